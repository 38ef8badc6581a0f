"""The HTTP servers of an instance: which nodes have one. A `Keeper` each sees that it has.

On the head node, or on every node, those included that join later; a node that leaves takes its server
along. What `kept` gives is checkpointed, for the controller that comes after this one: it takes over the
servers that still run (`recover`).
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import msgspec

from serveit.control.keeper import Keeper, failed, names_prefix
from serveit.control.orders import PROXY_NAMES, ProxyOrder, Started, StartFailed
from serveit.control.processes import ended, pause
from serveit.exceptions import NotServing

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from serveit.control.processes import Launcher, Node
    from serveit.types import Clock

logger = logging.getLogger("serveit.controller")

POLL_S = 1.0
"""So often is it looked which nodes there are, if each is to have a server."""
STRAYS_S = 5.0
"""What servers that nobody wants get to be gone; their ports are waited for."""


OTHERS_S = 5.0
"""What other nodes' servers get to start, too, before whoever asked for them goes on."""


class KeptServer(msgspec.Struct, frozen=True):
    """One node's server."""

    number: int
    started: Started | None = None


NOTHING_KEPT = KeptServer(0)


class KeptProxies(msgspec.Struct, frozen=True):
    """What outlives a controller."""

    order: ProxyOrder
    servers: dict[str, KeptServer]
    """By node."""


class Proxies:
    """All mutable state: `_order` (what all servers are ordered with; None before there is one), `_keepers`
    (by node, the head's first), `_follower` (the task that follows the nodes), `_found` (names of servers
    that an earlier controller had left), `_closed`."""

    def __init__(
        self,
        launcher: Launcher,
        clock: Clock,
        on_end: Callable[[str], None],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            launcher: makes the processes, and knows the nodes.
            clock: for pauses between attempts.
            on_end: told the id of each server that has ended.
            on_change: called when `kept` changed.
        """
        self._launcher = launcher
        self._clock = clock
        self._on_end = on_end
        self._on_change = on_change
        self._order: ProxyOrder | None = None
        self._keepers: dict[str, Keeper] = {}
        self._follower: asyncio.Task[None] | None = None
        self._found: Collection[str] = ()
        self._opening = asyncio.Lock()
        self._closed = False

    def __repr__(self) -> str:
        return f"<Proxies {list(self._keepers.values())}>"

    @property
    def url(self) -> str | None:
        """Where the instance answers HTTP: on its head node."""
        return next(iter(self.urls.values()), None)

    @property
    def urls(self) -> dict[str, str]:
        """Where each node's server answers, by the node's id."""
        return {node: keeper.url for node, keeper in self._keepers.items() if keeper.url is not None}

    @property
    def members(self) -> list[str]:
        """The names of the servers that serve; each watches under its own."""
        return [keeper.id for keeper in self._keepers.values() if keeper.state == "ready"]

    @property
    def kept(self) -> bytes | None:
        """For `recover`; None while there is nothing to be kept."""
        if self._order is None:
            return None
        servers = {node: KeptServer(keeper.number, keeper.started) for node, keeper in self._keepers.items()}
        return msgspec.msgpack.encode(KeptProxies(self._order, servers))

    def status(self) -> dict[str, Any]:
        """Each node's server, by the node's id: the node's address, the server's url, and its state:
        "starting", "ready" or "failed: why"."""
        return {node: keeper.status() for node, keeper in self._keepers.items()}

    async def open(self, options: bytes | None, order: ProxyOrder | None) -> Started | StartFailed | None:
        """The server of the head node, all started if need be.

        One that does not start on another node is tried again, and held against nobody.

        Args:
            options: what the caller wants, encoded; None to take it as it is.
            order: to start them with, if there is none yet; None not to. Its id is the first part of
                their names.

        Raises:
            ValueError: there are some with other options.
            NotServing: the instance is shutting down.
        """
        async with self._opening:
            if self._closed:
                raise NotServing("the instance is shutting down")
            if self._order is not None:
                _check_same(self._order.options, options)
                return await self._first()
            if order is None:
                return None
            outcome = await self._open(order)
        others = asyncio.ensure_future(_tried(list(self._keepers.values())))
        if not await ended(self._clock, others, OTHERS_S):
            others.cancel()
        return outcome

    async def recover(self, kept: bytes | None, running: Collection[str]) -> None:
        """Take over the servers that still run, start the missing, end those that nobody wants.

        Returns without waiting for those that start: they wait for the controller's first snapshot.

        Args:
            kept: what the controller before had kept; None if it had no servers yet.
            running: the names of all actors of the instance.
        """
        async with self._opening:
            self._found = [name for name in running if name.startswith(PROXY_NAMES) and "/" not in name]
            if kept is None:
                await self._end_strays()
                return
            record = msgspec.msgpack.decode(kept, type=KeptProxies)
            nodes = await self._launcher.nodes()
            if self._closed:
                return
            self._order = record.order
            missing = self._take_over(record, nodes)
            await self._end_strays()
            if self._closed:
                return
            for keeper in missing:
                keeper.keep()
            self._follow_nodes(record.order)
            self._changed()

    async def aclose(self, drain_s: float) -> None:
        """Stop accepting, let the requests that run end."""
        self._closed = True
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.wait((self._follower,))
        closing = (keeper.aclose(drain_s) for keeper in self._keepers.values())
        for outcome in await asyncio.gather(*closing, return_exceptions=True):
            if isinstance(outcome, Exception):
                logger.error("an HTTP server does not end", exc_info=outcome)

    async def _open(self, order: ProxyOrder) -> Started | StartFailed:
        """The head's first, alone: what is wrong with the options is found there."""
        head, *others = _wanted(order, await self._launcher.nodes())
        if self._closed:
            return failed("the instance is shutting down")
        keeper = self._add(head, order)
        try:
            outcome = await keeper.start()
        except BaseException:  # the caller has given up
            self._keepers.pop(head.id).drop()
            raise
        if isinstance(outcome, StartFailed):
            del self._keepers[head.id]
            return outcome
        self._order = order
        keeper.keep()
        for node in others:
            self._add(node, order).keep()
        self._follow_nodes(order)
        self._changed()
        return outcome

    async def _first(self) -> Started | StartFailed | None:
        """What became of the head's; one that was lost with a controller may be on its way."""
        first = next(iter(self._keepers.values()))
        if first.started is None:
            await first.tried.wait()
        return first.started or failed(first.state)

    def _take_over(self, record: KeptProxies, nodes: list[Node]) -> list[Keeper]:
        """A keeper for each node. Those that have no server to take over."""
        missing = []
        for node in _wanted(record.order, nodes):
            keeper = self._add(node, record.order, record.servers.get(node.id, NOTHING_KEPT))
            if keeper.id in self._found:
                keeper.take_over()
            else:
                missing.append(keeper)
        return missing

    async def _end_strays(self) -> None:
        """Of the servers that were found, those that were not taken over."""
        wanted = {keeper.id for keeper in self._keepers.values()}
        await asyncio.gather(*(self._end_stray(name) for name in self._found if name not in wanted))

    async def _end_stray(self, name: str) -> None:
        process = self._launcher.adopt(ProxyOrder(name, b"", b""))
        process.kill()
        gone = asyncio.ensure_future(process.death())
        if not await ended(self._clock, gone, STRAYS_S):
            logger.warning("the HTTP server %s, which nobody wants, does not end", name)
            gone.cancel()

    def _add(self, node: Node, order: ProxyOrder, server: KeptServer = NOTHING_KEPT) -> Keeper:
        keeper = self._keepers[node.id] = Keeper(
            node,
            order,
            self._launcher,
            self._clock,
            on_end=self._on_end,
            on_change=self._changed,
            look=self._look,
            number=self._last_number(names_prefix(order, node), server.number),
            started=server.started,
        )
        return keeper

    def _last_number(self, prefix: str, kept: int) -> int:
        """Of a node's servers. An earlier controller may have started one more than it has kept."""
        found = [name.removeprefix(prefix) for name in self._found if name.startswith(prefix)]
        return max(kept, *map(int, filter(str.isdecimal, found)), 0)

    # -- nodes that join and leave -----------------------------------------------------------

    def _follow_nodes(self, order: ProxyOrder) -> None:
        if _is_everywhere(order):
            self._follower = asyncio.get_running_loop().create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            await pause(self._clock, POLL_S)
            await self._look()

    async def _look(self) -> None:
        """See which nodes there are: a server on each new one, none on those that are gone."""
        try:
            nodes = await self._launcher.nodes()
        except Exception as error:
            logger.warning("it cannot be found out which nodes there are: %s", error)
            return
        if nodes and self._order is not None and not self._closed:
            self._match(self._order, nodes)

    def _match(self, order: ProxyOrder, nodes: list[Node]) -> None:
        wanted = {node.id: node for node in _wanted(order, nodes)}
        for gone in self._keepers.keys() - wanted.keys():
            keeper = self._keepers.pop(gone)
            keeper.drop()
            logger.info("node %s is gone, and its HTTP server with it", keeper.node.address)
            self._changed()
        for new in wanted.keys() - self._keepers.keys():
            logger.info("node %s is new: it gets an HTTP server", wanted[new].address)
            self._add(wanted[new], order).keep()

    def _changed(self) -> None:
        if self._order is not None:
            self._on_change()


async def _tried(keepers: Iterable[Keeper]) -> None:
    for keeper in keepers:
        await keeper.tried.wait()


def _wanted(order: ProxyOrder, nodes: Iterable[Node]) -> list[Node]:
    """The nodes that are to have a server, the head first."""
    heads_first = sorted(nodes, key=lambda node: not node.is_head)
    return heads_first if _is_everywhere(order) else heads_first[:1]


def _is_everywhere(order: ProxyOrder) -> bool:
    options: dict[str, Any] = msgspec.json.decode(order.options)
    return options.get("location") == "EveryNode"


def _check_same(here: bytes, asked: bytes | None) -> None:
    """ValueError names the options that differ."""
    if asked is None or asked == here:
        return
    ours: dict[str, Any] = msgspec.json.decode(here)
    theirs: dict[str, Any] = msgspec.json.decode(asked)
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    raise ValueError(
        f"the instance serves HTTP already, with {_shown(ours, names)}; asked for {_shown(theirs, names)}: "
        "leave these options out to take it as it is"
    )


def _shown(options: dict[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name}={options.get(name)!r}" for name in names)

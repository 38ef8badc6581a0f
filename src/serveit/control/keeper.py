"""One node's HTTP server, as the controller keeps it: started, watched, and started again."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from serveit.control.orders import Leaving, Started, StartFailed
from serveit.control.processes import ProcessDied, backoff_s, pause

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from serveit.control.orders import ProxyOrder
    from serveit.control.processes import Launcher, Node, Process
    from serveit.types import Clock

logger = logging.getLogger("serveit.controller")

STEADY_S = 60.0
"""A server that lived so long is started again without delay."""
MAX_PAUSE_S = 5.0
LOOK_S = 0.2
"""After a death: until the cluster knows whether the whole node is gone."""


class Keeper:
    """All mutable state: `number` (of its last process), `started` (what the last one that did had to say;
    None before), `state` ("starting", "ready", or "failed: why"), `tried` (set once the first attempt is
    through), `_process` (that serves, or is being started), `_task` (that keeps it), `_ended` (nothing is
    started any more)."""

    def __init__(
        self,
        node: Node,
        order: ProxyOrder,
        launcher: Launcher,
        clock: Clock,
        *,
        on_end: Callable[[str], None],
        on_change: Callable[[], None],
        look: Callable[[], Awaitable[None]],
        number: int = 0,
        started: Started | None = None,
    ) -> None:
        """
        Args:
            node: where it serves.
            order: what its processes' orders are made of; its id is the first part of their names.
            launcher: makes the processes.
            clock: for pauses between attempts.
            on_end: told the id of each that has ended.
            on_change: called when `number` or `started` changed.
            look: looks which nodes there are, and drops this if its own is gone.
            number: of the last process that there was before.
            started: what that one had said.
        """
        self.node = node
        self.number = number
        self.started = started
        self.state = "starting"
        self.tried = asyncio.Event()
        self._order = order
        self._launcher = launcher
        self._clock = clock
        self._on_end = on_end
        self._on_change = on_change
        self._look = look
        self._process: Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._ended = False

    def __repr__(self) -> str:
        return f"<Keeper {self.id} {self.state}>"

    @property
    def id(self) -> str:
        """The name of its process, and of that one's watch."""
        return f"{names_prefix(self._order, self.node)}{self.number}"

    @property
    def url(self) -> str | None:
        """Where it answers, or did last."""
        return self.started.address if self.started is not None else None

    def status(self) -> dict[str, Any]:
        """Plain data."""
        return {"address": self.node.address, "url": self.url, "state": self.state}

    async def start(self) -> Started | StartFailed:
        """Try to start a process, where the last one was: at the same port. Its name is another, for the
        last one's may be taken still."""
        self.number += 1
        self.state = "starting"
        self._on_change()
        return await self._ask(self._launcher.proxy)

    def keep(self) -> None:
        """From now on there is one: started if there is none, watched, started again."""
        self._task = asyncio.get_running_loop().create_task(self._keep(taken_over=False))

    def take_over(self) -> None:
        """Keep the process that runs under this name already: its clients notice nothing."""
        if self.started is not None:
            self.state = "ready"
        self._task = asyncio.get_running_loop().create_task(self._keep(taken_over=True))

    def drop(self) -> None:
        """End it at once, and without a word."""
        self._end()
        self._discard()

    async def aclose(self, drain_s: float) -> None:
        """Stop accepting, let the requests that run end."""
        self._end()
        if self._task is not None:
            await asyncio.wait((self._task,))
        if self._process is not None:
            await self._process.stop(drain_s)
            self._on_end(self.id)

    def _end(self) -> None:
        self._ended = True
        self.tried.set()
        if self._task is not None:
            self._task.cancel()

    async def _keep(self, *, taken_over: bool) -> None:
        attempts = 0
        while True:
            began = self._clock.time()
            if taken_over:
                await self._ask(self._launcher.adopt)
                taken_over = False
            elif self._process is None:
                await self.start()
            self.tried.set()
            if self._process is not None:
                self._lost(await self._process.death())
                if self._clock.time() - began > STEADY_S:
                    attempts = 0
            else:
                attempts = max(attempts, 1)  # what does not start is not tried again at once
            if await self._is_gone():
                return
            logger.error("the HTTP server on node %s %s", self.node.address, self.state)
            attempts += 1
            await pause(self._clock, backoff_s(attempts, MAX_PAUSE_S))

    async def _is_gone(self) -> bool:
        """Whether it went with its node, of which the cluster may learn a little later."""
        if not self.node.is_head:
            await pause(self._clock, LOOK_S)
            await self._look()
        return self._ended

    async def _ask(self, make: Callable[[ProxyOrder], Process]) -> Started | StartFailed:
        try:
            self._process = make(self._next_order())
            outcome = await self._process.start()
        except ProcessDied as error:
            outcome = failed(f"it died while it started: {error}")
        except Exception as error:
            logger.exception("the HTTP server on node %s cannot be started", self.node.address)
            outcome = failed(f"it cannot be started: {type(error).__name__}: {error}")
        if self._ended:
            return failed("the instance is shutting down")
        if isinstance(outcome, Leaving):
            outcome = failed("it is ending")
        if isinstance(outcome, StartFailed):
            self._discard()
            self.state = f"failed: {outcome.text or outcome.where}"
            return outcome
        self.state = "ready"
        if self.started != outcome:
            self.started = outcome
            self._on_change()
        return outcome

    def _lost(self, how: str) -> None:
        self._process = None
        self._on_end(self.id)
        self.state = f"failed: it died: {how}"

    def _discard(self) -> None:
        """End its process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
        self._on_end(self.id)

    def _next_order(self) -> ProxyOrder:
        options = msgspec.json.decode(self._order.options)
        if self.url is not None:
            options["port"] = urlsplit(self.url).port
        return msgspec.structs.replace(
            self._order,
            id=self.id,
            node=self.node.id,
            is_first=self.node.is_head,
            options=msgspec.json.encode(options),
        )


def names_prefix(order: ProxyOrder, node: Node) -> str:
    """What the names of all servers of a node begin with; a number follows."""
    return f"{order.id}-{node.id[:8]}-"


def failed(how: str) -> StartFailed:
    """An HTTP server that did not start."""
    return StartFailed(b"", where=f"the HTTP server: {how}")

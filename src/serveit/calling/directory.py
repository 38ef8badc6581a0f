"""What one process knows of one app: a router per backend, a traffic policy per endpoint.

Fed by snapshots; asked once per request which backend is meant and who leads to it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from serveit.calling.router import Router
from serveit.config import did_you_mean
from serveit.declare.traffic import Traffic, choose, choose_sticky, shadows_for
from serveit.exceptions import Draining, NotServing, QueueFull, Rejected
from serveit.types import DEFAULT_METHOD

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from serveit.calling.exchange import Exchange
    from serveit.calling.router import Connector
    from serveit.clock import DeadlineWheel
    from serveit.control.snapshot import AppInfo, BackendInfo
    from serveit.observe import Observer
    from serveit.types import Clock

logger = logging.getLogger("serveit.router")


class Endpoint(NamedTuple):
    """Where a name leads: a backend's own name (one backend, weight 1) or a route's."""

    name: str
    traffic: Traffic
    target: str


class Directory:
    """The names of an app and the routers behind them.

    All mutable state: `_endpoints` (by name), `_expected` (names that the first snapshot will bring),
    `_routers` (by backend), `_leaving` (routers of backends that are gone, with requests still under
    way), `_news` (set when names change, or no more will come), `_num_awaiting` (calls that wait for that),
    `_draining`, `closed`.
    """

    def __init__(
        self,
        app: str,
        *,
        default_queue: int,
        connect: Connector,
        clock: Clock,
        wheel: DeadlineWheel,
        observer: Observer,
        rng: random.Random | None = None,
        replaced: bool = False,
    ) -> None:
        """
        Args:
            app: its name.
            default_queue: `max_queued_requests` where a backend names none, and for calls to names that
                are not there yet.
            connect: makes links to replicas.
            clock: of deadlines.
            wheel: of deadlines, on the same clock.
            observer: told what happens in routers.
            rng: of choices by weight and of replicas.
            replaced: whether others come in the place of replicas that go away: then requests wait for them.
        """
        self.app = app
        self.clock = clock
        self._random = rng or random.Random()
        self._endpoints: dict[str, Endpoint] = {}
        self._expected: frozenset[str] = frozenset()
        self._routers: dict[str, Router] = {}
        self._leaving: list[Router] = []
        self._news = asyncio.Event()
        self._num_awaiting = 0
        self._max_awaiting = default_queue
        self._draining = False
        self.closed = False
        self._make_router: Callable[[BackendInfo], Router] = partial(
            Router,
            default_queue=default_queue,
            connect=connect,
            clock=clock,
            wheel=wheel,
            observer=observer,
            rng=self._random,
            replaced=replaced,
        )

    def __repr__(self) -> str:
        return f"<Directory {self.app}{' closed' if self.closed else ''} {list(self._routers.values())}>"

    async def update(self, info: AppInfo) -> None:
        """Follow a snapshot; new backends are connected before their names are known here.

        One at a time, in the order of the snapshots. Requests under way to a backend that is gone may
        end.
        """
        if self.closed:
            return
        for backend in info.backends:
            if backend.name not in self._routers:
                router = self._routers[backend.name] = self._make_router(backend)
                if self._draining:
                    router.drain()
        await asyncio.gather(*(self._routers[backend.name].update(backend) for backend in info.backends))
        endpoints = {
            backend.name: Endpoint(backend.name, Traffic(((backend.name, 1.0),), ()), DEFAULT_METHOD)
            for backend in info.backends
        }
        for endpoint in info.endpoints:
            traffic = Traffic(endpoint.weights, endpoint.shadows)
            endpoints[endpoint.name] = Endpoint(endpoint.name, traffic, endpoint.target)
        self._endpoints = endpoints
        self._expected = frozenset()
        self._leaving = [router for router in self._leaving if not router.idle]
        for name in self._routers.keys() - {backend.name for backend in info.backends}:
            router = self._routers.pop(name)
            router.retire()
            self._leaving.append(router)
        self._tell()

    def drain(self) -> None:
        """Take calls of running requests only, which are to come to their ends; fail what else waits."""
        self._draining = True
        for router in (*self._routers.values(), *self._leaving):
            router.drain()
        self._tell()

    def close(self) -> None:
        """Fail what waits and close all links."""
        self.closed = True
        for router in (*self._routers.values(), *self._leaving):
            router.close()
        self._tell()

    @property
    def incomplete(self) -> bool:
        """Whether some replica could not be reached, or was lost since: another `update` tries again."""
        return not self.closed and any(router.incomplete for router in self._routers.values())

    @property
    def routers(self) -> dict[str, Router]:
        return self._routers

    def expect(self, names: Iterable[str]) -> None:
        """These are the names of an app that is still starting: known, but not to be called yet."""
        self._expected = frozenset(names)

    def check(self, name: str) -> None:
        """Raises KeyError unless there is such a backend or endpoint, or will be."""
        if name not in self._expected:
            self.endpoint(name)

    def endpoint(self, name: str) -> Endpoint:
        """The endpoint or backend called `name`.

        Raises:
            KeyError: there is none; the text lists or suggests the known names.
            NotServing: its replicas are still starting.
        """
        found = self._endpoints.get(name)
        if found is None:
            if name in self._expected:
                raise NotServing(
                    f"{name!r} cannot be called yet: app {self.app!r} is still starting. Code that runs "
                    "while it does may get handles; calls belong into the code that answers requests"
                )
            raise KeyError(self.missing(name))
        return found

    def has(self, name: str) -> bool:
        """Whether there is such a backend or endpoint."""
        return name in self._endpoints

    def missing(self, name: str) -> str:
        """That there is none of this name, and what there is."""
        known = sorted({*self._endpoints, *self._expected})
        return f"app {self.app!r} has no backend or endpoint {name!r}: {did_you_mean(name, known)}"

    async def wait_for(self, name: str) -> None:
        """Wait until there is a backend or endpoint called `name`.

        Raises:
            QueueFull: as many calls wait for names already as may wait in a router.
            NotServing, Draining: none will come any more.
        """
        if self._num_awaiting >= self._max_awaiting:
            raise QueueFull(
                f"{self._num_awaiting} calls wait already for backends and endpoints that app {self.app!r} "
                "does not have yet"
            )
        self._num_awaiting += 1
        try:
            while name not in self._endpoints and name not in self._expected:
                if self.closed:
                    raise NotServing(f"app {self.app!r} was ended while a call waited for its {name!r}")
                if self._draining:
                    raise Draining(f"app {self.app!r} is stopping: {name!r} will not come any more")
                await self._news.wait()
        finally:
            self._num_awaiting -= 1

    def _tell(self) -> None:
        """Wake up who waits for a name."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    def choose(self, endpoint: Endpoint, shard_key: str | None = None) -> Router:
        """The router of the backend that this request goes to. Hot path: once per request."""
        traffic = endpoint.traffic
        if len(traffic.weights) == 1:
            backend = traffic.weights[0][0]
        elif shard_key is not None:
            backend = choose_sticky(traffic, shard_key)
        else:
            backend = choose(traffic, self._random.random())
        return self._routers[backend]

    def shadow(self, endpoint: Endpoint, copy: Callable[[], Exchange]) -> None:
        """Send copies of a request to the endpoint's shadows; their answers are nobody's.

        A shadow never waits and never harms: where its backend has no slot free right now, it is left
        out, and what is wrong with it is only logged.
        """
        for backend in shadows_for(endpoint.traffic, self._random.random):
            try:
                exchange = copy()
                router = self._routers[backend]
                exchange.answer.add_done_callback(partial(_drop, router, exchange))
                router.submit_now(exchange)
            except Rejected as error:
                logger.debug("a shadow request was left out: %s", error)
            except Exception:
                logger.exception("a shadow request to backend %r could not be sent", backend)


def _drop(router: Router, exchange: Exchange, answer: asyncio.Future[Any]) -> None:
    """Nobody reads a shadow's answer."""
    if not answer.cancelled() and answer.exception() is None:
        router.give_away(exchange, answer.result())

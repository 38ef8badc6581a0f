"""How handles reach an instance from anywhere: a driver, a replica, a Ray task that got one pickled.

Each event loop that uses handles has one `Entrance`: a watch, and a gateway per app. It is opened at
the first use. Threads without a loop use the portal of their process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import anyio
import ray
from anyio.from_thread import BlockingPortal

from serveit.calling.gateway import Gateway, open_portal
from serveit.calling.handle import Handle, HandleOptions
from serveit.cluster.contact import Line, find_controller, join
from serveit.cluster.objects import install
from serveit.cluster.refs import RayTasks
from serveit.cluster.session import join_cluster
from serveit.cluster.watch import Watch
from serveit.config import HANDLE_QUEUE, did_you_mean
from serveit.exceptions import NotServing

if TYPE_CHECKING:
    from serveit.declare.app import App


class Entrance:
    """A way from one event loop into the instance of this process's Ray.

    All mutable state: `_gateways` (by app), `_closed`, and what `open` makes.
    """

    def __init__(self, role: str, portal: BlockingPortal | None = None) -> None:
        """
        Args:
            role: of this process on its channels.
            portal: the way to this loop from other threads.
        """
        self._role = role
        self._portal = portal
        self._loop = asyncio.get_running_loop()
        self._gateways: dict[str, ClusterGateway] = {}
        self._is_open = self._closed = False
        self.watch: Watch

    async def open(self) -> None:
        """Join the instance. Raises NotServing where there is none."""
        install()
        controller = await asyncio.to_thread(find_controller)
        joined = await join(controller)
        member = f"{self._role}-{os.getpid()}-{secrets.token_hex(4)}"
        line = Line(find_controller, self._role, member=member)
        with contextlib.suppress(OSError):  # without it the controller waits longer for who is gone
            await line.open(joined)
        self.watch = Watch(
            controller,
            member=member,
            role=self._role,
            secret=joined.secret,
            default_queue=HANDLE_QUEUE,
            line=line,
        )
        self._is_open = True
        await self.watch.open()

    def gateway(self, app: str) -> ClusterGateway:
        """The way to one app. Raises NotServing if it does not run, or this has been closed."""
        if self._closed:
            raise NotServing(f"the client of app {app!r} has been shut down")
        gateway = self._gateways.get(app)
        if gateway is not None and not gateway.directory.closed:
            return gateway
        if app not in self.watch.directories:
            known = sorted(self.watch.directories)
            raise NotServing(f"there is no running app {app!r}: {did_you_mean(app, known)}")
        gateway = self._gateways[app] = ClusterGateway(self, app, self._loop, self._portal)
        return gateway

    @property
    def closed(self) -> bool:
        return self._closed

    async def aclose(self) -> None:
        self._closed = True
        if self._is_open:
            await self.watch.aclose()


# One per event loop, for handles that belong to no client; closed with its loop or replica.
_entrances: dict[asyncio.AbstractEventLoop, asyncio.Task[Entrance]] = {}


async def enter(role: str = "driver", portal: BlockingPortal | None = None) -> Entrance:
    """The running event loop's entrance, opened if it has none; whoever comes meanwhile waits for it.

    The arguments are `Entrance`'s.
    """
    loop = asyncio.get_running_loop()
    opening = _entrances.get(loop)
    if opening is None or _has_failed(opening):
        for closed in [other for other in _entrances if other.is_closed()]:
            del _entrances[closed]
        # In a task of its own: who comes first may give up, and the others go on.
        opening = _entrances[loop] = loop.create_task(_opened(role, portal))
    return await asyncio.shield(opening)


def _has_failed(opening: asyncio.Task[Entrance]) -> bool:
    return opening.done() and (opening.cancelled() or opening.exception() is not None)


async def _opened(role: str, portal: BlockingPortal | None) -> Entrance:
    entrance = Entrance(role, portal)
    try:
        await entrance.open()
    except BaseException:
        await entrance.aclose()
        raise
    return entrance


class Elsewhere(Gateway):
    """A gateway that has not been entered: each event loop finds its own behind it."""

    def __init__(self, app: str, role: str = "driver", portal: BlockingPortal | None = None) -> None:
        self.app = app
        self.tasks = None
        self._role = role
        self._portal = portal

    @property
    def closed(self) -> bool:
        return False

    @property
    def portal(self) -> BlockingPortal:  # type: ignore[override]
        return self._portal or process_portal()

    def is_here(self) -> bool:
        return False

    async def enter(self, who: object) -> Gateway:
        return (await enter(self._role, self._portal)).gateway(self.app)

    def reduce(self, name: str, options: HandleOptions, *, sync: bool) -> tuple[Any, ...]:
        return reduce_handle(self.app, name, options, sync)


class ClusterGateway(Elsewhere):
    """The way of one event loop to one app of the instance."""

    def __init__(
        self, entrance: Entrance, app: str, loop: asyncio.AbstractEventLoop, portal: BlockingPortal | None
    ) -> None:
        super().__init__(app, portal=portal)
        self._entrance = entrance
        self.directory = entrance.watch.directories[app]
        self.loop = loop
        self.tasks = RayTasks(app)

    @property
    def closed(self) -> bool:
        """An app that was deleted may be there again; then `enter` finds it."""
        return self._entrance.closed

    def is_here(self) -> bool:
        return asyncio.get_running_loop() is self.loop and not self.directory.closed

    async def enter(self, who: object) -> Gateway:
        if asyncio.get_running_loop() is self.loop:
            return self._entrance.gateway(self.app)  # the app is another by now, or none
        return await super().enter(who)


class Resolver:
    """Where the code of a replica finds handles: its own app's, by the names that the app has."""

    def __init__(self, app: App, name: str, role: str) -> None:
        self.app = app
        self._name = name
        self._role = role
        self._exit = contextlib.AsyncExitStack()
        self._portal: BlockingPortal | None = None
        self._loop = asyncio.get_running_loop()

    async def open(self) -> None:
        """Make the way in for the threads of `def` functions."""
        self._portal = await open_portal(self._exit)

    def get_handle(self, name: str, *, sync: bool = False) -> Any:
        known = [*self.app.backends, *(route.name for route in self.app.routes)]
        if name not in known:
            raise KeyError(
                f"app {self._name!r} has no backend or endpoint {name!r}: {did_you_mean(name, known)}"
            )
        handle: Handle[..., Any] = Handle(Elsewhere(self._name, self._role, self._portal), name)
        return handle.sync if sync else handle

    async def aclose(self) -> None:
        if self._loop in _entrances:
            await (await enter()).aclose()
        await self._exit.aclose()


def reduce_handle(app: str, name: str, options: HandleOptions, sync: bool) -> tuple[Any, ...]:
    """A handle's pickle: where its cluster, app and name are. It connects at its first use."""
    return open_handle, (ray.get_runtime_context().gcs_address, app, name, options, sync)


def open_handle(address: str, app: str, name: str, options: HandleOptions, sync: bool) -> Any:
    """A handle again, in whatever process its pickle is read."""
    handle: Handle[..., Any] = Handle(_At(address, app), name, options)
    return handle.sync if sync else handle


class _At(Elsewhere):
    """Elsewhere, in the cluster at an address."""

    def __init__(self, address: str, app: str) -> None:
        super().__init__(app)
        self._address = address

    async def enter(self, who: object) -> Gateway:
        await asyncio.to_thread(join_cluster, self._address)
        if (here := ray.get_runtime_context().gcs_address) != self._address:
            raise NotServing(
                f"{who!r} belongs to the Ray cluster at {self._address}; this process is connected to {here}"
            )
        return await super().enter(who)


_process_portal: Future[BlockingPortal] | None = None
_process_lock = threading.Lock()


def process_portal() -> BlockingPortal:
    """The way to the event loop that serves the threads of this process; a daemon thread runs it."""
    global _process_portal
    with _process_lock:
        if _process_portal is None:
            opened = _process_portal = Future()
            threading.Thread(target=_hold_portal, args=(opened,), name="serveit-portal", daemon=True).start()
    return _process_portal.result()


def _hold_portal(opened: Future[BlockingPortal]) -> None:
    async def hold() -> None:
        async with BlockingPortal() as portal:
            opened.set_result(portal)
            await portal.sleep_until_stopped()

    anyio.run(hold)

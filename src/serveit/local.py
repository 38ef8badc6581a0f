"""The whole flow in one process, without Ray: `--local`, tests, notebooks.

The same Replica, Batcher, Router and ingress as on a cluster, over in-memory links that carry the
encoded octets too.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from serveit.calling.directory import Directory
from serveit.calling.gateway import Gateway, open_portal
from serveit.calling.handle import Handle, HandleOptions
from serveit.cancellation import hurried, is_cancelled, outlast
from serveit.clock import DeadlineWheel, LoopClock
from serveit.config import HANDLE_QUEUE, HTTP_QUEUE, NODE_HOST
from serveit.context import serving
from serveit.control.snapshot import Snapshot
from serveit.control.spec import app_spec
from serveit.exceptions import NeedsRay, NotServing
from serveit.healing import Healer
from serveit.local_replicas import LocalReplicas
from serveit.observe import NullObserver
from serveit.running.watchdog import Watchdog
from serveit.web.ingress import Ingress

if TYPE_CHECKING:
    import socket
    from collections.abc import Collection, Coroutine, Mapping, Sequence

    from serveit.config import HTTPOptions
    from serveit.control.orders import BackendChange
    from serveit.control.snapshot import ReplicaInfo
    from serveit.control.spec import AppSpec, BackendSpec
    from serveit.declare.app import App
    from serveit.local_replicas import LocalReplica
    from serveit.observe import Observer
    from serveit.types import Clock
    from serveit.web.proxy import Proxy
    from serveit.wire.link import Link, Receiver


class LocalRuntime:
    """One app, its replicas and its HTTP server in the running event loop.

    Mutable state beside what its parts have: `_spec` (the app as it is to be), `_version` (how often its
    replicas were made anew), `_published` (how often), `_tasks` (that see changes through), `_closed`
    (nothing is changed any more).
    """

    def __init__(
        self,
        app: App,
        *,
        name: str = "default",
        prefix: str = "",
        http: HTTPOptions,
        clock: Clock | None = None,
        observer: Observer | None = None,
    ) -> None:
        """
        Args:
            app: what to serve.
            name: of the app.
            prefix: in front of all its paths.
            http: of the server.
            clock: where time comes from; None for the event loop's.
            observer: told what happens in replicas and routers, in the place of replicas' own meters.
        """
        self.app = app
        self.name = name
        self.prefix = prefix
        self.http = http
        self._clock = clock
        self._observer = observer
        self._version = 1
        self._published = 0
        self._healer = Healer(self)
        self._exit = contextlib.AsyncExitStack()
        self._tasks: set[asyncio.Task[None]] = set()
        self._scaling, self._publishing, self._closing = asyncio.Lock(), asyncio.Lock(), asyncio.Lock()
        self._is_started = False
        self._closed = False
        self.proxy: Proxy | None = None

    async def start(self, sock: socket.socket | None = None, *, listen: bool = True) -> None:
        """Start the replicas, then answer.

        Args:
            sock: a listening socket to take over.
            listen: False for an ingress without a server, as tests use it.

        Raises:
            OSError: the address can't be listened on; found before any replica starts.
            ValueError: the address is one that only Ray knows.
            Exception: what a replica's constructor or other start-up code raised.
        """
        if listen and self.http.serves and self.http.host == NODE_HOST:
            raise ValueError(
                "host='node' is a node's address in Ray, which is not used here: name an address"
            )
        async with contextlib.AsyncExitStack() as stack:
            self._make()
            self._spec = app_spec(self.app, name=self.name, prefix=self.prefix, code=b"")
            names = (*self.app.backends, *(route.name for route in self.app.routes))
            self._for_handles.expect(names)
            if listen and self.http.serves:
                from serveit.web.proxy import Proxy, bind

                sock = sock if sock is not None else bind(self.http)
                stack.callback(sock.close)
                self.proxy = Proxy(self.http, self.ingress)
            self.gateway = Gateway(self._for_handles, self._loop, await open_portal(stack))
            watchdog = Watchdog()
            watchdog.start(self._loop)
            stack.callback(watchdog.stop)
            stack.callback(self._wheel.close)
            stack.push_async_callback(self._close_replicas)
            await self._add([b for b in self._spec.backends for _ in range(b.num_replicas)])
            await self._publish()
            stack.enter_context(serving(self.app, self))
            if self.proxy is not None:
                await self.proxy.start(sock)
            self._exit = stack.pop_all()
            self._is_started = True

    async def aclose(self) -> None:
        """Take nothing new, let what runs end (`graceful_shutdown_timeout_s`), stop. Once is enough.

        Cancelled, it waits for nothing more, and still stops everything before it raises: the user's
        clean-up gets its time, in all about 6 s.
        """
        async with self._closing:
            if self._closed:
                return
            self._closed = True
            try:
                await self._let_end()
            finally:
                await outlast(self._exit.aclose())

    def get_handle(self, name: str, *, sync: bool = False, missing_ok: bool = False) -> Any:
        """A handle on a backend or endpoint. KeyError lists the known names."""
        if not missing_ok:
            self.gateway.directory.check(name)
        handle: Handle[..., Any] = Handle(self.gateway, name, HandleOptions(missing_ok=missing_ok))
        return handle.sync if sync else handle

    @property
    def url(self) -> str | None:
        """Where it answers HTTP; None without a server."""
        return self.proxy.url if self.proxy else None

    async def status(self) -> dict[str, Any]:
        """Each backend's replicas and what they are doing."""
        failed = self._healer.given_up
        return {
            "app": self.name,
            "url": self.url,
            "state": "DELETING" if self._closed else "FAILED" if failed else "RUNNING",
            "message": "; ".join(failed.values()),
            "version": self._version,
            "num_replicas": {backend.name: backend.num_replicas for backend in self._spec.backends},
            "backends": {**{name: {} for name in self.app.backends}, **self._replicas.status()},
            "failed": dict(failed),
        }

    async def spec(self) -> AppSpec:
        """The app as it is to be."""
        return self._spec

    async def update(self, backend: str, wanted: BackendChange, *, wait: bool = True) -> None:
        """Change a backend's options; returns when they are in force, and what is too many is gone.

        One change at a time: each finds what the one before has left.

        Args:
            backend: its name.
            wanted: what is to be another than now.
            wait: it always is waited.

        Raises:
            NotServing: the app is shutting down.
            Exception: what the user's code raised, of a new replica or of one that was to take them in; then
                all is as before.
        """
        async with self._scaling:
            self._check_open()
            spec = self._spec.changed(backend, wanted)
            old, new = self._spec.backend(backend), spec.backend(backend)
            own = self._replicas.ready(backend)
            if old.config.needs_new_replicas(new.config):
                await self._add([new] * new.num_replicas)
                self._version += 1
                going = own
            else:
                staying = own[: new.num_replicas]
                try:
                    await self._replicas.configure(staying, new.settings)
                    await self._add([new] * (new.num_replicas - len(own)))
                except BaseException:
                    await self._see_through(self._go_back(staying, old.settings))
                    raise
                going = own[new.num_replicas :]
            self._spec = self._spec.changed(backend, wanted)
            self._healer.forgive(backend)
            await self._see_through(self.withdraw(going))

    async def _go_back(self, replicas: Sequence[LocalReplica], settings: bytes) -> None:
        for stuck in await self._replicas.go_back(replicas, settings):
            self._healer.replace(stuck)

    async def fill_up(self, backend: str) -> None:
        """Start what is missing of a backend. Raises as `update` does."""
        async with self._scaling:
            self._check_open()
            spec = self._spec.backend(backend)
            await self._add([spec] * (spec.num_replicas - len(self._replicas.ready(backend))))
            await self._publish()

    async def reroute(
        self, endpoint: str, weights: Mapping[str, float] | None, shadows: Mapping[str, float]
    ) -> None:
        """Change where an endpoint leads. NotServing if the app is shutting down."""
        self._check_open()
        self._spec = self._spec.rerouted(endpoint, weights, shadows)
        await self._see_through(self._publish())

    async def deploy(
        self, app: App, *, name: str, prefix: str, wait: bool = True, deploy_timeout_s: float = 60.0
    ) -> None:
        raise NeedsRay("without Ray a process serves one app: leave local=True out to serve several")

    async def delete(self) -> None:
        """End the app: the same as leaving its context manager."""
        await self.aclose()

    # -- starting and stopping ---------------------------------------------------------------

    def _make(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.clock = self._clock or LoopClock()
        self._wheel = DeadlineWheel(self.clock)
        self._for_http = self._directory(HTTP_QUEUE)
        self._for_handles = self._directory(HANDLE_QUEUE)
        self.ingress = Ingress(self.http, {self.name: self._for_http}, self.clock)
        self._replicas = LocalReplicas(
            self.app,
            self.name,
            clock=self.clock,
            observer=self._observer,
            resolver=self,
            on_illness=self._healer.fell_ill,
        )

    def _directory(self, default_queue: int) -> Directory:
        return Directory(
            self.name,
            default_queue=default_queue,
            connect=self._connect,
            clock=self.clock,
            wheel=self._wheel,
            observer=self._observer or NullObserver(),
        )

    def _check_open(self) -> None:
        if self._closed:
            raise NotServing(f"app {self.name!r} is shutting down: nothing of it can be changed any more")

    async def _add(self, backends: Collection[BackendSpec]) -> None:
        """Start one more replica of each of these, all or none; whoever publishes next tells of them."""
        new: list[LocalReplica] = []
        try:
            new += (self._replicas.make(backend) for backend in backends)
            await self._replicas.start(new)
            self._check_open()
        except BaseException:
            await self._see_through(self._replicas.end(new))
            if not is_cancelled():
                self._check_open()  # it was `aclose` that gave the start up
            raise
        for replica in new:
            replica.serve()

    async def _publish(self) -> None:
        """Tell the directories and the ingress, as a controller would with a snapshot."""
        async with self._publishing:
            published = self._spec.published(self._replicas.infos())
            info = self._healer.told(self._replicas.tally.told(published))
            await self._for_http.update(info)
            await self._for_handles.update(info)
            self._published += 1
            self.ingress.update(Snapshot((0, self._published), (info,)))

    async def withdraw(self, replicas: Collection[LocalReplica], limit_s: float | None = None) -> None:
        """Tell what serves now, and end these, which do no longer, in their own time or this."""
        self._replicas.dismiss(replicas)
        await self._publish()
        await self._replicas.end(replicas, limit_s)

    async def _see_through(self, work: Coroutine[Any, Any, None]) -> None:
        """It goes on where whoever waits for it is cancelled; `aclose` waits for it."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)

    async def _connect(self, info: ReplicaInfo, receiver: Receiver) -> Link:
        return self._replicas.connect(info, receiver)

    async def _let_end(self) -> None:
        """Wait for what runs: requests over HTTP, then calls. Whatever one of them calls is still there."""
        if not self._is_started:
            return
        begun = self.clock.time()
        replicas = [known.replica for known in self._replicas.all()]
        limits = {replica: replica.config.graceful_shutdown_timeout_s for replica in replicas}
        self._for_handles.drain()
        if self.proxy is not None:
            self.ingress.ready = False
            await hurried(self.proxy.aclose(max(limits.values(), default=0.0)), self.proxy.force)
        while True:
            spent_s = self.clock.time() - begun
            busy = [replica for replica in limits if not replica.is_idle and limits[replica] > spent_s]
            if not busy:
                return
            await asyncio.gather(*(replica.idle(limits[replica] - spent_s) for replica in busy))

    async def _close_replicas(self) -> None:
        await outlast(self._healer.aclose())
        await outlast(self._end_all())

    async def _end_all(self) -> None:
        """End what still runs; its callers hear of it before their links are closed."""
        await self._replicas.end(self._replicas.all(), 0.0)
        async with self._scaling:  # a change that was under way is given up, and cleans up
            while self._tasks:
                await asyncio.wait(self._tasks)
        await asyncio.sleep(0)  # the last frames
        self._for_http.close()
        self._for_handles.close()
        await asyncio.sleep(0)  # the ends of the links

"""The whole flow in one process, without Ray: `--local`, tests, notebooks.

The same Replica, Batcher, Router and ingress as on a cluster, over in-memory links that carry the
encoded octets too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

from anyio.from_thread import BlockingPortal

from serveit.calling.directory import Directory
from serveit.calling.handle import Gateway, Handle
from serveit.clock import DeadlineWheel, LoopClock
from serveit.config import HANDLE_QUEUE, HTTP_QUEUE
from serveit.context import serving
from serveit.control.snapshot import ReplicaInfo, Snapshot, app_info
from serveit.observe import NullObserver
from serveit.running.httpjob import Bindings
from serveit.running.listener import Listener
from serveit.running.replica import Replica
from serveit.running.watchdog import Watchdog
from serveit.web.ingress import Ingress
from serveit.wire.memory import memory_pair

if TYPE_CHECKING:
    import socket

    from serveit.config import HTTPOptions
    from serveit.declare.app import App
    from serveit.declare.backend import BackendRecord
    from serveit.observe import Observer
    from serveit.types import Clock
    from serveit.web.proxy import Proxy
    from serveit.wire.link import Link, Receiver

logger = logging.getLogger("serveit.local")

SLOW_START_S = 2.0
"""A start that takes longer says that it goes on."""
SLOW_STOP_S = 1.0
"""Constructors that run on for so long after another has failed are worth a line in the log."""


class LocalRuntime:
    """One app, its replicas and its HTTP server in the running event loop."""

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
            observer: told what happens in replicas and routers.
        """
        self.app = app
        self.name = name
        self.prefix = prefix
        self.http = http
        self._clock = clock
        self._observer = observer or NullObserver()
        self._replicas: dict[str, Replica] = {}
        self._bindings: dict[str, Bindings] = {}
        self._exit = contextlib.AsyncExitStack()
        self._closing = asyncio.Lock()
        self._stopped_at: float | None = None
        self.proxy: Proxy | None = None

    async def start(self, sock: socket.socket | None = None, *, listen: bool = True) -> None:
        """Start the replicas, then answer.

        Args:
            sock: a listening socket to take over.
            listen: False for an ingress without a server, as tests use it.

        Raises:
            OSError: the address can't be listened on; found before any replica starts.
            Exception: what a replica's constructor or other start-up code raised.
        """
        async with contextlib.AsyncExitStack() as stack:
            self._make()
            if listen and self.http.serves:
                from serveit.web.proxy import Proxy, bind

                sock = sock if sock is not None else bind(self.http)
                stack.callback(sock.close)
                self.proxy = Proxy(self.http, self.ingress)
            self.gateway = Gateway(self._for_handles, self._loop, await self._open_portal(stack))
            watchdog = Watchdog()
            watchdog.start(self._loop)
            stack.callback(watchdog.stop)
            stack.callback(self._wheel.close)
            stack.push_async_callback(self._close_replicas)
            await self._start_replicas()
            await self._publish()
            stack.enter_context(serving(self.app, self))
            if self.proxy is not None:
                await self.proxy.start(sock)
            self._exit = stack.pop_all()

    async def aclose(self) -> None:
        """Take nothing new, let what runs end (`graceful_shutdown_timeout_s`), stop. Once is enough."""
        async with self._closing:
            if self._stopped_at is not None:
                return
            self._stopped_at = asyncio.get_running_loop().time()
            try:
                if self.proxy is not None:
                    self.ingress.ready = False
                    backends = self.app.backends.values()
                    await self.proxy.aclose(
                        max((b.config.graceful_shutdown_timeout_s for b in backends), default=0.0)
                    )
            finally:
                await self._exit.aclose()

    def get_handle(self, name: str, *, sync: bool = False) -> Any:
        """A handle on a backend or endpoint. KeyError lists the known names."""
        self.gateway.directory.endpoint(name)
        handle: Handle[..., Any] = Handle(self.gateway, name)
        return handle.sync if sync else handle

    def status(self) -> dict[str, Any]:
        """Each backend's replicas and what they are doing."""
        backends: dict[str, dict[str, Any]] = {name: {} for name in self.app.backends}
        for replica in self._replicas.values():
            statistics = replica.statistics()
            backends[replica.backend.name][replica.id] = {
                "running": statistics.running,
                "waiting": statistics.waiting,
            }
        return {"app": self.name, "url": self.proxy.url if self.proxy else None, "backends": backends}

    # -- starting and stopping ---------------------------------------------------------------

    def _make(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.clock = self._clock or LoopClock()
        self._wheel = DeadlineWheel(self.clock)
        self._for_http = self._directory(HTTP_QUEUE)
        self._for_handles = self._directory(HANDLE_QUEUE)
        self.ingress = Ingress(self.http, {self.name: self._for_http}, self.clock)

    def _directory(self, default_queue: int) -> Directory:
        return Directory(
            self.name,
            default_queue=default_queue,
            connect=self._connect,
            clock=self.clock,
            wheel=self._wheel,
            observer=self._observer,
        )

    async def _open_portal(self, stack: contextlib.AsyncExitStack) -> BlockingPortal:
        """The way in for sync handles. It lives in a task of its own: whoever closes it may be another."""
        opened: asyncio.Future[BlockingPortal] = self._loop.create_future()

        async def hold() -> None:
            async with BlockingPortal() as portal:
                opened.set_result(portal)
                await portal.sleep_until_stopped()

        holder = self._loop.create_task(hold())

        async def stop() -> None:
            await (await opened).stop(cancel_remaining=True)
            await holder

        stack.push_async_callback(stop)
        return await asyncio.shield(opened)

    async def _start_replicas(self) -> None:
        for backend in self.app.backends.values():
            for number in range(1, backend.config.num_replicas + 1):
                replica = Replica(
                    backend,
                    id=f"{backend.name}#{number}",
                    app=self.name,
                    clock=self.clock,
                    observer=self._observer,
                    resolver=self,
                )
                self._replicas[replica.id] = replica
        names = ", ".join(self.app.backends)
        slow = self._loop.call_later(SLOW_START_S, logger.info, "still starting %s", names)
        starts = [self._loop.create_task(self._start_replica(replica)) for replica in self._replicas.values()]
        try:
            await asyncio.gather(*starts)
        except BaseException as error:
            for start in starts:
                start.cancel()
            await self._outlast(starts, error)
            raise
        finally:
            slow.cancel()

    async def _outlast(self, starts: list[asyncio.Task[None]], error: BaseException) -> None:
        """Wait for the constructors that still run: a thread cannot be stopped."""
        ending = asyncio.gather(*starts, return_exceptions=True)
        _, still = await asyncio.wait((ending,), timeout=SLOW_STOP_S)
        if still and not isinstance(error, asyncio.CancelledError):
            logger.error("%s: %s; waiting for constructors that still run", type(error).__name__, error)
        await ending

    async def _start_replica(self, replica: Replica) -> None:
        backend: BackendRecord = replica.backend
        try:
            bindings = self._bindings.setdefault(backend.name, Bindings(backend))
            bindings.prepare()
            await replica.start()
        except Exception as error:
            error.add_note(f"(while replica {replica.id} of app {self.name!r} started)")
            raise

    async def _publish(self) -> None:
        """Tell the directories and the ingress, as a controller would with a snapshot."""
        ready: dict[str, list[ReplicaInfo]] = {}
        for replica in self._replicas.values():
            ready.setdefault(replica.backend.name, []).append(ReplicaInfo(replica.id, replica.id))
        info = app_info(self.app, self.name, self.prefix, ready)
        await self._for_http.update(info)
        await self._for_handles.update(info)
        self.ingress.update(Snapshot((0, 1), (info,)))

    async def _connect(self, info: ReplicaInfo, receiver: Receiver) -> Link:
        replica = self._replicas[info.address]
        near, far = memory_pair()
        near.receiver = receiver
        far.receiver = Listener(replica, self._bindings[replica.backend.name], far)
        return near

    async def _close_replicas(self) -> None:
        replicas = self._replicas.values()
        spent_s = self._loop.time() - self._stopped_at if self._stopped_at is not None else 0.0
        await asyncio.gather(
            *(
                replica.drain(max(0.0, replica.config.graceful_shutdown_timeout_s - spent_s))
                for replica in replicas
            )
        )
        self._for_http.close()
        self._for_handles.close()
        await asyncio.gather(*(replica.aclose() for replica in replicas))
        await asyncio.sleep(0)  # the links' last frames

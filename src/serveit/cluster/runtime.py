"""An app on Ray, as its driver's `Client` sees it: session, controller, HTTP, deploy, handles.

The counterpart of `local.LocalRuntime`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec
import ray

from serveit.calling.gateway import open_portal
from serveit.calling.handle import Handle
from serveit.cluster.contact import Line, ask, find_controller, join
from serveit.cluster.controller import start_controller
from serveit.cluster.gateways import ClusterGateway, Entrance
from serveit.cluster.launching import end_actors
from serveit.cluster.session import Session, open_session
from serveit.cluster.shipping import pack
from serveit.context import serving
from serveit.control.orders import (
    Deployed,
    DeployFailed,
    Joined,
    ProxyOrder,
    Started,
    StartFailed,
    decode_deployed,
    encode,
)
from serveit.control.spec import AppSpec, app_spec
from serveit.exceptions import NotServing
from serveit.wire.frames import Failure
from serveit.wire.pickles import load_exception

if TYPE_CHECKING:
    import socket
    from collections.abc import Coroutine

    from serveit.config import HTTPOptions
    from serveit.declare.app import App

logger = logging.getLogger("serveit.client")

JOIN_S, JOIN_RETRY_S = 30.0, 0.2
"""What the controller gets to start and answer, and between attempts where one is just ending."""
SLOW_START_S = 5.0
"""A deploy that takes longer says what it waits for."""


class ClusterRuntime:
    """One app on Ray."""

    def __init__(
        self,
        app: App | None,
        *,
        name: str = "default",
        prefix: str = "",
        http: HTTPOptions | None,
        address: str | None = None,
        deploy_timeout_s: float = 60.0,
        log_level: str = "info",
    ) -> None:
        """
        Args:
            app: what to serve, for as long as this runs; None for an app that runs already.
            name: of the app.
            prefix: in front of all its paths.
            http: of the instance's HTTP servers; None to take them as they are, or the defaults.
            address: of the cluster; see `open_session`.
            deploy_timeout_s: how long replicas may wait for resources.
            log_level: of the instance's processes, if this starts it.
        """
        self.app = app
        self.name = name
        self.prefix = prefix
        self._http = http
        self._address = address
        self._deploy_timeout_s = deploy_timeout_s
        self._log_level = log_level
        self._owner = secrets.token_hex(8)
        self._exit = contextlib.AsyncExitStack()
        self._closing = asyncio.Lock()
        self._closed = False
        self.url: str | None = None
        self._controller: Any = None
        self._entrance: Entrance
        self._gateway: ClusterGateway | None = None

    async def start(self, sock: socket.socket | None = None) -> None:
        """Start or join Ray and the instance, deploy, and answer.

        Raises:
            OSError: the HTTP address can't be listened on; found before any replica starts.
            ConnectionError: no cluster at the address.
            Exception: what a replica's constructor or other start-up code raised.
        """
        if sock is not None:
            raise ValueError("sock= is for local=True: on Ray the proxies listen")
        async with contextlib.AsyncExitStack() as stack:
            # What can be found wrong before anything is started, is.
            self._check_http()
            spec = None
            if self.app is not None:
                spec = await self._make_spec(self.app, self.name, self.prefix, self._owner)
            session = await self._open_session(stack)
            ways = await stack.enter_async_context(contextlib.AsyncExitStack())
            if spec is not None:
                # Ends first: what runs may end while the ways to it are still open.
                stack.push_async_callback(self._end, session)
            joined = await self._join(session, ways)
            if spec is not None:
                # At the same time: each takes a process of its own.
                await _both(self._serve_http(joined), self._deploy(spec))
            await self._open_ways(ways)
            if self.app is not None:
                stack.enter_context(serving(self.app, self))
            self._exit = stack.pop_all()

    async def aclose(self) -> None:
        """Let what runs end, end the app, and whatever was started for it. Once is enough."""
        async with self._closing:
            if not self._closed:
                self._closed = True
                await self._exit.aclose()

    # -- what a client asks for --------------------------------------------------------------

    def get_handle(self, name: str, *, sync: bool = False) -> Any:
        """A handle on a backend or endpoint. KeyError lists the known names."""
        gateway = self._entrance.gateway(self.name)
        gateway.directory.endpoint(name)
        handle: Handle[..., Any] = Handle(gateway, name)
        return handle.sync if sync else handle

    async def status(self) -> dict[str, Any]:
        """The app's backends, their replicas and what these are doing."""
        octets = await ask(self._controller.status, self.name)
        return {"app": self.name, "url": self.url, **msgspec.msgpack.decode(octets)}

    async def spec(self) -> AppSpec:
        """The app as it is to be."""
        octets = await ask(self._controller.describe, self.name)
        return msgspec.msgpack.decode(octets, type=AppSpec)

    async def scale(self, backend: str, num_replicas: int) -> None:
        """Change a backend's number of replicas; returns when they are there."""
        octets = await ask(self._controller.scale, self.name, backend, num_replicas, timeout_s=None)
        _check(decode_deployed(octets))

    async def reroute(self, endpoint: str, weights: Any, shadows: Any) -> None:
        """Change where an endpoint leads; returns when proxies and handles know."""
        await ask(self._controller.reroute, self.name, endpoint, weights, shadows, timeout_s=None)

    async def deploy(self, app: App, *, name: str, prefix: str) -> None:
        """Serve another app in the same instance; it stays until it is deleted."""
        await self._deploy(await self._make_spec(app, name, prefix, owner=""))

    async def delete(self) -> None:
        """End the app, whoever started it."""
        await ask(self._controller.delete, self.name, None, timeout_s=None)

    # -- starting ----------------------------------------------------------------------------

    def _check_http(self) -> None:
        """Find out that the port is taken before anything is started, where that can be known here."""
        if self._http_options().location == "EveryNode":
            raise ValueError("location='EveryNode' is not there yet: 'HeadOnly' serves on the head node")
        if self.app is not None and self._address is None and not ray.is_initialized():
            options = self._http_options()
            if options.serves:
                from serveit.web.proxy import bind

                bind(options).close()

    def _http_options(self) -> HTTPOptions:
        from serveit.config import HTTPOptions

        return self._http or HTTPOptions()

    async def _open_session(self, stack: contextlib.AsyncExitStack) -> Session:
        begun = time.monotonic()
        opening = asyncio.ensure_future(asyncio.to_thread(open_session, self._address))
        try:
            session = await asyncio.shield(opening)
        except asyncio.CancelledError:
            (await opening).close()  # a start cannot be stopped in the middle
            raise
        stack.push_async_callback(asyncio.to_thread, session.close)
        _take_signals_back()
        if session.embedded:
            logger.info("Ray is up after %.1f s", time.monotonic() - begun)
        return session

    async def _join(self, session: Session, ways: contextlib.AsyncExitStack) -> Joined:
        """Find or make the controller, and be known to it. One that is just ending is waited for."""
        if self.app is None:
            self._controller = await asyncio.to_thread(find_controller)
            return await join(self._controller, JOIN_S)
        line = Line(find_controller, "driver", owner=self._owner)
        ways.callback(line.close)
        begun = time.monotonic()
        while True:
            self._controller = await asyncio.to_thread(
                start_controller, session.folder, not session.embedded, self._log_level
            )
            try:
                joined = await join(self._controller, JOIN_S)
                await line.open(joined)
                return joined
            except (NotServing, ConnectionError, FileNotFoundError):
                if time.monotonic() - begun > JOIN_S:
                    raise
                await asyncio.sleep(JOIN_RETRY_S)

    async def _open_ways(self, ways: contextlib.AsyncExitStack) -> None:
        """Handles, from this loop and from other threads."""
        portal = await open_portal(ways)
        self._entrance = Entrance("driver", portal)
        ways.push_async_callback(self._entrance.aclose)
        await self._entrance.open()
        self._gateway = self._entrance.gateway(self.name)
        if self.app is None:
            self.url = await ask(self._controller.url)

    async def _make_spec(self, app: App, name: str, prefix: str, owner: str) -> AppSpec:
        shipment = await asyncio.to_thread(pack, app)
        spec = app_spec(
            app,
            name=name,
            prefix=prefix,
            code=encode(shipment),
            owner=owner,
            deploy_timeout_s=self._deploy_timeout_s,
        )
        return spec if self._http_options().serves else msgspec.structs.replace(spec, routes=())

    async def _deploy(self, spec: AppSpec) -> None:
        version = await ask(self._controller.deploy, encode(spec))
        names = ", ".join(backend.name for backend in spec.backends)
        slow = asyncio.get_running_loop().call_later(SLOW_START_S, logger.info, "still starting %s", names)
        try:
            octets = await ask(self._controller.deployed, spec.name, version, timeout_s=None)
        finally:
            slow.cancel()
        _check(decode_deployed(octets))

    async def _serve_http(self, joined: Joined) -> None:
        options = self._http_options()
        wanted = _encode_options(options) if self._http is not None and options.serves else None
        order = None
        if options.serves:
            order = ProxyOrder(
                id=f"proxy-{secrets.token_hex(4)}",
                options=_encode_options(options),
                secret=joined.secret,
                paths=tuple(sys.path),
                log_level=self._log_level,
            )
        ordered = encode(order) if order is not None else None
        octets = await ask(self._controller.http, wanted, ordered, timeout_s=None)
        outcome = msgspec.msgpack.decode(octets, type=Started | StartFailed | None)
        if isinstance(outcome, StartFailed):
            raise _error(outcome)
        self.url = outcome.address if outcome is not None else None

    async def _end(self, session: Session) -> None:
        """End the app; with the last one, and where this started Ray, the instance ends too."""
        if self._gateway is not None:
            self._gateway.directory.drain()  # what comes from here from now on is refused at once
        if self._controller is None:
            return
        try:
            if session.is_last:
                await ask(self._controller.shutdown, timeout_s=None)
            else:
                await ask(self._controller.delete, self.name, self._owner, timeout_s=None)
        except NotServing:
            # Nobody else looks after its replicas now.
            if ray.is_initialized():
                await asyncio.to_thread(end_actors, self.name)


def _take_signals_back() -> None:
    """Ray handles SIGTERM by printing where it came and dying, below Python's handlers: set these again."""
    if threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is None else handler)


async def _both(first: Coroutine[Any, Any, None], second: Coroutine[Any, Any, None]) -> None:
    """Run both; what one raises ends the other and is raised as it is."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in (first, second)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def _check(outcome: Deployed | DeployFailed) -> None:
    if isinstance(outcome, DeployFailed):
        raise _error(outcome.cause) if outcome.cause is not None else NotServing(outcome.text)


def _encode_options(options: HTTPOptions) -> bytes:
    """Raises TypeError for middlewares that are no import strings: proxies unpickle nothing."""
    for middleware in options.middlewares:
        if not isinstance(middleware, str):
            raise TypeError(
                f"on Ray middlewares are import strings, 'package.module:factory'; got {middleware!r}: "
                "proxies run in processes of their own, which unpickle nothing"
            )
    return msgspec.json.encode(options)


def _error(failed: StartFailed) -> Exception:
    """What a process could not start for, as the exception that it was."""
    if not failed.failure:
        return NotServing(failed.where)
    error = load_exception(msgspec.msgpack.decode(failed.failure, type=Failure), failed.pickled)
    error.add_note(f"(while {failed.where} started)")
    return error

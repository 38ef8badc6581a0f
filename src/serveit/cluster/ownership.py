"""An app that is a driver's own: deployed by it, again and again if need be, and ended with it.

`runtime` serves one so, and `serveit run --reload`, which never imports the app and knows it by its specs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec
import ray

from serveit.cluster.contact import Line, find_controller
from serveit.cluster.instance import check_middlewares, start_instance
from serveit.cluster.launching import end_actors
from serveit.cluster.session import open_session
from serveit.config import NODE_HOST, HTTPOptions
from serveit.exceptions import NotServing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from serveit.cluster.instance import Instance
    from serveit.cluster.session import Session
    from serveit.control.orders import Deploying
    from serveit.control.spec import AppSpec

logger = logging.getLogger("serveit.client")


LOOK_S = 0.5
"""So often is it looked, at the end, whether Ray is there still."""


class OwnedApp:
    """The app, whether anything of it was deployed yet or not.

    Attributes:
        instance: that it is in.
    """

    def __init__(self, instance: Instance, name: str, owner: str, *, has_routes: bool = True) -> None:
        """
        Args:
            instance: to be in.
            name: of the app.
            owner: id of the driver.
            has_routes: whether it is to answer HTTP.
        """
        self.instance = instance
        self._name = name
        self._owner = owner
        self._has_routes = has_routes

    async def deploy(self, spec: AppSpec, on_progress: Callable[[Deploying], None] | None = None) -> None:
        """Make it what the spec says, whoever that says is its owner; see `Instance.deploy`."""
        routes = spec.routes if self._has_routes else ()
        owned = msgspec.structs.replace(spec, name=self._name, owner=self._owner, routes=routes)
        await self.instance.deploy(owned, on_progress)

    async def status(self) -> dict[str, Any]:
        """Its part of `Instance.status`; of no backends while nothing of it runs."""
        try:
            return await self.instance.app(self._name).status()
        except KeyError:
            return {"backends": {}}

    async def end(self, session: Session) -> None:
        """End it, what runs in it first; the instance too, where nobody else can have use for it. Where Ray
        has ended already, so has it."""
        ending = asyncio.ensure_future(self._end(session))
        try:
            while not (await asyncio.wait((ending,), timeout=LOOK_S))[0]:
                if session.is_broken:
                    logger.warning("Ray has ended first: what ran was cut off")
                    return
            ending.result()
        finally:
            ending.cancel()

    async def _end(self, session: Session) -> None:
        try:
            if session.is_last:
                await self.instance.shutdown()
            else:
                await self.instance.app(self._name).delete(self._owner)
        except NotServing:
            # Nobody else looks after its replicas now.
            if ray.is_initialized():
                await asyncio.to_thread(end_actors, self._name)


@contextlib.asynccontextmanager
async def own_app(
    session: Session,
    name: str,
    http: HTTPOptions | None,
    *,
    log_level: str = "info",
    on_end: Callable[[], None] = lambda: None,
) -> AsyncIterator[tuple[OwnedApp, Callable[[], Awaitable[str | None]]]]:
    """A place for an app in an instance, for as long as one is inside; the app ends with it.

    Args:
        session: with its Ray.
        name: of the app.
        http: of the instance's HTTP servers; None takes them as they are, or the defaults.
        log_level: of the instance's processes, if this starts it.
        on_end: called before the app is ended.

    Yields:
        The app, and what sees that the instance answers HTTP: its URL; see `Instance.http`.
    """
    owner = secrets.token_hex(8)
    with contextlib.closing(Line(find_controller, "driver", owner=owner)) as line:
        instance, joined = await start_instance(session, line, log_level)
        app = OwnedApp(instance, name, owner, has_routes=(http or HTTPOptions()).serves)

        async def serve_http() -> str | None:
            return await instance.http(http, joined, log_level)

        try:
            yield app, serve_http
        finally:
            on_end()
            await app.end(session)


@contextlib.asynccontextmanager
async def opened_session(address: str | None) -> AsyncIterator[Session]:
    """Ray, for as long as one is inside; see `open_session`."""
    begun = time.monotonic()
    opening = asyncio.ensure_future(asyncio.to_thread(open_session, address))
    try:
        session = await asyncio.shield(opening)
    except asyncio.CancelledError:
        (await opening).close()  # a start cannot be stopped in the middle
        raise
    try:
        _take_signals_back()
        if session.embedded:
            logger.info("Ray is up after %.1f s", time.monotonic() - begun)
        yield session
    finally:
        await asyncio.to_thread(session.close)


def check_free(http: HTTPOptions | None, address: str | None) -> None:
    """Find out that the port is taken, or a middleware cannot travel, before anything is started, where
    that can be known here.

    Raises:
        OSError: the port is taken.
        TypeError: a middleware cannot travel.
    """
    options = http or HTTPOptions()
    check_middlewares(options)
    if options.serves and options.host != NODE_HOST and address is None and not ray.is_initialized():
        from serveit.web.proxy import bind

        bind(options).close()


def _take_signals_back() -> None:
    """Ray handles SIGTERM by printing where it came and dying, below Python's handlers: set these again."""
    if threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is None else handler)

"""Who starts an app, or joins one: `serve`, `connect`, `run`."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from anyio.from_thread import start_blocking_portal

from serveit.client import Client, SyncClient, check_app
from serveit.config import HTTPOptions, check_seconds
from serveit.exceptions import NotServing
from serveit.signals import StopSignals

if TYPE_CHECKING:
    import socket
    from types import TracebackType

    from serveit.client import Runtime
    from serveit.control.orders import Deploying
    from serveit.declare.app import App

logger = logging.getLogger("serveit.client")


LOOK_S = 2.0
"""What it may take to find out what a stop waits for."""


class Serving:
    """An app that is served, or joined, while one is inside: `async with`, or `with` for programs
    without a loop."""

    def __init__(
        self, make_runtime: Callable[[], Runtime], sock: socket.socket | None = None, *, what: str = "serve"
    ) -> None:
        self._what = what
        self._make_runtime = make_runtime
        self._sock = sock
        self._runtime: Runtime | None = None
        self._client: Client | None = None
        self._stack = contextlib.ExitStack()

    def __getattr__(self, name: str) -> Any:
        what = self._what
        hint = f"it has to be entered: `with {what}(...) as client:` or `async with {what}(...) as client:`"
        raise AttributeError(f"{what}(...) has no {name!r}; {hint}")

    async def __aenter__(self) -> Client:
        if self._runtime is not None:
            what = self._what
            raise RuntimeError(f"this {what}(...) is entered already: call serveit.{what} again for another")
        runtime = self._runtime = self._make_runtime()
        try:
            await runtime.start(self._sock)
        except BaseException:
            self._runtime = None
            raise
        self._client = Client(runtime)
        return self._client

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        runtime, self._runtime = self._runtime, None
        client, self._client = self._client, None
        if runtime is not None and client is not None:
            try:
                await runtime.aclose()
            finally:
                client.end(self._what)

    def __enter__(self) -> SyncClient:
        _refuse_event_loop(f"write `async with serveit.{self._what}(...)`")
        options = {"loop_factory": loop_factory()}
        with contextlib.ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal(backend_options=options, name="serveit"))
            client = stack.enter_context(portal.wrap_async_context_manager(self))
            self._stack = stack.pop_all()
        return SyncClient(client, portal)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(exc_type, exc, traceback)


def serve(
    app: App,
    *,
    name: str = "default",
    prefix: str = "",
    http: HTTPOptions | Mapping[str, Any] | None = None,
    address: str | None = None,
    deploy_timeout_s: float = 60.0,
    local: bool = False,
    sock: socket.socket | None = None,
    log_level: str = "info",
    on_progress: Callable[[Deploying], None] | None = None,
) -> Serving:
    """Serve an app for as long as one is inside the context manager that this returns.

    ```python
    async with serveit.serve(app) as client:
        print(client.url, await client.get_handle("user").call(7))
    ```

    Args:
        app: what to serve.
        name: of the app.
        prefix: in front of all its paths, "/like/this".
        http: of the HTTP servers, a dict or HTTPOptions; None for the defaults, and where an instance
            runs already, for its own.
        address: of a Ray cluster to join, "auto" for the one on this machine. None: the Ray that this
            process is connected to, else a new one that ends with this.
        deploy_timeout_s: how long the replicas may wait for resources.
        local: in this process, without Ray.
        sock: a listening socket to take over; with `local`.
        log_level: of the processes on Ray.
        on_progress: on Ray, told how far the replicas' start is, at once and whenever that changes.
    """
    check_app(app, name, prefix)
    check_seconds("deploy_timeout_s", deploy_timeout_s)
    options = None if http is None else HTTPOptions.parse(http)
    if local and address is not None:
        raise ValueError("address is for Ray, and local=True does without: give one of them")
    if not local and sock is not None:
        raise ValueError("sock is for local=True: on Ray the proxies listen")

    def make_runtime() -> Runtime:
        if local:
            from serveit.local import LocalRuntime

            return LocalRuntime(app, name=name, prefix=prefix, http=options or HTTPOptions())
        from serveit.cluster.runtime import ClusterRuntime

        return ClusterRuntime(
            app,
            name=name,
            prefix=prefix,
            http=options,
            address=address,
            deploy_timeout_s=deploy_timeout_s,
            log_level=log_level,
            on_progress=on_progress,
        )

    return Serving(make_runtime, sock)


def connect(address: str | None = "auto", app: str = "default") -> Serving:
    """Reach an app that someone else runs: `async with serveit.connect() as client`, or `with`.

    Args:
        address: of its Ray cluster; "auto" for the one on this machine, None for the one that this
            process is connected to.
        app: its name.

    Raises:
        ConnectionError: there is no such cluster.
        NotServing: the app does not run there.
    """

    def make_runtime() -> Runtime:
        from serveit.cluster.runtime import ClusterRuntime

        return ClusterRuntime(None, name=app, http=None, address=address)

    return Serving(make_runtime, what="connect")


def run(
    app: App,
    *,
    name: str = "default",
    prefix: str = "",
    http: HTTPOptions | Mapping[str, Any] | None = None,
    address: str | None = None,
    deploy_timeout_s: float = 60.0,
    local: bool = False,
    sock: socket.socket | None = None,
    log_level: str = "info",
    on_ready: Callable[[Client], None] | None = None,
    on_progress: Callable[[Deploying], None] | None = None,
) -> None:
    """Serve an app until Ctrl-C or SIGTERM; then what runs may end, within its backend's
    `graceful_shutdown_timeout_s`.

    A second signal ends the process at once, and with it an embedded Ray. So does the first, a moment
    later, where code that cannot be stopped does not return (a constructor, a `def` function after its
    time) or Ray is just starting.

    Args:
        app, name, prefix, http, address, deploy_timeout_s, local, sock, log_level, on_progress: as `serve`.
        on_ready: called once it answers.

    Raises:
        Exception: what a replica's constructor or other start-up code raised.
        OSError: the address can't be listened on.
    """
    _refuse_event_loop("await it there: `async with serveit.serve(...)`")
    serving = serve(
        app,
        name=name,
        prefix=prefix,
        http=http,
        address=address,
        deploy_timeout_s=deploy_timeout_s,
        local=local,
        sock=sock,
        log_level=log_level,
        on_progress=on_progress,
    )
    longest_s = max((b.config.graceful_shutdown_timeout_s for b in app.backends.values()), default=0.0)
    with StopSignals(longest_s) as signals, asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_serve_until_stopped(serving, signals, on_ready))


async def _serve_until_stopped(
    serving: Serving, signals: StopSignals, on_ready: Callable[[Client], None] | None
) -> None:
    stopped = asyncio.ensure_future(signals.attach().wait())
    starting = asyncio.ensure_future(serving.__aenter__())
    try:
        await signals.first_of(starting, stopped)
        if not starting.done():
            starting.cancel()
            await signals.first_of(starting)
            if starting.cancelled() or starting.exception() is not None:
                logger.info("stopped while the app was starting")
                return
        client = starting.result()
        try:
            signals.started()
            if on_ready is not None:
                on_ready(client)
            with _settled():
                await stopped
            await say_what_is_waited_for(client)
        finally:
            await serving.__aexit__(None, None, None)
    finally:
        stopped.cancel()
        signals.ending()


class Watched(Protocol):
    """Whose status can be asked for: a client, or an app without one."""

    async def status(self) -> dict[str, Any]: ...


async def say_what_is_waited_for(app: Watched) -> None:
    """Log how many requests still run, if any: a stop waits for them."""
    try:
        async with asyncio.timeout(LOOK_S):
            status = await app.status()
    except (NotServing, TimeoutError):  # the controller is gone
        return
    replicas = [replica for backend in status["backends"].values() for replica in backend.values()]
    count = sum(replica.get("running", 0) + replica.get("waiting", 0) for replica in replicas)
    if count:
        requests = "1 running request has" if count == 1 else f"{count} running requests have"
        logger.info("stopping once %s ended; Ctrl-C again stops at once", requests)


@contextlib.contextmanager
def _settled() -> Iterator[None]:
    """What is there by now (modules, models, the app) stays: garbage collection leaves it alone, for
    looking at all of it would hold requests up for some 10 ms each time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _refuse_event_loop(instead: str) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise RuntimeError(f"an event loop is running in this thread: {instead}")


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes the event loops of this package: uvloop's, where there is one."""
    try:
        import uvloop
    except ImportError:  # not on every platform
        return None
    return uvloop.new_event_loop

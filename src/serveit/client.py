"""Who starts an instance and talks to it: `serve`, `run`, and the client that they give."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

from anyio.from_thread import start_blocking_portal

from serveit.config import HTTPOptions
from serveit.declare.app import App
from serveit.exceptions import NeedsRay
from serveit.signals import StopSignals

if TYPE_CHECKING:
    import socket
    from types import TracebackType

    from serveit.calling.handle import Handle
    from serveit.calling.sync import SyncHandle


logger = logging.getLogger("serveit.client")


class Runtime(Protocol):
    """What a client needs of whoever runs the app: one process (`local`), or a cluster."""

    async def start(self, sock: socket.socket | None = None) -> None: ...

    async def aclose(self) -> None: ...

    def get_handle(self, name: str, *, sync: bool = False) -> Any: ...

    def status(self) -> dict[str, Any]: ...


class Client:
    """A running app, from a program with an event loop. Got from `async with serveit.serve(app)`."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def __repr__(self) -> str:
        return f"<Client {self.url or 'without HTTP'}>"

    @property
    def url(self) -> str | None:
        """Where the app answers HTTP: "http://127.0.0.1:8000"; None without a server."""
        url: str | None = self._runtime.status()["url"]
        return url

    @overload
    def get_handle(self, name: str, *, sync: Literal[False] = False) -> Handle[..., Any]: ...
    @overload
    def get_handle(self, name: str, *, sync: Literal[True]) -> SyncHandle[..., Any]: ...
    def get_handle(self, name: str, *, sync: bool = False) -> Any:
        """A handle on a backend (by its name) or an endpoint (by its route's name).

        Args:
            name: a backend's calls it; an endpoint's chooses by its traffic on each call.
            sync: the blocking handle, for threads without an event loop.

        Raises:
            KeyError: there is none; the text suggests or lists the known names.
        """
        return self._runtime.get_handle(name, sync=sync)

    def status(self) -> dict[str, Any]:
        """Name and address of the app, and each backend's replicas with what they are doing."""
        return self._runtime.status()


class SyncClient:
    """A running app, from a program without an event loop. Got from `with serveit.serve(app)`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def __repr__(self) -> str:
        return repr(self._client).replace("<Client", "<SyncClient")

    @property
    def url(self) -> str | None:
        """As `Client.url`."""
        return self._client.url

    def get_handle(self, name: str) -> SyncHandle[..., Any]:
        """A blocking handle; see `Client.get_handle`."""
        return self._client.get_handle(name, sync=True)

    def status(self) -> dict[str, Any]:
        """As `Client.status`."""
        return self._client.status()


class Serving:
    """An app that is served while one is inside: `async with`, or `with` for programs without a loop."""

    def __init__(self, make_runtime: Callable[[], Runtime], sock: socket.socket | None = None) -> None:
        self._make_runtime = make_runtime
        self._sock = sock
        self._runtime: Runtime | None = None
        self._stack = contextlib.ExitStack()

    def __getattr__(self, name: str) -> Any:
        hint = "it has to be entered: `with serve(...) as client:` or `async with serve(...) as client:`"
        raise AttributeError(f"serve(...) has no {name!r}; {hint}")

    async def __aenter__(self) -> Client:
        if self._runtime is not None:
            raise RuntimeError("this serve(...) is entered already: call serveit.serve again for another")
        runtime = self._runtime = self._make_runtime()
        try:
            await runtime.start(self._sock)
        except BaseException:
            self._runtime = None
            raise
        return Client(runtime)

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        runtime, self._runtime = self._runtime, None
        if runtime is not None:
            await runtime.aclose()

    def __enter__(self) -> SyncClient:
        _refuse_event_loop("write `async with serveit.serve(...)`")
        options = {"loop_factory": _loop_factory()}
        with contextlib.ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal(backend_options=options, name="serveit"))
            client = stack.enter_context(portal.wrap_async_context_manager(self))
            self._stack = stack.pop_all()
        return SyncClient(client)

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
    local: bool = False,
    sock: socket.socket | None = None,
) -> Serving:
    """Serve an app for as long as one is inside the context manager that this returns.

    ```python
    async with serveit.serve(app, local=True) as client:
        print(client.url, await client.get_handle("user").call(7))
    ```

    Args:
        app: what to serve.
        name: of the app.
        prefix: in front of all its paths, "/like/this".
        http: of the server, a dict or HTTPOptions; None for the defaults.
        local: in this process, without Ray.
        sock: a listening socket to take over.

    Raises:
        NeedsRay: `local` is False, and this version has no Ray runtime.
    """
    if not isinstance(app, App):
        raise TypeError(f"expected a serveit.App, got {type(app).__name__}")
    if prefix and (not prefix.startswith("/") or prefix.endswith("/")):
        raise ValueError(f"prefix must start with '/' and not end with one, got {prefix!r}")
    options = HTTPOptions.parse(http)
    if not local:
        raise NeedsRay("this version of serveit runs apps in one process: add --local, in Python local=True")

    def make_runtime() -> Runtime:
        from serveit.local import LocalRuntime

        return LocalRuntime(app, name=name, prefix=prefix, http=options)

    return Serving(make_runtime, sock)


def run(
    app: App,
    *,
    name: str = "default",
    prefix: str = "",
    http: HTTPOptions | Mapping[str, Any] | None = None,
    local: bool = False,
    sock: socket.socket | None = None,
    on_ready: Callable[[Client], None] | None = None,
) -> None:
    """Serve an app until Ctrl-C or SIGTERM; then what runs may end, within its backend's
    `graceful_shutdown_timeout_s`.

    A second signal ends the process at once. So does the first, a moment later, where code in a
    thread (a constructor, a `def` function after its time) does not return: it cannot be stopped.

    Args:
        app, name, prefix, http, local, sock: as `serve`.
        on_ready: called once it answers.

    Raises:
        Exception: what a replica's constructor or other start-up code raised.
        OSError: the address can't be listened on.
    """
    _refuse_event_loop("await it there: `async with serveit.serve(...)`")
    serving = serve(app, name=name, prefix=prefix, http=http, local=local, sock=sock)
    longest_s = max((b.config.graceful_shutdown_timeout_s for b in app.backends.values()), default=0.0)
    with StopSignals(longest_s) as signals, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve_until_stopped(serving, signals, on_ready))


async def _serve_until_stopped(
    serving: Serving, signals: StopSignals, on_ready: Callable[[Client], None] | None
) -> None:
    stopped = asyncio.ensure_future(signals.attach().wait())
    starting = asyncio.ensure_future(serving.__aenter__())
    try:
        await asyncio.wait((starting, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.wait((starting,))
            if starting.cancelled() or starting.exception() is not None:
                return
        client = starting.result()
        try:
            signals.started()
            if on_ready is not None:
                on_ready(client)
            with _settled():
                await stopped
            _say_what_is_waited_for(client)
        finally:
            await serving.__aexit__(None, None, None)
    finally:
        stopped.cancel()
        signals.ending()


def _say_what_is_waited_for(client: Client) -> None:
    replicas = [replica for backend in client.status()["backends"].values() for replica in backend.values()]
    count = sum(replica["running"] + replica["waiting"] for replica in replicas)
    if count:
        logger.info("stopping once %d running requests have ended; Ctrl-C again stops at once", count)


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


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not on every platform
        return None
    return uvloop.new_event_loop

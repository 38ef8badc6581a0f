"""Who starts an instance and talks to it: `serve`, `run`, and the client that they give."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

from anyio.from_thread import start_blocking_portal

from serveit.config import HTTPOptions
from serveit.declare.app import App
from serveit.exceptions import NeedsRay

if TYPE_CHECKING:
    import socket
    from types import TracebackType

    from serveit.calling.handle import Handle
    from serveit.calling.sync import SyncHandle


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

    async def __aenter__(self) -> Client:
        runtime = self._make_runtime()
        await runtime.start(self._sock)
        self._runtime = runtime
        return Client(runtime)

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._runtime is not None:
            await self._runtime.aclose()

    def __enter__(self) -> SyncClient:
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop()
            raise TypeError("an event loop is running here: write `async with serveit.serve(...)`")
        with contextlib.ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal(name="serveit"))
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
        raise NeedsRay("this version of serveit runs apps in one process: add local=True (or --local)")

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
    """Serve an app until Ctrl-C or SIGTERM; what runs then may end (a second one stops at once).

    Args:
        app, name, prefix, http, local, sock: as `serve`.
        on_ready: called once it answers.
    """
    serving = serve(app, name=name, prefix=prefix, http=http, local=local, sock=sock)

    async def main() -> None:
        with _stop_on_signals() as stop:
            async with serving as client:
                if on_ready is not None:
                    on_ready(client)
                await stop.wait()

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(main())


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not on every platform
        return None
    return uvloop.new_event_loop


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[asyncio.Event]:
    """An event that the first SIGINT or SIGTERM sets. The second ends the process at once.

    The handlers are set explicitly: a shell starts background commands with SIGINT ignored.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def received(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, received, number)
    try:
        yield stop
    finally:
        for number in signals:
            loop.remove_signal_handler(number)

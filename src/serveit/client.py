"""Who starts an instance and talks to it: `serve`, `run`, and the client that they give."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

from anyio.from_thread import start_blocking_portal

from serveit.config import BackendConfig, HTTPOptions, did_you_mean
from serveit.declare.app import App
from serveit.declare.traffic import parse_traffic
from serveit.exceptions import NotServing
from serveit.signals import StopSignals

if TYPE_CHECKING:
    import socket
    from types import TracebackType

    from anyio.from_thread import BlockingPortal

    from serveit.calling.handle import Handle
    from serveit.calling.sync import SyncHandle
    from serveit.control.snapshot import EndpointInfo
    from serveit.control.spec import AppSpec


logger = logging.getLogger("serveit.client")


class Runtime(Protocol):
    """What a client needs of whoever runs the app: one process (`local`), or a cluster."""

    async def start(self, sock: socket.socket | None = None) -> None: ...

    async def aclose(self) -> None: ...

    @property
    def url(self) -> str | None: ...

    def get_handle(self, name: str, *, sync: bool = False) -> Any: ...

    async def status(self) -> dict[str, Any]: ...

    async def spec(self) -> AppSpec: ...

    async def scale(self, backend: str, num_replicas: int) -> None: ...

    async def reroute(self, endpoint: str, weights: Any, shadows: Any) -> None: ...

    async def deploy(self, app: App, *, name: str, prefix: str) -> None: ...

    async def delete(self) -> None: ...


class Client:
    """A running app, from a program with an event loop. Got from `async with serveit.serve(app)`."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def __repr__(self) -> str:
        return f"<Client {self.url or 'without HTTP'}>"

    @property
    def url(self) -> str | None:
        """Where the app answers HTTP: "http://127.0.0.1:8000"; None without a server."""
        return self._runtime.url

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

    async def status(self) -> dict[str, Any]:
        """What runs, as plain data.

        Returns:
            "app" and "url"; "backends": of each backend its replicas by id, with "state" ("starting",
            "ready", "stopping"), "running" and "waiting" (requests); "failed": why a backend was given up.
        """
        return await self._runtime.status()

    async def routes(self) -> dict[str, list[Any]]:
        """The app's paths, each with its endpoint's name and methods."""
        spec = await self._runtime.spec()
        return {route.prefix + route.pattern: [route.endpoint, list(route.methods)] for route in spec.routes}

    async def update(self, backend: str, *, num_replicas: int) -> None:
        """Change a backend while it serves; returns when the change is in force.

        Args:
            backend: its name.
            num_replicas: as in `BackendConfig`. Replicas that go end what they run first.

        Raises:
            KeyError: there is no such backend.
            ValueError: the value is out of range.
            Exception: what a new replica's start-up code raised; then the old number stands.
        """
        BackendConfig(num_replicas=num_replicas)
        spec = await self._runtime.spec()
        if backend not in (known := _names(spec)):
            raise KeyError(f"app {spec.name!r} has no backend {backend!r}: {did_you_mean(backend, known)}")
        await self._runtime.scale(backend, num_replicas)

    async def set_traffic(self, endpoint: str, traffic: Mapping[str, float]) -> None:
        """Change the weights of the backends that an endpoint leads to; shadows stay.

        Args:
            endpoint: a route's name (its path, if it has no other).
            traffic: weight by backend; they sum to 1.

        Raises:
            KeyError: no such endpoint.
            ValueError: no such backend, or the weights do not sum to 1. The old ones stand.
        """
        spec, found = await self._endpoint(endpoint)
        weights = parse_traffic(traffic, None, _names(spec), f"endpoint {endpoint!r}").weights
        await self._runtime.reroute(endpoint, weights, found.shadows)

    async def shadow_traffic(self, endpoint: str, backend: str, fraction: float) -> None:
        """Send copies of some of an endpoint's requests to a backend, whose answers nobody waits for.

        Args:
            endpoint: a route's name.
            backend: who gets the copies.
            fraction: of the requests, from 0 (none any more) to 1.
        """
        spec, found = await self._endpoint(endpoint)
        shadows = {**dict(found.shadows), backend: fraction}
        parsed = parse_traffic(dict(found.weights), shadows, _names(spec), f"endpoint {endpoint!r}")
        kept = [(name, share) for name, share in parsed.shadows if share]
        await self._runtime.reroute(endpoint, found.weights, kept)

    async def deploy(self, app: App, *, name: str, prefix: str = "") -> None:
        """Serve another app in the same instance, or the next version of one. It stays until deleted.

        Args:
            app: what to serve.
            name: of the app in the instance.
            prefix: in front of all its paths.
        """
        _check_app(app, prefix)
        await self._runtime.deploy(app, name=name, prefix=prefix)

    async def delete(self) -> None:
        """End the app: what it runs may end."""
        await self._runtime.delete()

    async def _endpoint(self, name: str) -> tuple[AppSpec, EndpointInfo]:
        spec = await self._runtime.spec()
        for endpoint in spec.endpoints:
            if endpoint.name == name:
                return spec, endpoint
        known = [endpoint.name for endpoint in spec.endpoints]
        raise KeyError(f"app {spec.name!r} has no endpoint {name!r}: {did_you_mean(name, known)}")


class SyncClient:
    """A running app, from a program without an event loop. Got from `with serveit.serve(app)`."""

    def __init__(self, client: Client, portal: BlockingPortal) -> None:
        self._client = client
        self._portal = portal

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
        return self._portal.call(self._client.status)

    def routes(self) -> dict[str, list[Any]]:
        """As `Client.routes`."""
        return self._portal.call(self._client.routes)

    def update(self, backend: str, *, num_replicas: int) -> None:
        """As `Client.update`."""
        self._portal.call(partial(self._client.update, backend, num_replicas=num_replicas))

    def set_traffic(self, endpoint: str, traffic: Mapping[str, float]) -> None:
        """As `Client.set_traffic`."""
        self._portal.call(self._client.set_traffic, endpoint, traffic)

    def shadow_traffic(self, endpoint: str, backend: str, fraction: float) -> None:
        """As `Client.shadow_traffic`."""
        self._portal.call(self._client.shadow_traffic, endpoint, backend, fraction)

    def deploy(self, app: App, *, name: str, prefix: str = "") -> None:
        """As `Client.deploy`."""
        self._portal.call(partial(self._client.deploy, app, name=name, prefix=prefix))

    def delete(self) -> None:
        """As `Client.delete`."""
        self._portal.call(self._client.delete)


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
        _refuse_event_loop(f"write `async with serveit.{self._what}(...)`")
        options = {"loop_factory": _loop_factory()}
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
    """
    _check_app(app, prefix)
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


def _names(spec: AppSpec) -> list[str]:
    return [backend.name for backend in spec.backends]


def _check_app(app: App, prefix: str) -> None:
    if not isinstance(app, App):
        raise TypeError(f"expected a serveit.App, got {type(app).__name__}")
    if prefix and (not prefix.startswith("/") or prefix.endswith("/")):
        raise ValueError(f"prefix must start with '/' and not end with one, got {prefix!r}")


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
) -> None:
    """Serve an app until Ctrl-C or SIGTERM; then what runs may end, within its backend's
    `graceful_shutdown_timeout_s`.

    A second signal ends the process at once. So does the first, a moment later, where code in a
    thread (a constructor, a `def` function after its time) does not return: it cannot be stopped.

    Args:
        app, name, prefix, http, address, deploy_timeout_s, local, sock, log_level: as `serve`.
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
    )
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
            await _say_what_is_waited_for(client)
        finally:
            await serving.__aexit__(None, None, None)
    finally:
        stopped.cancel()
        signals.ending()


async def _say_what_is_waited_for(client: Client) -> None:
    try:
        status = await client.status()
    except NotServing:  # the controller is gone
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


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not on every platform
        return None
    return uvloop.new_event_loop

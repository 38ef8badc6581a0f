"""For tests of apps: `TestClient` speaks HTTP to one, `local` runs one with a clock to be advanced."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from serveit.client import Client
from serveit.config import HTTPOptions
from serveit.local import LocalRuntime
from serveit.web.middlewares import with_middlewares

try:
    import httpx2
    from starlette.testclient import TestClient as StarletteTestClient
except ImportError as error:
    raise ImportError(f"serveit.testing needs httpx2 ({error}): pip install 'serveit[testing]'") from error

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from serveit.declare.app import App

_SETTLE_TICKS = 50
_CLOSE_S = 1.0
_LONG_S = 3600.0


class ManualClock:
    """A clock that stands still until it is told to go on.

    Batch waits, deadlines and timeouts of an app under `testing.local` follow it; user code's own
    `asyncio.sleep` does not.
    """

    def __init__(self, start: float = 1_000.0) -> None:
        self._now = start
        self._count = itertools.count()
        self._timers: list[tuple[float, int, _Timer]] = []

    def time(self) -> float:
        return self._now

    def call_later(self, delay_s: float, callback: Callable[..., Any], *args: Any) -> _Timer:
        timer = _Timer(callback, args)
        heapq.heappush(self._timers, (self._now + delay_s, next(self._count), timer))
        return timer

    async def advance(self, seconds: float) -> None:
        """Let so much time pass: timers fire in their order, and what they set off is run."""
        target = self._now + seconds
        await self.settle()
        while self._timers and self._timers[0][0] <= target:
            when, _, timer = heapq.heappop(self._timers)
            self._now = max(self._now, when)
            timer.fire()
            await self.settle()
        self._now = target
        await self.settle()

    async def settle(self) -> None:
        """Let the event loop run what is ready, without any time passing."""
        for _ in range(_SETTLE_TICKS):
            await asyncio.sleep(0)


class _Timer:
    def __init__(self, callback: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._call: Callable[[], Any] | None = lambda: callback(*args)

    def cancel(self) -> None:
        self._call = None

    def fire(self) -> None:
        if self._call is not None:
            self._call()


class LocalClient(Client):
    """A `Client` with what tests want besides.

    Attributes:
        clock: advance it to let batch waits and timeouts pass.
        http: an `httpx2.AsyncClient` that reaches the app without a socket.
        runtime: the `LocalRuntime`.
    """

    def __init__(self, runtime: LocalRuntime, clock: ManualClock, http: httpx2.AsyncClient) -> None:
        super().__init__(runtime)
        self.runtime = runtime
        self.clock = clock
        self.http = http


@asynccontextmanager
async def local(
    app: App,
    *,
    name: str = "default",
    prefix: str = "",
    http: HTTPOptions | Mapping[str, Any] | None = None,
) -> AsyncIterator[LocalClient]:
    """Run an app in this event loop, without sockets and with a clock that stands still.

    ```python
    async with serveit.testing.local(app) as client:
        assert await client.get_handle("double").call(2) == 4
        assert (await client.http.get("/double/2")).json() == 4
    ```
    """
    clock = ManualClock()
    options = HTTPOptions.parse(http)
    runtime = LocalRuntime(app, name=name, prefix=prefix, http=options, clock=clock)
    await runtime.start(listen=False)
    try:
        transport = httpx2.ASGITransport(app=with_middlewares(runtime.ingress, options))
        async with httpx2.AsyncClient(transport=transport, base_url="http://testserver") as asked:
            yield LocalClient(runtime, clock, asked)
    finally:
        await _close(runtime, clock)


async def _close(runtime: LocalRuntime, clock: ManualClock) -> None:
    """Stop. The drain's limits are on the clock, which nobody advances any more: so what still runs
    gets a moment of real time, and then all the time there is on the clock."""
    closing = asyncio.ensure_future(runtime.aclose())
    await asyncio.wait((closing,), timeout=_CLOSE_S)
    while not closing.done():
        await clock.advance(_LONG_S)
    await closing


class TestClient(StarletteTestClient):
    """Starlette's TestClient on an app: `with TestClient(app) as client: client.get("/")`.

    The app runs while one is inside the `with`, its replicas in a thread of their own.
    """

    __test__ = False

    def __init__(
        self, app: App, *, http: HTTPOptions | Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """
        Args:
            app: what to test.
            http: HTTPOptions or a dict; `debug` and the limits hold here, too.
            options: of Starlette's TestClient: `base_url`, `headers`, `follow_redirects`, ...
        """
        self._served = _Lifespan(app, HTTPOptions.parse(http))
        super().__init__(self._served, **options)

    def get_handle(self, name: str) -> Any:
        """A blocking handle on a backend or endpoint."""
        return self._served.running.get_handle(name, sync=True)


class _Lifespan:
    """An ASGI app that starts and stops the runtime with ASGI's lifespan."""

    def __init__(self, app: App, http: HTTPOptions) -> None:
        self._app = app
        self._http = http
        self._runtime: LocalRuntime | None = None
        self._application: ASGIApp | None = None

    @property
    def running(self) -> LocalRuntime:
        if self._runtime is None:
            raise RuntimeError("the app is not running: write `with TestClient(app) as client:`")
        return self._runtime

    @property
    def _running_application(self) -> ASGIApp:
        if self._application is None:
            self._application = with_middlewares(self.running.ingress, self._http)
        return self._application

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await self._running_application(scope, receive, send)
            return
        await receive()
        runtime = LocalRuntime(self._app, http=self._http)
        await runtime.start(listen=False)
        self._runtime = runtime
        try:
            await send({"type": "lifespan.startup.complete"})
            await receive()
        finally:
            self._runtime = self._application = None
            await runtime.aclose()
        await send({"type": "lifespan.shutdown.complete"})

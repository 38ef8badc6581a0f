"""The blocking handle: a thin shim that runs the async one in its own loop, through anyio's portal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, cast

from serveit.exceptions import NotServing

if TYPE_CHECKING:
    from serveit.calling.handle import Handle

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class SyncHandle(Generic[P, R]):
    """The same names as `Handle`, blocking; from any thread that runs no event loop.

    Got from `client.get_handle(name, sync=True)`.
    """

    def __init__(self, handle: Handle[P, R]) -> None:
        self._handle = handle

    def __repr__(self) -> str:
        return repr(self._handle).replace("<Handle", "<SyncHandle", 1)

    def __getattr__(self, name: str) -> SyncHandle[..., Any]:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return cast("SyncHandle[..., Any]", self.options(method_name=name))

    def __reduce__(self) -> Any:
        return self._handle.reduced(sync=True)

    def options(self, **changes: Any) -> SyncHandle[P, R]:
        """As `Handle.options`."""
        return SyncHandle(self._handle.options(**changes))

    def call(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """As `Handle.call`, blocking."""
        self._check("await handle.call(...)")
        result: R = self._wait(lambda: self._handle.call(*args, **kwargs))
        return result

    def remote(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """As `Handle.remote`, blocking until the request is submitted."""
        self._check("await handle.remote(...)")
        return self._wait(lambda: self._handle.remote(*args, **kwargs))

    def stream(self, *args: P.args, **kwargs: P.kwargs) -> Iterator[Any]:
        """As `Handle.stream`: an ordinary iterator. Close it, or read it to its end."""
        self._check("async for item in handle.stream(...)")
        return self._pull(self._handle.stream(*args, **kwargs))

    def map(
        self,
        items: Iterable[Any],
        *,
        max_in_flight: int = 64,
        ordered: bool = True,
    ) -> Iterator[Any]:
        """As `Handle.map`: an ordinary iterator. `items` is iterated in the event loop's thread."""
        self._check("async for result in handle.map(...)")
        return self._pull(self._handle.map(items, max_in_flight=max_in_flight, ordered=ordered))

    def _wait(self, function: Callable[[], Awaitable[Any]]) -> Any:
        """Run it in the event loop; who is interrupted (Ctrl-C) while waiting takes it back."""
        gateway = self._handle.gateway
        try:
            future = gateway.portal.start_task_soon(function)
        except RuntimeError:
            if _running_loop() is not None:
                raise
            raise self._shut_down() from None
        try:
            return future.result()
        except BaseException as error:
            if future.cancelled() and isinstance(error, CancelledError):
                raise NotServing(f"{self!r}: the app was shut down meanwhile", executed="maybe") from None
            future.cancel()
            raise

    def _pull(self, source: AsyncIterator[T]) -> Iterator[T]:
        while True:
            more, item = self._wait(lambda: _next(source))
            if not more:
                return
            try:
                yield cast("T", item)
            except BaseException:  # the reader has closed this iterator, or the garbage collector
                if not self._handle.gateway.closed and _running_loop() is None:
                    self._wait(lambda: _close(source))
                raise

    def _check(self, instead: str) -> None:
        if _running_loop() is not None:
            raise RuntimeError(
                f"{self!r} blocks and an event loop is running in this thread: "
                f"use the async handle (sync=False): `{instead}`"
            )
        if self._handle.gateway.closed:
            raise self._shut_down()

    def _shut_down(self) -> NotServing:
        return NotServing(f"{self!r}: the client that it came from has been shut down")


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


async def _next(source: AsyncIterator[T]) -> tuple[bool, T | None]:
    """StopAsyncIteration as a value: it must not be mistaken for what the function raised."""
    try:
        return True, await anext(source)
    except StopAsyncIteration:
        return False, None


async def _close(source: Any) -> None:
    await source.aclose()

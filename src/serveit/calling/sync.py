"""The blocking handle: a thin shim that runs the async one in its own loop, through anyio's portal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, cast

if TYPE_CHECKING:
    from serveit.calling.handle import Gateway, Handle

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class SyncHandle(Generic[P, R]):
    """The same names as `Handle`, blocking; from any thread that runs no event loop.

    Got from `client.get_handle(name, sync=True)`.
    """

    def __init__(self, handle: Handle[P, R], gateway: Gateway) -> None:
        self._handle = handle
        self._gateway = gateway

    def __repr__(self) -> str:
        return repr(self._handle).replace("(async)", "(sync)")

    def __getattr__(self, name: str) -> SyncHandle[..., Any]:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return cast("SyncHandle[..., Any]", self.options(method_name=name))

    def __reduce__(self) -> Any:
        return self._handle.__reduce__()

    def options(self, **changes: Any) -> SyncHandle[P, R]:
        """As `Handle.options`."""
        return SyncHandle(self._handle.options(**changes), self._gateway)

    def call(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """As `Handle.call`, blocking."""
        return cast("R", self._run("await handle.call(...)", lambda: self._handle.call(*args, **kwargs)))

    def remote(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """As `Handle.remote`, blocking until the request is submitted."""
        return self._run("await handle.remote(...)", lambda: self._handle.remote(*args, **kwargs))

    def stream(self, *args: P.args, **kwargs: P.kwargs) -> Iterator[Any]:
        """As `Handle.stream`: an ordinary iterator."""
        return self._iterate(
            "async for item in handle.stream(...)", lambda: self._handle.stream(*args, **kwargs)
        )

    def map(
        self,
        items: Iterable[Any],
        *,
        max_in_flight: int = 64,
        ordered: bool = True,
    ) -> Iterator[Any]:
        """As `Handle.map`: an ordinary iterator. `items` is iterated in the event loop's thread."""
        return self._iterate(
            "async for result in handle.map(...)",
            lambda: self._handle.map(items, max_in_flight=max_in_flight, ordered=ordered),
        )

    def _run(self, instead: str, function: Callable[[], Any]) -> Any:
        self._refuse_event_loop(instead)
        return self._gateway.portal.call(function)

    def _iterate(self, instead: str, make: Callable[[], AsyncIterator[T]]) -> Iterator[T]:
        self._refuse_event_loop(instead)
        return self._pull(make)

    def _pull(self, make: Callable[[], AsyncIterator[T]]) -> Iterator[T]:
        call = self._gateway.portal.call
        source: Any = make()
        try:
            while True:
                more, item = call(_next, source)
                if not more:
                    return
                yield cast("T", item)
        finally:
            call(source.aclose)

    def _refuse_event_loop(self, instead: str) -> None:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return
        raise RuntimeError(
            f"{self!r} blocks and an event loop is running in this thread: "
            f"use the async handle (sync=False): `{instead}`"
        )


async def _next(source: AsyncIterable[T]) -> tuple[bool, T | None]:
    """StopAsyncIteration as a value: it cannot leave a coroutine."""
    try:
        return True, await cast("AsyncIterator[T]", source).__anext__()
    except StopAsyncIteration:
        return False, None

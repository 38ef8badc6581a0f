"""What `@app.backend(...)` and `@app.route(...)` are to type checkers; they exist only for these.

A class stays itself; a function becomes a `Backend`, or with `max_batch_size` a `BatchBackend`.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, overload

if TYPE_CHECKING:
    from serveit.declare.backend import Backend, BatchBackend

P = ParamSpec("P")
R = TypeVar("R")
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C", bound=type[Any])


class BackendDecorator(Protocol):
    """What `@app.backend(...)` is without `max_batch_size`."""

    @overload
    def __call__(self, target: C) -> C: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, target: Callable[P, R]) -> Backend[P, R]: ...


class BatchDecorator(Protocol):
    """What `@app.backend(max_batch_size=...)` is."""

    @overload
    def __call__(self, target: C) -> C: ...
    @overload
    def __call__(
        self, target: Callable[[list[A]], Coroutine[Any, Any, Sequence[B]]]
    ) -> BatchBackend[A, B, Coroutine[Any, Any, Sequence[B]]]: ...
    @overload
    def __call__(self, target: Callable[[list[A]], Sequence[B]]) -> BatchBackend[A, B, Sequence[B]]: ...


class RouteDecorator(Protocol):
    """What `@app.route(...)` is."""

    @overload
    def __call__(self, target: C) -> C: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, target: Backend[P, R]) -> Backend[P, R]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, target: BatchBackend[A, B, R]
    ) -> BatchBackend[A, B, R]: ...
    @overload
    def __call__(self, target: Callable[P, R]) -> Backend[P, R]: ...

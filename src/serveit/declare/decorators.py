"""What `@app.backend(...)`, `@app.route(...)` and `app.handle(...)` are to type checkers; only for these.

A class stays itself; a function becomes a `Backend`, or with `max_batch_size` a `BatchBackend`.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypedDict, TypeVar, overload

if TYPE_CHECKING:
    from serveit.declare.backend import Backend, BatchBackend

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C", bound=type[Any])


class BackendOptions(TypedDict, total=False):
    """The fields of `BackendConfig` but `max_batch_size`, which chooses an overload. A test holds the
    two together."""

    num_replicas: int
    batch_wait_timeout_s: float
    max_concurrent_batches: int
    batch_methods: Sequence[str]
    max_ongoing_requests: int | None
    max_queued_requests: int | None
    num_threads: int
    user_config: Any
    request_timeout_s: float | None
    graceful_shutdown_timeout_s: float
    max_surge: int
    ray_actor_options: Mapping[str, Any] | None


class BackendChanges(BackendOptions, total=False):
    """All fields of `BackendConfig`."""

    max_batch_size: int | None


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


class Served(Protocol[P, R_co]):
    """A `Backend` or `BatchBackend`: whatever its `call` takes and gives."""

    def call(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R_co]: ...


class AsyncModel(Protocol[P, R_co]):
    """A class whose `__call__` is `async def`."""

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


class Model(Protocol[P, R_co]):
    """A class whose `__call__` is `def`."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


class AsyncBatchModel(Protocol[A, B]):
    """A class whose `async def __call__` takes a list and gives a list.

    Whether it is called with batches, `max_batch_size` says, which a type checker does not see on a
    class. That it is, is far more likely: so handles on it are typed as taking one item.
    """

    async def __call__(self, items: list[A], /) -> list[B] | tuple[B, ...]: ...


class BatchModel(Protocol[A, B]):
    """As `AsyncBatchModel`, with `def`."""

    def __call__(self, items: list[A], /) -> list[B] | tuple[B, ...]: ...


AsyncMethod = Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]
Method = Callable[Concatenate[Any, P], R]
"""A method as its class gives it: the first parameter is `self`."""

"""A backend: the user's function or class plus its `BackendConfig`. A record; nothing runs here.

`Backend` is what `@app.backend` makes of a function: the plain function still, when called, and the
handle's calls beside it. Classes are registered by the same record and stay what they are.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypedDict, TypeVar, overload

from serveit.config import BackendConfig, did_you_mean
from serveit.context import resolve
from serveit.importer import import_from_string
from serveit.types import DEFAULT_METHOD

if TYPE_CHECKING:
    from serveit.calling.handle import Handle
    from serveit.declare.app import App

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
LIFECYCLE = ("setup", "reconfigure", "check_health", "aclose", "close")
"""Methods that serveit calls by itself; they can't be routed to."""


class BackendOptions(TypedDict, total=False):
    """The fields of `BackendConfig` but `max_batch_size`, for type checkers (which choose an overload
    by that one). A test holds the two together."""

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


@dataclass(frozen=True)
class Method:
    """One callable of a backend, as its replicas run it.

    Attributes:
        name: `DEFAULT_METHOD` for a function and for a class's `__call__`.
        function: the function; of a class the plain one, whose first parameter is `self`.
        of_class: whether that first parameter is there.
        is_async: a coroutine function or async generator: runs on the event loop.
        is_generator: its results are streamed.
        is_batch: called with lists.
    """

    name: str
    function: Callable[..., Any]
    of_class: bool
    is_async: bool
    is_generator: bool
    is_batch: bool


class BackendRecord:
    """What the app knows of one backend.

    Attributes:
        app: the app it belongs to.
        name: unique in the app.
        target: the function, the class, or an import string that only replicas resolve.
        config: its options.
        init_args: positional arguments of the class.
        init_kwargs: keyword arguments of the class.
    """

    def __init__(
        self,
        app: App,
        target: Callable[..., Any] | str,
        name: str,
        config: BackendConfig,
        init_args: Sequence[Any] = (),
        init_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.app = app
        self.target = target
        self.name = name
        self.config = config
        self.init_args = tuple(init_args)
        self.init_kwargs = dict(init_kwargs or {})
        if not isinstance(target, str):
            check_target(self, target)

    def __repr__(self) -> str:
        return f"<Backend {self.name!r} {describe(self.target)}>"

    def load(self) -> Callable[..., Any]:
        """The function or class itself, imported if it was given by name.

        Raises:
            ImportFailed: the import string leads nowhere.
            TypeError, ValueError: what it leads to does not fit the options.
        """
        if not isinstance(self.target, str):
            return self.target
        target = import_from_string(self.target)
        if isinstance(target, BackendRecord):
            target = target.load()
        check_target(self, target)
        loaded: Callable[..., Any] = target
        return loaded

    @property
    def is_async(self) -> bool:
        """Whether its `__call__` runs on the event loop rather than in a thread."""
        target = self.load()
        call = getattr(target, DEFAULT_METHOD, None) if inspect.isclass(target) else target
        return inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call)

    def method(self, name: str = DEFAULT_METHOD) -> Method:
        """One of the backend's callables.

        Raises:
            AttributeError: there is none of that name; the text suggests the nearest.
        """
        return find_method(self.load(), name, self.config, self.name)


class Backend(BackendRecord, Generic[P, R]):
    """A function that is served: the function itself when called, its handle's methods beside it.

    `await backend.call(...)`, `backend.stream(...)`, `backend.map(...)`, `backend.options(...)` reach
    whoever serves the app: the instance this code runs in, else the one that this process started.
    With nothing running they raise `NotServing`.
    """

    def __init__(self, app: App, target: Callable[P, R] | str, name: str, config: BackendConfig) -> None:
        super().__init__(app, target, name, config)
        if not isinstance(target, str):
            functools.update_wrapper(self, target)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        result: R = self.load()(*args, **kwargs)
        return result

    @property
    def _handle(self) -> Handle[P, Any]:
        handle: Handle[P, Any] = resolve(self.app, self.name)
        return handle

    @overload
    def call(
        self: Backend[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[Any, Any, T]: ...

    @overload
    def call(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]: ...

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call a replica and await the value. See `Handle.call`."""
        return self._handle.call(*args, **kwargs)

    def remote(self, *args: P.args, **kwargs: P.kwargs) -> Awaitable[Any]:
        """Call a replica and await a `ray.ObjectRef`. See `Handle.remote`."""
        return self._handle.remote(*args, **kwargs)

    @overload
    def stream(self: Backend[P, AsyncIterator[T]], *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]: ...

    @overload
    def stream(self: Backend[P, Iterator[T]], *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]: ...

    def stream(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        """Call a generator in a replica and iterate over its items. See `Handle.stream`."""
        return self._handle.stream(*args, **kwargs)

    def map(self, items: Any, *, max_in_flight: int = 64, ordered: bool = True) -> AsyncIterator[Any]:
        """Call a replica once per item. See `Handle.map`."""
        return self._handle.map(items, max_in_flight=max_in_flight, ordered=ordered)

    def options(self, **changes: Any) -> Handle[P, Any]:
        """The backend's handle with other options. See `Handle.options`."""
        return self._handle.options(**changes)


class BatchBackend(BackendRecord, Generic[A, B, R]):
    """A batch function that is served: called plainly it takes the list, `call` takes one item."""

    def __init__(
        self, app: App, target: Callable[[list[A]], R] | str, name: str, config: BackendConfig
    ) -> None:
        super().__init__(app, target, name, config)
        if not isinstance(target, str):
            functools.update_wrapper(self, target)

    def __call__(self, items: list[A]) -> R:
        result: R = self.load()(items)
        return result

    @property
    def _handle(self) -> Handle[[A], B]:
        handle: Handle[[A], B] = resolve(self.app, self.name)
        return handle

    def call(self, item: A) -> Coroutine[Any, Any, B]:
        """Put one item into a replica's next batch and await its result. See `Handle.call`."""
        return self._handle.call(item)

    def remote(self, item: A) -> Awaitable[Any]:
        """Put one item into a batch and await a `ray.ObjectRef`. See `Handle.remote`."""
        return self._handle.remote(item)

    def map(self, items: Any, *, max_in_flight: int = 64, ordered: bool = True) -> AsyncIterator[Any]:
        """Call a replica once per item. See `Handle.map`."""
        return self._handle.map(items, max_in_flight=max_in_flight, ordered=ordered)

    def options(self, **changes: Any) -> Handle[[A], B]:
        """The backend's handle with other options. See `Handle.options`."""
        return self._handle.options(**changes)


def describe(target: Any) -> str:
    """How messages name a function, class or import string."""
    if isinstance(target, str):
        return repr(target)
    return f"{getattr(target, '__module__', '?')}.{getattr(target, '__qualname__', repr(target))}"


def check_name(name: Any, where: str) -> str:
    """The name, if it is one that URLs, metrics and logs can carry."""
    if not isinstance(name, str):
        raise TypeError(f"{where}: name must be a str, got {name!r}")
    if not _NAME.fullmatch(name):
        hint = "; give name=" if name == "<lambda>" else ""
        raise ValueError(
            f"{where}: the name {name!r} may have only letters, digits, '_', '-', '.', a letter first{hint}"
        )
    return name


def check_target(record: BackendRecord, target: Any) -> None:
    """Everything that can be known to be wrong before anything runs.

    Raises:
        TypeError: the target, or an option, does not fit what it is.
        ValueError: a name in the options leads nowhere.
    """
    where = f"backend {record.name!r}"
    config = record.config
    if not callable(target):
        raise TypeError(f"{where}: expected a function, a class or 'module:attribute', got {target!r}")
    if not inspect.isclass(target):
        if not inspect.isroutine(target):
            raise TypeError(
                f"{where}: {target!r} is an instance; give its class, and init_args= for the constructor"
            )
        if record.init_args or record.init_kwargs:
            raise TypeError(
                f"{where}: init_args and init_kwargs are for classes; {describe(target)} is a function"
            )
        if config.batch_methods != (DEFAULT_METHOD,):
            raise ValueError(f"{where}: batch_methods are for classes; {describe(target)} is a function")
    if config.user_config is not None and not callable(getattr(target, "reconfigure", None)):
        raise TypeError(
            f"{where}: user_config needs a class with a method `reconfigure(self, user_config)`; "
            f"{describe(target)} has none"
        )
    if config.max_batch_size is not None:
        for name in config.batch_methods:
            _check_batch(find_method(target, name, config, record.name), where)


def find_method(target: Callable[..., Any], name: str, config: BackendConfig, backend: str) -> Method:
    """The `Method` of a function or class.

    Raises:
        AttributeError: there is none of that name that may be called.
    """
    if not inspect.isclass(target):
        if name != DEFAULT_METHOD:
            raise AttributeError(f"backend {backend!r} is a function and has no method {name!r}")
        return _method(name, target, False, config)
    function = inspect.getattr_static(target, name, None)
    of_class = not isinstance(function, (staticmethod, classmethod))
    plain = getattr(target, name, None)
    if (name.startswith("_") and name != DEFAULT_METHOD) or not callable(plain):
        raise AttributeError(
            f"backend {backend!r} has no method {name!r}: {did_you_mean(name, method_names(target))}"
        )
    return _method(name, plain, of_class, config)


def method_names(target: type[Any]) -> list[str]:
    """The methods of a class that may be called from outside."""
    return [
        name
        for name, value in inspect.getmembers(target, inspect.isroutine)
        if name == DEFAULT_METHOD or not (name.startswith("_") or name in LIFECYCLE)
        if getattr(value, "__objclass__", None) is not type
    ]


def _method(name: str, function: Callable[..., Any], of_class: bool, config: BackendConfig) -> Method:
    plain = inspect.unwrap(function)
    is_asyncgen = inspect.isasyncgenfunction(function) or inspect.isasyncgenfunction(plain)
    return Method(
        name=name,
        function=function,
        of_class=of_class,
        is_async=inspect.iscoroutinefunction(function) or is_asyncgen,
        is_generator=is_asyncgen or inspect.isgeneratorfunction(function),
        is_batch=config.max_batch_size is not None and name in config.batch_methods,
    )


def _check_batch(method: Method, where: str) -> None:
    what = f"{where}: {describe(method.function)}"
    if method.is_generator:
        raise TypeError(
            f"{what} is a generator; a batch function returns one result per item (max_batch_size)"
        )
    parameters = list(inspect.signature(method.function).parameters.values())[method.of_class :]
    required = [parameter for parameter in parameters if parameter.default is parameter.empty]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if not parameters or parameters[0].kind not in kinds or len(required) > 1 or len(parameters) > 1:
        names = ", ".join(map(str, parameters)) or "none"
        raise TypeError(
            f"{what} is called with batches (max_batch_size) and must take exactly one parameter, "
            f"`items: list[T]`; it takes {names}"
        )

"""A backend: the user's function or class plus its `BackendConfig`. A record; nothing runs here.

`Backend` is what `@app.backend` makes of a function: the plain function still, when called, and the
handle's calls beside it. Classes are registered by the same record and stay what they are.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, overload

from serveit.context import resolve
from serveit.declare.target import (
    Method,
    check_batch,
    check_kind,
    describe,
    find_method,
    method_names,
)
from serveit.importer import import_from_string
from serveit.types import DEFAULT_METHOD

if TYPE_CHECKING:
    from serveit.calling.handle import Handle
    from serveit.config import BackendConfig
    from serveit.declare.app import App

__all__ = [
    "Backend",
    "BackendRecord",
    "BatchBackend",
    "Method",
    "find_backend",
    "make_backend",
    "registered_already",
]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")


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
        self.init_args = _as_arguments(init_args, name)
        self.init_kwargs = dict(init_kwargs or {})
        self._loaded: Callable[..., Any] | None = None
        if not isinstance(target, str):
            check_target(self, target)
            self._loaded = target

    def __repr__(self) -> str:
        return f"<Backend {self.name!r} {describe(self.target)}>"

    def load(self) -> Callable[..., Any]:
        """The function or class itself, imported if it was given by name.

        Raises:
            ImportFailed: the import string leads nowhere.
            TypeError, ValueError: what it leads to does not fit the options.
        """
        if self._loaded is None:
            target = import_from_string(str(self.target))
            if isinstance(target, BackendRecord):
                target = target.load()
            check_target(self, target)
            self._loaded = target
        return self._loaded

    @property
    def is_loaded(self) -> bool:
        """Whether it is known what it is; of an import string only replicas need to know."""
        return self._loaded is not None

    @property
    def is_async(self) -> bool:
        """Whether its `__call__` runs on the event loop rather than in a thread.

        A class without one goes by its other methods: on the loop if all of them are.
        """
        target = self.load()
        names = [DEFAULT_METHOD]
        if inspect.isclass(target):
            known = method_names(target)
            names = [DEFAULT_METHOD] if DEFAULT_METHOD in known else known
        return bool(names) and all(self.method(name).is_async for name in names)

    @property
    def takes_user_config(self) -> bool | None:
        """Whether there is a `reconfigure` to hand it to; None for what is imported by replicas only."""
        return None if self._loaded is None else _reconfigures(self._loaded)

    def configured(self, config: BackendConfig) -> BackendRecord:
        """The same backend with another configuration.

        Raises:
            TypeError, ValueError: its function or class does not fit that.
        """
        return BackendRecord(self.app, self.target, self.name, config, self.init_args, self.init_kwargs)

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

    def __init__(
        self,
        app: App,
        target: Callable[P, R] | str,
        name: str,
        config: BackendConfig,
        init_args: Sequence[Any] = (),
        init_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        _look_like(self, target)
        super().__init__(app, target, name, config, init_args, init_kwargs)

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

    @overload
    def options(self: Backend[P, Coroutine[Any, Any, T]], **changes: Any) -> Handle[P, T]: ...

    @overload
    def options(self, **changes: Any) -> Handle[P, R]: ...

    def options(self, **changes: Any) -> Any:
        """The backend's handle with other options. See `Handle.options`."""
        return self._handle.options(**changes)


class BatchBackend(BackendRecord, Generic[A, B, R]):
    """A batch function that is served: called plainly it takes the list, `call` takes one item."""

    def __init__(
        self, app: App, target: Callable[[list[A]], R] | str, name: str, config: BackendConfig
    ) -> None:
        _look_like(self, target)
        super().__init__(app, target, name, config)

    def __call__(self, items: list[A], /) -> R:
        result: R = self.load()(items)
        return result

    @property
    def _handle(self) -> Handle[[A], B]:
        handle: Handle[[A], B] = resolve(self.app, self.name)
        return handle

    def call(self, item: A, /) -> Coroutine[Any, Any, B]:
        """Put one item into a replica's next batch and await its result. See `Handle.call`."""
        return self._handle.call(item)

    def remote(self, item: A, /) -> Awaitable[Any]:
        """Put one item into a batch and await a `ray.ObjectRef`. See `Handle.remote`."""
        return self._handle.remote(item)

    def map(self, items: Any, *, max_in_flight: int = 64, ordered: bool = True) -> AsyncIterator[Any]:
        """Call a replica once per item. See `Handle.map`."""
        return self._handle.map(items, max_in_flight=max_in_flight, ordered=ordered)

    def options(self, **changes: Any) -> Handle[[A], B]:
        """The backend's handle with other options. See `Handle.options`."""
        return self._handle.options(**changes)


def make_backend(
    app: App,
    target: Any,
    name: str,
    config: BackendConfig,
    init_args: Sequence[Any] = (),
    init_kwargs: Mapping[str, Any] | None = None,
) -> BackendRecord:
    """The record for a target: what is called by its function is a `Backend` or `BatchBackend`."""
    if inspect.isclass(target):
        return BackendRecord(app, target, name, config, init_args, init_kwargs)
    if isinstance(target, str):
        return Backend(app, target, name, config, init_args, init_kwargs)
    if init_args or init_kwargs:
        raise TypeError(_no_arguments(f"backend {name!r}", target))
    return (Backend if config.max_batch_size is None else BatchBackend)(app, target, name, config)


def find_backend(
    backends: Mapping[str, BackendRecord], target: Any, where: str
) -> tuple[BackendRecord, str] | None:
    """The backend, and the name of its method, that a function, class or method means.

    Raises:
        TypeError: a method that several classes share by inheritance; nothing tells which is meant.
    """
    for record in backends.values():
        if record is target or record.target is target:
            return record, DEFAULT_METHOD
    name = getattr(target, "__name__", "")
    found = [
        record
        for record in backends.values()
        if name and inspect.isclass(record.target) and _is_same(getattr(record.target, name, None), target)
    ]
    if len({record.target for record in found}) > 1:
        names = " and ".join(repr(record.name) for record in found)
        raise TypeError(
            f"{where}: {describe(target)} is a method of the backends {names}: say which one by its name "
            f"and method_name={name!r}"
        )
    return (found[0], name) if found else None


def check_target(record: BackendRecord, target: Any) -> None:
    """Everything that can be known to be wrong before anything runs.

    Raises:
        TypeError: the target, or an option, does not fit what it is.
    """
    where = f"backend {record.name!r}"
    config = record.config
    check_kind(target, where)
    if inspect.isclass(target):
        _check_constructor(record, target, where)
    else:
        if record.init_args or record.init_kwargs:
            raise TypeError(_no_arguments(where, target))
        if config.batch_methods != (DEFAULT_METHOD,):
            raise ValueError(f"{where}: batch_methods are for classes; {describe(target)} is a function")
    if config.user_config is not None and not _reconfigures(target):
        raise TypeError(no_reconfigure(record.name))
    if config.max_batch_size is not None:
        for name in config.batch_methods:
            check_batch(_batch_method(target, name, record), where)


def no_reconfigure(name: str) -> str:
    """What to say to a `user_config` for a backend that takes none."""
    return (
        f"backend {name!r} takes no user_config: it needs a class with a method "
        "`reconfigure(self, user_config)`"
    )


def _reconfigures(target: Any) -> bool:
    return inspect.isclass(target) and callable(getattr(target, "reconfigure", None))


def registered_already(backend: BackendRecord, app: App) -> TypeError:
    """What to say to `@app.backend` on a backend."""
    what = describe(backend.target)
    if backend.app is not app:
        return TypeError(
            f"{what} is backend {backend.name!r} of another app: leave its decorator out, and register "
            "the function with both apps by app.backend(function)"
        )
    if any(backend.name in dict(route.traffic.weights) for route in app.routes):
        return TypeError(
            f"{what} is backend {backend.name!r} already: write @app.route above @app.backend, not below it"
        )
    return TypeError(f"{what} is backend {backend.name!r} already: one @app.backend is enough")


def _look_like(wrapper: Any, target: Any) -> None:
    """Take over the function's name, text and signature. First of all: its attributes may be called
    as ours are, and ours have to win."""
    if not isinstance(target, str):
        functools.update_wrapper(wrapper, target)


def _is_same(attribute: Any, target: Any) -> bool:
    """Class methods are made anew at each access."""
    return attribute is target or (inspect.ismethod(target) and bool(attribute == target))


def _as_arguments(init_args: Any, name: str) -> tuple[Any, ...]:
    if isinstance(init_args, (str, bytes)) or not isinstance(init_args, Iterable):
        raise TypeError(
            f"backend {name!r}: init_args must be a tuple or list of arguments, got {init_args!r}: "
            f"write init_args=({init_args!r},)"
        )
    return tuple(init_args)


def _no_arguments(where: str, target: Any) -> str:
    return f"{where}: init_args and init_kwargs are for classes; {describe(target)} is a function"


def _check_constructor(record: BackendRecord, target: type[Any], where: str) -> None:
    try:
        signature = inspect.signature(target)
    except (ValueError, TypeError):  # written in C, or told by nobody
        return
    try:
        signature.bind(*record.init_args, **record.init_kwargs)
    except TypeError as error:
        raise TypeError(
            f"{where}: {describe(target)} cannot be constructed: {error}; "
            "its arguments are init_args=(...) and init_kwargs={...}"
        ) from None


def _batch_method(target: Any, name: str, record: BackendRecord) -> Method:
    try:
        return find_method(target, name, record.config, record.name)
    except AttributeError as error:
        way_out = ""
        if record.config.batch_methods == (DEFAULT_METHOD,):
            way_out = " (max_batch_size is for batch_methods, by default `__call__`)"
        raise TypeError(f"{error}{way_out}") from None

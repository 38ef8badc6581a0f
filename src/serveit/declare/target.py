"""What can be a backend: functions, classes and import strings, and the callables that they have.

Asked when a backend is declared, and once more by its replicas.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serveit.config import did_you_mean
from serveit.types import DEFAULT_METHOD

if TYPE_CHECKING:
    from serveit.config import BackendConfig

LIFECYCLE = ("setup", "reconfigure", "check_health", "aclose", "close")
"""Methods that serveit calls by itself; requests can't."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")


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

    @property
    def takes_thread(self) -> bool:
        """Whether it begins only when a thread is free for it."""
        return not (self.is_async or self.is_generator)


def describe(target: Any) -> str:
    """How messages name a function, class or import string."""
    name = getattr(target, "__qualname__", None)
    if name is None or isinstance(target, str):
        return repr(target)
    return f"{getattr(target, '__module__', '?')}.{name}"


def choose_name(target: Any, name: Any, where: str) -> str:
    """The backend's name: as given, else the function's or class's own.

    Raises:
        TypeError: there is none, or it is no str.
        ValueError: it is none that URLs, metrics and logs can carry.
    """
    if name is None:
        if isinstance(target, str):
            raise TypeError(f"{where}({target!r}) needs name=: the target is imported by replicas only")
        name = getattr(target, "__name__", None)
        if name is None or name == "<lambda>":
            raise TypeError(
                f"{where}: {describe(target)} has no name of its own: write app.backend(..., name=...)"
            )
    if not isinstance(name, str):
        raise TypeError(f"{where}: name must be a str, got {name!r}")
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{where}: the name {name!r} may have only letters, digits, '_', '-', '.', a letter or '_' first"
        )
    return name


def check_kind(target: Any, where: str) -> None:
    """Whether it is anything that can be served at all.

    Raises:
        TypeError: an instance, a method in a class body, or nothing that can be called.
    """
    if isinstance(target, str):
        module, _, attribute = target.partition(":")
        if not module or not attribute:
            raise TypeError(f"{where}: {target!r} is no import string: write 'package.module:attribute'")
        return
    if isinstance(target, (staticmethod, classmethod)):
        target = target.__func__
    outer, _, _ = getattr(target, "__qualname__", "").rpartition(".")
    if inspect.isfunction(target) and outer and not outer.endswith("<locals>"):
        # There is no instance that such a function could be called on.
        raise TypeError(
            f"{where} on the method {target.__qualname__}: put @app.backend on the class and lead a path "
            f'to the method with app.add_route("/path", {outer.rpartition(".")[2]}.{target.__name__})'
        )
    if not callable(target):
        raise TypeError(f"{where}: expected a function, a class or 'module:attribute', got {target!r}")
    if not (inspect.isclass(target) or inspect.isroutine(target) or isinstance(target, functools.partial)):
        kind = type(target).__qualname__
        raise TypeError(
            f"{where}: {target!r} is an instance; give its class, {kind}, and init_args= for the constructor"
        )


def find_method(target: Callable[..., Any], name: str, config: BackendConfig, backend: str) -> Method:
    """The `Method` of a function or class.

    Raises:
        AttributeError: there is none of that name that may be called.
    """
    if not inspect.isclass(target):
        if name != DEFAULT_METHOD:
            raise AttributeError(f"backend {backend!r} is a function and has no method {name!r}")
        return _method(name, target, False, config)
    if name in LIFECYCLE:
        raise AttributeError(f"{name}() of backend {backend!r} is called by serveit itself, not by requests")
    # Not with getattr: every class has `__call__`, its metaclass's.
    function = next((vars(kind)[name] for kind in target.__mro__ if name in vars(kind)), None)
    plain = getattr(target, name, None)
    hidden = name.startswith("_") and name != DEFAULT_METHOD
    if function is None or hidden or inspect.isclass(plain) or not callable(plain):
        raise AttributeError(
            f"backend {backend!r} has no method {name!r}: {did_you_mean(name, method_names(target))}"
        )
    return _method(name, plain, not isinstance(function, (staticmethod, classmethod)), config)


def method_names(target: type[Any]) -> list[str]:
    """The methods of a class that may be called from outside."""
    return [
        name
        for name, value in inspect.getmembers(target, inspect.isroutine)
        if name == DEFAULT_METHOD or not (name.startswith("_") or name in LIFECYCLE)
        if any(name in vars(kind) for kind in target.__mro__)
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


def check_batch(method: Method, where: str) -> None:
    """Whether it can be called with lists.

    Raises:
        TypeError: a generator, or it takes more or less than one parameter.
    """
    what = f"{where}: {describe(method.function)}"
    if method.is_generator:
        raise TypeError(
            f"{what} is a generator; a batch function returns one result per item: "
            "`return` a list, or leave max_batch_size out"
        )
    parameters = list(inspect.signature(method.function).parameters.values())[method.of_class :]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if len(parameters) != 1 or parameters[0].kind not in kinds:
        names = ", ".join(map(str, parameters)) or "none"
        raise TypeError(
            f"{what} is called with batches (max_batch_size) and must take exactly one parameter, "
            f"`items: list[T]`; it takes {names}"
        )

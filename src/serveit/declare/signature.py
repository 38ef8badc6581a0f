"""What a user's function says about its parameters, read once when a route is declared.

Before binding.py, which decides where each parameter comes from; the markers with which a user
decides it himself stand here too.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

UNANNOTATED: Any = inspect.Parameter.empty
REQUIRED: Any = inspect.Parameter.empty

_VARIADIC: dict[object, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


@dataclass(frozen=True, slots=True)
class Body:
    """`Annotated[T, Body()]`: the parameter is the request's body, decoded from JSON (`bytes`: as it is)."""


@dataclass(frozen=True, slots=True)
class Query:
    """`Annotated[T, Query()]`: the parameter comes from the query; a list, set or tuple from repeated keys.

    Attributes:
        alias: the key in the query, if it is not the parameter's name.
    """

    alias: str | None = None


@dataclass(frozen=True, slots=True)
class Header:
    """`Annotated[T, Header()]`: the parameter comes from a header; a list from a repeated one.

    Attributes:
        alias: the header's name, in any case. None: the parameter's, with "-" for "_".
    """

    alias: str | None = None


Marker = Body | Query | Header
_MARKERS = (Body, Query, Header)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter, annotation evaluated.

    Attributes:
        annotation: `UNANNOTATED` if there is none.
        default: `REQUIRED` if there is none.
        marker: the one in its `Annotated`, if any.
    """

    name: str
    annotation: Any
    default: Any
    keyword_only: bool
    marker: Marker | None


@dataclass(frozen=True, slots=True)
class Signature:
    """The parameters that a request has to give.

    Attributes:
        owner: where the function is used and its name, for errors: "route '/x': user()".
    """

    owner: str
    parameters: tuple[Parameter, ...]

    def refusal(self, parameter: Parameter | None, text: str) -> TypeError:
        """The error to raise: it names the function and the parameter; `text` names the way out."""
        return _refusal(self.owner, parameter.name if parameter else None, text)


def read_signature(func: Callable[..., Any], *, drop_first: bool, where: str) -> Signature:
    """The parameters of `func`.

    Args:
        func: a function, an unbound method or another callable.
        drop_first: `func` is an unbound method: its `self` is not a parameter.
        where: who uses it, for errors.

    Raises:
        TypeError: it has `*args` or `**kwargs`, an annotation that cannot be evaluated, or markers
            that contradict each other.
    """
    owner = f"{where}: {_name(func)}()"
    parameters = _evaluated(func, owner)
    if drop_first:
        if not parameters or parameters[0].kind in (*_VARIADIC, inspect.Parameter.KEYWORD_ONLY):
            raise _refusal(owner, None, "is a method without `self`: write it as the first parameter")
        parameters = parameters[1:]
    return Signature(owner, tuple(_read_parameter(parameter, owner) for parameter in parameters))


def type_name(annotation: Any) -> str:
    """How an annotation is written in errors: "dict", "list[int]", without the extras of Annotated."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__qualname__
    return repr(annotation).replace("typing.", "")


def _evaluated(func: Callable[..., Any], owner: str) -> list[inspect.Parameter]:
    try:
        plain = inspect.signature(func)
    except (ValueError, TypeError):
        raise _refusal(
            owner, None, "has no signature that can be read: wrap it in a function with annotated parameters"
        ) from None
    try:
        return list(inspect.signature(func, eval_str=True).parameters.values())
    except Exception:  # whatever evaluating a user's text raises; the return annotation may be the culprit
        return [_evaluate(parameter, func, owner) for parameter in plain.parameters.values()]


def _evaluate(parameter: inspect.Parameter, func: Callable[..., Any], owner: str) -> inspect.Parameter:
    if not isinstance(parameter.annotation, str):
        return parameter
    try:
        return parameter.replace(annotation=eval(parameter.annotation, _globals(func)))
    except Exception as error:
        raise _refusal(
            owner,
            parameter.name,
            f"is annotated {parameter.annotation!r}, which cannot be evaluated ({error}): define its names "
            "at module level and import them at run time, not only under `if TYPE_CHECKING:`",
        ) from error


def _globals(func: Any) -> dict[str, Any]:
    """The names that the annotations of `func` see, found as `inspect.signature` does."""
    while True:
        if isinstance(func, functools.partial):
            func = func.func
        elif hasattr(func, "__wrapped__"):
            func = func.__wrapped__
        elif hasattr(func, "__globals__"):
            return dict(func.__globals__)
        else:
            return dict(vars(sys.modules[func.__module__]))


def _read_parameter(parameter: inspect.Parameter, owner: str) -> Parameter:
    if stars := _VARIADIC.get(parameter.kind):
        raise _refusal(
            owner,
            f"{stars}{parameter.name}",
            "cannot be bound to a request: name each parameter, or take the whole `request: Request`",
        )
    if isinstance(parameter.default, _MARKERS):
        written = type(parameter.default).__name__
        raise _refusal(
            owner,
            parameter.name,
            f"has {written}() as its default: write `{parameter.name}: Annotated[..., {written}()]`",
        )
    return Parameter(
        parameter.name,
        parameter.annotation,
        parameter.default,
        parameter.kind is inspect.Parameter.KEYWORD_ONLY,
        _marker(parameter, owner),
    )


def _marker(parameter: inspect.Parameter, owner: str) -> Marker | None:
    annotation = parameter.annotation
    found: list[Marker] = []
    for part in (annotation, *get_args(annotation)):  # in `Annotated[int, Query("n")] | None` as well
        extras = get_args(part)[1:] if get_origin(part) is Annotated else ()
        found += [extra for extra in extras if isinstance(extra, _MARKERS)]
        found += [marker() for marker in _MARKERS if any(extra is marker for extra in extras)]
    if len(found) > 1:
        names = " and ".join(type(marker).__name__ for marker in found)
        raise _refusal(owner, parameter.name, f"is marked {names}: keep one of them")
    return found[0] if found else None


def _refusal(owner: str, name: str | None, text: str) -> TypeError:
    return TypeError(f"{owner}: parameter {name!r} {text}" if name else f"{owner} {text}")


def _name(func: Any) -> str:
    if isinstance(func, functools.partial):
        func = func.func
    return getattr(func, "__qualname__", None) or type(func).__qualname__

"""Whose the values are that travel with an app: for the errors of `byvalue`, which have to name one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from serveit.declare.app import App
from serveit.declare.backend import BackendRecord
from serveit.declare.target import describe

if TYPE_CHECKING:
    from collections.abc import Iterable

DEFINITIONS = (ModuleType, FunctionType, BuiltinFunctionType, type, App, BackendRecord)
"""What goes by reference if it can, or else has luggage of its own."""

NAMED = 3
"""So many of the largest are named."""


class Piece(NamedTuple):
    """Something that travels because a function, class or backend has it."""

    what: str
    value: Any


class Weight(NamedTuple):
    """How large a pickle is.

    Attributes:
        size: in octets.
        is_cut: there is more, which was not counted.
    """

    size: int
    is_cut: bool

    def __str__(self) -> str:
        return f"{'over ' if self.is_cut else ''}{self.size / 2**20:,.1f} MiB"


Weigh = Callable[[Any], Weight]
"""Pickles a value to nowhere; raises what pickling it raises."""


def pieces_of_function(function: FunctionType, used: Mapping[str, Any]) -> list[Piece]:
    """What a function by value takes along; `used` are its globals."""
    return [
        *_pieces("global", used, function),
        *_pieces("closure variable", _closure(function), function),
        *_pieces("default", _defaults(function), function),
    ]


def pieces_of_class(target: type[Any], attributes: Mapping[str, Any]) -> list[Piece]:
    """What a class by value takes along."""
    return _pieces("attribute", attributes, target)


def pieces_of_backends(app: App) -> Iterator[Piece]:
    """What backends give their classes."""
    for record in app.backends.values():
        where = f"of backend {record.name!r}"
        for position, value in enumerate(record.init_args):
            yield Piece(f"argument init_args[{position}] {where}", value)
        for name, value in record.init_kwargs.items():
            yield Piece(f"argument init_kwargs[{name!r}] {where}", value)
        yield Piece(f"user_config {where}", record.config.user_config)


def find_unpicklable(pieces: Iterable[Piece], weigh: Weigh) -> tuple[Piece, Exception] | None:
    """The first that cannot be pickled, and why."""
    for piece in pieces:
        try:
            weigh(piece.value)
        except Exception as error:
            return piece, error
    return None


def find_largest(pieces: Iterable[Piece], weigh: Weigh, time_s: float) -> str:
    """The largest, in words; those that are found in that time."""
    end = time.monotonic() + time_s
    weighed: dict[int, tuple[Weight, str]] = {}
    for piece in pieces:
        if id(piece.value) not in weighed and time.monotonic() < end:
            try:
                weighed[id(piece.value)] = weigh(piece.value), piece.what
            except Exception:  # counting the app was cut before it got there
                continue
    largest = sorted(weighed.values(), reverse=True)[:NAMED]
    named = [f"the {what} ({weight})" for weight, what in largest if weight.size * 10 >= largest[0][0].size]
    return ", ".join(named) or "its code"


def _pieces(what: str, named: Mapping[str, Any], owner: Any) -> list[Piece]:
    kind = "class" if isinstance(owner, type) else "function"
    return [
        Piece(f"{what} {name!r} of the {kind} {describe(owner)}", value)
        for name, value in named.items()
        if not issubclass(type(value), DEFINITIONS)
    ]


def _closure(function: FunctionType) -> dict[str, Any]:
    named = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            named[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return named


def _defaults(function: FunctionType) -> dict[str, Any]:
    code, defaults = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
    return {**dict(zip(names, defaults, strict=True)), **(function.__kwdefaults__ or {})}

"""An app that cannot be imported (a script's, a notebook's, a function's) as octets and back.

cloudpickle with narrower rules: what another process can import goes by reference, also where
cloudpickle would copy it with its globals; and what is too large, or cannot be pickled, is named.
Importing this imports Ray, so `shipping` does it only where an app has to travel so.
"""

from __future__ import annotations

import ast
import builtins
import functools
import io
import pickle
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, NewType, get_args

import msgspec
from ray.cloudpickle import cloudpickle as _cloudpickle

from serveit.cluster.luggage import (
    DEFINITIONS,
    Piece,
    Weight,
    find_largest,
    find_unpicklable,
    pieces_of_backends,
    pieces_of_class,
    pieces_of_function,
)
from serveit.cluster.references import attribute, backend_of, holds_no, import_module, unwrapped
from serveit.cluster.structs import reduce_struct
from serveit.declare.app import App
from serveit.declare.backend import BackendRecord

if TYPE_CHECKING:
    from serveit.cluster.references import References

cloudpickle: Any = _cloudpickle
"""Untyped. Beside its Pickler, five functions of it are relied on, all of which the tests run."""

_NewType: Any = NewType
"""Untyped: the checker takes each call of it for a declaration."""

MAX_BYTES = 2**20
"""Each replica gets a copy, and the checkpoint of the instance holds one."""

MAX_MEASURED = 2**28
MAX_MEASURING_S = 5.0
"""Where weighing what is too large ends: its pickle may have no end."""

_OF_CACHES = (*functools.WRAPPER_ASSIGNMENTS, "__wrapped__", "cache_parameters")
"""What `lru_cache` itself gives what it makes."""

_WAY_OUT = "in the class's __init__, or put the app into a module and serve it as 'module:app'"


def dump(app: App, references: References) -> bytes:
    """Pickle an app, and then what its definitions need to find in their modules.

    Raises:
        ValueError: larger than `MAX_BYTES`; the text names what makes it so.
        TypeError: something in it cannot be pickled; the text names it.
    """
    sink = _Sink()
    pickler = _Pickler(sink, references, app)
    try:
        pickler.dump(app)
        while surroundings := pickler.take_surroundings():
            pickler.dump(surroundings)
        pickler.dump({})
    except _Enough:
        pass
    except Exception as error:
        raise _unpicklable(app, pickler, error) from error
    if sink.size > MAX_BYTES:
        raise _too_large(app, pickler, sink)
    return sink.getvalue()


def load(pickled: bytes) -> App:
    """The app again.

    Puts what a script defines into this process's `__main__`, too: there annotations that are text
    are looked up, and what is pickled later by name, such as arguments and results.

    Raises:
        ImportFailed: it refers to what is not here.
    """
    unpickler = _Unpickler(io.BytesIO(pickled))
    app: App = unpickler.load()
    while surroundings := unpickler.load():
        for name, definitions in surroundings.items():
            if definitions:
                vars(sys.modules.setdefault(name, ModuleType(name))).update(definitions)
            else:
                import_module(name)
    return app


class _Enough(Exception):
    """There is no need to weigh on."""


class _Sink:
    """Keeps what may travel and counts the rest."""

    def __init__(self) -> None:
        self.size = 0
        self._is_cut = False
        self._kept = io.BytesIO()
        self._deadline = time.monotonic() + MAX_MEASURING_S

    def write(self, octets: Any) -> None:
        self.size += memoryview(octets).nbytes
        if self.size <= MAX_BYTES:
            self._kept.write(octets)
        elif self.size > MAX_MEASURED or time.monotonic() > self._deadline:
            self._is_cut = True
            raise _Enough

    def weight(self) -> Weight:
        return Weight(self.size, self._is_cut)

    def getvalue(self) -> bytes:
        return self._kept.getvalue()


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Decides object by object between reference and value, and notes whose the values are."""

    def __init__(self, sink: _Sink, references: References, app: App) -> None:
        super().__init__(sink, protocol=5)
        self.references = references
        self.app = app
        self.pieces: list[Piece] = []
        self._surroundings: dict[str, dict[str, Any]] = {}
        self._sent: set[tuple[str, str]] = set()

    def take_surroundings(self) -> dict[str, dict[str, Any]]:
        """What was noted since the last time: definitions to put into modules, by module and name.
        A module without any is one to import."""
        taken, self._surroundings = self._surroundings, {}
        return taken

    def reducer_override(self, obj: Any) -> Any:
        """By reference what can be; called for everything but plain data."""
        kind = type(obj)
        if issubclass(kind, App):
            held = self.references.holder(obj)
            return NotImplemented if held is None else (attribute, tuple(held))
        if issubclass(kind, BackendRecord):
            return self._reduce_backend(obj)
        if isinstance(obj, ModuleType) and sys.modules.get(obj.__name__) is obj:
            return import_module, (obj.__name__,)
        if issubclass(kind, io.TextIOWrapper) and obj not in (sys.stdout, sys.stderr):
            raise TypeError("cannot pickle an open file")  # cloudpickle would read it
        if issubclass(kind, (FunctionType, type)):
            return self._reduce_definition(obj)
        if self._is_lost(obj):
            return self._reduce_lost(obj)
        return super().reducer_override(obj)

    def _is_lost(self, obj: Any) -> bool:
        """Whether it has a name, by which it may want to go, and which leads to nothing in replicas."""
        module = getattr(obj, "__module__", None)
        name = getattr(obj, "__qualname__", None) or getattr(obj, "__name__", None)
        if module is None or name is None or type(obj) in self.dispatch_table:
            return False
        return not self.references.finds(obj, module, name)

    def _reduce_lost(self, obj: Any) -> Any:
        if isinstance(obj, functools._lru_cache_wrapper):
            options = obj.cache_parameters()
            own = {name: value for name, value in vars(obj).items() if name not in _OF_CACHES}
            return cached, (obj.__wrapped__, options["maxsize"], options["typed"]), own
        if isinstance(obj, _NewType):
            return new_type, (obj.__qualname__, obj.__supertype__, obj.__module__)
        reduced = super().reducer_override(obj)
        if reduced is NotImplemented and isinstance(name := obj.__reduce_ex__(5), str):
            raise TypeError(f"it would go by its name, {name!r}, which only this process knows it by")
        return reduced

    def _reduce_backend(self, record: BackendRecord) -> Any:
        if record.app is not self.app:  # its own are copied with it, so that they stay its own
            held = self.references.holder(record)
            if held is not None:
                return attribute, tuple(held)
            owner = self.references.holder(record.app)
            if owner is not None:
                return backend_of, (record.app, record.name, ":".join(owner))
        state = dict(vars(record))
        if isinstance(record.target, str):
            state["_loaded"] = None  # only replicas import it
        return blank, (type(record),), state

    def _reduce_definition(self, target: Any) -> Any:
        hidden = self.references.hidden(target)
        if hidden is not None:
            return unwrapped, tuple(hidden)
        if not self.references.is_in_memory(getattr(target, "__module__", None)):
            reduced = super().reducer_override(target)
        elif isinstance(target, FunctionType):
            reduced = self._dynamic_function_reduce(target)
        else:
            reduced = cloudpickle._dynamic_class_reduce(target)
        if isinstance(target, type) and isinstance(reduced, tuple) and len(reduced) > 2:
            return self._reduce_class(target, reduced)
        return reduced

    def _reduce_class(self, target: type[Any], reduced: Any) -> Any:
        """cloudpickle's, for a class by value, except for what msgspec makes of it."""
        attributes, _ = reduced[2]
        attributes.pop("__msgspec_cache__", None)  # cannot be pickled, and is made again
        self.pieces += pieces_of_class(target, attributes)
        self._note(target, names_in(vars(target).get("__annotations__", {})))
        return reduce_struct(target) if issubclass(target, msgspec.Struct) else reduced

    def _dynamic_function_reduce(self, function: FunctionType) -> Any:
        """cloudpickle's, with the names in annotations, and without the data of an importable module,
        which stays in that module."""
        reduced = super()._dynamic_function_reduce(function)
        _, (code, _, _, _, cells), (attributes, slots), *_, set_state = reduced
        used = slots["__globals__"]
        known = function.__globals__
        used.update({name: known[name] for name in names_in(function.__annotations__) if name in known})
        home = self.references.home(function)
        if home is not None and _uses_data(function, used):
            slots["__globals__"] = used = {}
            reduced = make_function, (home, code, cells), (attributes, slots), None, None, set_state
        self.pieces += pieces_of_function(function, used)
        self._note(function, ())
        return reduced

    def _note(self, definition: Any, names: Iterable[str]) -> None:
        """Names that are looked up in the module of a definition, its own among them."""
        module = definition.__module__
        if not isinstance(module, str) or module not in sys.modules:
            return
        known = vars(sys.modules[module])
        found = {name: known[name] for name in names if name in known}
        if self.references.can_import(module):
            if found:
                self._surround(module, "", {})
            return
        name = definition.__name__
        if known.get(name) is definition:
            found[name] = definition
        for name, value in found.items():
            self._surround(module, name, {name: value})

    def _surround(self, module: str, name: str, definitions: Mapping[str, Any]) -> None:
        if (module, name) not in self._sent:
            self._sent.add((module, name))
            self._surroundings.setdefault(module, {}).update(definitions)


class _Scales(_Pickler):
    """Weighs one piece without what has pieces of its own."""

    def reducer_override(self, obj: Any) -> Any:
        if issubclass(type(obj), (App, BackendRecord)):
            return str, ()
        reduced = super().reducer_override(obj)
        is_definition = issubclass(type(obj), (FunctionType, type))
        return (str, ()) if is_definition and isinstance(reduced, tuple) else reduced

    def weigh(self, value: Any) -> None:
        try:
            self.dump(value)
        except _Enough:
            pass


class _Unpickler(pickle.Unpickler):
    """Follows references with words for what is not here."""

    def find_class(self, module: str, name: str) -> Any:
        import_module(module)
        try:
            return super().find_class(module, name)
        except AttributeError:
            raise holds_no(module, name) from None


def blank(kind: type[BackendRecord]) -> BackendRecord:
    """A record to be filled: its state leads back to it."""
    return kind.__new__(kind)


def cached(function: Any, maxsize: int | None, typed: bool) -> Any:
    """A function with `functools.cache` or `lru_cache`, and nothing in its cache."""
    return functools.lru_cache(maxsize, typed)(function)


def new_type(name: str, supertype: Any, module: str) -> Any:
    made = _NewType(name, supertype)
    made.__module__ = module
    return made


def make_function(module: str, code: Any, cells: Any) -> FunctionType:
    """A local function of a module that is imported here: it shares the module's globals."""
    return FunctionType(code, vars(import_module(module)), None, None, cells)


def names_in(annotations: Mapping[str, Any]) -> Iterator[str]:
    """The names in annotations that are text, or have text in them; cloudpickle sees only code."""
    for annotation in annotations.values():
        yield from _names(annotation)


def _names(annotation: Any) -> Iterator[str]:
    text = getattr(annotation, "__forward_arg__", annotation)
    if isinstance(text, str):
        try:
            tree = ast.parse(text, mode="eval")
        except (SyntaxError, ValueError):
            return
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                yield node.id
            elif isinstance(node, ast.Constant):
                yield from _names(node.value)
    for argument in get_args(annotation):
        yield from _names(argument)


def _uses_data(function: FunctionType, used: Mapping[str, Any]) -> bool:
    """Whether it reads, or writes, more globals than definitions, which go by reference."""
    names = cloudpickle._extract_code_globals(function.__code__)
    written = any(name not in used and not hasattr(builtins, name) for name in names)
    return written or not all(issubclass(type(value), DEFINITIONS) for value in used.values())


def _unpicklable(app: App, pickler: _Pickler, error: Exception) -> TypeError:
    found = find_unpicklable(_luggage(app, pickler), lambda value: _weigh(value, pickler))
    if found is None:
        return TypeError(
            f"{_name(app)} cannot travel to its replicas, it cannot be pickled "
            f"({type(error).__name__}: {error}): put it into a module and serve it as 'module:app'"
        )
    piece, reason = found
    return TypeError(
        f"{_name(app)} cannot travel to its replicas: the {piece.what} is of type "
        f"{type(piece.value).__name__} and cannot be pickled ({reason}): make it {_WAY_OUT}"
    )


def _too_large(app: App, pickler: _Pickler, sink: _Sink) -> ValueError:
    largest = find_largest(_luggage(app, pickler), lambda value: _weigh(value, pickler), MAX_MEASURING_S)
    return ValueError(
        f"{_name(app)} cannot be imported by its replicas, so it travels by value, and is too large for "
        f"that: {sink.weight()}, at most 1 MiB; the largest in it: {largest}: load it {_WAY_OUT}"
    )


def _luggage(app: App, pickler: _Pickler) -> list[Piece]:
    return [*pickler.pieces, *pieces_of_backends(app)]


def _weigh(value: Any, pickler: _Pickler) -> Weight:
    sink = _Sink()
    _Scales(sink, pickler.references, pickler.app).weigh(value)
    return sink.weight()


def _name(app: App) -> str:
    main = sys.modules.get("__main__")
    names = [name for name, value in list(vars(main).items()) if value is app]
    return f"the app {names[0]!r} of {getattr(main, '__file__', 'this session')}" if names else repr(app)

"""From an HTTP request to the arguments of a user's function; decided once per route and backend.

Runs in the replica, after routing has found the route and before the function is called.
Hot path: `Binding.bind`, once per request. The decisions are made in `plan_binding`, when the route
is declared: what is left for a request is a row of small callables, one a parameter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args, get_origin
from uuid import UUID

from serveit.declare.conversion import Conversion, conversion_for, invalid_request, is_body_type
from serveit.declare.signature import (
    REQUIRED,
    UNANNOTATED,
    Body,
    Header,
    Parameter,
    Query,
    Signature,
    read_signature,
    type_name,
)
from serveit.declare.sources import (
    Source,
    Take,
    asgi_scope,
    header_reader,
    query_reader,
    read_query,
    starlette_request,
    take_body,
    take_converted,
    take_path,
    take_request,
    take_text,
)

if TYPE_CHECKING:
    from starlette.requests import Request

    from serveit.declare.routing import Pattern
    from serveit.types import HttpRequest

__all__ = [
    "Binding",
    "Body",
    "Header",
    "Query",
    "asgi_scope",
    "plan_binding",
    "starlette_request",
]

_CONVERTOR_TYPES: dict[str, type] = {"str": str, "path": str, "int": int, "float": float, "uuid": UUID}
"""What Starlette's own convertors give; others may give anything."""
_BATCH_TYPES: tuple[Any, ...] = (list, Sequence)
_BODILESS = frozenset({"GET", "HEAD"})


class _Slot(NamedTuple):
    """How one parameter is filled."""

    parameter: Parameter
    origin: Literal["path", "request", "body", "query", "header"]
    take: Take
    plain: bool = False
    """It is what the path's convertor made."""


class Binding:
    """The arguments of one function for the requests of one route; made by `plan_binding`.

    Attributes:
        reads_body: whether the function gets the body, or a Request that can read it.
    """

    __slots__ = ("_keyword", "_path_only", "_pattern", "_positional", "_reads_query", "reads_body")

    def __init__(self, pattern: Pattern, slots: Sequence[_Slot]) -> None:
        self.reads_body = any(slot.origin in ("body", "request") for slot in slots)
        self._pattern = None if pattern.is_literal else pattern
        self._positional = [slot.take for slot in slots if not slot.parameter.keyword_only]
        self._keyword = [(slot.parameter.name, slot.take) for slot in slots if slot.parameter.keyword_only]
        self._reads_query = any(slot.origin == "query" for slot in slots)
        self._path_only: list[str] | None = None
        if all(slot.plain for slot in slots) and not self._keyword:
            self._path_only = [slot.parameter.name for slot in slots]

    def bind(self, request: HttpRequest, body: bytes) -> tuple[list[Any], dict[str, Any]]:
        """The positional and the keyword arguments. Hot path: once per request.

        Raises:
            InvalidRequest: values are missing or bad; `errors` names all of them.
            PathNotFound: the path's convertor does not take a value.
            UnsupportedMediaType: the body is something other than JSON.
        """
        path = self._pattern.convert(request.path_values) if self._pattern is not None else {}
        if self._path_only is not None:
            return [path[name] for name in self._path_only], {}
        query = read_query(request.query) if self._reads_query and request.query else {}
        source = Source(request, body, path, query)
        args = [take(source) for take in self._positional]
        kwargs = {name: take(source) for name, take in self._keyword}
        if source.faults:
            raise invalid_request(source.faults)
        return args, kwargs


def plan_binding(
    func: Callable[..., Any],
    *,
    pattern: Pattern,
    methods: Collection[str],
    batch: bool,
    drop_first: bool = False,
    where: str,
) -> Binding:
    """Decide where each argument of `func` comes from.

    Args:
        func: the function, or an unbound method.
        pattern: the route's.
        methods: the route's HTTP methods; a route of GET and HEAD only has no body.
        batch: the function takes a list, each request gives one item of it: `bind` returns ([item], {}).
        drop_first: `func` is an unbound method: its `self` is not a parameter.
        where: what errors start with: which route this is.

    Raises:
        TypeError: a parameter cannot come from a request; names the function, the parameter, the way out.
    """
    signature = read_signature(func, drop_first=drop_first, where=where)
    planner = _Planner(signature, dict(pattern.params), frozenset(map(str.upper, methods)))
    slots = [planner.batch_slot()] if batch else planner.slots()
    _refuse_misspelt(pattern, slots, signature)
    return Binding(pattern, slots)


def _refuse_misspelt(pattern: Pattern, slots: Sequence[_Slot], signature: Signature) -> None:
    """A path parameter may be left unused, or be read from a Request; but where another is then asked for
    in the query, and has to be there, one of the two is misspelt."""
    names = {slot.parameter.name for slot in slots}
    has_all = any(slot.origin == "request" for slot in slots)
    unused = [name for name, _ in pattern.params if name not in names and not has_all]
    for slot in slots if unused else ():
        parameter = slot.parameter
        if slot.origin == "query" and parameter.default is REQUIRED and parameter.marker is None:
            raise signature.refusal(
                parameter,
                f"is not in the path {pattern.text!r}, whose {unused[0]!r} no parameter takes: name both the "
                "same, or mark what comes from the query with Annotated[..., Query()]",
            )


@dataclass(frozen=True, slots=True)
class _Planner:
    """The rules of binding, the first that fits."""

    signature: Signature
    convertors: dict[str, str]
    methods: frozenset[str]

    def slots(self) -> list[_Slot]:
        found = [self._slot(parameter) for parameter in self.signature.parameters]
        bodies = [slot.parameter for slot in found if slot.origin == "body"]
        if len(bodies) > 1:
            raise self.signature.refusal(
                bodies[1],
                f"and {bodies[0].name!r} are both the body, and a request has only one: make them "
                "fields of one dataclass or msgspec.Struct",
            )
        return found

    def _slot(self, parameter: Parameter) -> _Slot:
        if parameter.name in self.convertors:
            return self._from_path(parameter)
        if (kind := _request_type(parameter.annotation)) is not None or self._is_bare_request(parameter):
            return _Slot(parameter, "request", take_request(kind))
        if isinstance(parameter.marker, Query | Header):
            return self._from_text(parameter, parameter.marker)
        if isinstance(parameter.marker, Body) or self._is_body(parameter):
            return self._from_body(parameter)
        return self._from_text(parameter, Query())

    def _from_path(self, parameter: Parameter) -> _Slot:
        name, annotation = parameter.name, parameter.annotation
        if parameter.marker is not None:
            written = type(parameter.marker).__name__
            raise self.signature.refusal(
                parameter, f"is in the path and marked {written}() as well: rename one, or drop the mark"
            )
        if annotation is UNANNOTATED:
            return _Slot(parameter, "path", take_path(name), plain=True)
        key = self.convertors[name]
        source = _CONVERTOR_TYPES.get(key)
        conversion = self._conversion(parameter, annotation, custom=True)
        if source is not None:
            if not conversion.accepts(source):
                raise self.signature.refusal(
                    parameter,
                    f"is annotated {type_name(annotation)}, which the path's <{name}:{key}> never gives: "
                    + _path_way_out(name, source),
                )
            if conversion.fits(source):
                return _Slot(parameter, "path", take_path(name), plain=True)
        return _Slot(parameter, "path", take_converted(name, conversion))

    def _is_bare_request(self, parameter: Parameter) -> bool:
        """Whether it is the only parameter without annotation, the path's aside, and called `request`."""
        return parameter.name == "request" and [parameter] == [
            other
            for other in self.signature.parameters
            if other.annotation is UNANNOTATED and other.name not in self.convertors
        ]

    def _is_body(self, parameter: Parameter) -> bool:
        if parameter.annotation is UNANNOTATED:
            return False
        try:
            return is_body_type(parameter.annotation)
        except TypeError as error:
            raise self.signature.refusal(parameter, f"cannot be bound: {error}") from error

    def _from_body(self, parameter: Parameter) -> _Slot:
        conversion = self._conversion(parameter, parameter.annotation)
        if not self._has_body():
            way_out = 'add methods=["POST"] to the route'
            if conversion.takes_texts():
                way_out += f", or take it from repeated keys of the query: {_annotated(parameter, 'Query')}"
            raise self.signature.refusal(
                parameter,
                f"({type_name(parameter.annotation)}) is the body, which "
                f"{self._spoken_methods()} requests do not have: {way_out}",
            )
        return _Slot(parameter, "body", take_body(conversion, parameter.default))

    def _from_text(self, parameter: Parameter, marker: Query | Header) -> _Slot:
        """From the query or a header: a rule of its own, or what is left when no other fits."""
        conversion = None
        if parameter.annotation not in (UNANNOTATED, str):
            conversion = self._conversion(parameter, parameter.annotation)
            self._check_text(parameter, conversion)
        many = conversion is not None and conversion.takes_texts()
        if isinstance(marker, Query):
            key = marker.alias or parameter.name
            return _Slot(
                parameter,
                "query",
                take_text(query_reader(key), ["query", key], -1, many, conversion, parameter.default),
            )
        header = (marker.alias or parameter.name.replace("_", "-")).lower()
        return _Slot(
            parameter,
            "header",
            take_text(header_reader(header), ["header", header], 0, many, conversion, parameter.default),
        )

    def _check_text(self, parameter: Parameter, conversion: Conversion) -> None:
        if conversion.takes_text() or (parameter.marker and conversion.takes_texts()):
            return
        place = "a header" if isinstance(parameter.marker, Header) else "the query"
        raise self.signature.refusal(
            parameter,
            f"is annotated {type_name(parameter.annotation)}, which cannot be made from the text of {place}: "
            f"annotate it str, or make it the body ({_annotated(parameter, 'Body')})",
        )

    def batch_slot(self) -> _Slot:
        """The one parameter of a batch function: each request gives one item of its list."""
        parameter = self._batch_parameter()
        item = self._item_type(parameter)
        if (kind := _request_type(item)) is not None:
            return _Slot(parameter, "request", take_request(kind))
        if parameter.annotation is UNANNOTATED and parameter.name in ("request", "requests"):
            return _Slot(parameter, "request", take_request(None))
        if not self._has_body():
            raise self.signature.refusal(
                parameter,
                f"takes its items from bodies, which {self._spoken_methods()} requests do not have: "
                'add methods=["POST"] to the route, or take list[Request]',
            )
        return _Slot(parameter, "body", take_body(self._conversion(parameter, item), REQUIRED))

    def _batch_parameter(self) -> Parameter:
        parameters = self.signature.parameters
        if len(parameters) != 1:
            names = ", ".join(parameter.name for parameter in parameters)
            raise self.signature.refusal(
                None,
                "is a batch function, which takes exactly one list[T] and has "
                f"{f'{len(parameters)} parameters ({names})' if names else 'no parameter'}: "
                "write `items: list[T]`, where T is a type with a field for each of them",
            )
        parameter = parameters[0]
        if parameter.keyword_only:
            raise self.signature.refusal(
                parameter, "is keyword-only, a batch is given by position: drop the `*`"
            )
        if parameter.name in self.convertors:
            raise self.signature.refusal(
                parameter,
                "is a batch, whose items come from bodies, and in the path as well: rename one of them",
            )
        if isinstance(parameter.marker, Query | Header):
            raise self.signature.refusal(
                parameter, "is a batch, whose items come from bodies: drop the mark, or take list[Request]"
            )
        return parameter

    def _item_type(self, parameter: Parameter) -> Any:
        annotation = parameter.annotation
        if annotation is UNANNOTATED:
            return Any
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        origin = get_origin(annotation) or annotation
        if not any(origin is kind for kind in _BATCH_TYPES):
            raise self.signature.refusal(
                parameter,
                f"of a batch function is a list of items, not {type_name(annotation)}: "
                f"write `{parameter.name}: list[{type_name(_items_of(annotation))}]`, or drop max_batch_size",
            )
        return get_args(annotation)[0] if get_args(annotation) else Any

    def _has_body(self) -> bool:
        return not self.methods or not self.methods <= _BODILESS

    def _spoken_methods(self) -> str:
        return " and ".join(sorted(self.methods))

    def _conversion(self, parameter: Parameter, annotation: Any, *, custom: bool = False) -> Conversion:
        try:
            return conversion_for(annotation, custom=custom)
        except TypeError as error:
            raise self.signature.refusal(
                parameter,
                f"cannot be bound: {error}; make it a dataclass, a msgspec.Struct or a pydantic model (the "
                "body), a type such as int or str (the query), or take Starlette's Request in its place",
            ) from error


def _path_way_out(name: str, source: type) -> str:
    if source is str:
        return "annotate it with a type that text is made into, such as str, int or UUID"
    return f"annotate it {source.__name__}, or write <{name}>"


def _annotated(parameter: Parameter, marker: str) -> str:
    return f"`{parameter.name}: Annotated[{type_name(parameter.annotation)}, {marker}()]`"


def _items_of(annotation: Any) -> Any:
    """What a batch function's author meant the items to be: tuple[int, ...] → int, int → int."""
    origin = get_origin(annotation)
    if isinstance(origin, type) and issubclass(origin, Iterable) and not issubclass(origin, Mapping):
        return get_args(annotation)[0]
    return annotation


def _request_type(annotation: Any) -> type[Request] | None:
    """The annotation if it is Starlette's Request; who wrote it has imported that."""
    requests = sys.modules.get("starlette.requests")
    if requests is None or not isinstance(annotation, type) or get_origin(annotation) is not None:
        return None
    return annotation if issubclass(annotation, requests.Request) else None

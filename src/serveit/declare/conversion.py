"""From a request's text and bytes to the types in a signature; made once for each parameter.

Between binding.py, which decides where a value comes from, and msgspec or pydantic, which convert it;
what these two say about a bad value becomes one form here, `{"loc": [...], "msg": "..."}`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args
from uuid import UUID

import msgspec
import msgspec.inspect as types

from serveit.declare.signature import type_name
from serveit.exceptions import InvalidRequest

Fault = dict[str, Any]
Loc = Sequence[str | int]

BAD_VALUE = (ValueError, msgspec.MsgspecError)
"""What conversions raise for a bad value; msgspec's errors are ValueErrors only since 0.22."""
BAD_BODY = (*BAD_VALUE, RecursionError)

MAX_ECHO = 80
"""Characters of a request's value that an error repeats."""
MAX_MESSAGE = 120
"""Characters of a message that msgspec, pydantic or a user's validator wrote: it may hold a value."""
MAX_FAULTS = 50
"""Faults of one request that are told; a body of a million wrong items has no use for a million."""

CACHE = "__msgspec_cache__"
"""Where msgspec keeps what it knows of a dataclass, a TypedDict or a NamedTuple: on the class itself."""

_ARRAYS = (
    types.ListType,
    types.SetType,
    types.FrozenSetType,
    types.VarTupleType,
    types.TupleType,
)
_BODIES = (
    *_ARRAYS,
    types.StructType,
    types.DataclassType,
    types.TypedDictType,
    types.NamedTupleType,
    types.DictType,
    types.BytesType,
    types.ByteArrayType,
    types.MemoryViewType,
    types.RawType,
)
_RAW: dict[type, Callable[[bytes], Any]] = {
    types.BytesType: bytes,
    types.ByteArrayType: bytearray,
    types.MemoryViewType: memoryview,
}
_FROM_NUMBER = (types.AnyType, types.FloatType, types.DecimalType, types.DateTimeType, types.TimeDeltaType)
_FROM_INT = (*_FROM_NUMBER, types.IntType, types.BoolType)
_FROM_TEXT = (*_FROM_INT, types.StrType, types.UUIDType, types.DateType, types.TimeType)
_CONVERTIBLE: dict[type, tuple[type, ...]] = {
    str: _FROM_TEXT,
    int: _FROM_INT,
    float: (*_FROM_NUMBER, types.IntType),
    UUID: (types.AnyType, types.UUIDType),
}
_SAME: dict[type, types.Type] = {
    str: types.StrType(),
    int: types.IntType(),
    float: types.FloatType(),
    UUID: types.UUIDType(),
}

_AT = re.compile(r" - at (?P<key>`key` in )?`(?P<path>\$.*)`\Z", re.DOTALL)
_STEP = re.compile(r"\.(?P<field>[^.\[]+)|\[(?P<index>\d+|\.\.\.)\]")
_FIELD = re.compile(r"Object (?P<what>missing required|contains unknown) field `(?P<field>.*)`\Z", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Conversion:
    """How values of one annotation are made.

    Attributes:
        info: msgspec's view of the annotation.
        decode: from a body's bytes: a JSON document, unless `raw`.
        convert: from text, a list of texts, or what a path convertor made.
        choices: the values of its Enum or Literal, for errors.
        raw: it is `bytes`, `bytearray` or `memoryview`: a body of any media type, as it is.
    """

    info: types.Type
    decode: Callable[[bytes], Any]
    convert: Callable[[Any], Any]
    choices: tuple[Any, ...]
    raw: bool = False
    by_pydantic: bool = False

    def fits(self, source: type) -> bool:
        """Whether a value of `source` (str, int, float, UUID) is one of this type without conversion."""
        return not self.by_pydantic and any(
            isinstance(member, types.AnyType) or member == _SAME[source] for member in members(self.info)
        )

    def accepts(self, source: type) -> bool:
        """Whether some value of `source` (str, int, float, UUID) can become one of this type."""
        return any(_converts(member, source) for member in members(self.info))

    def takes_text(self) -> bool:
        """Whether it can be made of one piece of text."""
        return _is_text(self.info)

    def takes_texts(self) -> bool:
        """Whether it is a list, set or tuple (or None) of what can be made of text: a repeated key."""
        arrays = _without_none(self.info)
        return bool(arrays) and all(
            isinstance(array, _ARRAYS) and all(map(_is_text, _items(array))) for array in arrays
        )


def conversion_for(annotation: Any, *, custom: bool = False) -> Conversion:
    """The conversion of an annotation.

    Args:
        annotation: evaluated.
        custom: let classes pass that msgspec cannot make: the values are made already, by a path's
            custom convertor.

    Raises:
        TypeError: msgspec (or pydantic, if the annotation is its) cannot make values of it.
    """
    if _uses_pydantic(annotation):
        return _pydantic_conversion(annotation)
    info = describe(annotation)
    if not custom:
        _check_custom(annotation, info)
    convert = partial(msgspec.convert, type=annotation, strict=False)
    if (wrap := _raw_type(info)) is not None:
        return Conversion(info, lambda body: convert(wrap(body)), convert, (), raw=True)
    decode = msgspec.json.Decoder(annotation).decode
    _forget_caches(info, set())
    return Conversion(info, decode, convert, tuple(_choices(info)))


def describe(annotation: Any) -> types.Type:
    """msgspec's view of an annotation.

    Raises:
        TypeError: it has none; a name in one of its fields cannot be evaluated.
    """
    try:
        info = types.type_info(annotation)
    except Exception as error:  # a NameError, or whatever evaluating a field's text raises
        raise TypeError(f"{type_name(annotation)} cannot be used: {error}") from error
    _forget_caches(info, set())
    return info


def _forget_caches(part: Any, seen: set[int]) -> None:
    """Take what msgspec keeps on users' dataclasses, TypedDicts and NamedTuples off them.

    It cannot be pickled, and so neither could they, where that has to be by value: those of a script, as
    arguments of `remote`. Decoders have their own; what is made anew later costs microseconds.
    """
    if id(part) in seen:
        return
    seen.add(id(part))
    if isinstance(part, tuple):
        for inner in part:
            _forget_caches(inner, seen)
    elif isinstance(part, types.Type | types.Field):
        kept = getattr(part, "cls", None)
        if kept is not None and not isinstance(part, types.StructType) and CACHE in vars(kept):
            delattr(kept, CACHE)
        for name in part.__struct_fields__:
            _forget_caches(getattr(part, name), seen)


def members(info: types.Type) -> list[types.Type]:
    """The members of a union, and the type itself if it is none."""
    if isinstance(info, types.Metadata):
        return members(info.type)
    if isinstance(info, types.UnionType):
        return [inner for member in info.types for inner in members(member)]
    return [info]


def is_body_type(annotation: Any) -> bool:
    """Whether a parameter of this type is the body where nothing else is said.

    Raises:
        TypeError: msgspec has no view of the annotation.
    """
    if any(_is_model(part) for part in _parts(annotation)):
        return True
    return any(isinstance(member, _BODIES) for member in members(describe(annotation)))


def _raw_type(info: types.Type) -> Callable[[bytes], Any] | None:
    found = _without_none(info)
    return _RAW.get(type(found[0])) if len(found) == 1 else None


def _without_none(info: types.Type) -> list[types.Type]:
    return [member for member in members(info) if not isinstance(member, types.NoneType)]


def _is_text(info: types.Type) -> bool:
    found = _without_none(info)
    return bool(found) and all(_converts(member, str) for member in found)


def _converts(member: types.Type, source: type) -> bool:
    if isinstance(member, types.EnumType | types.LiteralType):
        return source is str or any(isinstance(choice, source) for choice in _choices(member))
    return isinstance(member, _CONVERTIBLE[source])


def _choices(info: types.Type) -> Iterator[Any]:
    for member in members(info):
        if isinstance(member, types.EnumType):
            yield from (choice.value for choice in member.cls)
        elif isinstance(member, types.LiteralType):
            yield from member.values


def _items(array: types.Type) -> Iterable[types.Type]:
    return array.item_types if isinstance(array, types.TupleType) else [array.item_type]  # type: ignore[attr-defined]


def _check_custom(annotation: Any, info: types.Type) -> None:
    for member in members(info):
        if isinstance(member, types.CustomType) and member.cls is not object:
            raise TypeError(f"{type_name(annotation)} is nothing that a request's text or JSON is made into")
    if inner := _custom_within(info, set()):
        raise TypeError(
            f"{type_name(annotation)} holds a {inner.__qualname__}, which JSON is not made into: give that "
            "field a default or another type"
        )


def _custom_within(node: Any, seen: set[int]) -> type | None:
    """A class below `node` that msgspec cannot make and that every document would have to give."""
    if isinstance(node, types.CustomType):
        return None if node.cls is object else node.cls
    if id(node) in seen:
        return None
    seen.add(id(node))
    if isinstance(node, types.Field):
        parts: Iterable[Any] = [node.type] if node.required else []
    elif isinstance(node, types.Type):
        parts = [getattr(node, name) for name in node.__struct_fields__]
    else:
        parts = node if isinstance(node, tuple) else []
    return next((found for part in parts if (found := _custom_within(part, seen))), None)


# pydantic


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)


def _is_model(part: Any) -> bool:
    """Whether it is a pydantic model or dataclass, found out without importing pydantic."""
    return isinstance(part, type) and hasattr(part, "__pydantic_validator__")


def _is_constraint(part: Any) -> bool:
    """Whether it is metadata that pydantic checks and msgspec overlooks, such as `Field(ge=1)`."""
    return type(part).__module__.partition(".")[0] in ("pydantic", "annotated_types")


def _uses_pydantic(annotation: Any) -> bool:
    return "pydantic" in sys.modules and any(
        _is_model(part) or _is_constraint(part) for part in _parts(annotation)
    )


def _pydantic_conversion(annotation: Any) -> Conversion:
    from pydantic import TypeAdapter

    try:
        adapter = TypeAdapter(annotation)
    except Exception as error:  # its errors have no common base
        said = str(error).partition("\n")[0]
        raise TypeError(f"{type_name(annotation)} cannot be used: {said}") from error
    try:
        info = describe(annotation)
    except TypeError:  # a union of two models
        info = types.CustomType(object)
    return Conversion(info, adapter.validate_json, adapter.validate_python, (), by_pydantic=True)


# Faults


def shorten(text: str, limit: int = MAX_ECHO) -> str:
    """The text with its middle left out if it is longer than `limit`."""
    if len(text) <= limit:
        return text
    head = limit - limit // 4
    return f"{text[: head - 1]}…{text[len(text) - limit // 4 :]}"


def text_faults(error: Exception, loc: Loc, value: Any, choices: Sequence[Any]) -> list[Fault]:
    """What is wrong with the text (or list of texts) of a query, header or path parameter."""
    if found := _pydantic_faults(error, loc):
        return found
    said, path, _ = _parse(error)
    for step in path:
        value = value[step]
    if choices and said.startswith("Invalid enum value"):
        said = shorten(f"expected one of {', '.join(map(repr, choices))}", MAX_MESSAGE)
    else:
        said = _tidy(said.partition(", got ")[0])
    return [{"loc": [*loc, *path], "msg": f"{said}, got {shorten(repr(value))}"}]


def body_faults(error: Exception, loc: Loc) -> list[Fault]:
    """What is wrong with a JSON document."""
    if found := _pydantic_faults(error, loc):
        return found
    if isinstance(error, RecursionError):
        return [{"loc": [*loc], "msg": "nested too deeply"}]
    if isinstance(error, UnicodeError):
        return [{"loc": [*loc], "msg": "not valid UTF-8"}]
    said, path, at_key = _parse(error)
    if at_key:
        path.append("[key]")
    if missing := _FIELD.match(said):
        path.append(shorten(missing["field"]))
        return [{"loc": [*loc, *path], "msg": f"{missing['what']} field {shorten(missing['field'])!r}"}]
    return [{"loc": [*loc, *path], "msg": _tidy(said)}]


def invalid_request(faults: Sequence[Fault]) -> InvalidRequest:
    """The error for these faults: the first three in its text, up to `MAX_FAULTS` in its records."""
    told = [f"{_dotted(fault['loc'])}: {fault['msg']}" for fault in faults[:3]]
    if len(faults) > len(told):
        told.append(f"and {len(faults) - len(told)} more")
    return InvalidRequest("; ".join(told), errors=faults[:MAX_FAULTS])


def _dotted(loc: Loc) -> str:
    """["body", "x", 0] → "body.x[0]"."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in loc)
    return shorten(text[1:], MAX_MESSAGE)


def _parse(error: Exception) -> tuple[str, list[Any], bool]:
    """What msgspec says, the place that it names, and whether it means the key of a dict there."""
    text = str(error)
    match = _AT.search(text)
    if match is None:
        return text, [], False
    steps: list[Any] = [
        step["field"] or (int(step["index"]) if step["index"].isdigit() else step["index"])
        for step in _STEP.finditer(match["path"])
    ]
    return text[: match.start()], steps, match["key"] is not None


def _tidy(said: str) -> str:
    """ "Expected `int`, got `str`" → "expected int, got str"."""
    if said.startswith("Expected ") and "regex" not in said:
        said = said.replace("`", "")
    if said[1:2].islower():
        said = said[:1].lower() + said[1:]
    return shorten(said, MAX_MESSAGE)


def _pydantic_faults(error: Exception, loc: Loc) -> list[Fault]:
    pydantic = sys.modules.get("pydantic")
    if pydantic is None or not isinstance(error, pydantic.ValidationError):
        return []
    return [
        {
            "loc": [*loc, *(shorten(step) if isinstance(step, str) else step for step in one["loc"])],
            "msg": shorten(one["msg"], MAX_MESSAGE),
        }
        for one in error.errors(include_url=False, include_context=False, include_input=False)
    ]

"""From what user code returns to the bytes of an HTTP answer.

Runs in the replica, after the function and before the answer goes back to the proxy.
Hot path: `encode_result`, once per request; `ChunkEncoder.encode`, once per chunk of a stream.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
import re
import sys
from collections import UserString
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence, ValuesView
from collections.abc import Set as AbstractSet
from enum import Enum
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from serveit.declare.conversion import shorten
from serveit.exceptions import EncodingError

if TYPE_CHECKING:
    from serveit.types import HeaderList

TEXT = "text/plain; charset=utf-8"
OCTETS = "application/octet-stream"
JSON = "application/json"
JSON_LINES = "application/x-ndjson"

_CONTENT_TYPES = {kind: (b"content-type", kind.encode()) for kind in (TEXT, OCTETS, JSON)}
_BYTES = (bytes, bytearray, memoryview)
_FAILURES = (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError)
"""What msgspec, and the code of a value's own class, raise for values that they cannot encode."""
_ARRAYS = (list, tuple, set, frozenset)
_STREAMS = (Generator, AsyncIterator)
_NONFINITE = re.compile(rb"\xcb[\x7f\xff][\xf0-\xff]")
"""How NaN and the infinities begin in msgpack, whatever their payload: exponent bits all set."""
_MAX_SEARCHED = 20_000
"""Values that the search for a fault looks at: the event loop waits meanwhile, for some 10 ms."""
_MAX_DEPTH = 10_000
"""Levels that it goes down: more than msgspec does."""
_MAX_PATH, _MAX_KEY, _MAX_REASON = 100, 40, 200
_NUMPY_KINDS = "biufUSTO"
"""numpy's dtypes whose `tolist` gives what JSON has: bool, ints, floats, text, bytes, objects."""
_EXACT: dict[type, Callable[[Any], Any]] = {
    str: str.__str__,
    int: int.__int__,
    float: float.__float__,
    bytes: bytes,
    bytearray: bytes,
}
"""Of these msgspec takes the very type and no subclass."""
_ONLY_AS_KEY = (bool, type(None), dict, *_ARRAYS)
"""msgspec knows these and asks for them only where they are keys of a dict."""


class Encoded(NamedTuple):
    """An answer that is whole."""

    status: int
    headers: HeaderList
    body: bytes


def encode_result(value: Any) -> Encoded:
    """The answer for what user code returned: str as text, bytes as octets, a Response as it is, else JSON.

    Raises:
        EncodingError: the value has no form in JSON, or is a Response that has to run as an ASGI app.
    """
    if isinstance(value, str):
        return _whole(TEXT, _utf8(value))
    if isinstance(value, _BYTES):
        return _whole(OCTETS, bytes(value))
    responses = sys.modules.get("starlette.responses")
    if responses is not None and isinstance(value, responses.Response):
        if needs_asgi(value):
            raise EncodingError(f"a {_type_label(value)} has no whole body: it has to run as an ASGI app")
        return Encoded(value.status_code, list(value.raw_headers), bytes(value.body))
    return _whole(JSON, encode_json(value))


def needs_asgi(value: Any) -> bool:
    """Whether it is a Starlette Response that has to run as an ASGI app.

    A stream, a file, a class with a `__call__` of its own, or one with a background task, which
    Starlette runs there.
    """
    responses = sys.modules.get("starlette.responses")
    if responses is None or not isinstance(value, responses.Response):
        return False
    return (
        type(value).__call__ is not responses.Response.__call__
        or getattr(value, "background", None) is not None
        or not hasattr(value, "body")
    )


def is_stream(value: Any) -> bool:
    """Whether it is answered chunk by chunk: a generator, or any async iterator.

    Other iterators (`map`, `zip`, files) are not: they are seldom returned on purpose.
    """
    return isinstance(value, _STREAMS)


def encode_json(value: Any) -> bytes:
    """Compact JSON. NaN and infinity are errors: msgspec would write `null`, and nobody would know.

    Raises:
        EncodingError: names the first place in the value that has no form in JSON.
    """
    try:
        data = _encode(value)
    except _FAILURES as error:
        raise EncodingError(_explain(value, error)) from error
    if b"null" in data and _may_hold_nonfinite(value) and (fault := _lost_nonfinite(value, data)):
        raise EncodingError(f"the result cannot be sent as JSON: {fault}")
    return data


class ChunkEncoder:
    """The chunks of one stream; the first decides what kind of stream it is.

    str is text and bytes are octets, and these two may mix; everything else is a line of JSON.

    Attributes:
        media_type: of the stream; None before the first chunk.
    """

    def __init__(self) -> None:
        self.media_type: str | None = None
        self._first = ""
        self._count = 0

    def encode(self, chunk: Any) -> bytes:
        """The chunk's bytes.

        Raises:
            EncodingError: it has no form in JSON, or is of another kind than the first.
        """
        self._count += 1
        kind = TEXT if isinstance(chunk, str) else OCTETS if isinstance(chunk, _BYTES) else JSON_LINES
        if self.media_type is None:
            self.media_type = kind
            self._first = _type_label(chunk)
        elif (kind == JSON_LINES) is not (self.media_type == JSON_LINES):
            raise EncodingError(
                f"chunk {self._count} of the stream is a {_type_label(chunk)} and the first was a "
                f"{self._first}: yield either str and bytes, or other values, each a line of JSON"
            )
        try:
            if kind == JSON_LINES:
                return encode_json(chunk) + b"\n"
            return _utf8(chunk) if kind == TEXT else bytes(chunk)
        except EncodingError as error:
            raise EncodingError(f"chunk {self._count} of the stream: {error}") from error


def _whole(media_type: str, body: bytes) -> Encoded:
    return Encoded(200, [_CONTENT_TYPES[media_type], (b"content-length", b"%d" % len(body))], body)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise EncodingError(
            f"the result cannot be sent as text: {error.object[error.start]!r} at {error.start} is half of a "
            "surrogate pair, which UTF-8 has no form for"
        ) from None


def _may_hold_nonfinite(value: Any) -> bool:
    """Whether a NaN may be in it, not only None: at msgspec's speed, as msgpack tells the two apart."""
    try:
        return _NONFINITE.search(_encode_msgpack(value)) is not None
    except _FAILURES:  # msgpack has no ints beyond 64 bits
        return True


def _lost_nonfinite(value: Any, data: bytes) -> str | None:
    """The NaN or infinity that is a `null` in `data`, the value's JSON; None if there is none."""
    if (fault := _find_fault(value)) != "":
        return fault
    try:  # at msgspec's speed: both brought to msgpack
        plain = msgspec.to_builtins(value, str_keys=True, enc_hook=_enc_hook)
        is_lost = _encode_msgpack(plain) != _encode_msgpack(msgspec.json.decode(data))
    except _FAILURES:
        return _find_fault(value, most=sys.maxsize)
    return "somewhere in it is nan or an infinity, which JSON does not have" if is_lost else None


def _explain(value: Any, error: Exception) -> str:
    fault = _find_fault(value)
    if not fault:
        said = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:_MAX_REASON]
        fault = f"{'$' if fault is None else 'somewhere in $'} ({_type_label(value)}): {said}"
    return f"the result cannot be sent as JSON: {fault}"


# Beyond what msgspec knows


def _enc_hook(value: Any) -> Any:
    """What stands for a value that msgspec does not know.

    Raises:
        TypeError: nothing does; the text goes on where the place ends: "is a Foo, which ...".
    """
    if isinstance(value, _ONLY_AS_KEY):
        raise TypeError(f"is a {_type_label(value)} as a key")
    if (numpy := sys.modules.get("numpy")) and isinstance(value, (numpy.ndarray, numpy.generic)):
        return _from_numpy(numpy, value)
    if (pydantic := sys.modules.get("pydantic")) and isinstance(value, pydantic.BaseModel):
        return _from_pydantic(value)
    for base, make in _EXACT.items():
        if isinstance(value, base):
            return make(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, PurePath | UserString):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence | AbstractSet | ValuesView):
        return list(value)
    raise TypeError(f"is a {_type_label(value)}, which has no form in JSON{_hint(value)}")


def _from_numpy(numpy: Any, value: Any) -> Any:
    kind = value.dtype.kind
    if kind == "f":
        return value.tolist() if value.ndim else float(value)  # a longdouble's tolist gives itself
    if kind in _NUMPY_KINDS:
        return value.tolist()
    if kind == "M" and not numpy.isnat(value).any():
        return numpy.datetime_as_string(value).tolist()
    what = "NaT" if kind == "M" else f"dtype {value.dtype}"
    raise TypeError(f"is a {_type_label(value)} of {shorten(what)}, which has no form in JSON")


def _from_pydantic(model: Any) -> Any:
    dumped = model.model_dump(mode="json", by_alias=True)
    if b"null" not in _encode(dumped):
        return dumped
    raw = model.model_dump(by_alias=True)
    # In fields of type Any pydantic writes None for NaN, as msgspec does everywhere.
    return _with_nonfinite(dumped, raw) if _may_hold_nonfinite(raw) else dumped


def _with_nonfinite(dumped: Any, raw: Any) -> Any:
    """`dumped` with the NaNs and infinities of `raw`, the same before it was made fit for JSON."""
    if dumped is None and isinstance(raw, float):
        return raw
    if isinstance(dumped, dict) and isinstance(raw, dict) and len(dumped) == len(raw):
        return dict(zip(dumped, map(_with_nonfinite, dumped.values(), raw.values()), strict=True))
    if isinstance(dumped, list) and isinstance(raw, _ARRAYS) and len(dumped) == len(raw):
        return list(map(_with_nonfinite, dumped, raw))
    return dumped  # no container, or a serializer of the user's made something else of it


def _hint(value: Any) -> str:
    if hasattr(value, "__await__"):
        return ": await it, in a function that is `async def`"
    if hasattr(value, "__next__") or hasattr(value, "__anext__"):
        return ": make it a list"
    for name in ("tolist", "to_dict", "_asdict"):
        if hasattr(value, name):
            return f": call its .{name}()"
    return ": make it a dataclass, or a dict"


def _type_label(value: Any) -> str:
    """The type's name for errors: "dict", "numpy.ndarray", "models.Image"."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


_encode_plain = msgspec.json.Encoder().encode
_encode = msgspec.json.Encoder(enc_hook=_enc_hook).encode
_encode_msgpack = msgspec.msgpack.Encoder(enc_hook=_enc_hook).encode


# Where a value has no form in JSON


def _find_fault(value: Any, most: int = _MAX_SEARCHED) -> str | None:
    """The first place in `value` that has no form in JSON, and why: "$.items[3].x is nan, ...".

    Goes down in msgspec's order, without recursion, so that depth and cycles are found as well. "" if
    there is none in the first `most` values.
    """
    labels: list[str] = []
    inside: list[Any] = []  # the values on the way down to this one, kept alive so that their ids hold
    ids: set[int] = set()
    levels: list[Iterator[tuple[str, Any]]] = [iter([("$", value)])]
    while levels:
        label = ""
        try:
            step = next(levels[-1], None)
            if step is None:
                levels.pop()
                if inside:
                    labels.pop()
                    ids.discard(id(inside.pop()))
                continue
            label, node = step
            if id(node) in ids:
                raise TypeError("is a value that it is itself in")
            children = _children(node)
        except Exception as error:  # also what the code of a value's own class raises
            return f"{_written([*labels, label])} {shorten(str(error), _MAX_REASON)}"
        most -= 1
        if most < 0:
            return ""
        if children is not None:
            if len(levels) == _MAX_DEPTH:
                return None
            levels.append(children)
            labels.append(label)
            inside.append(node)
            ids.add(id(node))
    return None


def _children(node: Any) -> Iterator[tuple[str, Any]] | None:
    """What is in a value, with its label; None if nothing is. TypeError if it has no form itself."""
    if isinstance(node, str):
        _check_text(node)
        return None
    if isinstance(node, float):
        if not math.isfinite(node):
            raise TypeError(f"is {float(node)}, which JSON does not have: return None or a str in its place")
        return None
    if isinstance(node, dict):
        return _entries(node)
    if isinstance(node, _ARRAYS):
        return ((f"[{index}]", item) for index, item in enumerate(node))
    if isinstance(node, Enum):
        return iter([("", node.value)])
    if (names := _field_names(node)) is not None:
        values = ((name, getattr(node, name, msgspec.UNSET)) for name in names)
        return ((f".{name}", value) for name, value in values if value is not msgspec.UNSET)
    return _stand_in(node)


def _stand_in(node: Any) -> Iterator[tuple[str, Any]] | None:
    """What `_enc_hook` makes of a value, in its place; None if msgspec needs no hook for it."""
    with contextlib.suppress(TypeError):
        _encode_plain(node)
        return None
    numpy = sys.modules.get("numpy")
    if numpy is None or type(node) is not numpy.ndarray or node.dtype.kind != "f":
        return iter([("", _enc_hook(node))])
    bad = numpy.argwhere(~numpy.isfinite(node))[:1]  # not element by element: arrays are large
    return (("".join(f"[{index}]" for index in place), float(node[tuple(place)])) for place in bad)


def _entries(node: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(key, str):
            _check_text(key)
            yield f".{key}" if key.isidentifier() else f"[{shorten(repr(key), _MAX_KEY)}]", value
            continue
        try:
            msgspec.json.encode({key: 0}, enc_hook=_enc_hook)
        except Exception as error:
            raise TypeError(
                f"has {shorten(repr(key), _MAX_KEY)} (a {_type_label(key)}) as a key: keys are str or numbers"
            ) from error
        yield f"[{shorten(repr(key), _MAX_KEY)}]", value


def _field_names(node: Any) -> Sequence[str] | None:
    """The fields of a Struct, a dataclass or an attrs object."""
    if isinstance(node, msgspec.Struct):
        return node.__struct_fields__
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return [field.name for field in dataclasses.fields(node)]
    attributes = getattr(type(node), "__attrs_attrs__", None)
    return None if attributes is None else [attribute.name for attribute in attributes]


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TypeError(
            f"holds {text[error.start]!r}, half of a surrogate pair, which UTF-8 has no form for"
        ) from None


def _written(labels: Sequence[str]) -> str:
    return shorten("".join(labels), _MAX_PATH)

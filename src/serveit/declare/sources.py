"""What a request gives to one parameter: the callables of which a `Binding` is a row.

Between binding.py, which chooses them when a route is declared, and conversion.py, which makes the
values. Hot path: each once per request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from serveit.declare.conversion import (
    BAD_BODY,
    BAD_VALUE,
    Conversion,
    Fault,
    body_faults,
    shorten,
    text_faults,
)
from serveit.declare.signature import REQUIRED
from serveit.exceptions import InvalidRequest, UnsupportedMediaType

if TYPE_CHECKING:
    from starlette.requests import Request

    from serveit.types import HeaderList, HttpRequest

MAX_QUERY_FIELDS = 1_000

_FORMS = (b"application/x-www-form-urlencoded", b"multipart/form-data")


class Source:
    """One request while its arguments are made."""

    __slots__ = ("body", "faults", "path", "query", "request")

    def __init__(
        self, request: HttpRequest, body: bytes, path: dict[str, Any], query: dict[str, list[str]]
    ) -> None:
        self.request = request
        self.body = body
        self.path = path
        self.query = query
        self.faults: list[Fault] = []


Take = Callable[[Source], Any]
"""One parameter's value; None, and a fault in the source, if it cannot be made."""


def take_path(name: str) -> Take:
    return lambda source: source.path[name]


def take_converted(name: str, conversion: Conversion) -> Take:
    convert = conversion.convert

    def take(source: Source) -> Any:
        value = source.path[name]
        try:
            return convert(value)
        except BAD_VALUE as error:
            source.faults += text_faults(error, ["path", name], value, conversion.choices)

    return take


def take_request(kind: type[Request] | None) -> Take:
    return lambda source: starlette_request(source.request, source.body, source.path, kind)


def query_reader(key: str) -> Callable[[Source], list[str] | None]:
    return lambda source: source.query.get(key)


def header_reader(name: str) -> Callable[[Source], list[str] | None]:
    wanted = name.encode("latin-1")
    return lambda source: [value.decode("latin-1") for key, value in source.request.headers if key == wanted]


def take_text(
    read: Callable[[Source], list[str] | None],
    loc: list[str | int],
    pick: int,
    many: bool,
    conversion: Conversion | None,
    default: Any,
) -> Take:
    """`pick`: which of repeated values a parameter that takes one gets."""
    convert = conversion.convert if conversion is not None else None
    choices = conversion.choices if conversion is not None else ()

    def take(source: Source) -> Any:
        values = read(source)
        if not values:
            if default is REQUIRED:
                source.faults.append({"loc": [*loc], "msg": "missing"})
            return default
        value = values if many else values[pick]
        if convert is None:
            return value
        try:
            return convert(value)
        except BAD_VALUE as error:
            source.faults += text_faults(error, loc, value, choices)

    return take


def take_body(conversion: Conversion, default: Any) -> Take:
    decode, raw = conversion.decode, conversion.raw

    def take(source: Source) -> Any:
        body = source.body
        if not body and default is not REQUIRED:
            return default
        if raw:
            _refuse_multipart(source.request.headers)
        else:
            if not body:
                source.faults.append({"loc": ["body"], "msg": "the body is missing"})
                return None
            _check_media_type(source.request.headers)
        try:
            return decode(body)
        except BAD_BODY as error:
            source.faults += body_faults(error, ["body"])

    return take


def _refuse_multipart(headers: HeaderList) -> None:
    """What `curl -F` sends is not the file but an envelope around it."""
    value = next((value for name, value in headers if name == b"content-type"), b"")
    if value[:19].lower() == b"multipart/form-data":
        raise UnsupportedMediaType(
            "the body is taken as it is, and a multipart form is an envelope around the file: send the file "
            "itself, with curl by --data-binary @file -H 'content-type: application/octet-stream'"
        )


def _check_media_type(headers: HeaderList) -> None:
    """Raise UnsupportedMediaType if the body says that it is something other than JSON."""
    value = next((value for name, value in headers if name == b"content-type"), b"")
    media_type = value.partition(b";")[0].strip().lower()
    if media_type in (b"application/json", b"") or media_type.endswith(b"+json"):
        return
    said = shorten(media_type.decode("latin-1"))
    message = f"the body must be application/json, got {said}"
    if media_type in _FORMS:
        message += ": forms are not taken, send JSON; with curl add -H 'content-type: application/json'"
    raise UnsupportedMediaType(message, errors=[{"loc": ["header", "content-type"], "msg": message}])


def read_query(query: bytes) -> dict[str, list[str]]:
    """The query's values by key, as Starlette reads them."""
    if query.count(b"&") >= MAX_QUERY_FIELDS:
        message = f"more than {MAX_QUERY_FIELDS:,} fields"
        raise InvalidRequest(f"query: {message}", errors=[{"loc": ["query"], "msg": message}])
    text = query.decode("latin-1")
    if "%" in text or "+" in text:
        pairs = parse_qsl(text, keep_blank_values=True)
    else:  # nothing to decode: a fifth of the time
        fields = (field.partition("=") for field in text.split("&") if field)
        pairs = [(key, value) for key, _, value in fields]
    found: dict[str, list[str]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found


# Starlette's view of a request


def asgi_scope(request: HttpRequest, path_params: dict[str, Any]) -> dict[str, Any]:
    """The ASGI scope of a request, for Starlette's Request and for responses that run as ASGI apps.

    It promises `spec_version` 2.4: who runs a response with it ends it when the client has gone (by
    cancelling, or an OSError from `send`), so that Starlette does not listen for a disconnect.
    """
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": request.http_version,
        "method": request.method,
        "scheme": request.scheme,
        "path": request.path,
        "raw_path": request.raw_path,
        "query_string": request.query,
        "root_path": request.root_path,
        "headers": request.headers,
        "client": request.client,
        "server": request.server,
        "path_params": path_params,
    }


def starlette_request(
    request: HttpRequest, body: bytes, path_params: dict[str, Any], kind: type[Request] | None = None
) -> Request:
    """Starlette's Request on a body that is already here.

    Args:
        request: the head.
        body: the whole of it.
        path_params: converted values.
        kind: a subclass of Request to make instead.
    """
    if kind is None:
        from starlette.requests import Request

        kind = Request
    return kind(asgi_scope(request, path_params), _receive(body))


def _receive(body: bytes) -> Callable[[], Awaitable[dict[str, Any]]]:
    """ASGI's `receive`: the body, then nothing ever. A client that goes away has the whole request
    cancelled, so it is here for as long as somebody asks (`Request.is_disconnected`)."""
    from anyio.lowlevel import checkpoint_if_cancelled

    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> dict[str, Any]:
        await checkpoint_if_cancelled()  # is_disconnected() asks with a cancelled scope: not for the body
        message = next(messages, None)
        if message is None:
            message = await asyncio.get_running_loop().create_future()
        return message

    return receive

"""The operator's ASGI middlewares around the ingress."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import msgspec

from serveit.declare.conversion import shorten
from serveit.exceptions import ServeitError
from serveit.importer import import_from_string
from serveit.web.head import REQUEST_ID, read_head
from serveit.web.presence import presence_of
from serveit.web.problems import problem_of, send_problem

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from serveit.config import HTTPOptions

logger = logging.getLogger("serveit.web")

_FORMS: dict[str, Any] = {
    "method": str,
    "path": str,
    "query_string": bytes,
    "scheme": str,
    "http_version": str,
    "raw_path": bytes | None,
    "root_path": str,
    "client": tuple[str, int] | None,
    "server": tuple[str, int | None] | None,
}
"""What of a scope goes on the wire, beside the headers."""


def with_middlewares(app: ASGIApp, options: HTTPOptions) -> ASGIApp:
    """The app inside the operator's middlewares, the first outermost.

    Raises:
        ImportFailed: an import string leads nowhere.
        TypeError: it leads to what is no factory, or what a factory returned is no ASGI app.
        Exception: what a factory raised, with a note that says which.
    """
    if options.middlewares:
        app = _Innermost(app)
    for entry in reversed(options.middlewares):
        app = _made(entry, app)
    return _Outermost(app, debug=options.debug) if options.middlewares else app


def _made(entry: Any, app: ASGIApp) -> ASGIApp:
    """One middleware around an app: by its import string, a factory, or Starlette's `Middleware`."""
    factory = import_from_string(entry) if isinstance(entry, str) else entry
    if not callable(factory) and not hasattr(factory, "cls"):
        raise TypeError(
            f"middleware {entry!r} is {shorten(repr(factory), 60)}: it must be a factory, which is called "
            "with the ASGI app that it wraps, or a Middleware of Starlette's"
        )
    try:
        if hasattr(factory, "cls"):
            made = factory.cls(app, *factory.args, **factory.kwargs)
        else:
            made = factory(app)
    except Exception as error:
        error.add_note(f"(in the making of middleware {entry!r})")
        raise
    if not callable(made):
        raise TypeError(f"middleware {entry!r} returned {made!r}: it must return an ASGI app")
    wrapped: ASGIApp = made
    return wrapped


class _Outermost:
    """Gives a middleware's own answers what all answers have: a request id, and errors as problems."""

    def __init__(self, app: ASGIApp, *, debug: bool) -> None:
        self._app = app
        self._debug = debug

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = read_head(scope["headers"]).request_id
        octets = request_id.encode()
        # The ingress takes it over.
        kept = [field for field in scope["headers"] if field[0] != REQUEST_ID]
        scope = {**scope, "headers": [*kept, (REQUEST_ID, octets)]}
        begun = False

        async def passed_on(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers: list[Any] = [*message.get("headers", ())]
                if all(name.lower() != REQUEST_ID for name, _ in headers):
                    message = {**message, "headers": [*headers, (REQUEST_ID, octets)]}
            await send(message)

        try:
            await self._app(scope, receive, passed_on)
        except Exception as error:
            if begun:
                raise
            if presence_of(scope, receive).is_lost:
                return  # Starlette's BaseHTTPMiddleware raises where no answer came, whatever the reason
            logger.error(
                "%s %s failed in a middleware (request %s)",
                scope["method"],
                scope["path"],
                request_id,
                exc_info=error,
            )
            await send_problem(send, problem_of(error, debug=self._debug), request_id)


class _Innermost:
    """Checks what the middlewares made of a request: on the wire a str for bytes would end the link, and
    with it the requests of everybody else."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_usual(scope) and (fault := _fault_in(scope)):
            raise ServeitError(f"a middleware passed on a request with {fault}")
        await self._app(scope, receive, send)


def _is_usual(scope: Scope) -> bool:
    """Whether all is as most servers have it, and good. Hot path with middlewares: a microsecond."""
    client, server = scope.get("client"), scope.get("server")
    root_path, raw_path = scope.get("root_path", ""), scope.get("raw_path")
    return (
        type(scope["headers"]) is list
        and not _wrong_fields(scope["headers"])
        and type(scope["path"]) is str
        and scope["path"].isascii()
        and type(scope["method"]) is type(scope["scheme"]) is type(scope["http_version"]) is str
        and type(scope["query_string"]) is bytes
        and (raw_path is None or type(raw_path) is bytes)
        and type(root_path) is str
        and root_path.isascii()
        and (client is None or (type(client) is tuple and [*map(type, client)] == [str, int]))
        and (server is None or (type(server) is tuple and [*map(type, server)] == [str, int]))
    )


def _wrong_fields(headers: list[Any]) -> bool:
    try:
        for name, value in headers:
            if type(name) is not bytes or type(value) is not bytes:
                return True
    except (TypeError, ValueError):
        return True
    return False


def _fault_in(scope: Scope) -> str:
    """What a peer would not take; "" if it takes all."""
    headers = scope["headers"]
    if type(headers) is not list:
        return f"headers that are a {type(headers).__name__}: in ASGI they are a list"
    for field in headers:
        if said := _refusal(field, tuple[bytes, bytes]):
            name = field[0] if isinstance(field, (tuple, list)) and field else field
            return f"the header field {shorten(repr(name), 60)} that is no pair of bytes {said}"
    for key, form in _FORMS.items():
        if said := _refusal(scope.get(key, "" if key == "root_path" else None), form):
            return f"a scope whose {key!r} is not as in ASGI {said}"
    return ""


def _refusal(value: Any, form: Any) -> str:
    """Why it does not go over the wire as `form`; "" if it does."""
    try:
        msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=form)
    except (TypeError, ValueError, OverflowError) as error:
        return f"({error})"
    return ""

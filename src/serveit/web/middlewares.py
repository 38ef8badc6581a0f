"""The operator's ASGI middlewares around the ingress."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from serveit.importer import import_from_string
from serveit.web.head import REQUEST_ID, read_head
from serveit.web.presence import presence_of
from serveit.web.problems import problem_of, send_problem

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from serveit.config import HTTPOptions

logger = logging.getLogger("serveit.web")


def with_middlewares(app: ASGIApp, options: HTTPOptions) -> ASGIApp:
    """The app inside the operator's middlewares, the first outermost.

    Raises:
        ImportFailed: an import string leads nowhere.
        TypeError: what a factory returned is no ASGI app.
    """
    for entry in reversed(options.middlewares):
        factory = import_from_string(entry) if isinstance(entry, str) else entry
        if hasattr(factory, "cls"):  # starlette.middleware.Middleware
            app = factory.cls(app, *factory.args, **factory.kwargs)
        else:
            app = factory(app)
        if not callable(app):
            raise TypeError(f"middleware {entry!r} returned {app!r}: it must return an ASGI app")
    return _Outermost(app, debug=options.debug) if options.middlewares else app


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

"""HTTP comes in: the ASGI application of a proxy. One route match per request, nothing unpickled.

A request is matched, its body read, its endpoint's backend chosen; then it is the router's. The
answer's octets are passed on as they come.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, NoReturn, cast
from urllib.parse import quote

from serveit.calling.exchange import Exchange
from serveit.declare.conversion import shorten
from serveit.exceptions import BodyTooLarge, Draining, ServeitError
from serveit.types import HttpRequest
from serveit.web.exposition import EVERYTHING, Exposition
from serveit.web.head import REQUEST_ID, Head, Unsendable, read_head
from serveit.web.metering import RouteMeter, RouteMeters
from serveit.web.presence import AnswerBroken, Presence, presence_of
from serveit.web.problems import WITHOUT_BODY, Problem, RequestFailed, problem, problem_of, send_problem
from serveit.web.table import Found, Redirect, RouteTable, WrongMethod
from serveit.web.views import Views
from serveit.wire.frames import Failure, FrameType, HttpAnswer, Request

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from serveit.calling.directory import Directory, Endpoint
    from serveit.calling.exchange import Answer
    from serveit.calling.router import Router
    from serveit.config import HTTPOptions
    from serveit.control.snapshot import Snapshot
    from serveit.types import Clock, HeaderList
    from serveit.web.exposition import Scope as MetricsScope
    from serveit.wire.frames import Message

logger = logging.getLogger("serveit.web")
access_logger = logging.getLogger("serveit.access")

MAX_SHOWN_PATH = 200
_FRAMING = (b"content-length", b"transfer-encoding")


class ClientGone(Exception):
    """The client left before it had its answer."""


class Own(NamedTuple):
    """A path under /-/ is the instance's own."""

    path: str


Unfound = Own | Redirect | WrongMethod | None
"""What else a path may lead to."""


class RequestExchange(Exchange):
    """A REQUEST under way."""

    __slots__ = ()

    def rebuild(self, failure: Failure, body: bytes) -> BaseException:
        return RequestFailed(failure)


class Ingress:
    """The ASGI application. `update` gives it a new route table; requests under way keep the old.

    Attributes:
        table: the routes.
        ready: whether the instance takes requests; what /-/readyz says.
        stopping: from now on, who is cancelled is so by the server, and answered 503.
        exposes: whose metrics it gives.
    """

    def __init__(
        self,
        options: HTTPOptions,
        directories: Mapping[str, Directory],
        clock: Clock,
        exposes: MetricsScope = EVERYTHING,
    ) -> None:
        """
        Args:
            options: of the HTTP servers.
            directories: by app name; followed as it changes.
            clock: the one of the directories' routers.
            exposes: whose metrics it gives.
        """
        self.table = RouteTable()
        self.ready = False
        self.stopping = False
        self.exposes = exposes
        self._options = options
        self._directories = directories
        self._meters = RouteMeters()
        self._views = Views(directories, Exposition(directories, self._meters, exposes))
        self._own_meter = RouteMeter("", "/-/")  # exposed to nobody: probes are no traffic
        self._now = clock.time

    def update(self, snapshot: Snapshot) -> None:
        self.table = RouteTable(snapshot.apps)
        self._meters.follow(self.table.entries)
        self.ready = bool(snapshot.apps)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"serveit's ingress speaks HTTP, not {scope['type']}")
        begun = self._now()
        head = read_head(scope["headers"])
        found = self._find(scope)
        if type(found) is Found:
            meter = self._meters.by_order[found.entry.order]
        else:
            meter = self._own_meter if type(found) is Own else self._meters.unmatched
        meter.in_flight += 1
        status = 500
        try:
            status = await self._respond(found, scope, head, receive, send)
        finally:
            took_s = self._now() - begun
            meter.end(scope["method"], status, took_s)
            if self._options.access_log:
                _log(scope, head, status, took_s)

    async def _respond(
        self, found: Found | Unfound, scope: Scope, head: Head, receive: Receive, send: Send
    ) -> int:
        """Answer the request; returns the status for the log and the metrics."""
        presence = presence_of(scope, receive)
        unread = head.has_body
        try:
            if isinstance(found, Found):
                body = await self._read_body(head, receive, presence)
                unread = False
                return await self._run(found, scope, head, body, presence, send)
            answer = await self._answer(found, scope, head)
        except ClientGone:
            return 499
        except AnswerBroken:
            raise
        except asyncio.CancelledError:
            if not self.stopping:
                raise
            answer = problem_of(Draining("the server is stopping", executed="maybe"), debug=False)
        except Exception as error:
            answer = self._failed(error, scope, head)
        if unread and (head.expects_continue or answer.status == 413):
            # What the client holds back is not to be waited for, nor the rest of too much to be read.
            answer.headers.append((b"connection", b"close"))
        await send_problem(send, answer, head.request_id)
        return answer.status

    # -- asking ------------------------------------------------------------------------------

    def _find(self, scope: Scope) -> Found | Unfound:
        path = route_path(scope)
        return Own(path) if path.startswith("/-/") else self.table.match(scope["method"], path)

    async def _answer(self, found: Unfound, scope: Scope, head: Head) -> Problem:
        """The answer to what no route takes."""
        method = scope["method"]
        if isinstance(found, Own):
            return await self._views.answer(method, found.path, head.headers, self.table, self.ready)
        if isinstance(found, Redirect):
            return Problem(307, [(b"location", _location(scope, found.path)), (b"content-length", b"0")], b"")
        shown = repr(shorten(route_path(scope), MAX_SHOWN_PATH))
        if isinstance(found, WrongMethod):
            allow = ", ".join(found.allow)
            detail = f"{method} is not among the methods of {shown}: {allow}"
            return problem(405, detail, headers=[(b"allow", allow.encode())])
        if not self.ready:
            headers = [(b"retry-after", b"1")]
            return problem(503, f"no route takes the path {shown} now: starting or stopping", headers=headers)
        return problem(404, f"no route takes the path {shown}; GET /-/routes lists the routes")

    async def _read_body(self, head: Head, receive: Receive, presence: Presence) -> bytes:
        """The whole body.

        Raises:
            BodyTooLarge: past the limit, as soon as that is known.
            ClientGone: the client left in the middle.
        """
        limit = self._options.max_body_bytes
        if head.content_length is not None and head.content_length > limit:
            _too_large(limit)
        if not head.has_body and presence.announces_bodies:
            return b""
        parts: list[bytes] = []
        length = 0
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            more = message.get("more_body", False)
            length += len(part)
            if length > limit:
                _too_large(limit)
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _run(
        self, found: Found, scope: Scope, head: Head, body: bytes, presence: Presence, send: Send
    ) -> int:
        if presence.is_lost:
            raise ClientGone
        route = found.entry.route
        directory = self._directories[found.entry.app]
        endpoint = directory.endpoint(route.endpoint)
        router = directory.choose(endpoint, head.shard_key)
        http = _request(found, endpoint.target, scope, head)
        deadline = self._deadline(router, head)
        exchange = _exchange(http, head.request_id, body, deadline)
        router.submit(exchange)
        on_lost = exchange.cancel
        presence.watch(on_lost)
        try:
            if endpoint.traffic.shadows:
                self._shadow(directory, endpoint, http, head, body, deadline)
            return await self._deliver(exchange, await exchange.answer, scope, head, presence, send)
        except asyncio.CancelledError:
            if presence.is_lost:
                raise ClientGone from None
            exchange.cancel()
            raise
        finally:
            presence.unwatch(on_lost)

    def _deadline(self, router: Router, head: Head) -> float | None:
        limit_s, asked_s = router.info.request_timeout_s, head.timeout_s
        if limit_s is None or (asked_s is not None and asked_s < limit_s):
            limit_s = asked_s
        return None if limit_s is None else self._now() + limit_s

    @staticmethod
    def _shadow(
        directory: Directory,
        endpoint: Endpoint,
        http: HttpRequest,
        head: Head,
        body: bytes,
        deadline: float | None,
    ) -> None:
        """Copies, whose failures are nobody's."""
        try:
            directory.shadow(endpoint, lambda: _exchange(http, head.request_id, body, deadline))
        except Exception:
            logger.exception("the shadows of endpoint %r could not be sent a request", endpoint.name)

    # -- answering ---------------------------------------------------------------------------

    async def _deliver(
        self,
        exchange: RequestExchange,
        answer: Answer[Message],
        scope: Scope,
        head: Head,
        presence: Presence,
        send: Send,
    ) -> int:
        """Pass an answer on. What fails once its head is out can only be shown by cutting it off."""
        message = cast("HttpAnswer", answer.message)
        status, headers = message.status, message.headers
        bodiless = scope["method"] == "HEAD" or status in WITHOUT_BODY
        try:
            if status in WITHOUT_BODY:
                headers = [field for field in headers if field[0] not in _FRAMING]
            _set_request_id(headers, head.request_id)
            await send({"type": "http.response.start", "status": status, "headers": headers})
            if answer.inflow is None or bodiless:
                await send({"type": "http.response.body", "body": b"" if bodiless else answer.body})
            else:
                await _pass_on(answer, presence, send)
        except Unsendable as error:
            logger.error("%s %s: %s", scope["method"], scope["path"], error)
            raise ServeitError(str(error), executed="yes") from None
        except BaseException as error:
            if presence.is_lost:
                raise ClientGone from None
            if isinstance(error, Exception) and not isinstance(error, RequestFailed):
                logger.warning(
                    "an answer to %s %s was cut off", scope["method"], scope["path"], exc_info=error
                )
            presence.cut()
            if isinstance(error, Exception) or self.stopping:
                return 500
            raise
        finally:
            exchange.cancel()  # of what is left of the body; nothing if it was sent
        return 499 if presence.is_lost else status

    def _failed(self, error: Exception, scope: Scope, head: Head) -> Problem:
        if not isinstance(error, ServeitError):
            logger.error(
                "%s %s failed in the ingress (request %s)",
                scope["method"],
                scope["path"],
                head.request_id,
                exc_info=error,
            )
        return problem_of(error, debug=self._options.debug)


def _log(scope: Scope, head: Head, status: int, took_s: float) -> None:
    method, path = scope["method"], scope["path"]
    access_logger.info("%s %s %d %.1f ms %s", method, path, status, took_s * 1000, head.request_id)


async def _pass_on(answer: Answer[Message], presence: Presence, send: Send) -> None:
    """The body as it comes."""
    assert answer.inflow is not None
    if answer.body:
        await send({"type": "http.response.body", "body": answer.body, "more_body": True})
    ended = False
    while not ended:
        chunk, ended = await answer.inflow.read()
        if presence.is_lost:
            raise ClientGone
        if chunk or ended:
            await send({"type": "http.response.body", "body": chunk, "more_body": not ended})


def _set_request_id(headers: HeaderList, request_id: str) -> None:
    for index, field in enumerate(headers):
        if field[0] == REQUEST_ID:  # the backend's own
            del headers[index]
            break
    headers.append((REQUEST_ID, request_id.encode()))


def route_path(scope: Scope) -> str:
    """The path without the server's root path, which some servers leave in front of it."""
    path: str = scope["path"]
    root_path: str = scope.get("root_path", "")
    if root_path and (path == root_path or path.startswith(f"{root_path}/")):
        return path[len(root_path) :]
    return path


def _request(found: Found, target: str, scope: Scope, head: Head) -> HttpRequest:
    route = found.entry.route
    return HttpRequest(
        route.pattern,
        target,
        scope["method"],
        scope["path"],
        scope.get("raw_path") or b"",
        scope["query_string"],
        head.headers,
        found.values,
        scope["scheme"],
        scope["http_version"],
        scope.get("root_path", "") + route.prefix,
        scope.get("client"),
        scope.get("server"),
    )


def _exchange(http: HttpRequest, request_id: str, body: bytes, deadline: float | None) -> RequestExchange:
    return RequestExchange(FrameType.REQUEST, Request(request_id, http), (body,), HttpAnswer, deadline)


def _too_large(limit: int) -> NoReturn:
    raise BodyTooLarge(f"the body is larger than max_body_bytes={limit:,}")


def _location(scope: Scope, path: str) -> bytes:
    """Where a redirect leads: the same server, the other path, the same query."""
    location = quote(scope.get("root_path", "") + path, safe="/:@!$&'()*+,;=~").encode()
    # A path of two slashes would be read as another server's name.
    location = b"/" + location.lstrip(b"/")
    query: bytes = scope["query_string"]
    return location + b"?" + query if query else location

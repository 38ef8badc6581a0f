"""HTTP comes in: the ASGI application of a proxy. One route match per request, nothing unpickled.

A request is matched, its body read, its endpoint's backend chosen; then it is the router's. The
answer's octets are passed on as they come.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import msgspec

from serveit.calling.exchange import Exchange
from serveit.context import new_request_id
from serveit.exceptions import BodyTooLarge, InvalidRequest, ProtocolError
from serveit.importer import import_from_string
from serveit.types import HeaderList, HttpRequest
from serveit.web.problems import Problem, RequestFailed, problem, problem_of
from serveit.web.table import Found, Redirect, RouteTable, WrongMethod
from serveit.wire.frames import Failure, FrameType, HttpAnswer, Request

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from serveit.calling.directory import Directory
    from serveit.calling.exchange import Answer
    from serveit.calling.router import Router
    from serveit.config import HTTPOptions
    from serveit.control.snapshot import Snapshot
    from serveit.types import Clock
    from serveit.wire.frames import Message

access_logger = logging.getLogger("serveit.access")

MAX_REQUEST_ID = 128
_WANTED = frozenset(
    {b"x-request-id", b"x-request-timeout-ms", b"x-serve-shard-key", b"content-length", b"transfer-encoding"}
)


class Head(NamedTuple):
    """What the ingress itself reads of a request's header."""

    request_id: str
    timeout_s: float | None
    shard_key: str | None
    content_length: int | None
    headers: HeaderList


class ClientGone(Exception):
    """The client left before it had its answer."""


class RequestExchange(Exchange):
    """A REQUEST under way."""

    __slots__ = ()

    def rebuild(self, failure: Failure, body: bytes) -> BaseException:
        return RequestFailed(failure)


class Ingress:
    """The ASGI application. `update` gives it a new route table; requests under way keep the old."""

    def __init__(self, options: HTTPOptions, directories: Mapping[str, Directory], clock: Clock) -> None:
        """
        Args:
            options: of the HTTP servers.
            directories: by app name; followed as it changes.
            clock: the one of the directories' routers.
        """
        self.table = RouteTable()
        self.ready = False
        self._options = options
        self._directories = directories
        self._clock = clock

    def update(self, snapshot: Snapshot) -> None:
        self.table = RouteTable(snapshot.apps)
        self.ready = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"serveit's ingress speaks HTTP, not {scope['type']}")
        started = self._clock.time()
        request_id = ""
        status = 499
        try:
            try:
                head = _read_head(scope["headers"])
                request_id = head.request_id
                status = await self._handle(scope, head, receive, send)
            except (InvalidRequest, ProtocolError) as error:
                request_id = request_id or new_request_id()
                status = await self._send_problem(send, problem_of(error, debug=False), request_id)
        except ClientGone:
            pass
        finally:
            if self._options.access_log:
                ran_ms = (self._clock.time() - started) * 1000
                access_logger.info(
                    "%s %s %d %.1f ms %s", scope["method"], scope["path"], status, ran_ms, request_id
                )

    async def _handle(self, scope: Scope, head: Head, receive: Receive, send: Send) -> int:
        root_path = scope.get("root_path", "")
        path: str = scope["path"]
        if root_path and path.startswith(root_path):
            path = path[len(root_path) :]
        if path.startswith("/-/"):
            return await self._send_problem(send, self._own(scope["method"], path), head.request_id)
        found = self.table.match(scope["method"], path)
        if not isinstance(found, Found):
            return await self._send_problem(send, self._no_route(found, scope, path), head.request_id)
        directory = self._directories[found.entry.app]
        endpoint = directory.endpoint(found.entry.route.endpoint)
        router = directory.choose(endpoint, head.shard_key)
        body = await _read_body(receive, head.content_length, self._options.max_body_bytes)
        http = HttpRequest(
            route=found.entry.route.pattern,
            target=endpoint.target,
            method=scope["method"],
            path=scope["path"],
            raw_path=scope.get("raw_path", b""),
            query=scope["query_string"],
            headers=head.headers,
            path_values=found.values,
            scheme=scope["scheme"],
            http_version=scope["http_version"],
            root_path=root_path + found.entry.route.prefix,
            client=scope.get("client"),
            server=scope.get("server"),
        )
        deadline = self._deadline(router, head)
        exchange = _exchange(http, head.request_id, body, deadline)
        try:
            router.submit(exchange)
            if endpoint.traffic.shadows:
                directory.shadow(endpoint, lambda: _exchange(http, head.request_id, body, deadline))
            return await self._answer(exchange, scope, receive, send)
        except ClientGone:
            raise
        except Exception as error:
            answer = problem_of(error, debug=self._options.debug)
            return await self._send_problem(send, answer, head.request_id)

    def _deadline(self, router: Router, head: Head) -> float | None:
        limits = [limit for limit in (router.info.request_timeout_s, head.timeout_s) if limit is not None]
        return self._clock.time() + min(limits) if limits else None

    # -- answering ---------------------------------------------------------------------------

    async def _answer(self, exchange: RequestExchange, scope: Scope, receive: Receive, send: Send) -> int:
        watch = _Disconnect(scope, receive, exchange)
        watch.start()
        try:
            answer = await exchange.answer
            message = cast("HttpAnswer", answer.message)
            message.headers.append((b"x-request-id", cast("Request", exchange.message).request_id.encode()))
            start = {"type": "http.response.start", "status": message.status, "headers": message.headers}
            await send(start)
            if answer.inflow is None:
                await send({"type": "http.response.body", "body": answer.body})
            else:
                await self._pass_on(exchange, answer, watch, send)
            return message.status
        except asyncio.CancelledError:
            if watch.gone:
                raise ClientGone from None
            exchange.cancel()
            raise
        finally:
            watch.stop()

    @staticmethod
    async def _pass_on(
        exchange: RequestExchange, answer: Answer[Message], watch: _Disconnect, send: Send
    ) -> None:
        """The rest of the body, as it comes. What fails now can only be shown by cutting it off."""
        assert answer.inflow is not None
        ended = False
        try:
            while not ended:
                chunk, ended = await answer.inflow.read()
                if chunk or ended:
                    await send({"type": "http.response.body", "body": chunk, "more_body": not ended})
        except Exception:
            if watch.gone:
                raise ClientGone from None
            watch.cut()
            raise ClientGone from None
        finally:
            if not ended:
                exchange.cancel()

    @staticmethod
    async def _send_problem(send: Send, answer: Problem, request_id: str) -> int:
        headers = [*answer.headers, (b"x-request-id", request_id.encode())]
        if answer.status in (413, 431):
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body})
        return answer.status

    # -- what needs no backend ---------------------------------------------------------------

    def _no_route(self, found: WrongMethod | Redirect | None, scope: Scope, path: str) -> Problem:
        if isinstance(found, WrongMethod):
            allow = ", ".join(found.allow)
            detail = f"{scope['method']} is not among the methods of {path}: {allow}"
            return problem(405, detail, headers=[(b"allow", allow.encode())])
        if isinstance(found, Redirect):
            return Problem(307, [(b"location", _location(scope, found.path)), (b"content-length", b"0")], b"")
        return problem(404, f"no route takes the path {path!r}; GET /-/routes lists the routes")

    def _own(self, method: str, path: str) -> Problem:
        """The instance's own paths, for people, load balancers and orchestrators."""
        views = {"/-/routes": self._routes, "/-/healthz": self._healthz, "/-/readyz": self._readyz}
        view = views.get(path)
        if view is None:
            return problem(404, f"no such path; under /-/ there are {', '.join(sorted(views))}")
        if method not in ("GET", "HEAD"):
            return problem(405, headers=[(b"allow", b"GET, HEAD")])
        return view()

    def _routes(self) -> Problem:
        listed: dict[str, Any] = {}
        for entry in self.table.entries:
            key = entry.path if entry.path not in listed else entry.route.endpoint
            listed[key] = [entry.route.endpoint, list(entry.route.methods)]
        return _json(200, listed)

    def _healthz(self) -> Problem:
        return _json(200, {"status": "ok"})

    def _readyz(self) -> Problem:
        """Ready: every backend that a route leads to has a replica that takes requests."""
        if not self.ready:
            return problem(503, "starting")
        missing = set()
        for entry in self.table.entries:
            directory = self._directories[entry.app]
            endpoint = directory.endpoint(entry.route.endpoint)
            for backend, weight in endpoint.traffic.weights:
                if weight and not directory.routers[backend].statistics().replicas_ready:
                    missing.add(backend)
        if missing:
            return problem(503, f"no replica of {', '.join(sorted(missing))} is ready")
        return _json(200, {"status": "ready"})


class _Disconnect:
    """Watches for the client's leaving while its answer is made, and then cancels the request.

    Under serveit's own protocol class a callback, which costs nothing; under other ASGI servers (and
    in tests) a task that waits for `http.disconnect`.
    """

    def __init__(self, scope: Scope, receive: Receive, exchange: Exchange) -> None:
        self.gone = False
        self._connection: Any = (scope.get("extensions") or {}).get("serveit")
        self._receive = receive
        self._exchange = exchange
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._connection is not None:
            self._connection.on_disconnect = self._left
            if self._connection.is_lost:
                self._left()
        else:
            self._task = asyncio.get_running_loop().create_task(self._wait())

    def stop(self) -> None:
        if self._connection is not None:
            self._connection.on_disconnect = None
        if self._task is not None:
            self._task.cancel()

    def cut(self) -> None:
        """End the connection without the end of the answer."""
        if self._connection is None:
            raise RuntimeError("the answer's body failed in the middle")
        self._connection.cut()

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._left()

    def _left(self) -> None:
        self.gone = True
        self._exchange.cancel()


def with_middlewares(app: ASGIApp, options: HTTPOptions) -> ASGIApp:
    """The app inside the operator's middlewares, the first outermost."""
    for entry in reversed(options.middlewares):
        factory = import_from_string(entry) if isinstance(entry, str) else entry
        if hasattr(factory, "cls"):  # starlette.middleware.Middleware
            app = factory.cls(app, *factory.args, **factory.kwargs)
        else:
            app = factory(app)
    return app


def _exchange(http: HttpRequest, request_id: str, body: bytes, deadline: float | None) -> RequestExchange:
    return RequestExchange(FrameType.REQUEST, Request(request_id, http), (body,), HttpAnswer, deadline)


def _read_head(headers: list[tuple[bytes, bytes]]) -> Head:
    """One pass over the header fields.

    Raises:
        InvalidRequest: one that serveit itself reads has a bad value.
    """
    wanted: dict[bytes, bytes] = {}
    kept: HeaderList = []
    for field in headers:
        name = field[0]
        if name in _WANTED:
            wanted[name] = field[1]
        elif name.startswith(b"x-serveit-"):
            continue
        kept.append(field)
    request_id = wanted.get(b"x-request-id", b"").decode("latin-1")
    if (
        not request_id
        or len(request_id) > MAX_REQUEST_ID
        or not request_id.isascii()
        or not request_id.isprintable()
    ):
        request_id = new_request_id()
    shard_key = wanted.get(b"x-serve-shard-key")
    length = wanted.get(b"content-length")
    return Head(
        request_id=request_id,
        timeout_s=_timeout_s(wanted.get(b"x-request-timeout-ms")),
        shard_key=None if shard_key is None else shard_key.decode("latin-1"),
        content_length=int(length) if length is not None and length.isdigit() and len(length) < 20 else None,
        headers=kept,
    )


def _timeout_s(value: bytes | None) -> float | None:
    if value is None:
        return None
    if not value.isdigit() or len(value) > 10 or int(value) == 0:
        message = "x-request-timeout-ms must be a whole number of milliseconds > 0"
        raise InvalidRequest(message, [{"loc": ["header", "x-request-timeout-ms"], "msg": message}])
    return int(value) / 1000


async def _read_body(receive: Receive, content_length: int | None, limit: int) -> bytes:
    """The whole body.

    Raises:
        BodyTooLarge: past the limit, as soon as that is known.
        ClientGone: the client left in the middle.
    """
    too_large = BodyTooLarge(f"the body is larger than max_body_bytes={limit:,}")
    if content_length is not None and content_length > limit:
        raise too_large
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
            raise too_large
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _location(scope: Scope, path: str) -> bytes:
    """Where a redirect leads: the same server, the other path, the same query."""
    from urllib.parse import quote

    location = quote(scope.get("root_path", "") + path, safe="/:@!$&'()*+,;=~").encode()
    # A path of two slashes would be read as another server's name.
    location = b"/" + location.lstrip(b"/")
    query: bytes = scope["query_string"]
    return location + b"?" + query if query else location


def _json(status: int, value: Any) -> Problem:
    body = msgspec.json.encode(value)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    return Problem(status, headers, body)

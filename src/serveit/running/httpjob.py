"""A job that came as an HTTP request: bound to the function's parameters, answered in HTTP's terms."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from serveit.declare.binding import Binding, plan_binding
from serveit.declare.encoding import ChunkEncoder, encode_result, needs_asgi
from serveit.declare.routing import compile_pattern
from serveit.declare.sources import asgi_scope
from serveit.exceptions import EncodingError, ServeitError
from serveit.running.failures import Cancelled, failure_of, is_of_a_call, status_of, user_traceback
from serveit.running.job import Job, Lane
from serveit.wire.frames import HttpAnswer, Request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, MutableMapping

    from serveit.declare.backend import BackendRecord, Method
    from serveit.declare.routing import Pattern
    from serveit.running.reply import Reply
    from serveit.types import HeaderList, HttpRequest

_OCTETS = (bytes, bytearray, memoryview)

logger = logging.getLogger("serveit.replica")


class Bindings:
    """A backend's bindings, by route and method; planned once, before the replica is ready."""

    def __init__(self, backend: BackendRecord) -> None:
        self._backend = backend
        self._known: dict[tuple[str, str], Binding] = {}
        self._patterns: dict[str, Pattern] = {}
        self._hinted: set[str] = set()

    def prepare(self) -> None:
        """Plan those of the routes that the app has.

        Raises:
            TypeError: a function does not fit its route; here only for backends given by import
                string, the others are checked when they are declared.
        """
        for route in self._backend.app.routes:
            names = {*dict(route.traffic.weights), *dict(route.traffic.shadows)}
            if self._backend.name in names:
                self.find(route.pattern.text, self._backend.method(route.target), route.methods)

    def find(self, route: str, method: Method, methods: tuple[str, ...] = ("POST",)) -> Binding:
        """The binding of a route to a method. Hot path: once per request."""
        key = route, method.name
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = plan_binding(
                method.function,
                pattern=self._pattern(route),
                methods=methods,
                batch=method.is_batch,
                drop_first=method.of_class,
                where=f"route {route!r}, backend {self._backend.name!r}",
            )
        return found

    def path_params(self, http: HttpRequest) -> dict[str, Any]:
        """The path's values, converted, by name."""
        return self._pattern(http.route).convert(http.path_values)

    def hint_at_status(self, http: HttpRequest, value: tuple[Any, ...]) -> None:
        """Say once per route that `return {...}, 201` is a list in JSON: elsewhere it would be a status."""
        is_meant = (
            len(value) in (2, 3)
            and isinstance(value[0], (dict, str))
            and type(value[-1]) is int
            and 100 <= value[-1] <= 599
        )
        if is_meant and http.route not in self._hinted:
            self._hinted.add(http.route)
            logger.warning(
                "%s %s returned a tuple, which is sent as a list in JSON: if the %d is meant as the status, "
                "return a Response(..., status_code=%d) of starlette.responses",
                http.method,
                http.route,
                value[-1],
                value[-1],
            )

    def _pattern(self, route: str) -> Pattern:
        pattern = self._patterns.get(route)
        if pattern is None:
            pattern = self._patterns[route] = compile_pattern(route)
        return pattern


class HttpJob(Job):
    """A REQUEST under way in its replica."""

    __slots__ = ("_bindings", "_body", "_fault", "http")

    def __init__(
        self,
        lane: Lane,
        request: Request,
        body: bytes,
        deadline: float | None,
        reply: Reply,
        bindings: Bindings,
    ) -> None:
        super().__init__(lane, request.http.target, request.request_id, deadline, reply)
        self.http: HttpRequest = request.http
        self._body = body
        self._bindings = bindings
        self._fault: EncodingError | None = None
        """What is wrong with its own answer; user code may raise the same about another's."""

    def arguments(self, method: Method) -> tuple[Any, Any]:
        binding = self._bindings.find(self.http.route, method)
        body, self._body = self._body, b""
        return binding.bind(self.http, body)

    def is_whole(self, value: Any) -> bool:
        return not needs_asgi(value)

    def answer(self, value: Any) -> None:
        try:
            status, headers, body = encode_result(value)
            headers = _in_octets(headers)
        except EncodingError as error:
            self._fault = error
            raise
        if type(value) is tuple:
            self._bindings.hint_at_status(self.http, value)
        self.reply.whole(HttpAnswer(self.reply.others(), int(status), headers), (body,), len(body))

    async def deliver(self, value: Any) -> None:
        """Run a Starlette response as the ASGI app that it is."""
        sender = _AsgiSender(self.reply)
        try:
            await value(asgi_scope(self.http, self._bindings.path_params(self.http)), _never, sender.send)
        finally:
            self._fault = sender.fault
        sender.check_complete()

    async def stream(self, items: AsyncIterator[Any]) -> None:
        encoder = ChunkEncoder()
        begun = False
        async for value in items:
            try:
                octets = encoder.encode(value)
            except EncodingError as error:
                self._fault = error
                raise
            if not begun:
                begun = True
                self._begin(encoder.media_type or "")
            if octets:
                await self.reply.push([octets])
        if not begun:
            self._begin("text/plain; charset=utf-8")
        self.reply.finish()

    def _begin(self, media_type: str) -> None:
        head = HttpAnswer(self.reply.others(), 200, [(b"content-type", media_type.encode())])
        self.reply.begin(head)

    def fail(self, error: BaseException) -> None:
        """Send the error, and log what is nobody's but the user code's fault: what answers 500."""
        # What fails after the head of its answer is cut off, and nothing but the log can say why.
        is_cut = self.reply.is_sending and not isinstance(error, Cancelled)
        is_fault = status_of(error) == 500 or is_cut
        is_own = not self.in_user_code or error is self.given_up or error is self._fault
        failure = failure_of(
            error, others=self.reply.others(), in_user_code=self.in_user_code, traced=is_fault, is_own=is_own
        )
        self.reply.error(failure)
        if not is_fault and (is_own or not is_of_a_call(error)):
            return
        if self._is_reported(error):
            return
        where = self.http.method, self.http.route, self.request_id
        if is_fault:
            text = failure.traceback or user_traceback(error)
            logger.error("%s %s failed (request %s)\n%s", *where, text.rstrip())
        else:
            logger.warning("%s %s failed (request %s): %s: %s", *where, failure.kind, failure.text)

    def _is_reported(self, error: BaseException) -> bool:
        if self.batch is None:
            return False
        reported, self.batch.reported = self.batch.reported, error
        return reported is error


class _AsgiSender:
    """ASGI's `send`, onto a reply."""

    def __init__(self, reply: Reply) -> None:
        self.fault: EncodingError | None = None
        self._reply = reply
        self._head: HttpAnswer | None = None
        self._expected = "http.response.start"

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """One ASGI message.

        Raises:
            ServeitError: it is not the one that comes next.
            EncodingError: a header field is not octets.
        """
        kind = message["type"]
        if kind != self._expected:
            expected = f"{self._expected!r} comes next" if self._expected else "its body is complete"
            raise ServeitError(f"a response sent the ASGI message {kind!r}, but {expected}", executed="yes")
        if kind == "http.response.start":
            try:
                fields = _in_octets(list(message.get("headers", ())))
            except EncodingError as error:
                self.fault = error
                raise
            headers = [(name.lower(), value) for name, value in fields]
            self._head = HttpAnswer(self._reply.others(), int(message["status"]), headers)
            self._expected = "http.response.body"
            return
        more = message.get("more_body", False)
        if not more:
            self._expected = ""
        await self._body(bytes(message.get("body", b"")), more)

    def check_complete(self) -> None:
        """Raises ServeitError if the response returned before the end of its body."""
        if self._expected:
            raise ServeitError(
                f"a response returned too early: {self._expected!r} should have come next", executed="yes"
            )

    async def _body(self, body: bytes, more: bool) -> None:
        head, self._head = self._head, None
        if head is not None and not more:
            self._reply.whole(head, (body,), len(body))
            return
        if head is not None:
            self._reply.begin(head)
        if body:
            await self._reply.push([body])
        if not more:
            self._reply.finish()


def _in_octets(headers: HeaderList) -> HeaderList:
    """A response's header fields as they can go on the wire: a peer ends the link over anything but octets.

    Raises:
        EncodingError: names the first that is no pair of octets.
    """
    try:
        for name, value in headers:
            if type(name) is not bytes or type(value) is not bytes:
                break
        else:
            return headers
    except (TypeError, ValueError):
        pass
    return [_octets_of(field) for field in headers]


def _octets_of(field: Any) -> tuple[bytes, bytes]:
    if isinstance(field, (tuple, list)) and len(field) == 2:
        name, value = field
        if isinstance(name, _OCTETS) and isinstance(value, _OCTETS):
            return bytes(name), bytes(value)
        what = f"{name!r:.60}, a pair of {type(name).__name__} and {type(value).__name__}"
    else:
        what = f"of type {type(field).__name__}"
    raise EncodingError(
        f"a header field of the response ({what}) is not a pair of bytes: write response.headers[name] = "
        "value for text, or put (b'name', b'value') into raw_headers"
    )


async def _never() -> Any:
    """ASGI's `receive` after the body: a client that goes away cancels the whole task instead."""
    return await asyncio.get_running_loop().create_future()

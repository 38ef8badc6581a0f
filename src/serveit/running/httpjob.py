"""A job that came as an HTTP request: bound to the function's parameters, answered in HTTP's terms."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from serveit.declare.binding import Binding, plan_binding
from serveit.declare.encoding import ChunkEncoder, encode_result, needs_asgi
from serveit.declare.routing import compile_pattern
from serveit.declare.sources import asgi_scope
from serveit.exceptions import ServeitError
from serveit.running.failures import Cancelled, failure_of, status_of, user_traceback
from serveit.running.job import Job, Lane
from serveit.wire.frames import HttpAnswer, Request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, MutableMapping

    from serveit.declare.backend import BackendRecord, Method
    from serveit.declare.routing import Pattern
    from serveit.running.reply import Reply
    from serveit.types import HttpRequest

logger = logging.getLogger("serveit.replica")


class Bindings:
    """A backend's bindings, by route and method; planned once, before the replica is ready."""

    def __init__(self, backend: BackendRecord) -> None:
        self._backend = backend
        self._known: dict[tuple[str, str], Binding] = {}
        self._patterns: dict[str, Pattern] = {}

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

    def _pattern(self, route: str) -> Pattern:
        pattern = self._patterns.get(route)
        if pattern is None:
            pattern = self._patterns[route] = compile_pattern(route)
        return pattern


class HttpJob(Job):
    """A REQUEST under way in its replica."""

    __slots__ = ("_bindings", "_body", "http")

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

    def arguments(self, method: Method) -> tuple[Any, Any]:
        binding = self._bindings.find(self.http.route, method)
        body, self._body = self._body, b""
        return binding.bind(self.http, body)

    def is_whole(self, value: Any) -> bool:
        return not needs_asgi(value)

    def answer(self, value: Any) -> None:
        status, headers, body = encode_result(value)
        self.reply.whole(HttpAnswer(self.reply.others(), int(status), headers), (body,), len(body))

    async def deliver(self, value: Any) -> None:
        """Run a Starlette response as the ASGI app that it is."""
        sender = _AsgiSender(self.reply)
        await value(asgi_scope(self.http, self._bindings.path_params(self.http)), _never, sender.send)
        sender.check_complete()

    async def stream(self, items: AsyncIterator[Any]) -> None:
        encoder = ChunkEncoder()
        begun = False
        async for value in items:
            octets = encoder.encode(value)
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
        failure = failure_of(
            error, others=self.reply.others(), in_user_code=self.in_user_code, traced=is_fault
        )
        self.reply.error(failure)
        if is_fault and not self._is_reported(error):
            logger.error(
                "%s %s failed (request %s)\n%s",
                self.http.method,
                self.http.route,
                self.request_id,
                (failure.traceback or user_traceback(error)).rstrip(),
            )

    def _is_reported(self, error: BaseException) -> bool:
        if self.batch is None:
            return False
        reported, self.batch.reported = self.batch.reported, error
        return reported is error


class _AsgiSender:
    """ASGI's `send`, onto a reply."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._head: HttpAnswer | None = None
        self._expected = "http.response.start"

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """One ASGI message.

        Raises:
            ServeitError: it is not the one that comes next.
        """
        kind = message["type"]
        if kind != self._expected:
            expected = f"{self._expected!r} comes next" if self._expected else "its body is complete"
            raise ServeitError(f"a response sent the ASGI message {kind!r}, but {expected}", executed="yes")
        if kind == "http.response.start":
            headers = [(bytes(name).lower(), bytes(value)) for name, value in message.get("headers", ())]
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


async def _never() -> Any:
    """ASGI's `receive` after the body: a client that goes away cancels the whole task instead."""
    return await asyncio.get_running_loop().create_future()

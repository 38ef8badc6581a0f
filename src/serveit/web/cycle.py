"""One request and its answer on a connection: uvicorn's cycle, with a whole answer in one write.

uvicorn writes an answer's head and body separately, which costs a second system call, and sends
chunks to HTTP/1.0, which knows none. Hot path: `send` twice per request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from serveit.declare.conversion import shorten
from serveit.web.head import MAX_DIGITS, Unsendable, are_sendable, request_id_of
from serveit.web.problems import WITHOUT_BODY, problem, send_problem

if TYPE_CHECKING:
    from serveit.types import HeaderList

_NOT_PLAIN = frozenset({b"connection", b"transfer-encoding"})


class Cycle(RequestResponseCycle):
    """Made by uvicorn as its own class and turned into this one: all state here has a default.

    The head is held back until the first of the body is there, as ASGI asks of servers.
    """

    _held: Any = None
    _ends_with_connection = False

    async def send(self, message: Any) -> None:
        """ASGI's.

        Raises:
            Unsendable: the answer's head cannot be sent; another answer can.
        """
        if self.disconnected:
            return
        if self._held is not None and message["type"] == "http.response.body":
            if self.flow.write_paused or not self._finish(self._held, message):
                await self._send_first(message)
        elif self.response_started:
            await self._send_body(message)
        elif self._held is None and message["type"] == "http.response.start":
            self._held = _checked(message)
        else:
            self._held = None
            raise RuntimeError(
                f"an answer is a start and then its body; {message['type']!r} came out of order"
            )

    async def send_500_response(self) -> None:
        """For what the application raised or left undone."""
        self._held = None
        await send_problem(
            self.send, problem(500, executed="maybe"), request_id_of(list(self.scope["headers"]))
        )

    async def _send_first(self, message: Any) -> None:
        if self.flow.write_paused:
            await self.flow.drain()
        head, self._held = self._held, None
        if self.disconnected:
            return
        _check_length(head["headers"])
        if self.scope["http_version"] == "1.0" and not _has_length(head["headers"]):
            self._ends_with_connection = True
            self.chunked_encoding = False
        await super().send(head)
        await self._send_body(message)

    async def _send_body(self, message: Any) -> None:
        if self._ends_with_connection:
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)

    def _finish(self, head: Any, message: Any) -> bool:
        """Send head and body in one; False, and nothing sent, for what is better left to uvicorn."""
        status = head["status"]
        if message.get("more_body") or status in WITHOUT_BODY or self.scope["method"] == "HEAD":
            return False
        body = message.get("body", b"")
        parts = [STATUS_LINE[status]]
        length = None
        for name, value in (*self.default_headers, *head["headers"]):
            name = name.lower()
            if name == b"content-length":
                if length is not None:
                    return False
                length = value
            elif name in _NOT_PLAIN:
                if name != b"connection" or value != b"close":
                    return False
                self.keep_alive = False
                continue
            parts += (name, b": ", value, b"\r\n")
        if length != b"%d" % len(body):
            return False
        parts += (b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n", body)
        self._held = None
        self.transport.write(b"".join(parts))
        self.response_started = self.response_complete = True
        self.waiting_for_100_continue = False
        self.message_event.set()
        if not self.keep_alive and not self.more_body:
            self.transport.close()
        self.on_response()  # closes, where the client has yet to stop sending
        return True


def _checked(start: Any) -> Any:
    headers: HeaderList = start.setdefault("headers", [])
    if not 200 <= start["status"] <= 599 or not are_sendable(headers):
        raise Unsendable("the answer has a status or a header field that HTTP does not have")
    return start


def _check_length(headers: HeaderList) -> None:
    """Not in `_checked`: `_finish` sends only what has the length of its body."""
    said = {value for name, value in headers if name.lower() == b"content-length"}
    if len(said) > 1 or not all(value.isdigit() and len(value) <= MAX_DIGITS for value in said):
        shown = b", ".join(sorted(said)).decode("latin-1")
        raise Unsendable(f"the answer's content-length is {shorten(shown, 40)!r}: it must be one number")


def _has_length(headers: HeaderList) -> bool:
    return any(name.lower() == b"content-length" for name, _ in headers)

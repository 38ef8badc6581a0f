"""serveit's class of uvicorn's HTTP protocol: limits that uvicorn lacks, and who left when.

uvicorn is pinned to a range, and `tests/test_protocol.py` names each of its attributes used here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serveit.web.problems import Problem, problem

if TYPE_CHECKING:
    import asyncio

    from serveit.config import HTTPOptions

MAX_HEADER_FIELDS = 100


class ServeitProtocol(HttpToolsProtocol):
    """One connection of a client.

    The ingress finds it as `scope["extensions"]["serveit"]`: it sets `on_disconnect` while it makes
    an answer, and calls `cut` where an answer fails in the middle.
    """

    options: HTTPOptions
    """Set by `protocol_class`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.on_disconnect: Callable[[], None] | None = None
        self.is_lost = False
        self._extensions: dict[str, Any] = {"serveit": self}
        self._in_head = False
        self._head_bytes = 0
        self._fed_bytes = 0
        self._too_large = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.options.max_connections:
            self._refuse(problem(503, "too many connections", headers=[(b"retry-after", b"1")]))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.is_lost = True
        if self.on_disconnect is not None:
            self.on_disconnect()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._in_head:
            # The parser keeps an unfinished field to itself: what it was fed counts.
            self._fed_bytes += len(data)
            if self._fed_bytes > self.options.max_header_bytes and not self.transport.is_closing():
                self._refuse(self._header_too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = self._extensions
        self._in_head = True
        self._head_bytes = self._fed_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value) + 4)
        if len(self.headers) > MAX_HEADER_FIELDS:
            self._give_up()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._header_too_large() if self._too_large else problem(400, msg))

    def cut(self) -> None:
        """Close without the end of the answer, which the client can see: its body is incomplete."""
        self.cycle.disconnected = True
        self.transport.close()

    def _count(self, octets: int) -> None:
        self._head_bytes += octets
        if self._head_bytes > self.options.max_header_bytes:
            self._give_up()

    def _give_up(self) -> None:
        self._too_large = True
        raise ValueError("header too large")  # the parser stops, and uvicorn calls send_400_response

    def _header_too_large(self) -> Problem:
        limit = self.options.max_header_bytes
        return problem(431, f"the header is over {limit:,} bytes or {MAX_HEADER_FIELDS} fields")

    def _refuse(self, answer: Problem) -> None:
        """Answer without the application, and close."""
        lines = [b"HTTP/1.1 %d %s" % (answer.status, b"Refused")]
        lines += [name + b": " + value for name, value in (*answer.headers, (b"connection", b"close"))]
        self.transport.write(b"\r\n".join((*lines, b"", answer.body)))
        self.transport.close()


def protocol_class(options: HTTPOptions) -> type[ServeitProtocol]:
    """The class for one server: uvicorn makes its protocols without arguments of ours."""
    return type("ServeitProtocol", (ServeitProtocol,), {"options": options})

"""serveit's class of uvicorn's HTTP protocol: limits and checks that uvicorn lacks, and who left when.

uvicorn is pinned to a range, and `tests/test_protocol.py` names each of its attributes used here.
Hot path: the callbacks of the parser, a few times per request.
"""

from __future__ import annotations

import logging
import socket
import struct
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serveit.web.cycle import Cycle
from serveit.web.head import REQUEST_ID, request_id_of
from serveit.web.presence import EXTENSION
from serveit.web.problems import Problem, problem

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

    from serveit.config import HTTPOptions
    from serveit.types import HeaderList

logger = logging.getLogger("serveit.web")

MAX_HEADER_FIELDS = 100
READ_SIZE = 64 * 1024
"""The most that is read at once, where the event loop lets one choose: what a limit is overrun by."""
LINGER_S = 2.0
"""How long a connection is kept for a client that still sends what nobody wants."""


class Refused(ValueError):
    """Raised in a callback of the parser, which then stops: the request gets this answer."""

    def __init__(self, answer: Problem) -> None:
        super().__init__(answer.status)
        self.answer = answer


class ServeitProtocol(HttpToolsProtocol):
    """One connection of a client; to the ingress, the `Presence` of its requests.

    State beside uvicorn's: `running` (the request whose answer is being made; uvicorn's `cycle` is the
    last that was parsed), `_in_head` (a header is being parsed), `_silent_bytes` (octets that the
    parser has swallowed without a word), `_refusal` (what to answer once what came before is answered),
    `_closes` (the timer of the lingering close; from then on nothing is read that counts).
    """

    options: HTTPOptions
    """Set by `protocol_class`."""

    announces_bodies = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_lost = False
        self.running: RequestResponseCycle | None = None
        self._on_lost: Callable[[], None] | None = None
        self._extensions: dict[str, Any] = {EXTENSION: self}
        self._max_header_bytes = self.options.max_header_bytes
        self._in_head = False
        self._heads_begun = 0
        self._head_bytes = 0
        self._body_bytes = 0
        self._silent_bytes = 0
        self._refusal: Problem | None = None
        self._closes: asyncio.TimerHandle | None = None

    # -- web.presence.Presence ---------------------------------------------------------------

    def watch(self, on_lost: Callable[[], None]) -> None:
        self._on_lost = on_lost

    def unwatch(self, on_lost: Callable[[], None]) -> None:
        if self._on_lost == on_lost:  # and not the next request's already
            self._on_lost = None

    def cut(self) -> None:
        cycle = self.running
        if cycle is not None:
            cycle.disconnected = True
            if cycle.scope["http_version"] == "1.0":
                # Its end is the end of the connection: only a reset shows the cut.
                sock = self.transport.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.transport.abort()
                return
        self.transport.close()

    # -- asyncio.Protocol --------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if hasattr(transport, "max_size"):  # asyncio's own; uvloop's buffer is 250 KiB
            transport.max_size = READ_SIZE
        if len(self.connections) > self.options.max_connections:
            self._refuse(problem(503, "too many connections", headers=[(b"retry-after", b"1")]))
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._closes is not None:
            self._closes.cancel()
        self._lose()

    def data_received(self, data: bytes) -> None:
        """As uvicorn's, but nothing is lost after a request to upgrade, and errors are told apart."""
        if self._refusal is not None or self._is_ending:
            return
        if self.timeout_keep_alive_task is not None:
            self._unset_keepalive_if_required()
        self._heads_begun = 0
        is_new = not self._in_head and (self.cycle is None or not self.cycle.more_body)
        body_bytes, rest = self._body_bytes, data
        while rest:
            try:
                self.parser.feed_data(rest)
                break
            except httptools.HttpParserUpgrade as upgrade:
                rest = rest[upgrade.args[0] :]  # served as a plain request, as HTTP allows
            except httptools.HttpParserError as error:
                self._refuse_after_others(_answer_to(error))
                return
        if self._in_head or self.cycle is None or self.cycle.more_body:
            self._count_silence(len(data), is_new, self._body_bytes != body_bytes)

    # -- httptools ---------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = self._extensions
        self._in_head = True
        self._heads_begun += 1
        self._head_bytes = self._body_bytes = self._silent_bytes = 0

    def on_url(self, url: bytes) -> None:
        self.url += url
        self._head_bytes += len(url)
        if self._head_bytes > self._max_header_bytes:
            raise Refused(self._header_too_large())

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > self._max_header_bytes or len(self.headers) >= MAX_HEADER_FIELDS:
            raise Refused(self._header_too_large())
        if self._in_head:  # a trailer is no header
            name = name.lower()
            if name == b"expect":
                self.expect_100_continue = value.lower() == b"100-continue"
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        version = self.parser.get_http_version()
        _check(version, self.headers)
        super().on_headers_complete()
        self._in_head = False
        self.cycle.__class__ = Cycle

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)
        if self._body_bytes > self.options.max_body_bytes:
            if self.cycle.response_complete:
                self._linger()  # it was answered without: all of that is not wanted
            else:
                self.flow.pause_reading()

    # -- uvicorn -----------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        cycle = self.running
        if cycle is not None and cycle.more_body and not cycle.keep_alive:
            self._linger()
            return
        super().on_response_complete()
        if self._refusal is not None and not self.pipeline and self._is_idle:
            self._refuse(self._refusal)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self.running = cycle
        super()._start_asgi_task(cycle, app)

    # -- limits and refusals -----------------------------------------------------------------

    def _lose(self) -> None:
        """Nobody reads the answer that is being made."""
        self.is_lost = True
        if self.running is not None and not self.running.response_complete:
            self.running.disconnected = True
            self.running.message_event.set()
        if self._on_lost is not None:
            self._on_lost()

    def _count_silence(self, octets: int, is_new: bool, got_body: bool) -> None:
        """Bound what the parser keeps to itself: unfinished fields, extensions of chunks, trailers.

        Where the header began in the middle of what was read, only what follows counts.
        """
        if self.parser is None or self._is_ending:
            return
        if self._in_head:
            if self._heads_begun == 0 or (is_new and self._heads_begun == 1):
                self._silent_bytes += octets
        elif got_body or self._heads_begun:
            self._silent_bytes = 0
        else:
            self._silent_bytes += octets
        if self._silent_bytes > self._max_header_bytes:
            self._refuse_after_others(self._header_too_large())

    def _header_too_large(self) -> Problem:
        return problem(
            431, f"the header is over {self._max_header_bytes:,} bytes or {MAX_HEADER_FIELDS} fields"
        )

    def _refuse_after_others(self, answer: Problem) -> None:
        """Refuse what is being parsed, once the requests before it have their answers."""
        cycle = self.cycle
        if cycle is not None and not self._in_head and cycle.more_body:
            # The fault is in this request's body: the refusal is its answer.
            waiting = next((entry for entry in self.pipeline if entry[0] is cycle), None)
            if waiting is not None:
                self.pipeline.remove(waiting)
            elif cycle.response_started:
                self.cut()
                return
            else:
                self._refuse(answer)
                return
        if self._is_idle:
            self._refuse(answer)
        else:
            self._refusal = answer

    def _refuse(self, answer: Problem) -> None:
        """Answer without the application, and close."""
        if self._is_ending:
            return
        logger.info("refused a request of %s: %d %s", self.client, answer.status, answer.body.decode())
        request_id = request_id_of(self.headers or []).encode()
        fields = (
            *self.server_state.default_headers,
            *answer.headers,
            (REQUEST_ID, request_id),
            (b"connection", b"close"),
        )
        phrase = HTTPStatus(answer.status).phrase.encode()
        lines = [b"HTTP/1.1 %d %s" % (answer.status, phrase)]
        lines += [name + b": " + value for name, value in fields]
        self.transport.write(b"\r\n".join((*lines, b"", answer.body)))
        self._linger()
        self._lose()

    @property
    def _is_idle(self) -> bool:
        return self.running is None or self.running.response_complete

    @property
    def _is_ending(self) -> bool:
        return self._closes is not None or self.transport.is_closing()

    def _linger(self) -> None:
        """Close, but not at once: a reset would take the answer from a client that is still sending."""
        if self._is_ending:
            return
        if not self.transport.can_write_eof():  # TLS
            self.transport.close()
            return
        self._unset_keepalive_if_required()
        self.transport.write_eof()
        self.flow.resume_reading()
        self._closes = self.loop.call_later(LINGER_S, self.transport.close)


def _check(version: str, headers: HeaderList) -> None:
    """What llhttp lets through, and others may read as something else (RFC 9112, 3.2 and 6.1).

    Raises:
        Refused: with a 400 or 505.
    """
    if version not in ("1.1", "1.0"):
        raise Refused(problem(505, f"HTTP/{version} is not spoken here: use HTTP/1.1"))
    names = [name for name, _ in headers]
    hosts = names.count(b"host")
    if hosts > 1 or (not hosts and version == "1.1"):
        raise Refused(problem(400, f"a request has one Host, this one has {hosts or 'none'}"))
    if b"transfer-encoding" in names:
        codings = [value.strip().lower() for name, value in headers if name == b"transfer-encoding"]
        if version == "1.0" or codings != [b"chunked"]:
            raise Refused(problem(400, "the only Transfer-Encoding taken is chunked, in HTTP/1.1"))


def _answer_to(error: httptools.HttpParserError) -> Problem:
    raised = error.__context__
    if isinstance(raised, Refused):
        return raised.answer
    if isinstance(error, httptools.HttpParserCallbackError):
        return problem(400, "the request's target is not one that HTTP knows")
    return problem(400, f"not valid HTTP/1.1: {error}")


def protocol_class(options: HTTPOptions) -> type[ServeitProtocol]:
    """The class for one server: uvicorn makes its protocols without arguments of ours."""
    return type("ServeitProtocol", (ServeitProtocol,), {"options": options})

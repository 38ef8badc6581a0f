"""The oracle of the fault tests: it asks at a fixed rate, whatever the answers do, and keeps account.

    log = tmp_path / "log"                       # and the app's handler: return await recorded(log, id, "v1")
    async with Ledger(client.url, path="/route", log=log) as ledger:
        ...                                      # what must not be noticed
    ledger.report().check()

Each request has an id of its own and waits for no other: there are as many connections as that takes.
What handlers do, and what a report says, is in `account`.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec

from tests.account import Echo, Entry, Report, make_report
from tests.support import wait_until

PATIENCE_S = 20.0
"""What requests that are under way get once no more are sent."""


class Answer(NamedTuple):
    """An HTTP answer, whole."""

    status: int
    headers: dict[str, str]
    body: bytes


def take_answers(buffer: bytearray) -> Iterator[Answer]:
    """Take the whole answers out of what a server has sent so far.

    Raises:
        ValueError: that is no answer of known length.
    """
    while (end := buffer.find(b"\r\n\r\n")) >= 0:
        first, *lines = buffer[:end].decode("latin-1").split("\r\n")
        if not first.startswith("HTTP/1."):
            raise ValueError(f"no answer: {first[:80]!r}")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        status = int(first.split(" ")[1])
        if status >= 200 and "content-length" not in headers:
            raise ValueError(f"a {status} without content-length")
        whole = end + 4 + int(headers.get("content-length", 0))
        if len(buffer) < whole:
            return
        body = bytes(buffer[end + 4 : whole])
        del buffer[:whole]
        if status >= 200:
            yield Answer(status, headers, body)


class _Connection(asyncio.Protocol):
    """One keep-alive connection, with at most one request under way.

    All mutable state: `entry` (the request under way), `transport`, and what was received and not read yet.
    """

    def __init__(self, ledger: Ledger, sock: socket.socket) -> None:
        self.entry: Entry | None = None
        self.transport: asyncio.Transport
        self._ledger = ledger
        self._sock = sock
        self._buffer = bytearray()

    def is_usable(self) -> bool:
        """Whether the server has neither closed it nor sent what nobody asked for. The socket is asked:
        the event loop may not have come to it yet."""
        if self.transport.is_closing():
            return False
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def send(self, entry: Entry, request: bytes) -> None:
        self.entry = entry
        self.transport.write(request)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._ledger.opened(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        try:
            for answer in take_answers(self._buffer):
                entry, self.entry = self.entry, None
                self._ledger.answered(entry, answer)
                if answer.headers.get("connection", "").lower() == "close":
                    self.transport.close()
        except ValueError as error:
            self._fail(f"unreadable: {error}")
            self.transport.abort()
        if self.entry is None and not self.transport.is_closing():
            self._ledger.idle(self)

    def connection_lost(self, exc: Exception | None) -> None:
        how = type(exc).__name__ if exc is not None else "closed"
        self._fail(f"{how} {'inside an answer' if self._buffer else 'without an answer'}")
        self._ledger.lost(self)

    def _fail(self, error: str) -> None:
        entry, self.entry = self.entry, None
        if entry is not None:
            self._ledger.settle(entry, error)


class Ledger:
    """Requests at a fixed rate for as long as one is inside: `async with Ledger(url, path=...) as ledger`.

    All mutable state: `entries` (each request), `_echoes` (answers by the id that they bear), `_num_done`
    (requests whose outcome is known), `_idle` and `_connections`, `_opening` (tasks that connect, then
    send) and `_pacer`.
    """

    def __init__(
        self,
        url: str,
        *,
        path: str,
        rate: float = 200.0,
        log: Path | None = None,
        patience_s: float = PATIENCE_S,
        fields: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            url: of the server, "http://127.0.0.1:8000".
            path: of the route, with a query if need be; its handler returns
                `recorded(...)` of the query's `id`.
            rate: requests a second.
            log: what the handlers note in.
            patience_s: what requests that are under way in the end get.
            fields: of each request's header.
        """
        parts = urlsplit(url)
        assert parts.scheme == "http" and parts.hostname and parts.port, url
        self.entries: list[Entry] = []
        self._place = (parts.hostname, parts.port)
        self._path = path
        self._rate = rate
        self._log = log
        self._patience_s = patience_s
        self._fields = "".join(f"{name}: {value}\r\n" for name, value in (fields or {}).items())
        self._run = secrets.token_hex(4)
        self._echoes: Counter[str] = Counter()
        self._num_done = 0
        self._idle: list[_Connection] = []
        self._connections: set[_Connection] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._pacer: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Ledger:
        self._pacer = asyncio.create_task(self._pace())
        return self

    async def __aexit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        await _cancel({self._pacer} if self._pacer is not None else set())
        if exc_type is None:
            with contextlib.suppress(AssertionError):  # what has no outcome now is the report's affair
                await wait_until(lambda: self._num_done == len(self.entries), self._patience_s, "all done")
        await _cancel(self._opening)
        for connection in list(self._connections):
            connection.entry = None
            connection.transport.abort()
        await wait_until(lambda: not self._connections, self._patience_s, "connections are closed")

    @property
    def mark(self) -> int:
        """This moment, for `report`: how many requests have been sent."""
        return len(self.entries)

    def report(self, since: int = 0, until: int | None = None) -> Report:
        """The account of the requests sent between two marks. Without them, of all."""
        return make_report(self.entries[since:until], self._echoes, self._log)

    def versions(self, since: int = 0) -> set[str]:
        """Those that have answered what was sent since a mark. Cheap: the log is not read."""
        return {entry.echo.version for entry in self.entries[since:] if entry.echo is not None}

    async def more(self, count: int, timeout_s: float = PATIENCE_S) -> None:
        """Wait until the next so many requests, sent from now on, have their outcome."""
        first, last = self.mark, self.mark + count

        def are_done() -> bool:
            return self.mark >= last and all(entry.done is not None for entry in self.entries[first:last])

        await wait_until(are_done, timeout_s, f"the outcome of {count} more requests")

    # -- sending -----------------------------------------------------------------------------

    async def _pace(self) -> None:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        while True:
            due = begun + len(self.entries) / self._rate
            if (ahead_s := due - loop.time()) > 0:
                await asyncio.sleep(ahead_s)
            self._send(Entry(f"{self._run}-{len(self.entries)}", due))

    def _send(self, entry: Entry) -> None:
        self.entries.append(entry)
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable():
                connection.send(entry, self._request(entry))
                return
        task = asyncio.create_task(self._open_and_send(entry))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open_and_send(self, entry: Entry) -> None:
        loop = asyncio.get_running_loop()
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, self._place)
            _, connection = await loop.create_connection(lambda: _Connection(self, sock), sock=sock)
        except BaseException as error:
            sock.close()
            if not isinstance(error, OSError):
                raise
            self.settle(entry, f"{type(error).__name__} while connecting")
            return
        connection.send(entry, self._request(entry))

    def _request(self, entry: Entry) -> bytes:
        host, port = self._place
        joint = "&" if "?" in self._path else "?"
        target = f"{self._path}{joint}id={entry.id}"
        return f"GET {target} HTTP/1.1\r\nhost: {host}:{port}\r\n{self._fields}\r\n".encode()

    # -- what connections tell ---------------------------------------------------------------

    def answered(self, entry: Entry | None, answer: Answer) -> None:
        """An answer, to a request or to none."""
        echo = None
        if answer.status == 200:
            with contextlib.suppress(msgspec.MsgspecError):
                echo = msgspec.json.decode(answer.body, type=Echo)
        if echo is not None:
            self._echoes[echo.id] += 1
        if entry is not None:
            entry.status, entry.body, entry.echo = answer.status, answer.body, echo
            entry.executed = answer.headers.get("x-serveit-executed", "")
            self.settle(entry, "" if echo is not None else f"not a handler's answer ({answer.status})")

    def settle(self, entry: Entry, error: str) -> None:
        """A request has its outcome: the text says why it has no readable answer, if it has none."""
        entry.done, entry.error = asyncio.get_running_loop().time(), error
        self._num_done += 1

    def opened(self, connection: _Connection) -> None:
        self._connections.add(connection)

    def idle(self, connection: _Connection) -> None:
        if connection not in self._idle:
            self._idle.append(connection)

    def lost(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)


async def _cancel(tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)

"""HTTP as octets on a real socket, for what a well-behaved client never sends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from serveit.config import HTTPOptions
from serveit.web.proxy import Proxy

TIMEOUT_S = 10.0


@dataclass
class Reply:
    """An answer as it was on the wire."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes = b""
    chunks: list[bytes] = field(default_factory=list)

    def __getitem__(self, name: str) -> str:
        return dict(self.headers)[name]

    def __contains__(self, name: str) -> bool:
        return name in dict(self.headers)

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)


class Wire:
    """A client's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, octets: bytes) -> None:
        self.writer.write(octets)
        await self.writer.drain()

    async def get(self, path: str, *fields: str, method: str = "GET", body: bytes = b"") -> Reply:
        """A well-formed request and its answer."""
        lines = [f"{method} {path} HTTP/1.1", "Host: test", *fields]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        await self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        return await self.reply(method)

    async def head(self) -> Reply:
        """Status and header fields of the next answer."""
        lines = (await self._wait(self.reader.readuntil(b"\r\n\r\n"))).decode("latin-1").split("\r\n")
        fields = [line.split(": ", 1) for line in lines[1:] if line]
        return Reply(int(lines[0].split(" ")[1]), [(name.lower(), value) for name, value in fields])

    async def reply(self, method: str = "GET") -> Reply:
        """The whole of the next answer."""
        reply = await self.head()
        if method == "HEAD" or reply.status in (204, 304) or reply.status < 200:
            return reply
        if "transfer-encoding" in reply:
            while chunk := await self.chunk():
                reply.chunks.append(chunk)
            reply.body = b"".join(reply.chunks)
        elif "content-length" in reply:
            reply.body = await self._wait(self.reader.readexactly(int(reply["content-length"])))
        else:
            reply.body = await self.rest()
        return reply

    async def chunk(self) -> bytes:
        """The next chunk; empty for the last."""
        size = int(await self._wait(self.reader.readuntil(b"\r\n")), 16)
        return (await self._wait(self.reader.readexactly(size + 2)))[:-2]

    async def rest(self) -> bytes:
        """All until the server closes."""
        return await self._wait(self.reader.read())

    async def is_closed(self) -> bool:
        """Whether the server closed and sent nothing more."""
        try:
            return await self.rest() == b""
        except ConnectionResetError:
            return True

    def reset(self) -> None:
        """Leave with a RST."""
        sock: socket.socket = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    @staticmethod
    async def _wait(awaitable: Any) -> bytes:
        octets: bytes = await asyncio.wait_for(awaitable, TIMEOUT_S)
        return octets


@contextlib.asynccontextmanager
async def connected(url: str | None, *, receive_buffer: int = 0) -> AsyncIterator[Wire]:
    """A connection to the server at `url`."""
    assert url is not None
    host, port = url.removeprefix("http://").split("/")[0].rsplit(":", 1)
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
    except OSError:
        sock.close()
        raise
    wire = Wire(*await asyncio.open_connection(sock=sock))
    try:
        yield wire
    finally:
        await wire.close()


class Ingress:
    """Stands in for the ingress: an ASGI app that a test wrote."""

    def __init__(self, app: Any) -> None:
        self.stopping = False
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


@contextlib.asynccontextmanager
async def proxied(app: Any, **options: Any) -> AsyncIterator[Proxy]:
    """A server on a free port around an ASGI app."""
    proxy = Proxy(HTTPOptions(port=0, **options), Ingress(app))  # type: ignore[arg-type]
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.aclose(0)

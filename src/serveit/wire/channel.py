"""The link between processes: frames over a Unix or TCP socket, one write a loop tick and side.

Hot path: `send`, `flush` and `data_received`. Whom a channel speaks with is settled before its receiver
hears of anything (`wire/auth.py`); which frames mean what is the receiver's business.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from serveit.exceptions import ProtocolError
from serveit.wire.auth import Handshake
from serveit.wire.frames import Buffer, Decoder, FrameType, encode_frame
from serveit.wire.heart import Heart
from serveit.wire.link import lose, receive
from serveit.wire.shaking import Shaking
from serveit.wire.sockets import Address, bind_private, bind_tcp, named

if TYPE_CHECKING:
    from serveit.wire.link import Receiver

logger = logging.getLogger("serveit.wire")

MAX_SILENT = 3
"""Ticks of the heart in a row without a word from the other end, after which it counts as stale."""

CLOSE_S = 5.0
"""What a peer gets to read the last of what was sent to it."""

MAX_SHAKING = 256
"""Connections over TCP whose handshake is not complete, at once; more are closed."""

BACKLOG = 1024
READ_SIZE = 256 * 1024
MAX_DRAIN_READS = 64
"""A peer that goes on writing to a connection that broke must not keep this end reading for ever."""


class Channel(asyncio.Protocol):
    """One end of a connection whose handshake is complete; `connect` and `listen` make it.

    All other mutable state: `_receiver` (set by `open`), `_outbox` (frames of this tick),
    `_copy` (of the socket, see `_drain`), `_guard` (bounds the closing), `_silent` (ticks without a
    word), `_sent` (something was, in this tick).

    Attributes:
        closed: as `wire.link.Link` says.
        stale: the same.
        peer: the other end's HELLO.
    """

    _receiver: Receiver

    def __init__(self, shaken: Shaking, lost: Callable[[Channel], object], first: bytes = b"") -> None:
        self.closed = False
        self.stale = False
        self.peer = shaken.handshake.peer
        self._address = shaken.address
        self._transport = shaken.transport
        self._copy = shaken.copy
        self._lost = lost
        self._decoder = Decoder()
        self._outbox = [first] if first else []
        self._loop = asyncio.get_running_loop()
        self._guard: asyncio.TimerHandle | None = None
        self._silent = -1
        self._sent = False
        # Or uvloop (up to 0.19) keeps what is written until the end of the tick, and a process that
        # dies in it (STARTED, then a segfault) takes it along.
        self._transport.set_write_buffer_limits(0)

    def __repr__(self) -> str:
        state = "closed" if self.closed else "stale" if self.stale else "open"
        return f"<Channel {self._address} {self.peer.role} {state}>"

    # -- wire.link.Link ----------------------------------------------------------------------

    def send(self, kind: int, stream: int, meta: bytes = b"", body: Buffer = b"", flags: int = 0) -> None:
        if self.closed:
            return
        frame = encode_frame(kind, stream, meta, body, flags)
        if not self._outbox:
            self._loop.call_soon(self.flush)
        self._outbox.append(frame)

    def flush(self) -> None:
        """Write what is queued now: the kernel has it then, unless the peer reads too slowly."""
        outbox = self._outbox
        if outbox:
            self._outbox = []
            self._sent = True
            if not self._transport.is_closing():  # asyncio logs who writes to a lost connection
                self._transport.write(outbox[0] if len(outbox) == 1 else b"".join(outbox))

    def close(self) -> None:
        if self.closed:
            return
        self.flush()
        self._release()
        transport = self._transport
        if transport.is_closing():
            return  # lost, and about to be told
        self._guard = self._loop.call_later(CLOSE_S, transport.abort)
        if self._address.kind == "unix":
            transport.close()
            return
        # Closing a TCP socket with unread octets in it would reset it and lose what the peer has not
        # got yet: so say that this is the end, and drop what comes until the peer closes too.
        try:
            transport.write_eof()
        except OSError:
            transport.abort()

    # -- asyncio.Protocol --------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if not self.closed:
            self._silent = -1
            self.stale = False
            receive(data, self._decoder, self._receiver, self)

    def eof_received(self) -> None:
        # Nobody reads any more, so what is still to be written need not be waited for.
        self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._drain()
        closed_here = self.closed
        self._release()
        if self._guard is not None:
            self._guard.cancel()
            self._guard = None
        self._lost(self)
        lose(self._receiver, None if closed_here else error)

    # -- who made it, and the heart ----------------------------------------------------------

    def open(self, receiver: Receiver) -> None:
        """The peer is welcome: `receiver` hears of what comes from now on."""
        self._receiver = receiver
        self._transport.set_protocol(self)
        self.flush()
        if not self.closed:
            Heart.join(self._loop, self)

    def resume(self, rest: bytes) -> None:
        """Take in what came behind the handshake, and then the rest."""
        if not self._transport.is_closing():
            self._transport.resume_reading()
        self.data_received(rest)

    def beat(self) -> None:
        """Counted in ticks of this loop, so that one that was blocked does not suspect the others."""
        self._silent += 1
        self.stale = self._silent >= MAX_SILENT
        if not self._sent and not self._transport.get_write_buffer_size():
            self.send(FrameType.PING, 0)
            self.flush()
        self._sent = False

    # -- inside ------------------------------------------------------------------------------

    def _drain(self) -> None:
        """When a write fails first, asyncio and uvloop drop what the peer wrote before it died. It
        tells what was started there from what was not, so it is read from a copy of the socket."""
        with suppress(OSError):
            for _ in range(MAX_DRAIN_READS):
                if self.closed or self._copy is None:
                    return
                data = self._copy.recv(READ_SIZE, socket.MSG_DONTWAIT)
                if not data:
                    return
                self.data_received(data)

    def _release(self) -> None:
        """This end is closed. The copy would keep the connection alive."""
        self.closed = True
        Heart.leave(self._loop, self)
        if self._copy is not None:
            self._copy.close()
            self._copy = None


class _Dial:
    """The owner of the connection that `connect` makes."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.answered: asyncio.Future[None] = loop.create_future()
        self.gone: asyncio.Future[None] = loop.create_future()

    def made(self, shaking: Shaking) -> None: ...

    def shaken(self, shaking: Shaking, answer: bytes) -> None:
        shaking.transport.write(answer)
        shaking.transport.pause_reading()
        if not self.answered.done():
            self.answered.set_result(None)

    def failed(self, shaking: Shaking, error: Exception) -> None:
        if not self.answered.done():
            self.answered.set_exception(error)

    def lost(self, gone: Shaking | Channel) -> None:
        if not self.gone.done():
            self.gone.set_result(None)


async def connect(
    address: str,
    receiver: Receiver,
    *,
    role: str,
    secret: bytes = b"",
    extra: Mapping[str, Any] | None = None,
    timeout_s: float = 5.0,
) -> Channel:
    """A channel to who listens at `address`; `receiver` hears nothing before the loop's next turn.

    Args:
        address: "unix:/path" or "tcp:host:port".
        receiver: who gets the frames.
        role: what this end is; the other may refuse it.
        secret: what both ends know; needed for TCP and used only there.
        extra: arrives as `channel.peer.extra` at the other end; at most about 4 KiB.
        timeout_s: for all of it.

    Raises:
        OSError: nobody is there, or another user's process (PermissionError).
        ProtocolError: what is there speaks another protocol or version, does not know the secret, or
            does not want this role.
        TimeoutError: it does not answer.
        ValueError: a bad argument.
    """
    where = Address.parse(address, secret)
    dial = _Dial()
    handshake = Handshake("caller", role, secret if where.kind == "tcp" else b"", extra)
    shaking = Shaking(where, handshake, dial)
    reached = False
    try:
        async with asyncio.timeout(timeout_s):
            await _reach(shaking)
            reached = True
            await dial.answered
    except BaseException as error:
        dial.answered.cancel()
        shaking.abort()
        if reached:  # or uvloop may never say that it is lost
            await dial.gone
        if isinstance(error, TimeoutError):
            raise TimeoutError(f"{address} did not answer within {timeout_s:g} s") from None
        if isinstance(error, OSError):
            raise named(error, address) from None
        raise
    if shaking.closed:
        raise ConnectionResetError(f"{address} closed the connection after the handshake")
    channel = Channel(shaking, dial.lost)
    channel.open(receiver)
    asyncio.get_running_loop().call_soon(channel.resume, handshake.rest)
    return channel


async def _reach(shaking: Shaking) -> None:
    loop, address = asyncio.get_running_loop(), shaking.address
    if address.kind == "unix":
        await loop.create_unix_connection(lambda: shaking, address.host)
    else:
        await loop.create_connection(lambda: shaking, address.host, address.port)


class Listening:
    """Where callers come in; `listen` makes it.

    All mutable state: `_shaking` and `_channels` (until their sockets are closed), `_idle` (there are
    none), `_closing`, `_socket_file` (what identifies ours).

    Attributes:
        address: the real one, for `connect`.
    """

    def __init__(
        self, address: Address, accept: Callable[[Channel], Receiver], role: str, secret: bytes
    ) -> None:
        self.address = str(address)
        self._where = address
        self._accept = accept
        self._role = role
        self._secret = secret if address.kind == "tcp" else b""
        self._shaking: set[Shaking] = set()
        self._channels: set[Channel] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False
        self._socket_file = os.lstat(address.host) if address.kind == "unix" else None
        self.server: asyncio.Server

    def __repr__(self) -> str:
        state = "closed" if self._closing else "open"
        return (
            f"<Listening {self.address} {state} channels={len(self._channels)} shaking={len(self._shaking)}>"
        )

    @property
    def channels(self) -> list[Channel]:
        """Those that are open."""
        return [channel for channel in self._channels if not channel.closed]

    async def aclose(self) -> None:
        """Stop listening, and close all channels: what was sent on them before still goes out."""
        self._closing = True
        self.server.close()
        self.unlink()
        for shaking in tuple(self._shaking):
            shaking.abort()
        for channel in tuple(self._channels):
            channel.close()
        await self._idle.wait()
        await asyncio.sleep(0)  # what was closed last is closed by uvloop in the next turn

    # -- wire.shaking.Owner ---------------------------------------------------------------------

    def made(self, shaking: Shaking) -> None:
        if self._closing:
            raise ConnectionResetError(f"{self.address} is closed")
        if self._secret and len(self._shaking) >= MAX_SHAKING:
            raise ConnectionRefusedError(f"{MAX_SHAKING} peers have not completed their handshakes yet")
        self._shaking.add(shaking)
        self._idle.clear()

    def shaken(self, shaking: Shaking, answer: bytes) -> None:
        channel = Channel(shaking, self.lost, answer)
        try:
            receiver = self._accept(channel)
        except Exception as error:
            channel.closed = True
            if not isinstance(error, ProtocolError):
                logger.exception("%s could not accept a peer", self.address)
            refused = error if isinstance(error, ProtocolError) else ProtocolError("an error on its side")
            shaking.handshake.refuse(refused)
            raise refused from error
        self._shaking.discard(shaking)
        self._channels.add(channel)
        channel.open(receiver)
        channel.data_received(shaking.handshake.rest)

    def failed(self, shaking: Shaking, error: Exception) -> None:
        quiet = isinstance(error, ConnectionResetError)  # somebody only looked whether we listen
        logger.log(logging.DEBUG if quiet else logging.WARNING, "refusing a peer: %s", error)

    def lost(self, gone: Shaking | Channel) -> None:
        if isinstance(gone, Channel):
            self._channels.discard(gone)
        else:
            self._shaking.discard(gone)
        if not self._shaking and not self._channels:
            self._idle.set()

    def incoming(self) -> Shaking:
        """For the next caller."""
        return Shaking(self._where, Handshake("replica", self._role, self._secret), self)

    def unlink(self) -> None:
        """Remove the socket file, if it is still ours."""
        with suppress(FileNotFoundError):
            if self._socket_file and os.path.samestat(os.lstat(self._where.host), self._socket_file):
                os.unlink(self._where.host)


async def listen(
    address: str, accept: Callable[[Channel], Receiver], *, role: str, secret: bytes = b""
) -> Listening:
    """Take callers in.

    Args:
        address: "unix:/path", in a directory that is made or has to be private; or "tcp:host:port".
        accept: called once for each peer whose handshake is complete; says who gets its frames, or
            raises ProtocolError.
        role: what this end is.
        secret: what both ends know; needed for TCP and used only there.

    Raises:
        OSError: the address is taken or not this machine's, or (PermissionError) its directory open.
        ValueError: a bad argument.
    """
    where = Address.parse(address, secret)
    unix = where.kind == "unix"
    sock = bind_private(where.host) if unix else await bind_tcp(where)
    listening = Listening(where if unix else Address("tcp", *sock.getsockname()[:2]), accept, role, secret)
    loop = asyncio.get_running_loop()
    serve = loop.create_unix_server if unix else loop.create_server
    try:
        listening.server = await serve(listening.incoming, sock=sock, backlog=BACKLOG)
    except BaseException:
        listening.unlink()
        sock.close()
        raise
    return listening

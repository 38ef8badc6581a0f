"""A connection until both ends know each other: `auth.Handshake` on a socket. Then it is a `Channel`."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING, Protocol, cast

from serveit.exceptions import ProtocolError
from serveit.wire.sockets import prepare

if TYPE_CHECKING:
    from serveit.wire.auth import Handshake
    from serveit.wire.sockets import Address

HANDSHAKE_S = 5.0
"""What a peer gets for its side of the handshake."""


class Owner(Protocol):
    """Who opens or accepts connections."""

    def made(self, shaking: Shaking) -> None:
        """A new one. An OSError refuses it."""

    def shaken(self, shaking: Shaking, answer: bytes) -> None:
        """Its handshake is complete once `answer` is written. From here on its transport is the
        owner's. A ProtocolError refuses the peer."""

    def failed(self, shaking: Shaking, error: Exception) -> None:
        """Its handshake is not going to be complete; it is being closed."""

    def lost(self, gone: Shaking) -> None:
        """Its socket is closed, or will be in this turn."""


class Shaking(asyncio.Protocol):
    """A connection until both ends know each other.

    Attributes:
        address: where the other end listens, or this one.
        handshake: how far it is.
        copy: of its socket.
        closed: it failed, was aborted or lost.
    """

    transport: asyncio.Transport

    def __init__(self, address: Address, handshake: Handshake, owner: Owner) -> None:
        self.address = address
        self.handshake = handshake
        self.copy: socket.socket | None = None
        self._connected = False
        self.closed = False
        self._owner = owner
        self._guard: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        if self.closed:
            self.transport.abort()
            return
        self._connected = True
        try:
            self.copy = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
            prepare(self.copy, self.address.kind)
            self._owner.made(self)
        except OSError as error:
            self._fail(error)
            return
        if self.handshake.side == "replica":
            self._guard = asyncio.get_running_loop().call_later(HANDSHAKE_S, self._late)
        self.transport.write(self.handshake.opening)

    def data_received(self, data: bytes) -> None:
        if self.closed:
            return
        handshake = self.handshake
        try:
            answer = handshake.feed(data)
            if not handshake.done:
                self.transport.write(answer)
                return
            self._cancel_guard()
            self._owner.shaken(self, answer)
        except ProtocolError as error:
            self.transport.write(handshake.farewell)
            self._fail(ProtocolError(f"{self.address}: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed:
            self._fail(ConnectionResetError(f"{self.address} closed the connection within the handshake"))
        self._owner.lost(self)

    def abort(self) -> None:
        """Close it now."""
        self.closed = True
        self._cancel_guard()
        if self.copy is not None:
            self.copy.close()
        if self._connected:
            self.transport.abort()

    def _cancel_guard(self) -> None:
        if self._guard is not None:
            self._guard.cancel()

    def _late(self) -> None:
        self._fail(ProtocolError(f"{self.address}: no handshake within {HANDSHAKE_S:g} s"))

    def _fail(self, error: Exception) -> None:
        self.abort()
        self._owner.failed(self, error)

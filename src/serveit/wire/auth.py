"""Who may speak on a channel: the handshake that opens each one. Sans-IO: octets in, octets out.

    caller → replica   HELLO (magic, versions, role; over TCP a nonce)
    replica → caller   HELLO (the same; over TCP its own nonce and its proof)
    caller → replica   AUTH  (over TCP only: the caller's proof)

A Unix socket is in a directory of mode 0700 and its peer has this process's uid. Over TCP both ends
prove that they know the instance's secret, by HMAC-SHA256 over both nonces: the secret never travels,
and a proof of one side, role and connection is no use to another. What follows is neither encrypted
nor signed.
"""

from __future__ import annotations

import hmac
import secrets
from typing import TYPE_CHECKING, Any, Literal

from serveit.exceptions import ProtocolError
from serveit.wire.frames import (
    HEADER,
    HEADER_SIZE,
    MAGIC,
    VERSION,
    Decoder,
    Frame,
    FrameType,
    Hello,
    decode_message,
    encode_frame,
    encode_message,
)

if TYPE_CHECKING:
    from collections.abc import Mapping


Side = Literal["caller", "replica"]

NONCE_SIZE = 32

MAX_UNSHAKEN = 4096
"""Octets of the longest frame that a peer may send before its handshake is complete."""

VERSIONS = (VERSION, VERSION)
"""The oldest and the newest version of the wire format that this end speaks."""


_OWN_KEYS = frozenset({"nonce", "proof", "refused"})
"""What the handshake itself puts into HELLO's `extra`."""


def new_nonce() -> bytes:
    """Octets that no connection had before."""
    return secrets.token_bytes(NONCE_SIZE)


def prove(secret: bytes, side: Side, role: str, caller_nonce: bytes, replica_nonce: bytes) -> bytes:
    """What only who knows the secret can say on this connection, as this side, in this role."""
    fields = (b"serveit channel", side.encode(), role.encode(), caller_nonce, replica_nonce)
    # Each with its length, so that no two lists of fields give the same octets.
    octets = b"".join(len(field).to_bytes(4, "big") + field for field in fields)
    return hmac.digest(secret, octets, "sha256")


def check(
    proof: object, secret: bytes, side: Side, role: str, caller_nonce: bytes, replica_nonce: bytes
) -> bool:
    """Whether `proof`, whatever the peer sent for it, is `prove` of the rest; in constant time."""
    expected = prove(secret, side, role, caller_nonce, replica_nonce)
    return isinstance(proof, bytes) and hmac.compare_digest(proof, expected)


class Handshake:
    """One end of it. All mutable state: the attributes, `_expected` (the frame that has to come next),
    `_octets` (what came and is not used), `_nonces` (the caller's and the replica's).

    Args:
        side: which end this is (also an attribute).
        role: what this end is, for the other to judge.
        secret: what both ends have to know; empty where none is needed.
        extra: arrives as `peer.extra` at the other end.

    Attributes:
        opening: what is sent first: the caller's HELLO; nothing by a replica, which is spoken to.
        peer: the other end's HELLO without the handshake's own keys, once `done`.
        done: the handshake is complete at this end, and `rest` is the beginning of what follows.
        farewell: what the peer should still get after `feed` raised.

    Raises:
        ValueError: `extra` has one of the handshake's own keys, or is too long.
    """

    def __init__(
        self, side: Side, role: str, secret: bytes = b"", extra: Mapping[str, Any] | None = None
    ) -> None:
        taken = _OWN_KEYS.intersection(extra or ())
        if taken:
            raise ValueError(f"extra must not have the handshake's own keys: {', '.join(sorted(taken))}")
        self.peer: Hello
        self.done = False
        self.farewell = b""
        self.side = side
        self._role = role
        self._secret = secret
        self._extra = dict(extra or {})
        self._expected = FrameType.HELLO
        self._octets = bytearray()
        self._nonces = (new_nonce(), b"") if side == "caller" else (b"", new_nonce())
        self.opening = b""
        if side == "caller":
            self.opening = self._hello({"nonce": self._nonces[0]} if secret else {})
            if len(self.opening) > MAX_UNSHAKEN:
                length = len(self.opening)
                raise ValueError(f"role and extra are {length:,} octets; {MAX_UNSHAKEN:,} are allowed")

    @property
    def rest(self) -> bytes:
        """What came behind the handshake."""
        return bytes(self._octets)

    def feed(self, data: bytes) -> bytes:
        """What to answer to `data`, which may be cut anywhere.

        Raises:
            ProtocolError: the peer is not one to speak with; the connection has to be closed.
        """
        self._octets += data
        frame = self._next_frame()
        if frame is None:
            return b""
        if frame.type == FrameType.AUTH:
            self._judge_auth(frame.body)
            return b""
        hello = decode_message(Hello, frame)
        self._judge_hello(hello)
        extra = {key: value for key, value in hello.extra.items() if key not in _OWN_KEYS}
        self.peer = Hello(hello.magic, hello.versions, hello.role, hello.features, extra)
        return self._accept_caller(hello) if self.side == "replica" else self._accept_replica(hello)

    def refuse(self, reason: ProtocolError) -> None:
        """This replica does not want this caller. Over TCP the HELLO that could say so is gone already."""
        if not self._secret:
            self.farewell = self._hello({"refused": str(reason)[:500]})

    def _next_frame(self) -> Frame | None:
        octets = self._octets
        if len(octets) < HEADER_SIZE:
            return None
        length, kind, _, stream = HEADER.unpack_from(octets)
        end = HEADER_SIZE + length
        if kind != self._expected or stream or end > MAX_UNSHAKEN:
            raise ProtocolError(f"{self._expected.name} was to come, but {bytes(octets[:16])!r} came")
        if len(octets) < end:
            return None
        (frame,) = Decoder().feed(octets[:end])
        del octets[:end]
        return frame

    def _judge_hello(self, hello: Hello) -> None:
        if hello.magic != MAGIC:
            raise ProtocolError(f"wrong magic {hello.magic[:16]!r}: this is not serveit's protocol")
        (oldest, newest), (its_oldest, its_newest) = VERSIONS, hello.versions
        if min(newest, its_newest) < max(oldest, its_oldest):
            # The caller finds the same when it sees what is spoken here.
            self.farewell = self._hello({}) if self.side == "replica" else b""
            raise ProtocolError(
                f"no common version: this end speaks {oldest} to {newest}, "
                f"the other {its_oldest} to {its_newest}"
            )
        if self.side == "caller" and "refused" in hello.extra:
            raise ProtocolError(f"refused: {hello.extra['refused']!s:.500}")

    def _accept_caller(self, hello: Hello) -> bytes:
        if self._octets:
            raise ProtocolError("it sent more before it was answered")
        if not self._secret:
            self.done = True
            return self._hello({})
        self._nonces = _nonce(hello), self._nonces[1]
        self._expected = FrameType.AUTH
        return self._hello({"nonce": self._nonces[1], "proof": self._prove()})

    def _accept_replica(self, hello: Hello) -> bytes:
        answer = b""
        if self._secret:
            self._nonces = self._nonces[0], _nonce(hello)
            if not check(hello.extra.get("proof"), self._secret, "replica", hello.role, *self._nonces):
                raise ProtocolError("wrong secret: the other end does not know this end's")
            answer = encode_frame(FrameType.AUTH, 0, b"", self._prove())
        self.done = True
        return answer

    def _judge_auth(self, proof: bytes) -> None:
        if not check(proof, self._secret, "caller", self.peer.role, *self._nonces):
            raise ProtocolError("wrong secret: the other end does not know this end's")
        self.done = True

    def _prove(self) -> bytes:
        return prove(self._secret, self.side, self._role, *self._nonces)

    def _hello(self, own: dict[str, Any]) -> bytes:
        hello = Hello(MAGIC, VERSIONS, self._role, [], {**self._extra, **own})
        return encode_frame(FrameType.HELLO, 0, encode_message(hello))


def _nonce(hello: Hello) -> bytes:
    nonce = hello.extra.get("nonce")
    if not isinstance(nonce, bytes) or len(nonce) != NONCE_SIZE:
        raise ProtocolError(f"no secret: the other end sent no nonce of {NONCE_SIZE} octets")
    return nonce

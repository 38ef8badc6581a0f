"""Wire format v1, sans-IO: messages to bytes, bytes to frames. Hot path: a few calls per request.

A frame is a 10-byte header (u32 length of what follows it, u8 type, u8 flags, u32 stream), then a
u32 length of metadata, the metadata (msgpack), and the body (octets that are nobody's business
here). Many streams share one connection; the caller numbers them. Each message's metadata ends in a
map, for what later versions add.

    caller → replica   REQUEST (HTTP), CALL (Python), RESERVE (a slot for an actor task), CANCEL
    replica → caller   QUEUED, STARTED, then one of ANSWER, ERROR, REFUSED, RESERVED
    both ways          HELLO, AUTH, DATA, CREDIT, PING, GOAWAY, METRICS

METRICS belongs to no stream: empty it asks for the replica's `Figures`, which come back in another. It
needs no slot, and the replica answers it before it runs anything else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import Annotated, Any, TypeVar

import msgspec

from serveit.exceptions import ProtocolError
from serveit.histogram import Histogram
from serveit.types import Executed, HeaderList, HttpRequest

VERSION = 1
MAGIC = b"serveit"

MAX_INLINE = 64 * 1024
"""Bytes of body that travel in the frame of their message; more follows as DATA under credit."""

MAX_FRAME = 512 * 1024
"""Cap on what follows a header; a longer frame is refused before memory is taken for it."""

HEADER = struct.Struct("!IBBI")
HEADER_SIZE = HEADER.size
_HEAD = struct.Struct("!IBBII")  # header and metadata length in one call
_HEAD_SIZE = _HEAD.size
_pack_head = _HEAD.pack
_unpack_head = _HEAD.unpack_from

Buffer = bytes | bytearray | memoryview
"""Octets; a memoryview has to be one-dimensional and of format "B"."""


class FrameType(IntEnum):
    """The type octet."""

    HELLO = 1
    AUTH = 2
    REQUEST = 3
    CALL = 4
    RESERVE = 5
    RESERVED = 6
    DATA = 7
    CREDIT = 8
    ANSWER = 9
    ERROR = 10
    REFUSED = 11
    QUEUED = 12
    STARTED = 13
    CANCEL = 14
    PING = 15
    GOAWAY = 16
    METRICS = 17


# Flags.
END = 1
"""Nothing more follows from this side on this stream."""
PART = 2
"""DATA: the item goes on in the next DATA frame."""
FREED = 4
"""ANSWER: user code is done and its slot free, though the body is still to follow."""
STREAM = 8
"""ANSWER: the body is a sequence of items, one pickle each."""


class Frame(msgspec.Struct, gc=False, frozen=True):
    """One frame as it was on the wire; metadata is decoded by who knows the stream."""

    type: int
    flags: int
    stream: int
    meta: bytes
    body: bytes


Size = Annotated[int, msgspec.Meta(ge=0)]
"""A number of octets that the peer names."""


class Message(msgspec.Struct, array_like=True, gc=False):
    """Metadata of a frame; every kind ends in `extra`."""


class Hello(Message):
    """The first frame both ways: what each side speaks and is."""

    magic: bytes
    versions: tuple[int, int]
    role: str
    features: list[str]
    extra: dict[str, Any] = {}


class Request(Message):
    """REQUEST: an HTTP request; the frame's body is the HTTP body."""

    request_id: str
    http: HttpRequest
    deadline_ms: int | None = None
    extra: dict[str, Any] = {}


class Call(Message):
    """CALL: a Python call. The body is the pickle of (args, kwargs), then its out-of-band buffers."""

    request_id: str
    target: str
    sizes: list[Size]
    deadline_ms: int | None = None
    extra: dict[str, Any] = {}


class Reserve(Message):
    """RESERVE: a slot for a call whose arguments an actor task will bring, under this request id."""

    request_id: str
    target: str
    deadline_ms: int | None = None
    extra: dict[str, Any] = {}


class Reserved(Message):
    """RESERVED: the slot is held. An empty DATA with END follows when the task has ended."""

    others: int
    extra: dict[str, Any] = {}


class Load(Message):
    """QUEUED, STARTED: `others` is what the replica runs for everybody but the receiver."""

    others: int
    extra: dict[str, Any] = {}


class HttpAnswer(Message):
    """ANSWER to a REQUEST; the body is the HTTP body."""

    others: int
    status: int
    headers: HeaderList
    extra: dict[str, Any] = {}


class CallAnswer(Message):
    """ANSWER to a CALL. The body is a pickle and its out-of-band buffers, of these sizes."""

    others: int
    sizes: list[Size]
    extra: dict[str, Any] = {}


class Failure(Message):
    """ERROR: what user code raised, or why it was not called. The body: the pickled exception or empty."""

    others: int
    status: int
    kind: str
    """The exception's qualified name."""
    detail: str
    """Text that may be shown to an HTTP client; empty if none may."""
    text: str
    """The exception's own text, for Python callers and `debug=True`."""
    executed: Executed
    errors: list[dict[str, Any]] = []
    headers: HeaderList = []
    traceback: str = ""
    extra: dict[str, Any] = {}


class Refusal(Message):
    """REFUSED: not executed and never will be; "full" or "draining"."""

    others: int
    reason: str
    extra: dict[str, Any] = {}


class Credit(Message):
    """CREDIT: the receiver may send so many more octets of DATA on this stream."""

    octets: Size
    extra: dict[str, Any] = {}


class Figures(Message):
    """METRICS from a replica: what it does now, and what it has counted since its start."""

    running: int
    waiting: int
    requests: int
    """Those that it took in."""
    errors: int
    """Those of them that failed; not those that their callers cancelled."""
    refusals: dict[str, int]
    """By reason."""
    queued: Histogram
    """Seconds until user code ran."""
    processed: Histogram
    """Seconds in user code, the answer included."""
    batches: Histogram
    """Their sizes."""
    extra: dict[str, Any] = {}


M = TypeVar("M", bound=Message)

_encoder = msgspec.msgpack.Encoder()
encode_message = _encoder.encode
"""Metadata to bytes."""

_decoders: dict[type[Any], msgspec.msgpack.Decoder[Any]] = {
    kind: msgspec.msgpack.Decoder(kind)
    for kind in (
        Hello,
        Request,
        Call,
        Reserve,
        Reserved,
        Load,
        HttpAnswer,
        CallAnswer,
        Failure,
        Refusal,
        Credit,
        Figures,
    )
}


def decode_message(kind: type[M], frame: Frame) -> M:
    """The frame's metadata as `kind`.

    Raises:
        ProtocolError: it is something else.
    """
    try:
        message: M = _decoders[kind].decode(frame.meta)
    except Exception as error:  # also RecursionError: a peer may nest `extra` as deep as it likes
        raise ProtocolError(f"malformed {kind.__name__} metadata: {error}") from None
    return message


def encode_frame(kind: int, stream: int, meta: bytes = b"", body: Buffer = b"", flags: int = 0) -> bytes:
    """One frame as octets.

    Raises:
        ProtocolError: metadata and body together are over `MAX_FRAME`.
    """
    length = 4 + len(meta) + len(body)
    if length > MAX_FRAME:
        raise ProtocolError(f"a frame of {length:,} octets is over the limit of {MAX_FRAME:,}")
    return b"".join((_pack_head(length, kind, flags, stream, len(meta)), meta, body))


_KNOWN = frozenset(map(int, FrameType))


class Decoder:
    """Octets in, whole frames out.

    Holds at most one unfinished frame, so less than a header and `MAX_FRAME` octets, and only those
    that have come: what a header claims is not believed. However the octets are cut, each is copied
    a few times at most.

    Attributes:
        error: what was wrong with the octets; the connection has to be closed then.
    """

    def __init__(self) -> None:
        self.error: ProtocolError | None = None
        self._rest = bytearray()
        self._needed = 0
        """So long does `_rest` have to be for another look at it."""

    def feed(self, data: Buffer) -> list[Frame]:
        """The frames that `data` completes.

        Raises:
            ProtocolError: a frame is too long, of unknown type, or its lengths contradict each
                other. Frames that came whole before it are not lost: they are returned, `error` is
                set, and the next call raises it.
        """
        if self.error is not None:
            raise self.error
        if self._rest:
            self._rest += data
            if len(self._rest) < self._needed:
                return []
            data = bytes(self._rest)
            self._rest.clear()
        elif type(data) is not bytes:
            data = bytes(data)
        frames: list[Frame] = []
        position, available, needed = 0, len(data), _HEAD_SIZE
        while available - position >= _HEAD_SIZE:
            length, kind, flags, stream, meta_length = _unpack_head(data, position)
            if length > MAX_FRAME or meta_length > length - 4 or kind not in _KNOWN:
                return self._stop(_fault(length, kind, meta_length), frames)
            end = position + HEADER_SIZE + length
            if end > available:
                needed = end - position
                break
            start = position + _HEAD_SIZE
            meta_end = start + meta_length
            frames.append(Frame(kind, flags, stream, data[start:meta_end], data[meta_end:end]))
            position = end
        if position < available:
            return self._keep(data[position:], needed, frames)
        return frames

    def _keep(self, rest: bytes, needed: int, frames: list[Frame]) -> list[Frame]:
        self._rest += rest
        self._needed = needed if len(rest) >= HEADER_SIZE else HEADER_SIZE
        if HEADER_SIZE <= len(rest) < _HEAD_SIZE:
            # The header alone is here and may be wrong already.
            length, kind, _, _ = HEADER.unpack_from(rest)
            if not 4 <= length <= MAX_FRAME or kind not in _KNOWN:
                return self._stop(_fault(length, kind, 0), frames)
        return frames

    def _stop(self, error: ProtocolError, frames: list[Frame]) -> list[Frame]:
        self.error = error
        self._rest.clear()
        if not frames:
            raise error
        return frames


def _fault(length: int, kind: int, meta_length: int) -> ProtocolError:
    if not 4 <= length <= MAX_FRAME:
        return ProtocolError(f"a frame claims {length:,} octets; 4 to {MAX_FRAME:,} are allowed")
    if kind not in _KNOWN:
        return ProtocolError(f"unknown frame type {kind}")
    return ProtocolError(f"metadata of {meta_length:,} octets in a frame of {length:,}")


def pieces(buffers: Iterable[Buffer], size: int = MAX_INLINE) -> Iterable[memoryview]:
    """The octets of `buffers` in slices of at most `size`, without copying."""
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        for start in range(0, len(view), size):
            yield view[start : start + size]

"""The in-memory kind of link: both ends in one event loop, for `--local` and for tests.

It carries the encoded octets, so that what would not survive a socket fails the same here.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from serveit.wire.frames import Buffer, Decoder, encode_frame
from serveit.wire.link import lose, receive

if TYPE_CHECKING:
    from serveit.wire.link import Receiver


class MemoryLink:
    """One end; `memory_pair` makes two that belong together."""

    def __init__(self) -> None:
        self.closed = False
        self.stale = False  # both ends hang together or not at all
        self.receiver: Receiver | None = None
        self._peer: MemoryLink
        self._outbox: list[bytes] = []
        self._decoder = Decoder()
        self._loop = asyncio.get_running_loop()
        self._flush_scheduled = False

    def send(self, kind: int, stream: int, meta: bytes = b"", body: Buffer = b"", flags: int = 0) -> None:
        if self.closed:
            return
        self._outbox.append(encode_frame(kind, stream, meta, body, flags))
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._write)

    def flush(self) -> None:
        """Nothing to do: the octets are in the other end's hands in the next tick, whatever happens."""

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        # After the `_write` of what was sent before.
        self._loop.call_soon(self._shut)

    def data_received(self, data: bytes) -> None:
        """Octets from the other end, cut anywhere."""
        if self.receiver is not None and not self.closed:
            receive(data, self._decoder, self.receiver, self)

    def _write(self) -> None:
        self._flush_scheduled = False
        outbox, self._outbox = self._outbox, []
        self._peer.data_received(outbox[0] if len(outbox) == 1 else b"".join(outbox))

    def _shut(self) -> None:
        for end in (self, self._peer):
            end.closed = True
            receiver, end.receiver = end.receiver, None
            if receiver is not None:
                lose(receiver, None)


def memory_pair() -> tuple[MemoryLink, MemoryLink]:
    """Two ends of one link; set each one's `receiver` before the loop runs on."""
    one, other = MemoryLink(), MemoryLink()
    one._peer, other._peer = other, one
    return one, other

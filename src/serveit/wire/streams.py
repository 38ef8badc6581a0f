"""Bodies that do not fit one frame: DATA under per-stream credit, so that a slow reader holds back
the writer and not the connection.

A writer may have `WINDOW` octets under way that the reader has not taken; each frame counts
`FRAME_COST` on top of its length, which bounds how far ahead a generator of tiny items may run.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from serveit.exceptions import BodyTooLarge, ProtocolError
from serveit.wire.frames import END, PART, Buffer, Credit, FrameType, encode_message, pieces

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serveit.wire.link import Link

WINDOW = 256 * 1024
FRAME_COST = 1024


def cost(length: int) -> int:
    """What a DATA frame of so many octets takes of the credit."""
    return FRAME_COST + length


class Outflow:
    """The writing side of one stream."""

    def __init__(self, link: Link, stream: int) -> None:
        self._link = link
        self._stream = stream
        self._credit = WINDOW
        self._pending: deque[tuple[Buffer, int]] = deque()
        self._drained: asyncio.Future[None] | None = None
        self._error: BaseException | None = None
        self._ended = False

    def write(self, buffers: Sequence[Buffer], *, end: bool = False, item: bool = False) -> None:
        """Queue some of the body and send as much as the credit allows.

        Args:
            buffers: octets, sent in pieces of at most `MAX_INLINE`.
            end: nothing more follows.
            item: the octets belong together; the reader gets them as one, however many pieces.
        """
        parts = list(pieces(buffers)) or [memoryview(b"")]
        between = PART if item else 0
        self._pending.extend((part, between) for part in parts[:-1])
        self._pending.append((parts[-1], END if end else 0))
        self._pump()

    async def drain(self) -> None:
        """Wait until all that was written is on its way.

        Raises:
            Exception: what `abort` was given.
        """
        if self._error is not None:
            raise self._error
        if self._pending:
            self._drained = asyncio.get_running_loop().create_future()
            await self._drained

    def credited(self, octets: int) -> None:
        """The reader took so much."""
        self._credit += octets
        if self._credit > WINDOW:
            raise ProtocolError(f"credit of {self._credit:,} octets is over the window of {WINDOW:,}")
        self._pump()

    def abort(self, error: BaseException) -> None:
        """The reader is gone: drop what is pending and fail who waits."""
        self._error = error
        self._pending.clear()
        if self._drained is not None and not self._drained.done():
            self._drained.set_exception(error)

    @property
    def ended(self) -> bool:
        """Whether the last of it is on its way."""
        return self._ended

    def _pump(self) -> None:
        while self._pending:
            body, flags = self._pending[0]
            price = cost(len(body))
            if price > self._credit:
                return
            self._pending.popleft()
            self._credit -= price
            self._ended = bool(flags & END)
            self._link.send(FrameType.DATA, self._stream, b"", body, flags)
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)


class Inflow:
    """The reading side of one stream: items one by one, or the whole.

    Credit goes back as items are taken, in steps of half a window.
    """

    def __init__(self, link: Link, stream: int) -> None:
        self._link = link
        self._stream = stream
        self._items: deque[bytes] = deque()
        self._parts: list[bytes] = []
        self._costs: deque[int] = deque()
        self._item_cost = 0
        self._owed = 0
        self._outstanding = 0
        self._ended = False
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None

    def received(self, body: bytes, flags: int) -> None:
        """One DATA frame.

        Raises:
            ProtocolError: the writer went past its credit or past its own end.
        """
        if self._ended:
            raise ProtocolError("DATA after the end of its stream")
        price = cost(len(body))
        self._outstanding += price
        if self._outstanding > WINDOW:
            raise ProtocolError("DATA beyond the credit given")
        self._parts.append(body)
        self._item_cost += price
        if flags & PART:
            # An item may be larger than the window: what is stored for it is taken.
            self._take(self._item_cost)
            self._item_cost = 0
            return
        self._items.append(self._parts[0] if len(self._parts) == 1 else b"".join(self._parts))
        self._costs.append(self._item_cost)
        self._parts = []
        self._item_cost = 0
        self._ended = bool(flags & END)
        self._wake()

    def fail(self, error: BaseException) -> None:
        """No more will come; readers get `error` once they have taken what came before it."""
        if not self._ended and self._error is None:
            self._error = error
            self._wake()

    async def read(self) -> tuple[bytes, bool]:
        """The next item, and whether it is the last.

        The last may be an empty one that only says so. Raises what `fail` was given.
        """
        while not self._items:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        item = self._items.popleft()
        self._take(self._costs.popleft())
        return item, self._ended and not self._items

    async def read_all(self) -> bytes:
        """All octets that are still to come, as one."""
        chunks: list[bytes] = []
        ended = False
        while not ended:
            chunk, ended = await self.read()
            chunks.append(chunk)
        return b"".join(chunks)

    def _take(self, price: int) -> None:
        self._owed += price
        if self._owed >= WINDOW // 2 and not self._ended:
            octets, self._owed = self._owed, 0
            self._outstanding -= octets
            self._link.send(FrameType.CREDIT, self._stream, encode_message(Credit(octets)))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Collector:
    """Puts a request's body together in the replica as it comes, up to a cap."""

    def __init__(self, link: Link, stream: int, limit: int) -> None:
        self._link = link
        self._stream = stream
        self._limit = limit
        self._parts: list[bytes] = []
        self._length = 0
        self._owed = 0

    def received(self, body: bytes, flags: int) -> bytes | None:
        """One DATA frame; the whole body with the last.

        Raises:
            BodyTooLarge: past the cap.
        """
        self._length += len(body)
        if self._length > self._limit:
            raise BodyTooLarge(f"the body is larger than {self._limit:,} bytes")
        self._parts.append(body)
        if flags & END:
            return b"".join(self._parts)
        self._owed += cost(len(body))
        if self._owed >= WINDOW // 2:
            octets, self._owed = self._owed, 0
            self._link.send(FrameType.CREDIT, self._stream, encode_message(Credit(octets)))
        return None

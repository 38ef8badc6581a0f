"""Bodies that do not fit one frame: DATA under per-stream credit, so that a slow reader holds back
the writer and not the connection.

A writer may have `WINDOW` octets under way that the reader has not taken; each frame counts
`FRAME_COST` on top of its length, which bounds how far ahead a generator of tiny items may run. The
largest frame costs less than half a window, and credit goes back in halves: a reader that has taken
everything has always given back enough for the next frame, so that the two never wait for each other.
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
    """The writing side of one stream.

    All mutable state: `_credit` (what may still be sent), `_pending` (frames that wait for it),
    `_waiters` (who is in `drain`), `_error` (set by `abort`), `_ended`.
    """

    def __init__(self, link: Link, stream: int) -> None:
        self._link = link
        self._stream = stream
        self._credit = WINDOW
        self._pending: deque[tuple[Buffer, int]] = deque()
        self._waiters: list[asyncio.Future[None]] = []
        self._error: BaseException | None = None
        self._ended = False

    def __repr__(self) -> str:
        state = "aborted" if self._error else "ended" if self._ended else "open"
        return f"<Outflow {self._stream} {state} credit={self._credit} pending={len(self._pending)}>"

    def write(self, buffers: Sequence[Buffer], *, end: bool = False, item: bool = False) -> None:
        """Queue some of the body and send as much as the credit allows. Silent once aborted.

        Args:
            buffers: octets, sent in pieces of at most `MAX_INLINE`. They may be changed afterwards.
            end: nothing more follows.
            item: the octets belong together; the reader gets them as one, however many pieces.
        """
        if self._error is not None:
            return
        parts = list(pieces(buffers)) or [memoryview(b"")]
        between = PART if item else 0
        self._pending.extend((part, between) for part in parts[:-1])
        self._pending.append((parts[-1], END if end else 0))
        self._pump()
        if self._pending:
            # Its owner may reuse an array for the next result while this one waits for credit.
            self._pending = deque((_lasting(part), flags) for part, flags in self._pending)

    async def drain(self) -> None:
        """Wait until all that was written is on its way.

        Raises:
            Exception: what `abort` was given.
        """
        if self._pending:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        if self._error is not None:
            raise self._error

    def credited(self, octets: int) -> None:
        """The reader took so much.

        Raises:
            ProtocolError: it says that it took more than it got.
        """
        self._credit += octets
        if self._credit > WINDOW:
            raise ProtocolError(f"credit of {self._credit:,} octets is over the window of {WINDOW:,}")
        self._pump()

    def abort(self, error: BaseException) -> None:
        """The reader is gone: drop what is pending and fail who waits."""
        self._error = error
        self._pending.clear()
        self._wake()

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
        self._wake()

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


def _lasting(part: Buffer) -> Buffer:
    """The octets as they are now, whatever becomes of the buffer that they are in."""
    if isinstance(part, memoryview) and not isinstance(part.obj, bytes):
        return bytes(part)
    return part


class Inflow:
    """The reading side of one stream: items one by one, or the whole.

    Credit goes back as items are taken, in steps of half a window. An item may be larger than the
    window, so the parts of the item that the reader waits for count as taken when they come; those of
    a later one do not, so that the writer is at most a window and the next item ahead.
    """

    def __init__(self, link: Link, stream: int) -> None:
        self._link = link
        self._stream = stream
        self._items: deque[bytes] = deque()
        self._costs: deque[int] = deque()
        self._parts: list[bytes] = []
        """Of the item that is still coming."""
        self._parts_cost = 0
        self._owed = 0
        """Taken, and not yet given back as credit."""
        self._outstanding = 0
        """What the writer has spent, as far as it is known here, and not got back."""
        self._ended = False
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._is_discarded = False

    def __repr__(self) -> str:
        state = "failed" if self._error else "ended" if self._ended else "open"
        return f"<Inflow {self._stream} {state} items={len(self._items)} outstanding={self._outstanding}>"

    def received(self, body: bytes, flags: int) -> None:
        """One DATA frame.

        Raises:
            ProtocolError: the writer went past its credit or past its own end, or ended within an item.
        """
        if self._ended:
            raise ProtocolError("DATA after the end of its stream")
        price = cost(len(body))
        self._outstanding += price
        if self._outstanding > WINDOW:
            raise ProtocolError("DATA beyond the credit given")
        if self._is_discarded:
            self._ended = bool(flags & END)
            self._take(price)
            return
        self._parts.append(body)
        self._parts_cost += price
        if flags & PART:
            if flags & END:
                raise ProtocolError("a stream ended in the middle of an item")
            self._take_parts()
            return
        self._items.append(self._parts[0] if len(self._parts) == 1 else b"".join(self._parts))
        self._costs.append(self._parts_cost)
        self._parts = []
        self._parts_cost = 0
        self._ended = bool(flags & END)
        self._wake()

    def discard(self) -> None:
        """Nobody will read: what comes counts as taken, so that the writer gets through with it."""
        self._is_discarded = True
        self._take(sum(self._costs) + self._parts_cost)
        self._items.clear()
        self._costs.clear()
        self._parts, self._parts_cost = [], 0

    def fail(self, error: BaseException) -> None:
        """No more will come; readers get `error` once they have taken what came before it."""
        if not self._ended and self._error is None:
            self._error = error
            self._wake()

    async def read(self) -> tuple[bytes, bool]:
        """The next item, and whether it is the last. One reader at a time.

        The last may be an empty one that only says so.

        Raises:
            EOFError: the last item has been read.
            Exception: what `fail` was given.
        """
        while not self._items:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise EOFError(f"stream {self._stream} has been read to its end")
            if self._waiter is not None:
                raise RuntimeError(f"stream {self._stream} is being read by another task already")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        item = self._items.popleft()
        self._take(self._costs.popleft())
        self._take_parts()
        return item, self._ended and not self._items

    async def read_all(self) -> bytearray:
        """All octets that are still to come, as one. Raises as `read` does."""
        octets = bytearray()
        ended = False
        while not ended:
            chunk, ended = await self.read()
            octets += chunk
        return octets

    def _take_parts(self) -> None:
        if self._parts_cost and not self._items:
            price, self._parts_cost = self._parts_cost, 0
            self._take(price)

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
        # One buffer: a list of parts would let a peer make millions of objects of single octets.
        self._octets = bytearray()
        self._owed = 0

    def __repr__(self) -> str:
        return f"<Collector {self._stream} {len(self._octets)}/{self._limit}>"

    def received(self, body: bytes, flags: int) -> bytes | None:
        """One DATA frame; the whole body with the last.

        Raises:
            BodyTooLarge: past the cap.
        """
        length = len(self._octets) + len(body)
        if length > self._limit:
            self._octets.clear()
            raise BodyTooLarge(f"the body is larger than {self._limit:,} bytes")
        self._octets += body
        if flags & END:
            return bytes(self._octets)
        self._owed += cost(len(body))
        if self._owed >= WINDOW // 2:
            octets, self._owed = self._owed, 0
            self._link.send(FrameType.CREDIT, self._stream, encode_message(Credit(octets)))
        return None

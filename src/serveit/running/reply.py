"""One stream's way back to its caller: frames out, and the state of a body that is still going.

Hot path: `whole` once per request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from serveit.wire.frames import (
    END,
    FREED,
    MAX_INLINE,
    Buffer,
    Failure,
    FrameType,
    Load,
    Message,
    Refusal,
    Reserved,
    encode_message,
)
from serveit.wire.streams import Outflow

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serveit.wire.link import Link


class ReplyOwner(Protocol):
    """The listener, as a reply sees it."""

    def others(self) -> int: ...

    def is_free(self, reply: Reply) -> bool:
        """Whether the slot of a large answer that is about to go out is free for others already."""

    def reply_ended(self, reply: Reply) -> None:
        """The last frame of the stream has been handed to the link."""


class Reply:
    """Ends its stream with exactly one of: an ANSWER or DATA with END, ERROR, REFUSED.

    DATA follow an ANSWER without END, or the RESERVED of a slot.

    All mutable state: `outflow` (the body after the head, once begun), `ended` (the last frame has
    been handed to the link), `unread` (octets of a large whole answer), `_freed` (its slot was free
    before it was sent), `_complete` (the body is all here, though some may have to wait for credit),
    `_aborted` (nobody reads on).
    """

    __slots__ = (
        "_aborted",
        "_complete",
        "_freed",
        "_owner",
        "ended",
        "link",
        "outflow",
        "stream",
        "unread",
    )

    def __init__(self, owner: ReplyOwner, link: Link, stream: int) -> None:
        self._owner = owner
        self.link = link
        self.stream = stream
        self.outflow: Outflow | None = None
        self.ended = False
        self.unread = 0
        self._freed = False
        self._complete = False
        self._aborted: BaseException | None = None

    @property
    def is_sending(self) -> bool:
        """Whether a body has begun to go out and has not all gone."""
        return self.outflow is not None and not self.ended

    @property
    def has_begun(self) -> bool:
        """Whether the head of an answer is on its way."""
        return self.outflow is not None or self.ended

    @property
    def keeps_slot(self) -> bool:
        """Whether the slot is to be kept until the answer has been read."""
        return self.unread > 0 and not (self._freed or self.ended)

    def others(self) -> int:
        """The load that every frame back carries."""
        return self._owner.others()

    def queued(self) -> None:
        self.link.send(FrameType.QUEUED, self.stream, encode_message(Load(self.others())))

    def started(self) -> None:
        """Written out at once: what a caller concludes from a lost link depends on it."""
        self.link.send(FrameType.STARTED, self.stream, encode_message(Load(self.others())))
        self.link.flush()

    def refuse(self, reason: str) -> None:
        self.link.send(FrameType.REFUSED, self.stream, encode_message(Refusal(self.others(), reason)))
        self._end()

    def whole(self, message: Message, buffers: Sequence[Buffer], size: int) -> None:
        """An answer whose body is all here. If it is large the slot is free before it is sent, unless too
        much waits for readers already.

        Raises:
            ProtocolError: what goes before the body does not fit a frame; nothing was sent.
            Exception: what `abort` was given.
        """
        self._check_wanted()
        meta = encode_message(message)
        if size <= MAX_INLINE:
            body = buffers[0] if len(buffers) == 1 else b"".join(buffers)
            self.link.send(FrameType.ANSWER, self.stream, meta, body, END)
            self._end()
            return
        self._freed = self._owner.is_free(self)
        self.link.send(FrameType.ANSWER, self.stream, meta, b"", FREED if self._freed else 0)
        self.unread = size
        self.outflow = Outflow(self.link, self.stream)
        self._last(buffers)

    def begin(self, message: Message, flags: int = 0) -> None:
        """The head of an answer whose body is still being made. Raises as `whole` does."""
        self._check_wanted()
        self.link.send(FrameType.ANSWER, self.stream, encode_message(message), b"", flags)
        self.outflow = Outflow(self.link, self.stream)

    def reserved(self) -> None:
        """The slot is held; `release` tells that it is free again."""
        self.link.send(FrameType.RESERVED, self.stream, encode_message(Reserved(self.others())))

    def release(self) -> None:
        """The slot that was held is free."""
        self.link.send(FrameType.DATA, self.stream, flags=END)
        self._end()

    async def push(self, buffers: Sequence[Buffer], *, item: bool = False) -> None:
        """Some of the body; waits while the reader is behind. Raises what `abort` was given."""
        assert self.outflow is not None, "begin() comes first"
        self._check_wanted()
        self.outflow.write(buffers, item=item)
        await self.outflow.drain()

    def finish(self) -> None:
        """The body is complete. Raises what `abort` was given."""
        assert self.outflow is not None, "begin() comes first"
        self._check_wanted()
        self._last([])

    def error(self, failure: Failure, pickled: bytes = b"") -> None:
        """The request failed; after `begin` this cuts the body off.

        A body that was complete by then goes out still, unless nobody reads it.
        """
        if self.ended or (self._complete and self._aborted is None):
            return
        self.link.send(FrameType.ERROR, self.stream, encode_message(failure), pickled)
        self._end()

    def credited(self, octets: int) -> None:
        """The caller took so much of the body."""
        if self.outflow is not None:
            self.outflow.credited(octets)
            self._end_if_idle()

    def abort(self, error: BaseException) -> None:
        """Nobody reads on: whoever waits in `push`, or goes on sending, gets the error."""
        self._aborted = error
        if self.outflow is not None:
            self.outflow.abort(error)

    def _last(self, buffers: Sequence[Buffer]) -> None:
        assert self.outflow is not None
        self._complete = True
        self.outflow.write(buffers, end=True)
        self._end_if_idle()

    def _check_wanted(self) -> None:
        if self._aborted is not None:
            raise self._aborted

    def _end_if_idle(self) -> None:
        if self.outflow is not None and self.outflow.ended:
            self._end()

    def _end(self) -> None:
        if not self.ended:
            self.ended = True
            self._owner.reply_ended(self)

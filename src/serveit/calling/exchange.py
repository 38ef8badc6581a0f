"""One request in the caller's process, from its submission to the last octet of its answer.

Hot path: one object per request. A router moves it through its phases; whoever made it awaits
`answer` and reads `inflow`. Handles send CALLs, proxies send REQUESTs; what differs is the message.
"""

from __future__ import annotations

import asyncio
from enum import IntEnum
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from serveit.exceptions import Rejected, ServeitError
from serveit.wire.frames import MAX_INLINE, Buffer, Message

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serveit.calling.connection import Connection
    from serveit.exceptions import ReplicaDied
    from serveit.wire.frames import Failure, FrameType
    from serveit.wire.streams import Inflow, Outflow


class Phase(IntEnum):
    """How far a request has come; what a failure means depends on it."""

    WAITING = 0
    """In the router: not executed."""
    SENT = 1
    """With the replica, which runs it unless it says otherwise: maybe executed."""
    QUEUED = 2
    """In the replica's waiting room: not executed."""
    STARTED = 3
    """User code may be running."""
    ANSWERING = 4
    """The head of the answer is here, more of the body may come."""
    DONE = 5


class Owner(Protocol):
    """The router, as an exchange sees it."""

    def cancel(self, exchange: Exchange) -> None: ...

    def expire(self, exchange: Exchange) -> None: ...


M = TypeVar("M", bound=Message)


class Answer(Generic[M]):
    """The head of an answer and as much of its body as came with it.

    Attributes:
        message: HttpAnswer or CallAnswer.
        flags: of the ANSWER frame.
        body: the octets that came along.
        inflow: where the rest comes in; None if this was all.
    """

    __slots__ = ("body", "flags", "inflow", "message")

    def __init__(self, message: M, flags: int, body: bytes, inflow: Inflow | None) -> None:
        self.message = message
        self.flags = flags
        self.body = body
        self.inflow = inflow


class Exchange:
    """One request under way.

    All of its mutable state is here and changed only by the router and the connection that have it:
    `phase`, `connection`, `stream` (where it was sent), `bucket` (its place in the deadline wheel),
    `refused_by` (replicas not to be asked again while others are left), `resent` (it was lost with a
    replica once), `loss` (set if user code may have run there), `expendable` (a shadow: dropped rather
    than kept waiting).
    """

    __slots__ = (
        "answer",
        "answer_type",
        "body",
        "body_size",
        "bucket",
        "connection",
        "deadline",
        "expendable",
        "frame_type",
        "loss",
        "message",
        "outflow",
        "owner",
        "phase",
        "refused_by",
        "resent",
        "stream",
        "waiting_since",
    )

    def __init__(
        self,
        frame_type: FrameType,
        message: Message,
        body: Sequence[Buffer],
        answer_type: type[Message],
        deadline: float | None,
    ) -> None:
        """
        Args:
            frame_type: REQUEST or CALL.
            message: its metadata; `deadline_ms` is filled in when it is sent.
            body: the body's buffers.
            answer_type: HttpAnswer or CallAnswer.
            deadline: on the clock of this process; None for no limit.
        """
        self.frame_type = frame_type
        self.message = message
        self.body = body
        size = 0
        for buffer in body:
            size += buffer.nbytes if isinstance(buffer, memoryview) else len(buffer)
        self.body_size = size
        self.answer_type = answer_type
        self.deadline = deadline
        self.answer: asyncio.Future[Answer[Message]] = asyncio.get_running_loop().create_future()
        self.phase = Phase.WAITING
        self.owner: Owner | None = None
        self.connection: Connection | None = None
        self.stream = 0
        self.outflow: Outflow | None = None
        self.bucket: int | None = None
        self.refused_by: frozenset[str] = frozenset()
        self.resent = False
        self.loss: ReplicaDied | None = None
        self.expendable = False
        self.waiting_since = 0.0

    def __repr__(self) -> str:
        where = f" on {self.connection.replica.id}/{self.stream}" if self.connection else ""
        return f"<Exchange {self.frame_type.name} {self.phase.name}{where}>"

    @property
    def inline(self) -> bool:
        """Whether the body fits the message's own frame."""
        return self.body_size <= MAX_INLINE

    def cancel(self) -> None:
        """Nobody wants the answer any more."""
        if self.owner is not None and self.phase != Phase.DONE:
            self.owner.cancel(self)

    def expire(self) -> None:
        """Called by the deadline wheel."""
        end = Phase.DONE if self.expendable else Phase.ANSWERING
        if self.owner is not None and self.phase < end:
            self.owner.expire(self)

    def rebuild(self, failure: Failure, body: bytes) -> BaseException:
        """The exception that an ERROR frame means to whoever asked."""
        raise NotImplementedError

    def succeed(self, answer: Answer[Message]) -> None:
        if not self.answer.done():
            self.answer.set_result(answer)

    def fail(self, error: BaseException) -> None:
        if not self.answer.done():
            self.answer.set_exception(error if self.loss is None else _after(self.loss, error))
            # Counts as seen: where nobody waits any more, nobody is to read of it in the log.
            self.answer.exception()


def _after(loss: ReplicaDied, error: BaseException) -> BaseException:
    """What to say of a request that may have run where it was lost, and then failed like this: never that
    it did not run."""
    if isinstance(error, Rejected):
        return loss
    if isinstance(error, ServeitError) and error.executed == "no":
        error.executed = "maybe"
    return error

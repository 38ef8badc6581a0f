"""One request inside a replica, whatever it came as: what the replica asks of it and tells it.

`listener` makes jobs of frames; `replica` admits, runs and ends them.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import asyncio
    from collections import deque
    from collections.abc import AsyncIterator

    from serveit.declare.backend import Method
    from serveit.running.replica import BatchRun


class JobState(IntEnum):
    """How far a job has come."""

    WAITING = 0
    """In the waiting room."""
    GATHERING = 1
    """Has a slot; its batch is not formed yet."""
    RUNNING = 2
    """User code may be running."""
    DONE = 3


class Lane(Protocol):
    """One caller's share of a replica: its jobs in the waiting room and in slots."""

    waiting: deque[Job]
    running: int


class Job:
    """The replica's side of one request. Subclasses know what it came as and how it is answered.

    Exactly one of `answer`, `stream` (to its end), `fail` and `refuse` ends it.
    """

    __slots__ = (
        "admitted_at",
        "batch",
        "cancelled",
        "deadline",
        "entered",
        "in_user_code",
        "item",
        "lane",
        "request_id",
        "state",
        "target",
        "task",
    )

    def __init__(self, lane: Lane, target: str, request_id: str, deadline: float | None) -> None:
        self.lane = lane
        self.target = target
        self.request_id = request_id
        self.deadline = deadline
        self.state = JobState.WAITING
        self.admitted_at = 0.0
        self.task: asyncio.Task[None] | None = None
        self.batch: BatchRun | None = None
        self.item: Any = None
        self.cancelled = False
        self.entered = False
        self.in_user_code = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.request_id} {self.target} {self.state.name}>"

    @property
    def is_done(self) -> bool:
        return self.state == JobState.DONE

    def arguments(self, method: Method) -> tuple[Any, Any]:
        """Positional and keyword arguments for the method. Raises what is wrong with the request."""
        raise NotImplementedError

    def queued(self) -> None:
        """It is in the waiting room: not executed yet."""

    def started(self) -> None:
        """It left the waiting room; written out before the first line of user code runs."""

    def refuse(self, reason: str) -> None:
        """It was not and will not be executed here."""
        raise NotImplementedError

    def is_whole(self, value: Any) -> bool:
        """Whether `answer` takes this value; else it is for `deliver`."""
        raise NotImplementedError

    def answer(self, value: Any) -> None:
        """Send a whole value. Raises EncodingError if it cannot be sent; then it is not ended."""
        raise NotImplementedError

    async def deliver(self, value: Any) -> None:
        """Send a value that takes time to send."""
        raise NotImplementedError

    async def stream(self, items: AsyncIterator[Any]) -> None:
        """Send items as they are made, held back by a slow reader."""
        raise NotImplementedError

    def fail(self, error: BaseException) -> None:
        """Send an error. After the head of an answer it visibly cuts the rest off."""
        raise NotImplementedError

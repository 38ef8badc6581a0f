"""One request inside a replica, whatever it came as: what the replica asks of it and tells it.

`listener` makes jobs of frames; `replica` admits, runs and ends them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol

from serveit.declare.encoding import is_stream
from serveit.exceptions import BatchError

if TYPE_CHECKING:
    import asyncio
    from collections import deque
    from collections.abc import AsyncIterator, Sequence

    from serveit.declare.backend import Method
    from serveit.exceptions import ServeitError
    from serveit.running.reply import Reply


class JobState(IntEnum):
    """How far a job has come."""

    WAITING = 0
    """In the waiting room."""
    RESERVED = 1
    """Has a slot; its arguments are still to come."""
    GATHERING = 2
    """Has a slot; its batch does not run yet."""
    RUNNING = 3
    """User code may be running."""
    DONE = 4
    """Its last word is said; of a large answer some octets may still be going out."""


class Lane(Protocol):
    """One caller's share of a replica: its jobs in the waiting room and in slots, when it was last given
    a slot (a count, not a time), and how many slots it last heard that others hold."""

    waiting: deque[Job]
    running: int
    last_turn: int
    told: int

    @property
    def outstanding(self) -> int:
        """Slots that its caller counts as its own: held, or asked for."""

    def tell(self) -> None:
        """Let the caller know how many slots others hold now."""


class WaitingRoom:
    """Jobs that wait for a slot: the lane whose last turn is the longest ago is next, each lane's jobs in
    their order.

    All mutable state: each lane's `waiting` and `last_turn`, `_lanes` (those with waiting jobs), `_count`
    (jobs in them), `_turns` (slots given so far), `_latest` (the lane that the last one went to),
    `_changed` (the last turn before that lane's), `_crowded_until` (the turn up to which callers are
    taken to compete for slots).
    """

    def __init__(self) -> None:
        self._lanes: dict[Lane, None] = {}
        self._count = 0
        self._turns = 0
        self._latest: Lane | None = None
        self._changed = 0
        self._crowded_until = 0

    def __len__(self) -> int:
        return self._count

    def note_crowd(self, limit: int) -> None:
        """Somebody has to wait: for as many turns as fill all slots twice, count on more of that."""
        self._crowded_until = self._turns + 2 * limit

    def take_turn(self, lane: Lane) -> None:
        """The lane is given a slot."""
        if lane is not self._latest:
            self._latest, self._changed = lane, self._turns
        self._turns += 1
        lane.last_turn = self._turns

    def is_contested(self, lane: Lane, limit: int) -> bool:
        """Whether others want the lane's next slot as well, though theirs may come a moment later: of
        late somebody had to wait, and somebody else was given a slot."""
        if self._turns >= self._crowded_until:
            return False
        others_turn = self._turns if lane is not self._latest else self._changed
        return others_turn > 0 and self._turns - others_turn < 2 * limit

    def add(self, job: Job) -> None:
        job.lane.waiting.append(job)
        self._lanes[job.lane] = None
        self._count += 1

    def remove(self, job: Job) -> None:
        job.lane.waiting.remove(job)
        self._count -= 1
        if not job.lane.waiting:
            del self._lanes[job.lane]

    def pop(self) -> Job:
        """The one whose turn it is. Raises ValueError if nobody waits."""
        lane = min(self._lanes, key=_last_turn)
        job = lane.waiting[0]
        self.remove(job)
        return job


def _last_turn(lane: Lane) -> int:
    return lane.last_turn


@dataclass
class BatchRun:
    """A batch that runs: how many of its jobs are still wanted, and what was logged of it."""

    task: asyncio.Task[None] | None
    wanted: int
    begun_at: float | None = None
    reported: BaseException | None = None
    """A failure of the whole batch is logged once, not once per item."""


def latest_deadline(jobs: Sequence[Job]) -> float | None:
    """When all of them have given up; None for never."""
    deadlines = [job.deadline for job in jobs if job.deadline is not None]
    return max(deadlines) if len(deadlines) == len(jobs) else None


class Job(ABC):
    """The replica's side of one request. Subclasses know what it came as and how it is answered.

    Exactly one of `answer`, `deliver` and `stream` (to their ends), `fail` and `refuse` ends it.
    """

    __slots__ = (
        "admitted_at",
        "batch",
        "begun_at",
        "deadline",
        "entered",
        "given_up",
        "in_user_code",
        "item",
        "lane",
        "reply",
        "request_id",
        "state",
        "target",
        "task",
    )

    def __init__(
        self, lane: Lane, target: str, request_id: str, deadline: float | None, reply: Reply
    ) -> None:
        self.lane = lane
        self.target = target
        self.request_id = request_id
        self.deadline = deadline
        self.reply = reply
        self.state = JobState.WAITING
        self.admitted_at = 0.0
        self.begun_at: float | None = None
        """When user code began; None where a thread has not been free for it."""
        self.task: asyncio.Task[None] | None = None
        self.batch: BatchRun | None = None
        self.item: Any = None
        self.given_up: ServeitError | None = None
        """Why it need not go on: its caller cancelled it, or the replica stops."""
        self.entered = False
        """Whether its task has had its first step: before that a cancelled task just vanishes."""
        self.in_user_code = False
        """Whether the user's function has been called: then it counts as executed."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.request_id} {self.target} {self.state.name}>"

    @property
    def is_done(self) -> bool:
        return self.state == JobState.DONE

    def check_wanted(self) -> None:
        """Raise what it was given up for, if it was."""
        if self.given_up is not None:
            raise self.given_up

    @property
    def is_sending(self) -> bool:
        """Whether octets of its answer wait for the reader to take those before them."""
        return self.reply.is_sending

    @property
    def outlives_caller(self) -> bool:
        """Whether it goes on though its caller's link is gone: somebody else waits for the result."""
        return False

    brings_arguments_later = False
    """Whether it only holds its slot when it gets one, and runs when its arguments are there."""

    def hold(self) -> None:
        """It has a slot now; for one that brings its arguments later."""
        raise NotImplementedError

    def queued(self) -> None:
        """It is in the waiting room: not executed yet."""
        self.reply.queued()

    def started(self) -> None:
        """It left the waiting room; written out before the first line of user code runs."""
        self.reply.started()

    def refuse(self, reason: str) -> None:
        """It was not and will not be executed here."""
        self.reply.refuse(reason)

    def abort(self, error: ServeitError) -> None:
        """No more of its answer is wanted: whoever goes on sending gets the error."""
        self.reply.abort(error)

    @abstractmethod
    def arguments(self, method: Method) -> tuple[Any, Any]:
        """Positional and keyword arguments for the method. Raises what is wrong with the request."""

    @abstractmethod
    def is_whole(self, value: Any) -> bool:
        """Whether `answer` takes this value; else it is for `deliver`."""

    @abstractmethod
    def answer(self, value: Any) -> None:
        """Send a whole value. Raises EncodingError if it cannot be sent; then it is not ended."""

    def answer_item(self, value: Any) -> None:
        """Send what a batch function returned for it. Raises BatchError, too."""
        if is_stream(value) or not self.is_whole(value):
            raise BatchError(f"a batch function's results must be whole values, got {type(value).__name__}")
        self.answer(value)

    @abstractmethod
    async def deliver(self, value: Any) -> None:
        """Send a value that takes time to send."""

    @abstractmethod
    async def stream(self, items: AsyncIterator[Any]) -> None:
        """Send items as they are made, held back by a slow reader."""

    @abstractmethod
    def fail(self, error: BaseException) -> None:
        """Send an error. After the head of an answer it visibly cuts the rest off."""

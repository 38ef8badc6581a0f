"""Slots for Ray actor tasks: RESERVE holds one, the task brings the arguments and takes the result away.

The actor of `cluster/` runs its tasks through `Reservations.run`, so that they are admitted, bounded,
batched and counted as calls are.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from serveit.exceptions import DeadlineExceeded, ProtocolError, RemoteError, ReplicaDied
from serveit.running.calljob import check_item, raisable, send_error
from serveit.running.failures import text_of, user_traceback
from serveit.running.job import Job, JobState, Lane
from serveit.wire.pickles import dump_exception

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from serveit.declare.backend import Method
    from serveit.running.replica import Replica
    from serveit.running.reply import Reply
    from serveit.types import Executed, Timer
    from serveit.wire.frames import Reserve

MAX_EXCEPTION = 1024 * 1024
TELL_S = 0.002
"""How long the news of a free slot may wait for company."""


class Reservation(Job):
    """A slot that is asked for, held, taken up by a task, and free again.

    Until a task takes it up it belongs to its caller: a CANCEL or the loss of the link ends it. Afterwards
    it is the task's, whoever holds the ObjectRef. The deadline ends it before and after.
    """

    __slots__ = ("_args", "_kwargs", "_reservations", "_timer", "claimed", "outcome")

    brings_arguments_later = True

    def __init__(
        self, lane: Lane, message: Reserve, deadline: float | None, reply: Reply, reservations: Reservations
    ) -> None:
        super().__init__(lane, message.target, message.request_id, deadline, reply)
        self._reservations = reservations
        self._timer: Timer | None = None
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}
        self.claimed = False
        self.outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    @property
    def outlives_caller(self) -> bool:
        return self.claimed

    def hold(self) -> None:
        if self._reservations.hold(self):
            self._timer = self._reservations.timer(self)
            self.reply.reserved()

    def claim(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A task has come. The deadline stays."""
        self._reservations.forget(self)
        self.claimed = True
        self._args, self._kwargs = args, kwargs

    def expire(self) -> None:
        """The deadline passed, and a task has come: whoever awaits it hears of it now, though a `def`
        function runs on."""
        if not self.outcome.done():
            executed: Executed = "maybe" if self.in_user_code else "no"
            where = "while the function ran" if self.in_user_code else "before the function was called"
            self._fail_task(DeadlineExceeded(f"the deadline passed {where}", executed=executed))

    def arguments(self, method: Method) -> tuple[Any, Any]:
        if method.is_batch:
            check_item(self.target, self._args, self._kwargs)
        args, kwargs = self._args, self._kwargs
        self._args, self._kwargs = (), {}
        return args, kwargs

    def is_whole(self, value: Any) -> bool:
        return True

    def answer(self, value: Any) -> None:
        if not self.outcome.done():  # else its task was cancelled, and takes nothing more
            self.outcome.set_result(value)
        self._stop_timer()
        self._reservations.finish(self)

    async def stream(self, items: AsyncIterator[Any]) -> None:
        raise TypeError(
            "the function returned a stream, which no ObjectRef can be: "
            "use `async for item in handle.stream(...)`"
        )

    async def deliver(self, value: Any) -> None:
        raise AssertionError("unreachable: every value is whole")

    def fail(self, error: BaseException) -> None:
        self._stop_timer()
        self._reservations.forget(self)
        if not self.claimed:
            send_error(self, error)
            return
        if not raisable(error) or not dump_exception(error, MAX_EXCEPTION):
            error = RemoteError(f"{type(error).__qualname__}: {text_of(error)}", user_traceback(error))
        if not self.outcome.done():
            self._fail_task(error)
        self._reservations.finish(self)

    def _fail_task(self, error: BaseException) -> None:
        self.outcome.set_exception(error)
        self.outcome.exception()  # counts as seen: the task may be gone

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Reservations:
    """The held slots of one replica, by request id.

    All mutable state: `_held`, `_ended` (whose callers are not yet told that the slot is free) and
    `_telling` (the timer that will tell them).
    """

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._held: dict[str, Reservation] = {}
        self._ended: list[Reservation] = []
        self._telling: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Reservations {self._replica.id} held={len(self._held)}>"

    async def run(self, request_id: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a task on the slot that was reserved for it.

        Raises:
            ReplicaDied: the reservation has lapsed, at its deadline or with its caller's link.
            DeadlineExceeded: the deadline passed since.
            Exception: what the function raised.
        """
        reservation = self._held.get(request_id)
        if reservation is None:
            raise ReplicaDied(
                f"the slot of request {request_id} on replica {self._replica.id} is no longer held: its "
                "deadline has passed, or its caller was lost, before the task came",
                executed="no",
            )
        reservation.claim(args, kwargs)
        self._replica.claim(reservation)
        try:
            return await reservation.outcome
        except asyncio.CancelledError:
            self._replica.abandon(reservation)
            raise

    def finish(self, reservation: Reservation) -> None:
        """Its task has ended. Its caller hears of the slot along with the next frame, or a moment later:
        nobody waits for that, and a write and a wake-up of their own would cost as much as the call."""
        self._ended.append(reservation)
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(TELL_S, self._tell)

    def hold(self, reservation: Reservation) -> bool:
        """Keep it until its task comes; whether that can be. A second one of the same name, which only a
        caller that breaks the rules sends, must not get the first one's task."""
        self._tell()
        if self._held.setdefault(reservation.request_id, reservation) is reservation:
            return True
        again = ProtocolError(f"a slot is held for a request {reservation.request_id} already")
        self._replica.end(reservation, again)
        return False

    def timer(self, reservation: Reservation) -> Timer | None:
        """What ends it at its deadline."""
        if reservation.deadline is None:
            return None
        clock = self._replica.clock
        return clock.call_later(max(0.0, reservation.deadline - clock.time()), self._lapse, reservation)

    def _tell(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        ended, self._ended = self._ended, []
        for reservation in ended:
            if reservation.given_up is None:
                reservation.reply.release()
            else:
                send_error(reservation, reservation.given_up)

    def forget(self, reservation: Reservation) -> None:
        if self._held.get(reservation.request_id) is reservation:
            del self._held[reservation.request_id]

    def _lapse(self, reservation: Reservation) -> None:
        if reservation.state == JobState.RESERVED:
            self._replica.lapse(reservation)
        else:
            reservation.expire()
            self._replica.abandon(reservation)

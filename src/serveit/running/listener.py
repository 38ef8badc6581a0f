"""The replica's end of a link to one caller: frames to jobs. The caller's is `calling/connection.py`.

Hot path: `frame_received` once per request.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from serveit.exceptions import BodyTooLarge, ProtocolError
from serveit.running.calljob import CallJob
from serveit.running.failures import Cancelled, failure_of
from serveit.running.httpjob import Bindings, HttpJob
from serveit.running.reply import Reply
from serveit.running.reservation import Reservation
from serveit.wire.frames import (
    END,
    Call,
    Credit,
    Frame,
    FrameType,
    Load,
    Request,
    Reserve,
    decode_message,
    encode_message,
)
from serveit.wire.streams import Collector

if TYPE_CHECKING:
    from serveit.exceptions import ServeitError
    from serveit.running.job import Job
    from serveit.running.replica import Replica
    from serveit.running.reservation import Reservations
    from serveit.wire.link import Link

MAX_REQUEST = 4 * 1024**3
"""Cap on a request that is put together here. A proxy has its own, far lower (`max_body_bytes`); a
Python caller is authenticated and says beforehand how much will come."""


class Listener:
    """Receives for one caller; to the replica it is that caller's lane.

    All mutable state: `waiting`, `running`, `last_turn`, `told` (kept by the replica), `_collecting`
    (requests whose bodies are still coming), `_jobs` (jobs whose stream has not ended).
    """

    def __init__(
        self,
        replica: Replica,
        bindings: Bindings,
        link: Link,
        *,
        reservations: Reservations | None = None,
        may_call: bool = True,
    ) -> None:
        """
        Args:
            replica: what runs the jobs.
            bindings: how HTTP requests become arguments.
            link: to the caller.
            reservations: where actor tasks find the slots held for them; None without Ray.
            may_call: whether the caller may send pickles. A proxy may not: what it sends came from HTTP.
        """
        self.waiting: deque[Job] = deque()
        self.running = 0
        self.last_turn = 0
        self.told = 0
        self._replica = replica
        self._bindings = bindings
        self._link = link
        self._reservations = reservations
        self._may_call = may_call
        self._collecting: dict[int, tuple[Request | Call, Collector]] = {}
        self._jobs: dict[int, HttpJob | CallJob | Reservation] = {}

    def __repr__(self) -> str:
        return f"<Listener {self._replica.id} open={len(self._jobs)} waiting={len(self.waiting)}>"

    # -- running.job.Lane --------------------------------------------------------------------

    @property
    def outstanding(self) -> int:
        return self.running + len(self.waiting) + len(self._collecting)

    def tell(self) -> None:
        self._link.send(FrameType.PING, 0, encode_message(Load(self.others())))

    # -- running.reply.ReplyOwner ------------------------------------------------------------

    def others(self) -> int:
        return self._replica.admission.others(self)

    def is_free(self, reply: Reply) -> bool:
        return self._replica.is_free(self._jobs[reply.stream])

    def reply_ended(self, reply: Reply) -> None:
        job = self._jobs.pop(reply.stream, None)
        if job is not None and reply.outflow is not None:
            self._replica.sent(job)

    # -- wire.link.Receiver ------------------------------------------------------------------

    def frame_received(self, frame: Frame) -> None:
        kind = frame.type
        if kind == FrameType.REQUEST:
            self._open(frame, decode_message(Request, frame))
        elif kind == FrameType.CALL and self._may_call:
            self._open(frame, decode_message(Call, frame))
        elif kind == FrameType.DATA:
            self._data(frame)
        elif kind == FrameType.CANCEL:
            self._cancel(frame.stream)
        elif kind == FrameType.CREDIT:
            job = self._jobs.get(frame.stream)
            if job is not None:
                job.reply.credited(decode_message(Credit, frame).octets)
        elif kind == FrameType.RESERVE and self._may_call and self._reservations is not None:
            self._reserve(frame.stream, decode_message(Reserve, frame), self._reservations)
        elif kind == FrameType.METRICS:
            self._tell_figures()
        elif kind != FrameType.PING:
            raise ProtocolError(f"a caller must not send frames of type {kind}")

    def link_lost(self, error: BaseException | None) -> None:
        self._collecting.clear()
        # The latest first: those that wait, so that none of them gets the slots of the others.
        for job in reversed(list(self._jobs.values())):
            self._replica.cancel(job)
        self._replica.admission.notices.forget(self)

    def go_away(self) -> None:
        """Tell the caller that the replica takes nothing new."""
        self._link.send(FrameType.GOAWAY, 0)

    def _tell_figures(self) -> None:
        replica = self._replica
        figures = replica.meter.figures(replica.statistics())
        self._link.send(FrameType.METRICS, 0, encode_message(figures))

    def _reserve(self, stream: int, message: Reserve, reservations: Reservations) -> None:
        self._check_new(stream)
        deadline = self._deadline(message.deadline_ms)
        reply = Reply(self, self._link, stream)
        job = self._jobs[stream] = Reservation(self, message, deadline, reply, reservations)
        self._replica.admit(job)

    def _check_new(self, stream: int) -> None:
        if stream in self._jobs or stream in self._collecting:
            raise ProtocolError(f"stream {stream} is open already")

    def _deadline(self, deadline_ms: int | None) -> float | None:
        return None if deadline_ms is None else self._replica.clock.time() + deadline_ms / 1000

    def _open(self, frame: Frame, message: Request | Call) -> None:
        stream = frame.stream
        self._check_new(stream)
        if frame.flags & END:
            self._admit(stream, message, frame.body)
            return
        limit = sum(message.sizes) if isinstance(message, Call) else MAX_REQUEST
        self._collecting[stream] = message, Collector(self._link, stream, min(limit, MAX_REQUEST))
        if self.told:
            self._replica.admission.notices.consider(self)

    def _data(self, frame: Frame) -> None:
        entry = self._collecting.get(frame.stream)
        if entry is None:
            return  # cancelled or refused meanwhile
        message, collector = entry
        try:
            body = collector.received(frame.body, frame.flags)
        except BodyTooLarge as error:
            del self._collecting[frame.stream]
            self._fail(frame.stream, error)
            return
        if body is not None:
            del self._collecting[frame.stream]
            self._admit(frame.stream, message, body)

    def _admit(self, stream: int, message: Request | Call, body: bytes) -> None:
        deadline = self._deadline(message.deadline_ms)
        reply = Reply(self, self._link, stream)
        job: HttpJob | CallJob
        if isinstance(message, Request):
            job = HttpJob(self, message, body, deadline, reply, self._bindings)
        else:
            job = CallJob(self, message, body, deadline, reply)
        self._jobs[stream] = job
        self._replica.admit(job)

    def _cancel(self, stream: int) -> None:
        if stream in self._collecting:
            del self._collecting[stream]
            self._fail(stream, Cancelled("cancelled by its caller"))
        elif stream in self._jobs:
            self._replica.cancel(self._jobs[stream])
        # Otherwise its last frame is on the way.

    def _fail(self, stream: int, error: ServeitError) -> None:
        """End a stream that has not become a job."""
        failure = failure_of(error, others=self.others(), in_user_code=False)
        Reply(self, self._link, stream).error(failure)

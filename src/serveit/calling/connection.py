"""The caller's end of a link to one replica: streams, and what is known of the replica's load.

Hot path: `send` and `frame_received` once per request and answer each. The replica's own end is
`running/listener.py`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from serveit.calling.exchange import Answer, Exchange, Phase
from serveit.exceptions import ProtocolError, RemoteError, ReplicaDied
from serveit.wire.frames import (
    END,
    FREED,
    Credit,
    Failure,
    Figures,
    Frame,
    FrameType,
    Load,
    Refusal,
    decode_message,
    encode_message,
)
from serveit.wire.streams import Inflow, Outflow

if TYPE_CHECKING:
    from serveit.control.snapshot import ReplicaInfo
    from serveit.wire.link import Link

MAX_STREAM = 2**32 - 1
"""Stream numbers are u32 on the wire; after the last they start again."""


class Dispatcher(Protocol):
    """The router, as a connection sees it."""

    def room_made(self, connection: Connection) -> None:
        """The replica may be able to take more."""

    def answered(self, exchange: Exchange) -> None:
        """The head of the answer, or the error, is in: the deadline is met. Or the end of one that nobody
        reads, which has a deadline, too."""

    def refused(self, exchange: Exchange) -> None:
        """Its replica did not and will not execute it."""

    def lost(self, connection: Connection, exchanges: list[Exchange]) -> None:
        """The link is gone, with these on it."""

    def draining(self, connection: Connection) -> None:
        """The replica takes nothing new, and never will again."""

    def now(self) -> float: ...


class Connection:
    """One router's way to one replica.

    A stream is open until the replica ends it, with ANSWER or DATA that say END, ERROR or REFUSED:
    exactly one of them, also after CANCEL. All mutable state: `_streams` (who waits on which stream;
    None once given up), `_inflows` (bodies still coming in), `_freed` (open streams whose slot is
    free already), `outstanding` (slots that this router holds or asked for there), `others` (what
    the replica last said that it runs for everybody else), `draining` (the replica takes nothing
    new), `retired` (no snapshot names it any more), `_ceiling` (see `_refused`), `_figures` (what the
    replica was last asked to tell of itself).
    """

    def __init__(self, replica: ReplicaInfo, limit: int, prefetch: int, dispatcher: Dispatcher) -> None:
        self.replica = replica
        self.limit = limit
        self.prefetch = prefetch
        self.outstanding = 0
        self.others = 0
        self.draining = False
        self.retired = False
        self.link: Link | None = None
        self._dispatcher = dispatcher
        self._streams: dict[int, Exchange | None] = {}
        self._inflows: dict[int, Inflow] = {}
        self._freed: set[int] = set()
        self._next_stream = 1
        self._ceiling = sys.maxsize
        self._figures: asyncio.Future[Figures] | None = None

    def __repr__(self) -> str:
        if self.retired:
            state = "retired"
        elif self.draining:
            state = "draining"
        else:
            state = "open" if self.link is not None else "connecting"
        return f"<Connection {self.replica.id} {state} {self.outstanding}+{self.others}/{self.limit}>"

    @property
    def ready(self) -> bool:
        """Whether the replica takes requests at all."""
        link = self.link
        return link is not None and not (link.closed or link.stale or self.draining or self.retired)

    @property
    def closed(self) -> bool:
        """Whether its link is closed, though `link_lost` may be still to come."""
        return self.link is not None and self.link.closed

    @property
    def load(self) -> int:
        """What the replica has to do, as far as is known here."""
        return self.outstanding + self.others

    @property
    def has_free_slot(self) -> bool:
        """Whether the replica, as far as is known here, would run a request at once."""
        return self.outstanding + self.others < self.limit and self.outstanding < self._ceiling

    @property
    def has_room(self) -> bool:
        """Whether a request may be sent: to run, or to be the next to run."""
        free = self.limit - self.others
        most = (free if free > 0 else 0) + self.prefetch
        return self.outstanding < most and self.outstanding < self._ceiling

    def passed_over(self) -> None:
        """Another replica was chosen for what this one was said to run for others.

        While nothing of ours is there, nothing tells when that changes: so what was heard counts a
        little less each time, until the replica is tried again and says.
        """
        if self.others and not self.outstanding:
            self.others -= 1

    def adjust(self, limit: int, prefetch: int) -> None:
        """The backend's options are these now, and the replica is one of its replicas (again)."""
        if limit != self.limit:
            self._ceiling = sys.maxsize
        self.limit, self.prefetch, self.retired = limit, prefetch, False

    def retire(self) -> None:
        """Send nothing more; close the link when the last stream has ended."""
        self.retired = True
        if not self._streams:
            self.close()

    def close(self) -> None:
        if self.link is not None:
            self.link.close()

    def send(self, exchange: Exchange) -> None:
        """Put the request on the wire.

        Raises:
            ProtocolError: its metadata is too long for a frame; nothing was sent.
        """
        link = self._open_link
        stream = self._next_stream
        while stream in self._streams:
            stream = stream % MAX_STREAM + 1
        message: Any = exchange.message
        if exchange.deadline is not None:
            message.deadline_ms = max(0, int((exchange.deadline - self._dispatcher.now()) * 1000))
        meta = encode_message(message)
        body = exchange.body
        if exchange.inline:
            link.send(exchange.frame_type, stream, meta, body[0] if len(body) == 1 else b"".join(body), END)
        else:
            link.send(exchange.frame_type, stream, meta)
            exchange.outflow = Outflow(link, stream)
            exchange.outflow.write(body, end=True)
        self._next_stream = stream % MAX_STREAM + 1
        self._streams[stream] = exchange
        self.outstanding += 1
        exchange.phase = Phase.SENT
        exchange.connection = self
        exchange.stream = stream

    def cancel(self, exchange: Exchange) -> None:
        """Tell the replica. The slot counts as taken until the replica says that it is free."""
        stream = exchange.stream
        inflow = self._inflows.pop(stream, None)
        if self.link is not None and self._streams.get(stream) is exchange:
            self._streams[stream] = None
            self.link.send(FrameType.CANCEL, stream)
        if inflow is not None:
            inflow.fail(ReplicaDied("the stream was cancelled"))
        if exchange.outflow is not None:
            exchange.outflow.abort(ReplicaDied("the request was cancelled"))

    def figures(self) -> asyncio.Future[Figures]:
        """Ask the replica what it has counted; who asks before it has answered shares the answer. Cancelled
        when the link is lost.

        Raises:
            ProtocolError: there is no link.
        """
        if self._figures is None or self._figures.done():
            link = self._open_link
            self._figures = asyncio.get_running_loop().create_future()
            link.send(FrameType.METRICS, 0)
        return self._figures

    # -- wire.link.Receiver ------------------------------------------------------------------

    def frame_received(self, frame: Frame) -> None:
        kind, stream = frame.type, frame.stream
        handle = _HANDLERS.get(kind)
        if handle is not None and stream in self._streams:
            handle(self, frame, self._streams[stream])
        elif kind == FrameType.PING:
            if frame.meta:
                self._load_told(decode_message(Load, frame).others)
            self._dispatcher.room_made(self)  # its link may have been stale
        elif kind == FrameType.GOAWAY:
            self._drains()
        elif kind == FrameType.METRICS and self._figures is not None:
            figures = decode_message(Figures, frame)
            if not self._figures.done():
                self._figures.set_result(figures)
        elif kind not in _HARMLESS:
            raise ProtocolError(f"a frame of type {kind} that no replica sends on stream {stream} now")

    def link_lost(self, error: BaseException | None) -> None:
        self.link = None
        lost = [exchange for exchange in self._streams.values() if exchange is not None]
        self._streams.clear()
        self._freed.clear()
        self.outstanding = 0
        for inflow in self._inflows.values():
            inflow.fail(ReplicaDied(f"replica {self.replica.id} was lost in the middle of its answer"))
        self._inflows.clear()
        if self._figures is not None:
            self._figures.cancel()
        self._dispatcher.lost(self, lost)

    def _answer(self, frame: Frame, exchange: Exchange | None) -> None:
        stream, flags = frame.stream, frame.flags
        if exchange is None:
            # Cancelled here while the answer was under way: only the slot and the load matter.
            if flags & END:
                self._finish(stream, _others_in(frame))
            elif flags & FREED:
                self._slot_freed(stream, _others_in(frame))
            return
        if exchange.phase >= Phase.ANSWERING:
            raise ProtocolError("a second answer on one stream")
        message: Any = decode_message(exchange.answer_type, frame)
        inflow = None
        if flags & END:
            exchange.phase = Phase.DONE
        else:
            exchange.phase = Phase.ANSWERING
            if exchange.frame_type != FrameType.RESERVE:  # nothing but the end follows a RESERVED
                inflow = self._inflows[stream] = Inflow(self._open_link, stream)
        self._dispatcher.answered(exchange)
        exchange.succeed(Answer(message, flags, frame.body, inflow))
        if flags & END:
            self._finish(stream, message.others)
        elif flags & FREED:
            self._slot_freed(stream, message.others)

    def _reserved(self, frame: Frame, exchange: Exchange | None) -> None:
        """A slot is held: like an answer of which no more than the end is still to come."""
        if exchange is not None and exchange.frame_type != FrameType.RESERVE:
            raise ProtocolError("RESERVED for what was no RESERVE")
        self._answer(frame, exchange)

    def _error(self, frame: Frame, exchange: Exchange | None) -> None:
        failure = decode_message(Failure, frame)
        inflow = self._inflows.pop(frame.stream, None)
        if exchange is not None:
            exchange.phase = Phase.DONE
            self._dispatcher.answered(exchange)
            try:
                error = exchange.rebuild(failure, frame.body)
            except Exception:  # user code takes part in it, and the caller must have its answer
                error = RemoteError(f"{failure.kind}: {failure.text}", failure.traceback)
            if inflow is not None:
                inflow.fail(error)
            exchange.fail(error)
        self._finish(frame.stream, failure.others)

    def _refused(self, frame: Frame, exchange: Exchange | None) -> None:
        """Not executed there. A replica that is full has one of ours waiting already: until that one
        or another ends, the replica would refuse everything, whatever the figures known here say.
        From then on it gets one more with each that ends, until it says that slots are free."""
        refusal = decode_message(Refusal, frame)
        if frame.stream in self._freed or (exchange is not None and exchange.phase >= Phase.ANSWERING):
            raise ProtocolError("REFUSED after the head of an answer")
        if refusal.reason != "draining":
            self._ceiling = max(1, self.outstanding - 1)
        self._close_stream(frame.stream)
        self.outstanding -= 1
        self.others = refusal.others
        if refusal.reason == "draining":
            self._drains()
        if exchange is not None:
            self._dispatcher.refused(exchange)
        self._dispatcher.room_made(self)

    def _placed(self, frame: Frame, exchange: Exchange | None) -> None:
        """QUEUED or STARTED."""
        self.others = decode_message(Load, frame).others
        phase = Phase.QUEUED if frame.type == FrameType.QUEUED else Phase.STARTED
        if exchange is not None and exchange.phase < phase:
            exchange.phase = phase
            if exchange.expendable and phase == Phase.QUEUED:
                exchange.cancel()  # it was to run at once, and must not stand in anybody's way
        if phase == Phase.STARTED and self._ceiling != sys.maxsize:
            self._ceiling += 1  # one of ours has left the waiting room
        self._dispatcher.room_made(self)

    def _load_told(self, others: int) -> None:
        """Slots are free there, and none of ours waits for one; see `running/notices.py`."""
        self.others = others
        self._ceiling = sys.maxsize

    def _drains(self) -> None:
        if not self.draining:
            self.draining = True
            self._dispatcher.draining(self)

    def _credited(self, frame: Frame, exchange: Exchange | None) -> None:
        if exchange is not None and exchange.outflow is not None:
            exchange.outflow.credited(decode_message(Credit, frame).octets)

    def _data(self, frame: Frame, exchange: Exchange | None) -> None:
        stream = frame.stream
        inflow = self._inflows.get(stream)
        if inflow is not None:
            inflow.received(frame.body, frame.flags)
        elif exchange is not None and exchange.phase < Phase.ANSWERING:
            raise ProtocolError("DATA before the head of its answer")
        if frame.flags & END:
            self._inflows.pop(stream, None)
            if exchange is not None:
                exchange.phase = Phase.DONE
                if exchange.bucket is not None:
                    self._dispatcher.answered(exchange)
            self._finish(stream, self.others)

    @property
    def _open_link(self) -> Link:
        if self.link is None:
            raise ProtocolError(f"no link to {self.replica.id}")
        return self.link

    def _finish(self, stream: int, others: int) -> None:
        self._close_stream(stream)
        if stream in self._freed:
            self._freed.discard(stream)
        else:
            self._count_free(others)

    def _close_stream(self, stream: int) -> None:
        del self._streams[stream]
        if self.retired and not self._streams:
            self.close()

    def _slot_freed(self, stream: int, others: int) -> None:
        if stream not in self._freed:
            self._freed.add(stream)
            self._count_free(others)

    def _count_free(self, others: int) -> None:
        self.outstanding -= 1
        self.others = others
        if self._ceiling != sys.maxsize:
            self._ceiling += 1
        self._dispatcher.room_made(self)


class _Head(msgspec.Struct, array_like=True):
    """What all frames back begin with."""

    others: int


_decode_head = msgspec.msgpack.Decoder(_Head).decode


def _others_in(frame: Frame) -> int:
    """The load in the head of an answer of whatever kind."""
    try:
        return _decode_head(frame.meta).others
    except msgspec.DecodeError as error:
        raise ProtocolError(f"malformed metadata of an answer: {error}") from None


_HANDLERS: dict[int, Callable[[Connection, Frame, Exchange | None], None]] = {
    FrameType.ANSWER: Connection._answer,
    FrameType.RESERVED: Connection._reserved,
    FrameType.ERROR: Connection._error,
    FrameType.REFUSED: Connection._refused,
    FrameType.QUEUED: Connection._placed,
    FrameType.STARTED: Connection._placed,
    FrameType.CREDIT: Connection._credited,
    FrameType.DATA: Connection._data,
}
_HARMLESS = (FrameType.CREDIT, FrameType.DATA)
"""May come late, when their stream has ended."""

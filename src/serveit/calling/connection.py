"""The caller's end of a link to one replica: streams, and what is known of the replica's load.

Hot path: `send` and `frame_received` once per request and answer each. The replica's own end is
`running/listener.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from serveit.calling.exchange import Answer, Exchange, Phase
from serveit.exceptions import ProtocolError, ReplicaDied
from serveit.wire.frames import (
    END,
    FREED,
    Credit,
    Failure,
    Frame,
    FrameType,
    Load,
    Message,
    Refusal,
    decode_message,
    encode_message,
)
from serveit.wire.streams import Inflow, Outflow

if TYPE_CHECKING:
    from serveit.control.snapshot import ReplicaInfo
    from serveit.wire.link import Link


class Dispatcher(Protocol):
    """The router, as a connection sees it."""

    def room_made(self, connection: Connection) -> None:
        """The replica may be able to take more."""

    def answered(self, exchange: Exchange) -> None:
        """The head of the answer, or the error, is in: the deadline is met."""

    def refused(self, exchange: Exchange, reason: str) -> None: ...

    def lost(self, connection: Connection, exchanges: list[Exchange]) -> None: ...

    def now(self) -> float: ...


class Connection:
    """One router's way to one replica.

    A stream is open until the replica ends it, with ANSWER or DATA that say END, ERROR or REFUSED:
    exactly one of them, also after CANCEL. All mutable state: `_streams` (who waits on which stream;
    None once given up), `_inflows` (bodies still coming in), `_freed` (open streams whose slot is
    free already), `outstanding` (slots that this router holds or asked for there), `others` (what
    the replica last said that it runs for everybody else).
    """

    def __init__(self, replica: ReplicaInfo, limit: int, prefetch: int, dispatcher: Dispatcher) -> None:
        self.replica = replica
        self.limit = limit
        self.prefetch = prefetch
        self.outstanding = 0
        self.others = 0
        self.draining = False
        self.link: Link | None = None
        self._dispatcher = dispatcher
        self._streams: dict[int, Exchange | None] = {}
        self._inflows: dict[int, Inflow] = {}
        self._freed: set[int] = set()
        self._next_stream = 1

    def __repr__(self) -> str:
        state = "draining" if self.draining else "open" if self.link is not None else "connecting"
        return f"<Connection {self.replica.id} {state} {self.outstanding}+{self.others}/{self.limit}>"

    @property
    def ready(self) -> bool:
        return self.link is not None and not self.link.closed and not self.draining

    @property
    def has_free_slot(self) -> bool:
        """Whether the replica, as far as is known here, would run a request at once."""
        return self.outstanding + self.others < self.limit

    @property
    def has_room(self) -> bool:
        """Whether a request may be sent: to run, or to be the next to run."""
        free = self.limit - self.others
        return self.outstanding < (free if free > 0 else 0) + self.prefetch

    def send(self, exchange: Exchange) -> None:
        """Put the request on the wire.

        Raises:
            ProtocolError: its metadata is too long for a frame; nothing was sent.
        """
        link = self._open_link
        stream = self._next_stream
        message: Any = exchange.message
        if exchange.deadline is not None:
            message.deadline_ms = max(0, int((exchange.deadline - self._dispatcher.now()) * 1000))
        meta = encode_message(message)
        if exchange.inline:
            body = exchange.body
            link.send(exchange.frame_type, stream, meta, body[0] if len(body) == 1 else b"".join(body), END)
        else:
            link.send(exchange.frame_type, stream, meta)
            exchange.outflow = Outflow(link, stream)
            exchange.outflow.write(exchange.body, end=True)
        self._next_stream = stream + 1
        self._streams[stream] = exchange
        self.outstanding += 1
        exchange.phase = Phase.SENT
        exchange.connection = self
        exchange.stream = stream

    def cancel(self, exchange: Exchange) -> None:
        """Tell the replica. The slot counts as taken until the replica says that it is free."""
        stream = exchange.stream
        inflow = self._inflows.pop(stream, None)
        if self.link is not None and stream in self._streams:
            self._streams[stream] = None
            self.link.send(FrameType.CANCEL, stream)
        if inflow is not None:
            inflow.fail(ReplicaDied("the stream was cancelled"))
        if exchange.outflow is not None:
            exchange.outflow.abort(ReplicaDied("the request was cancelled"))

    def close(self) -> None:
        if self.link is not None:
            self.link.close()

    # -- wire.link.Receiver ------------------------------------------------------------------

    def frame_received(self, frame: Frame) -> None:
        kind, stream = frame.type, frame.stream
        if kind == FrameType.DATA:
            self._data(frame)
        elif kind == FrameType.GOAWAY:
            self.draining = True
        elif stream in self._streams:
            handle = _HANDLERS.get(kind)
            if handle is None:
                raise ProtocolError(f"a replica must not send frames of type {kind}")
            handle(self, frame, self._streams[stream])
        elif kind not in (FrameType.CREDIT, FrameType.PING):
            raise ProtocolError(f"a frame of type {kind} for a stream that is not open")

    def link_lost(self, error: BaseException | None) -> None:
        self.link = None
        lost = [exchange for exchange in self._streams.values() if exchange is not None]
        self._streams.clear()
        self._freed.clear()
        self.outstanding = 0
        for inflow in self._inflows.values():
            inflow.fail(ReplicaDied(f"replica {self.replica.id} was lost in the middle of its answer"))
        self._inflows.clear()
        self._dispatcher.lost(self, lost)

    def _answer(self, frame: Frame, exchange: Exchange | None) -> None:
        stream, flags = frame.stream, frame.flags
        if exchange is None:
            # Cancelled here while the answer was under way: only the slot matters.
            if flags & END:
                self._finish(stream, self.others)
            elif flags & FREED:
                self._slot_freed(stream, self.others)
            return
        if exchange.phase >= Phase.ANSWERING:
            raise ProtocolError("a second answer on one stream")
        message: Any = decode_message(exchange.answer_type, frame)
        inflow = None
        if not flags & END:
            inflow = self._inflows[stream] = Inflow(self._open_link, stream)
        exchange.phase = Phase.DONE if inflow is None else Phase.ANSWERING
        self._dispatcher.answered(exchange)
        exchange.succeed(Answer[Message](message, flags, frame.body, inflow))
        if flags & END:
            self._finish(stream, message.others)
        elif flags & FREED:
            self._slot_freed(stream, message.others)

    def _error(self, frame: Frame, exchange: Exchange | None) -> None:
        failure = decode_message(Failure, frame)
        inflow = self._inflows.pop(frame.stream, None)
        self._finish(frame.stream, failure.others)
        if exchange is None:
            return
        exchange.phase = Phase.DONE
        self._dispatcher.answered(exchange)
        error = exchange.rebuild(failure, frame.body)
        if inflow is not None:
            inflow.fail(error)
        exchange.fail(error)

    def _refused(self, frame: Frame, exchange: Exchange | None) -> None:
        refusal = decode_message(Refusal, frame)
        self._finish(frame.stream, refusal.others)
        if exchange is not None:
            self._dispatcher.refused(exchange, refusal.reason)

    def _placed(self, frame: Frame, exchange: Exchange | None) -> None:
        """QUEUED or STARTED."""
        self.others = decode_message(Load, frame).others
        if exchange is not None and exchange.phase < Phase.ANSWERING:
            exchange.phase = Phase.QUEUED if frame.type == FrameType.QUEUED else Phase.STARTED
        self._dispatcher.room_made(self)

    def _credited(self, frame: Frame, exchange: Exchange | None) -> None:
        if exchange is not None and exchange.outflow is not None:
            exchange.outflow.credited(decode_message(Credit, frame).octets)

    def _data(self, frame: Frame) -> None:
        inflow = self._inflows.get(frame.stream)
        if inflow is not None:
            inflow.received(frame.body, frame.flags)
        if not frame.flags & END:
            return
        self._inflows.pop(frame.stream, None)
        exchange = self._streams.get(frame.stream)
        if exchange is not None:
            exchange.phase = Phase.DONE
        if frame.stream in self._streams:
            self._finish(frame.stream, self.others)

    @property
    def _open_link(self) -> Link:
        if self.link is None:
            raise ProtocolError(f"no link to {self.replica.id}")
        return self.link

    def _finish(self, stream: int, others: int) -> None:
        del self._streams[stream]
        if stream in self._freed:
            self._freed.discard(stream)
        else:
            self._count_free(others)

    def _slot_freed(self, stream: int, others: int) -> None:
        self._freed.add(stream)
        self._count_free(others)

    def _count_free(self, others: int) -> None:
        self.outstanding -= 1
        self.others = others
        self._dispatcher.room_made(self)


_HANDLERS: dict[int, Callable[[Connection, Frame, Exchange | None], None]] = {
    FrameType.ANSWER: Connection._answer,
    FrameType.ERROR: Connection._error,
    FrameType.REFUSED: Connection._refused,
    FrameType.QUEUED: Connection._placed,
    FrameType.STARTED: Connection._placed,
    FrameType.CREDIT: Connection._credited,
}

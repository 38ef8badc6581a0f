"""For tests of the replica's side: a link that records, a caller that speaks frames, a clock in steps."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from serveit import App
from serveit.clock import LoopClock
from serveit.declare.backend import BackendRecord
from serveit.running.httpjob import Bindings
from serveit.running.listener import Listener
from serveit.running.replica import Replica
from serveit.types import Clock, HttpRequest
from serveit.wire.frames import (
    END,
    Call,
    CallAnswer,
    Credit,
    Decoder,
    Failure,
    Frame,
    FrameType,
    HttpAnswer,
    Message,
    Refusal,
    Request,
    decode_message,
    encode_frame,
    encode_message,
)
from serveit.wire.pickles import dump, load, load_exception
from serveit.wire.streams import cost
from tests.support import wait_until


class RecordingLink:
    """A link whose other end is a list."""

    def __init__(self) -> None:
        self.closed = False
        self.stale = False
        self.sent: list[Frame] = []
        self.flushed_at: list[int] = []
        """How many frames had been sent, at each flush."""
        self._by_stream: dict[int, list[Frame]] = {}
        self._decoder = Decoder()

    def send(self, kind: int, stream: int, meta: bytes = b"", body: Any = b"", flags: int = 0) -> None:
        octets = encode_frame(kind, stream, meta, body, flags)
        if not self.closed:
            for frame in self._decoder.feed(octets):
                self.sent.append(frame)
                self._by_stream.setdefault(frame.stream, []).append(frame)

    def flush(self) -> None:
        self.flushed_at.append(len(self.sent))

    def close(self) -> None:
        self.closed = True

    def of(self, stream: int) -> list[Frame]:
        return self._by_stream.get(stream, [])

    def kinds(self, stream: int) -> list[FrameType]:
        return [FrameType(frame.type) for frame in self.of(stream)]

    def finals(self, stream: int) -> list[Frame]:
        return [frame for frame in self.of(stream) if is_final(frame)]


def is_final(frame: Frame) -> bool:
    if frame.type in (FrameType.ANSWER, FrameType.DATA):
        return bool(frame.flags & END)
    return frame.type in (FrameType.ERROR, FrameType.REFUSED)


class Caller:
    """The other end of a listener's link: writes requests, reads what comes back."""

    def __init__(self, replica: Replica) -> None:
        self.link = RecordingLink()
        self.listener = Listener(replica, Bindings(replica.backend), self.link)
        self._streams = itertools.count(1)
        self._credited: dict[int, int] = {}

    def receive(self, kind: int, stream: int, meta: bytes = b"", body: bytes = b"", flags: int = 0) -> None:
        """Hand the listener a frame."""
        self.listener.frame_received(Frame(kind, flags, stream, meta, body))

    def call(
        self, *args: Any, target: str = "__call__", deadline_ms: int | None = None, **kwargs: Any
    ) -> int:
        """Send a CALL; returns its stream."""
        sizes, buffers = dump((args, kwargs), "the arguments")
        stream = next(self._streams)
        message = Call(f"r{stream}", target, sizes, deadline_ms)
        self.receive(FrameType.CALL, stream, encode_message(message), b"".join(buffers), END)
        return stream

    def request(
        self,
        route: str = "/",
        body: bytes = b"",
        *,
        values: tuple[str, ...] = (),
        method: str = "GET",
        headers: list[tuple[bytes, bytes]] | None = None,
        deadline_ms: int | None = None,
    ) -> int:
        """Send a REQUEST; returns its stream."""
        stream = next(self._streams)
        http = HttpRequest(route, "__call__", method, route, route.encode(), b"", headers or [], list(values))
        message = Request(f"r{stream}", http, deadline_ms)
        self.receive(FrameType.REQUEST, stream, encode_message(message), body, END)
        return stream

    def cancel(self, stream: int) -> None:
        self.receive(FrameType.CANCEL, stream)

    def credit(self, stream: int, octets: int) -> None:
        self.receive(FrameType.CREDIT, stream, encode_message(Credit(octets)))

    def take(self, stream: int) -> int:
        """Read what has come of a body: give credit for it. Returns the number of frames."""
        data = [frame for frame in self.link.of(stream) if frame.type == FrameType.DATA]
        fresh = data[self._credited.get(stream, 0) :]
        self._credited[stream] = len(data)
        if fresh:
            self.credit(stream, sum(cost(len(frame.body)) for frame in fresh))
        return len(fresh)

    def is_over(self, stream: int) -> bool:
        return bool(self.link.finals(stream))

    async def over(self, stream: int) -> Frame:
        """The final frame, and no other: once it is there."""
        await wait_until(lambda: self.is_over(stream), 5, f"the end of stream {stream}")
        (final,) = self.link.finals(stream)
        return final

    async def result(self, stream: int) -> Any:
        """What the call returned; raises what it raised."""
        final = await self.over(stream)
        if final.type != FrameType.ANSWER:
            raise self.error(final)
        return load(decode_message(CallAnswer, final).sizes, final.body)

    async def answer(self, stream: int) -> tuple[HttpAnswer, bytes]:
        """Head and body of an HTTP answer; raises its Failure's text."""
        final = await self.over(stream)
        if final.type not in (FrameType.ANSWER, FrameType.DATA):
            raise self.error(final)
        frames = self.link.of(stream)
        (head,) = (frame for frame in frames if frame.type == FrameType.ANSWER)
        return decode_message(HttpAnswer, head), b"".join(
            frame.body for frame in frames if frame.type in (FrameType.ANSWER, FrameType.DATA)
        )

    async def failure(self, stream: int) -> Failure:
        final = await self.over(stream)
        assert final.type == FrameType.ERROR, final
        return decode_message(Failure, final)

    async def items(self, stream: int) -> list[Any]:
        """All items of a stream of a CALL that has ended well."""
        final = await self.over(stream)
        assert final.type == FrameType.DATA, final
        frames = [frame for frame in self.link.of(stream) if frame.type == FrameType.DATA]
        return [load((), frame.body) for frame in frames if frame.body]

    @staticmethod
    def error(final: Frame) -> BaseException:
        if final.type == FrameType.REFUSED:
            return AssertionError(f"refused: {decode_message(Refusal, final).reason}")
        return load_exception(decode_message(Failure, final), final.body)

    def message(self, stream: int, kind: type[Message], index: int = 0) -> Message:
        return decode_message(kind, self.link.of(stream)[index])


class StepClock:
    """A clock that is moved by hand, without the event loop's turning meanwhile."""

    def __init__(self) -> None:
        self._now = 1_000.0
        self._count = itertools.count()
        self._timers: list[tuple[float, int, StepTimer]] = []

    def time(self) -> float:
        return self._now

    def call_later(self, delay_s: float, callback: Callable[..., Any], *args: Any) -> StepTimer:
        timer = StepTimer(callback, args)
        heapq.heappush(self._timers, (self._now + delay_s, next(self._count), timer))
        return timer

    @property
    def armed(self) -> int:
        return sum(timer.is_armed for _, _, timer in self._timers)

    def step(self, seconds: float) -> None:
        target = self._now + seconds
        while self._timers and self._timers[0][0] <= target:
            when, _, timer = heapq.heappop(self._timers)
            self._now = max(self._now, when)
            if timer.is_armed:
                timer.fire()
        self._now = target


class StepTimer:
    def __init__(self, callback: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.is_armed = True
        self._callback = callback
        self._args = args

    def cancel(self) -> None:
        self.is_armed = False

    def fire(self) -> None:
        self.is_armed = False
        self._callback(*self._args)


def backend_of(target: Any, **options: Any) -> BackendRecord:
    """The record of a function or class in an app of its own."""
    app = App()
    app.backend(target, **options)
    (record,) = app.backends.values()
    return record


@asynccontextmanager
async def running(target: Any, clock: Clock | None = None, **options: Any) -> AsyncIterator[Replica]:
    """A started replica of a function, class or record; `options` are the backend's."""
    record = target if isinstance(target, BackendRecord) else backend_of(target, **options)
    clock = clock or LoopClock()
    replica = Replica(record, id=f"{record.name}#1", app="app", clock=clock)
    try:
        await replica.start()
        yield replica
    finally:
        await replica.aclose()

"""Fake replicas for the tests of `calling/`: they record frames, and answer as the test says."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

from serveit.calling.exchange import Exchange
from serveit.calling.router import Router
from serveit.clock import DeadlineWheel
from serveit.control.snapshot import BackendInfo, ReplicaInfo
from serveit.observe import NullObserver
from serveit.testing import ManualClock
from serveit.wire.frames import (
    END,
    FREED,
    STREAM,
    Buffer,
    Call,
    CallAnswer,
    Credit,
    Decoder,
    Failure,
    Frame,
    FrameType,
    Load,
    Message,
    Refusal,
    decode_message,
    encode_frame,
    encode_message,
)
from serveit.wire.link import Receiver, deliver
from serveit.wire.pickles import dump, load_exception


class FakeReplica:
    """A link, as the caller's end sees it, and the replica behind it in the test's hands."""

    def __init__(self, receiver: Receiver) -> None:
        self.closed = False
        self.stale = False
        self.receiver = receiver
        self.frames: list[Frame] = []
        self.lost = False

    # -- wire.link.Link ----------------------------------------------------------------------

    def send(self, kind: int, stream: int, meta: bytes = b"", body: Buffer = b"", flags: int = 0) -> None:
        if not self.closed:
            self.frames += Decoder().feed(encode_frame(kind, stream, meta, body, flags))

    def flush(self) -> None: ...

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            asyncio.get_running_loop().call_soon(self.lose)

    # -- what came ---------------------------------------------------------------------------

    def sent(self, kind: FrameType) -> list[Frame]:
        return [frame for frame in self.frames if frame.type == kind]

    @property
    def calls(self) -> list[Call]:
        return [decode_message(Call, frame) for frame in self.sent(FrameType.CALL)]

    @property
    def streams(self) -> list[int]:
        """Of the calls, in the order in which they came."""
        return [frame.stream for frame in self.sent(FrameType.CALL)]

    # -- what the replica says ---------------------------------------------------------------

    def say(
        self, kind: int, stream: int, message: Message | None, body: Buffer = b"", flags: int = 0
    ) -> None:
        meta = b"" if message is None else encode_message(message)
        frames = Decoder().feed(encode_frame(kind, stream, meta, body, flags))
        deliver(frames, self.receiver, self)

    def answer(self, stream: int, value: Any = None, *, flags: int = END, others: int = 0) -> None:
        """A whole answer; or, without END among the flags, the head of one."""
        sizes, buffers = dump(value, "the answer")
        body = b"".join(buffers) if flags & END else b""
        self.say(FrameType.ANSWER, stream, CallAnswer(others, sizes), body, flags)

    def begin_stream(self, stream: int) -> None:
        self.answer(stream, flags=STREAM)

    def begin_large(self, stream: int, size: int) -> None:
        self.say(FrameType.ANSWER, stream, CallAnswer(0, [size]), flags=FREED)

    def data(self, stream: int, body: bytes, flags: int = 0) -> None:
        self.say(FrameType.DATA, stream, None, body, flags)

    def error(self, stream: int, text: str = "bad", *, others: int = 0) -> None:
        failure = Failure(others, 500, "ValueError", "", text, "yes")
        self.say(FrameType.ERROR, stream, failure)

    def refuse(self, stream: int, reason: str = "full", *, others: int = 0) -> None:
        self.say(FrameType.REFUSED, stream, Refusal(others, reason))

    def queued(self, stream: int, *, others: int = 0) -> None:
        self.say(FrameType.QUEUED, stream, Load(others))

    def started(self, stream: int, *, others: int = 0) -> None:
        self.say(FrameType.STARTED, stream, Load(others))

    def credit(self, stream: int, octets: int) -> None:
        self.say(FrameType.CREDIT, stream, Credit(octets))

    def goaway(self) -> None:
        self.say(FrameType.GOAWAY, 0, None)

    def lose(self) -> None:
        """The link breaks, or its closing is through."""
        if not self.lost:
            self.lost = self.closed = True
            self.receiver.link_lost(None)


class Replicas:
    """The connector of a router: a `FakeReplica` for each that it asks for."""

    def __init__(self) -> None:
        self.by_id: dict[str, FakeReplica] = {}
        self.unreachable: set[str] = set()
        self.gates: dict[str, asyncio.Event] = {}
        self.connects: list[str] = []

    def __getitem__(self, replica_id: str) -> FakeReplica:
        return self.by_id[replica_id]

    async def connect(self, info: ReplicaInfo, receiver: Receiver) -> FakeReplica:
        self.connects.append(info.id)
        if info.id in self.gates:
            await self.gates[info.id].wait()
        if info.id in self.unreachable:
            raise OSError("connection refused")
        replica = self.by_id[info.id] = self.make(info, receiver)
        return replica

    def make(self, info: ReplicaInfo, receiver: Receiver) -> FakeReplica:
        return FakeReplica(receiver)


class Refusals(NullObserver):
    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str]] = []

    def refused(self, backend: str, where: str, reason: str) -> None:
        self.seen.append((backend, where, reason))


class FakeExchange(Exchange):
    """A CALL; `ends` counts how often it has ended."""

    __slots__ = ("ends",)

    def __init__(
        self, name: str = "x", *, body: Sequence[Buffer] = (b"args",), deadline: float | None = None
    ) -> None:
        super().__init__(FrameType.CALL, Call(name, "__call__", []), body, CallAnswer, deadline)
        self.ends = 0
        self.answer.add_done_callback(self._count)

    def _count(self, _: object) -> None:
        self.ends += 1

    @property
    def name(self) -> str:
        message: Any = self.message
        name: str = message.request_id
        return name

    def rebuild(self, failure: Failure, body: bytes) -> BaseException:
        return load_exception(failure, body)


class Rig:
    """A router with fake replicas and a clock that stands still."""

    def __init__(self, *, seed: int = 1, default_queue: int = 100, replicas: Replicas | None = None) -> None:
        self.clock = ManualClock()
        self.wheel = DeadlineWheel(self.clock)
        self.replicas = replicas or Replicas()
        self.observer = Refusals()
        self.default_queue = default_queue
        self.rng = random.Random(seed)
        self.router = self.make_router(backend_info())

    def make_router(self, info: BackendInfo) -> Router:
        return Router(
            info,
            default_queue=self.default_queue,
            connect=self.replicas.connect,
            clock=self.clock,
            wheel=self.wheel,
            observer=self.observer,
            rng=self.rng,
        )

    def __getitem__(self, replica_id: str) -> FakeReplica:
        return self.replicas[replica_id]

    async def update(self, *ids: str, **options: Any) -> None:
        await self.router.update(backend_info(*ids, **options))

    def submit(self, name: str = "x", **options: Any) -> FakeExchange:
        exchange = FakeExchange(name, **options)
        self.router.submit(exchange)
        return exchange

    def submit_many(self, count: int) -> list[FakeExchange]:
        return [self.submit(str(number)) for number in range(count)]


def backend_info(*ids: str, limit: int = 2, prefetch: int = 1, **options: Any) -> BackendInfo:
    replicas = tuple(ReplicaInfo(replica_id, replica_id) for replica_id in ids)
    return BackendInfo("model", replicas, limit, prefetch, **options)

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from serveit import App, BackendConfig, context
from serveit.exceptions import ProtocolError
from serveit.running import listener as listener_module
from serveit.running.httpjob import Bindings
from serveit.running.listener import Listener
from serveit.types import HttpRequest
from serveit.wire.frames import (
    END,
    FREED,
    MAX_INLINE,
    PART,
    Call,
    CallAnswer,
    Credit,
    Figures,
    Frame,
    FrameType,
    Load,
    Request,
    decode_message,
    encode_message,
)
from serveit.wire.pickles import dump
from serveit.wire.streams import WINDOW, cost
from tests.callers import Caller, RecordingLink, StepClock, running
from tests.support import wait_until


async def echo(x: Any) -> Any:
    return x


async def ticks(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def send_large(caller: Caller, value: Any, *, short_by: int = 0) -> tuple[int, list[bytes]]:
    """The head of a CALL whose body comes as DATA; returns the stream and the parts to send."""
    sizes, buffers = dump(((value,), {}), "the arguments")
    body = b"".join(buffers)
    if short_by:
        sizes = [sizes[0] - short_by]
    caller.receive(FrameType.CALL, 1, encode_message(Call("r1", "__call__", sizes)))
    return 1, [body[start : start + MAX_INLINE] for start in range(0, len(body), MAX_INLINE)]


async def test_a_body_that_comes_in_parts_is_put_together_under_credit() -> None:
    async with running(echo) as replica:
        caller = Caller(replica)
        value = "x" * (2 * WINDOW)
        stream, parts = send_large(caller, value)
        for index, part in enumerate(parts):
            assert replica.statistics().running == 0
            last = index == len(parts) - 1
            caller.receive(FrameType.DATA, stream, b"", part, END if last else 0)
        credited = sum(
            decode_message(Credit, frame).octets
            for frame in caller.link.of(stream)
            if frame.type == FrameType.CREDIT
        )
        assert credited >= sum(cost(len(part)) for part in parts) - WINDOW
        assert repr(caller.listener) == "<Listener echo#1 open=1 waiting=0>"
        await wait_until(lambda: caller.take(stream) < 0 or caller.is_over(stream), 5, "all is read")
        assert repr(caller.listener) == "<Listener echo#1 open=0 waiting=0>"


async def test_a_body_over_what_was_announced_is_refused_as_too_large() -> None:
    async with running(echo) as replica:
        caller = Caller(replica)
        stream, parts = send_large(caller, "x" * MAX_INLINE, short_by=10)
        for part in parts:
            caller.receive(FrameType.DATA, stream, b"", part)
        failure = await caller.failure(stream)
        assert (failure.status, failure.executed) == (413, "no")
        caller.receive(FrameType.DATA, stream, b"", b"more", END)  # on the way still: nobody's
        assert len(caller.link.finals(stream)) == 1
        assert caller.listener._collecting == {}


async def test_an_http_body_has_a_cap_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "MAX_REQUEST", 10)
    async with running(echo) as replica:
        caller = Caller(replica)
        request = Request("r1", _http())
        caller.receive(FrameType.REQUEST, 1, encode_message(request))
        caller.receive(FrameType.DATA, 1, b"", b"x" * 11)
        assert (await caller.failure(1)).status == 413


def _http() -> HttpRequest:
    return HttpRequest("/", "__call__", "POST", "/", b"/", b"", [], [])


async def test_an_http_body_in_parts() -> None:
    app = App()

    async def length(body: bytes) -> int:
        return len(body)

    app.backend(length, config=BackendConfig())
    app.add_route("/", "length", methods=["POST"])
    async with running(app.backends["length"]) as replica:
        caller = Caller(replica)
        caller.receive(FrameType.REQUEST, 1, encode_message(Request("r1", _http())))
        caller.receive(FrameType.DATA, 1, b"", b"x" * 100, PART)
        caller.receive(FrameType.DATA, 1, b"", b"x" * 50, END)
        assert (await caller.answer(1))[1] == b"150"


async def test_cancelled_while_its_body_comes_in() -> None:
    async with running(echo) as replica:
        caller = Caller(replica)
        stream, parts = send_large(caller, "x" * MAX_INLINE)
        caller.receive(FrameType.DATA, stream, b"", parts[0])
        caller.cancel(stream)
        failure = await caller.failure(stream)
        assert (failure.status, failure.executed) == (499, "no")
        caller.receive(FrameType.DATA, stream, b"", parts[-1], END)
        await ticks()
        assert len(caller.link.finals(stream)) == 1
        assert replica.statistics().running == 0


async def test_a_stream_is_opened_once() -> None:
    async with running(echo) as replica:
        caller = Caller(replica)
        stream, _ = send_large(caller, "x")
        with pytest.raises(ProtocolError, match="stream 1 is open already"):
            send_large(caller, "x")
        caller.cancel(stream)
        caller = Caller(replica)
        stream = caller.call(1)
        meta = encode_message(Call("r", "__call__", []))
        with pytest.raises(ProtocolError, match="is open already"):
            caller.receive(FrameType.CALL, stream, meta, b"", END)
        assert await caller.result(stream) == 1


@pytest.mark.parametrize("kind", [FrameType.ANSWER, FrameType.QUEUED, FrameType.RESERVE, FrameType.HELLO])
async def test_what_a_caller_must_not_send(kind: FrameType) -> None:
    async with running(echo) as replica:
        with pytest.raises(ProtocolError, match=f"must not send frames of type {kind:d}"):
            Caller(replica).receive(kind, 1)


@pytest.mark.parametrize("kind", [FrameType.CALL, FrameType.REQUEST])
async def test_malformed_metadata_is_the_peers_fault(kind: FrameType) -> None:
    async with running(echo) as replica:
        with pytest.raises(ProtocolError, match="malformed"):
            Caller(replica).receive(kind, 1, b"\xc1", b"", END)


async def test_frames_about_streams_that_are_over_are_ignored() -> None:
    async with running(echo) as replica:
        caller = Caller(replica)
        stream = caller.call(1)
        assert await caller.result(stream) == 1
        sent = len(caller.link.sent)
        caller.credit(stream, 100)
        caller.cancel(stream)
        caller.receive(FrameType.DATA, stream, b"", b"x", END)
        caller.receive(FrameType.PING, 0)
        await ticks()
        assert len(caller.link.sent) == sent


async def test_too_much_credit_is_the_peers_fault() -> None:
    async def large() -> bytes:
        return b"x" * 2 * WINDOW

    async with running(large) as replica:
        caller = Caller(replica)
        stream = caller.call()
        await ticks()
        with pytest.raises(ProtocolError, match="over the window"):
            caller.credit(stream, 10 * WINDOW)
        caller.cancel(stream)


async def test_the_load_is_what_others_have() -> None:
    go_on = asyncio.Event()

    async def wait() -> None:
        await go_on.wait()

    async with running(wait, max_ongoing_requests=3) as replica:
        one, other = Caller(replica), Caller(replica)
        streams = [one.call(), one.call(), other.call()]
        waits = other.call()
        load = other.message(waits, Load)
        assert isinstance(load, Load)
        assert load.others == 2
        go_on.set()
        for stream in streams[:2]:
            await one.over(stream)
        await other.over(streams[2])
        await other.over(waits)
        answer = one.message(streams[0], CallAnswer)
        assert isinstance(answer, CallAnswer)
        assert answer.others == 2  # the slot that this one leaves is the other caller's already


async def test_deadlines_travel_as_what_is_left() -> None:
    async def left() -> Any:
        return context().deadline

    clock = StepClock()
    async with running(left, clock) as replica:
        caller = Caller(replica)
        assert await caller.result(caller.call(deadline_ms=1_500)) == clock.time() + 1.5
        assert await caller.result(caller.call()) is None


# Large answers


async def test_cancelled_while_its_large_answer_goes_out() -> None:
    async def large() -> bytes:
        return b"x" * 2 * WINDOW

    async with running(large) as replica:
        caller = Caller(replica)
        stream = caller.call()
        await wait_until(lambda: not replica.statistics().running, 5, "the slot is free")
        assert caller.link.of(stream)[0].flags == FREED
        assert not caller.is_over(stream)
        caller.cancel(stream)
        failure = await caller.failure(stream)
        assert (failure.status, failure.executed) == (499, "yes")
        assert caller.listener._jobs == {}
        assert await replica.drain(0.5)


async def test_a_lost_link_cancels_everything_and_starts_nothing() -> None:
    entered, cancelled = list[int](), list[int]()

    async def work(x: int) -> bytes:
        if x == 0:
            return b"x" * 2 * WINDOW
        entered.append(x)
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            cancelled.append(x)
            raise
        return b""

    async with running(work, max_ongoing_requests=2) as replica:
        caller = Caller(replica)
        sending = caller.call(0)
        await wait_until(lambda: caller.link.of(sending), 5, "the answer begins")
        for number in (1, 2, 3):
            caller.call(number)
        collecting = 99
        caller.receive(FrameType.CALL, collecting, encode_message(Call("r", "__call__", [9])))
        await ticks()
        caller.link.closed = True
        caller.listener.link_lost(None)
        await ticks()
        assert (entered, sorted(cancelled)) == ([1, 2], [1, 2])
        assert replica.statistics().running == replica.statistics().waiting == 0
        assert (caller.listener._jobs, caller.listener._collecting) == ({}, {})
        assert await replica.drain(0.5)


# The invariant


async def slow_batch(items: list[Any]) -> list[Any]:
    for _ in range(random.randrange(4)):
        await asyncio.sleep(0)
    return [ValueError(item) if item % 7 == 0 else value(item) for item in items]


def value(x: int) -> Any:
    return b"x" * (2 * WINDOW) if x % 5 == 0 else x


async def anything(x: int) -> Any:
    """Whole and large values, errors, streams that end, break or never end, code that will not stop."""
    for _ in range(x % 4):
        await asyncio.sleep(0)
    if x % 11 == 0:
        raise (SystemExit(1), asyncio.CancelledError(), LookupError(x))[x % 3]
    if x % 7 == 0:
        try:
            await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            return x
    if x % 3 == 0:
        return numbers(x)
    return value(x)


async def numbers(x: int) -> AsyncIterator[Any]:
    for number in range(x % 9 * 100):
        if x % 13 == 0 and number == 50:
            raise KeyError(x)
        yield number


def plainly(x: int) -> Any:
    if x % 4 == 0:
        return iter_numbers(x)
    if x % 5 == 0:
        return threading.Lock()
    return value(x)


def iter_numbers(x: int) -> Iterator[int]:
    yield from range(x % 5 * 100)


BACKENDS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (anything, {"max_ongoing_requests": 3}),
    (slow_batch, {"max_batch_size": 3, "batch_wait_timeout_s": 0.01, "max_concurrent_batches": 2}),
    (plainly, {"num_threads": 2}),
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("backend", range(len(BACKENDS)))
async def test_every_stream_ends_with_exactly_one_final_frame(backend: int, seed: int) -> None:
    rng, clock = random.Random(seed), StepClock()
    function, options = BACKENDS[backend]
    async with running(function, clock, **options) as replica:
        callers = [Caller(replica) for _ in range(3)]
        opened: list[tuple[Caller, int]] = []
        for number in range(1, 250):
            caller = rng.choice(callers)
            deadline_ms = rng.choice((None, None, 0, 20))
            opened.append((caller, caller.call(number, deadline_ms=deadline_ms)))
            for _ in range(rng.randrange(3)):
                disturb(rng, *rng.choice(opened))
            await ticks(rng.randrange(3))
            clock.step(0.005)
        if seed % 2:
            await replica.aclose()
        await wait_until(lambda: all_over(clock, opened), 20, "all streams are over")
        await ticks()
        for caller, stream in opened:
            assert len(caller.link.finals(stream)) == 1, caller.link.kinds(stream)
            assert caller.link.finals(stream)[0] is caller.link.of(stream)[-1]
            check_order(caller.link.kinds(stream))
        assert replica.statistics().running == replica.statistics().waiting == 0
        assert [caller.listener.running for caller in callers] == [0, 0, 0]
        assert [caller.listener._jobs for caller in callers] == [{}, {}, {}]


def disturb(rng: random.Random, caller: Caller, stream: int) -> None:
    if rng.random() < 0.3:
        caller.cancel(stream)
    else:
        caller.take(stream)


def all_over(clock: StepClock, opened: list[tuple[Caller, int]]) -> bool:
    clock.step(0.005)
    left = [(caller, stream) for caller, stream in opened if not caller.is_over(stream)]
    for caller, stream in left:
        caller.take(stream)
    return not left


def check_order(kinds: list[FrameType]) -> None:
    if FrameType.STARTED in kinds:
        assert kinds[:2] == [FrameType.QUEUED, FrameType.STARTED]
    if FrameType.ANSWER in kinds:
        assert FrameType.DATA not in kinds[: kinds.index(FrameType.ANSWER)]
    assert kinds.count(FrameType.ANSWER) <= 1


async def test_figures_are_told_while_the_replica_is_full() -> None:
    may_end = asyncio.Event()

    async def wait() -> None:
        await may_end.wait()

    async with running(wait, max_ongoing_requests=1) as replica:
        caller = Caller(replica)
        streams = [caller.call(), caller.call()]
        caller.receive(FrameType.METRICS, 0)
        (frame,) = (frame for frame in caller.link.of(0) if frame.type == FrameType.METRICS)
        told = decode_message(Figures, frame)
        assert (told.requests, told.running, told.waiting) == (2, 1, 1)
        may_end.set()
        for stream in streams:
            await caller.result(stream)
        assert (told.errors, replica.statistics().running) == (0, 0), "it took no slot"


async def test_a_proxy_may_ask_for_figures() -> None:
    async with running(echo) as replica:
        link = RecordingLink()
        listener = Listener(replica, Bindings(replica.backend), link, may_call=False)
        listener.frame_received(Frame(FrameType.METRICS, 0, 0, b"", b""))
        assert [frame.type for frame in link.sent] == [FrameType.METRICS]

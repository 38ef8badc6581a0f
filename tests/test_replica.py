from __future__ import annotations

import asyncio
import contextvars
import logging
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

import serveit
from serveit import (
    App,
    BatchError,
    Context,
    DeadlineExceeded,
    Draining,
    EncodingError,
    ItemErrors,
    QueueFull,
    RemoteError,
    ReplicaDied,
)
from serveit.calling.handle import CallExchange
from serveit.calling.router import Router
from serveit.clock import DeadlineWheel, LoopClock
from serveit.context import context, resolve
from serveit.control.snapshot import BackendInfo, ReplicaInfo
from serveit.declare.encoding import is_stream
from serveit.observe import NullObserver
from serveit.running import replica as replica_module
from serveit.running.httpjob import Bindings
from serveit.running.listener import Listener
from serveit.running.meter import ReplicaStatistics
from serveit.running.replica import Replica
from serveit.testing import ManualClock
from serveit.wire.frames import FREED, FrameType, Refusal, decode_message
from serveit.wire.link import Link, Receiver
from serveit.wire.memory import memory_pair
from serveit.wire.pickles import dump
from serveit.wire.streams import FRAME_COST, WINDOW
from tests.callers import Caller, StepClock, backend_of, running
from tests.support import wait_until

color: contextvars.ContextVar[str] = contextvars.ContextVar("color", default="none")


class Gate:
    """An async function that waits at a gate, and what came through it."""

    def __init__(self) -> None:
        self.entered: list[Any] = []
        self.left: list[Any] = []
        self.cancelled: list[Any] = []
        self._open = asyncio.Event()

    def open(self) -> None:
        self._open.set()

    async def __call__(self, x: Any) -> Any:
        self.entered.append(x)
        try:
            await self._open.wait()
        except asyncio.CancelledError:
            self.cancelled.append(x)
            raise
        self.left.append(x)
        return x

    def function(self) -> Any:
        async def gated(x: Any) -> Any:
            return await self(x)

        return gated

    def batch_function(self) -> Any:
        async def gated(items: list[Any]) -> list[Any]:
            return list(await self(items))

        return gated


class ThreadGate:
    """The same for `def`: in a thread, let through one by one."""

    def __init__(self) -> None:
        self.entered: list[Any] = []
        self.left: list[Any] = []
        self._permits = threading.Semaphore(0)

    def let(self, count: int = 1) -> None:
        self._permits.release(count)

    def function(self) -> Any:
        def gated(x: Any) -> Any:
            self.entered.append(x)
            assert self._permits.acquire(timeout=10)
            self.left.append(x)
            return x

        return gated


async def ticks(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


# Admission


async def test_so_many_run_one_waits_and_the_next_is_refused() -> None:
    gate = Gate()
    async with running(gate.function(), max_ongoing_requests=2) as replica:
        caller = Caller(replica)
        one, two, three, four = (caller.call(number) for number in range(4))
        await ticks()
        assert gate.entered == [0, 1]
        assert replica.statistics() == ReplicaStatistics(running=2, waiting=1, gathering=0, draining=False)
        assert repr(replica) == "<Replica gated#1 running=2/2 waiting=1>"
        assert caller.link.kinds(three) == [FrameType.QUEUED]
        refused = await caller.over(four)
        assert decode_message(Refusal, refused).reason == "full"
        gate.open()
        assert [await caller.result(stream) for stream in (one, two, three)] == [0, 1, 2]
        assert caller.link.kinds(three) == [FrameType.QUEUED, FrameType.STARTED, FrameType.ANSWER]
        assert replica.statistics() == ReplicaStatistics(0, 0, 0, False)


async def test_started_is_written_out_before_the_first_line_of_user_code() -> None:
    written: list[bool] = []

    async def look(x: int) -> None:
        link = caller.link
        sent = [index for index, frame in enumerate(link.sent) if frame.type == FrameType.STARTED]
        written.append(bool(sent) and any(count > sent[-1] for count in link.flushed_at))
        await asyncio.sleep(0)

    async def look_at_batch(items: list[int]) -> list[int]:
        await look(0)
        return items

    for function, size in (look, None), (look_at_batch, 1):
        written.clear()
        async with running(function, max_ongoing_requests=1, max_batch_size=size) as replica:
            caller = Caller(replica)
            streams = [caller.call(1), caller.call(2)]
            for stream in streams:
                await caller.over(stream)
            assert written == [False, True]


async def test_the_waiting_room_is_served_round_robin() -> None:
    order: list[str] = []

    async def note(items: list[str]) -> list[str]:
        order.extend(items)
        return items

    clock = StepClock()
    async with running(note, clock, max_batch_size=2, max_ongoing_requests=2) as replica:
        greedy, modest = Caller(replica), Caller(replica)
        for name in ("g0", "g1", "g2", "g3"):
            greedy.call(name)
        streams = [modest.call("m0"), modest.call("m1")]
        assert replica.statistics().waiting == 4
        for stream in streams:
            await modest.over(stream)
        assert sorted(order[:2]) == ["g0", "g1"]
        assert sorted(order[2:4]) == ["g2", "m0"]
        assert sorted(order[4:]) == ["g3", "m1"]


@pytest.mark.parametrize("clients", [4, 8, 30])
@pytest.mark.parametrize("duration", ["equal", "a tick", "random"])
async def test_two_routers_share_a_replica_evenly_at_saturation(duration: str, clients: int) -> None:
    now, peak, rng = 0, 0, random.Random(1)
    waits: dict[str, Callable[[], Awaitable[None]]] = {
        "equal": lambda: asyncio.sleep(0.001),  # jobs end together
        "a tick": lambda: asyncio.sleep(0),
        "random": lambda: ticks(rng.randint(5, 15)),
    }

    async def work() -> None:
        nonlocal now, peak
        now += 1
        peak = max(peak, now)
        await waits[duration]()
        now -= 1

    async with running(work, max_ongoing_requests=3) as replica:
        bindings = Bindings(replica.backend)

        async def connect(info: ReplicaInfo, receiver: Receiver) -> Link:
            near, far = memory_pair()
            near.receiver, far.receiver = receiver, Listener(replica, bindings, far)
            return near

        clock = LoopClock()
        wheel = DeadlineWheel(clock)
        info = BackendInfo("work", (ReplicaInfo(replica.id, replica.id),), max_ongoing_requests=3)
        routers = [
            Router(
                info,
                default_queue=100,
                connect=connect,
                clock=clock,
                wheel=wheel,
                observer=NullObserver(),
            )
            for _ in range(2)
        ]
        done: Counter[int] = Counter()

        async def client(number: int) -> None:
            while sum(done.values()) < 600:
                exchange = CallExchange("__call__", dump(((), {}), "nothing"), None)
                routers[number].submit(exchange)
                await exchange.result()
                done[number] += 1

        for router in routers:
            await router.update(info)
        await asyncio.gather(*(client(number) for number in (0, 1) for _ in range(clients)))
        for router in routers:
            router.close()
        wheel.close()
        await ticks()
    assert peak == 3
    assert min(done.values()) >= 0.4 * sum(done.values())


def test_calls_of_a_def_backend_run_on_one_thread_whatever_runs_the_loop() -> None:
    app = App()

    @app.backend
    def where(x: int) -> int:
        return threading.get_ident()

    async def main() -> set[int]:
        async with serveit.serve(app, local=True, http={"location": None}) as client:
            return {ident async for ident in client.get_handle("where").map(range(200))}

    assert len(asyncio.run(main())) == 1

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        used = asyncio.run_coroutine_threadsafe(main(), loop).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
    assert len(used) == 1
    assert not used & {thread.ident, threading.get_ident()}


async def test_what_is_wrong_from_the_start_takes_no_slot_however_many() -> None:
    def batch(items: list[int]) -> list[int]:
        return items

    async with running(batch, max_batch_size=5_000, max_ongoing_requests=5_000) as replica:
        caller = Caller(replica)
        release = Caller(replica)
        for number in range(5_000):
            release.call(number)
        streams = [caller.call() for _ in range(4_999)]  # these wait, and fail one after the other
        assert replica.statistics().waiting == 4_999
        failure = await caller.failure(streams[-1])
        assert (failure.kind, failure.executed) == ("TypeError", "no")
        assert "give exactly one item, not 0 positional and 0 keyword arguments" in failure.text
        with pytest.raises(AttributeError, match="no method 'nothing'"):
            await caller.result(caller.call(target="nothing"))
        await wait_until(lambda: replica.statistics().running == 0, 5, "all slots free")


# Cancelling


async def test_cancelled_in_the_waiting_room() -> None:
    gate = Gate()
    async with running(gate.function(), max_ongoing_requests=1) as replica:
        caller, other = Caller(replica), Caller(replica)
        running_, waiting, next_ = caller.call(1), caller.call(2), other.call(3)
        caller.cancel(waiting)
        assert replica.statistics().waiting == 1
        failure = await caller.failure(waiting)
        assert (failure.status, failure.executed) == (499, "no")
        caller.cancel(waiting)  # it is over: nothing
        gate.open()
        assert await caller.result(running_) == 1
        assert await other.result(next_) == 3
        assert gate.entered == [1, 3]


async def test_cancelled_while_gathering() -> None:
    clock = StepClock()
    batches: list[list[int]] = []

    async def note(items: list[int]) -> list[int]:
        batches.append(items)
        return items

    async with running(note, clock, max_batch_size=4, batch_wait_timeout_s=1) as replica:
        caller = Caller(replica)
        one, two = caller.call(1), caller.call(2)
        await ticks()
        assert replica.statistics() == ReplicaStatistics(running=2, waiting=0, gathering=2, draining=False)
        caller.cancel(one)
        assert (await caller.failure(one)).executed == "no"
        assert replica.statistics().running == 1
        clock.step(1)
        assert await caller.result(two) == 2
    assert batches == [[2]]


async def test_cancelled_after_its_batch_is_formed_and_before_it_runs() -> None:
    batches: list[list[int]] = []

    async def note(items: list[int]) -> list[int]:
        batches.append(items)
        return items

    async with running(note, max_batch_size=2) as replica:
        caller = Caller(replica)
        one, two = caller.call(1), caller.call(2)
        asyncio.get_running_loop().call_soon(caller.cancel, one)  # runs just after the batch is formed
        assert await caller.result(two) == 2
        assert (await caller.failure(one)).executed == "no"
        three = caller.call(3)
        asyncio.get_running_loop().call_soon(caller.cancel, three)
        assert (await caller.failure(three)).executed == "no"
        await ticks()
        assert replica.statistics() == ReplicaStatistics(0, 0, 0, False)
    assert batches == [[2]]


async def test_cancelled_before_the_first_step_of_its_task() -> None:
    gate = Gate()
    async with running(gate.function()) as replica:
        caller = Caller(replica)
        stream = caller.call(1)
        caller.cancel(stream)
        failure = await caller.failure(stream)
        assert (failure.status, failure.executed) == (499, "no")
        assert gate.entered == []
        assert replica.statistics().running == 0


async def test_cancelled_while_async_code_runs() -> None:
    gate = Gate()
    async with running(gate.function()) as replica:
        caller = Caller(replica)
        stream = caller.call(1)
        await ticks()
        caller.cancel(stream)
        caller.cancel(stream)
        failure = await caller.failure(stream)
        assert (failure.status, failure.executed) == (499, "yes")
        assert gate.cancelled == [1]
        assert replica.statistics().running == 0


async def test_code_that_swallows_its_cancellation_is_answered_as_cancelled() -> None:
    async def stubborn() -> bytes:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            pass
        return b"x" * WINDOW * 2

    async with running(stubborn) as replica:
        caller = Caller(replica)
        stream = caller.call()
        await ticks()
        caller.cancel(stream)
        assert (await caller.failure(stream)).status == 499


async def test_a_cancelled_def_keeps_its_slot_until_it_returns() -> None:
    gate = ThreadGate()
    async with running(gate.function()) as replica:
        caller = Caller(replica)
        one, two = caller.call(1), caller.call(2)
        await wait_until(lambda: gate.entered == [1], 5, "the first in its thread")
        caller.cancel(one)
        await ticks()
        assert caller.link.kinds(one) == []
        assert replica.statistics() == ReplicaStatistics(running=1, waiting=1, gathering=0, draining=False)
        gate.let(2)
        assert (await caller.failure(one)).status == 499
        assert await caller.result(two) == 2
        assert gate.left == [1, 2]


async def test_a_cancelled_def_that_has_no_thread_yet_never_runs() -> None:
    gate = ThreadGate()
    async with running(gate.function(), max_ongoing_requests=2) as replica:
        caller = Caller(replica)
        one, two = caller.call(1), caller.call(2)
        await wait_until(lambda: gate.entered == [1], 5, "the first in its thread")
        caller.cancel(two)
        assert (await caller.failure(two)).status == 499
        assert replica.statistics().running == 1
        gate.let()
        assert await caller.result(one) == 1
    assert gate.entered == [1]


async def test_batch_mates_are_untouched_and_the_last_one_cancels_the_batch() -> None:
    gate = Gate()
    async with running(gate.batch_function(), max_batch_size=2) as replica:
        caller = Caller(replica)
        one, two = caller.call(1), caller.call(2)
        await ticks()
        caller.cancel(one)
        await ticks()
        assert gate.cancelled == []
        assert not caller.is_over(one)  # its slot is taken for as long as the batch runs
        gate.open()
        assert await caller.result(two) == 2
        assert (await caller.failure(one)).status == 499

        gate = Gate()
    async with running(gate.batch_function(), max_batch_size=2) as replica:
        caller = Caller(replica)
        one, two = caller.call(1), caller.call(2)
        await ticks()
        caller.cancel(one)
        caller.cancel(two)
        for stream in (one, two):
            assert (await caller.failure(stream)).status == 499
        assert gate.cancelled == [[1, 2]]
        assert replica.statistics().running == 0


# Deadlines


async def test_expired_on_arrival() -> None:
    gate = Gate()
    async with running(gate.function()) as replica:
        caller = Caller(replica)
        failure = await caller.failure(caller.call(1, deadline_ms=0))
        assert (failure.status, failure.kind, failure.executed) == (504, "DeadlineExceeded", "no")
        assert gate.entered == []


async def test_expired_in_the_waiting_room() -> None:
    clock, gate = StepClock(), Gate()
    async with running(gate.function(), clock, max_ongoing_requests=1) as replica:
        caller, other = Caller(replica), Caller(replica)
        one, late, next_ = caller.call(1), caller.call(2, deadline_ms=100), other.call(3, deadline_ms=1_000)
        await ticks()
        clock.step(0.2)
        gate.open()
        assert await caller.result(one) == 1
        assert await other.result(next_) == 3
        assert FrameType.STARTED not in caller.link.kinds(late)
        with pytest.raises(DeadlineExceeded, match="in the waiting room") as caught:
            await caller.result(late)
        assert caught.value.executed == "no"


async def test_expired_before_its_batch() -> None:
    clock = StepClock()

    async def echo(items: list[int]) -> list[int]:
        return items

    async with running(echo, clock, max_batch_size=3, batch_wait_timeout_s=1) as replica:
        caller = Caller(replica)
        late, one = caller.call(1, deadline_ms=500), caller.call(2, deadline_ms=5_000)
        await ticks()
        clock.step(1)
        assert await caller.result(one) == 2
        with pytest.raises(DeadlineExceeded, match="before its batch") as caught:
            await caller.result(late)
        assert caught.value.executed == "no"
        assert replica.statistics().running == 0


# Batches


async def test_three_at_once_report_two_two_one() -> None:
    app = App()

    @app.backend(max_batch_size=2, batch_wait_timeout_s=1)
    async def size(items: list[int]) -> list[int]:
        return [len(items)] * len(items)

    async with serveit.testing.local(app) as client:
        calls = [asyncio.ensure_future(size.call(number)) for number in range(3)]
        await client.clock.advance(0.9)
        assert [call.done() for call in calls] == [True, True, False]
        await client.clock.advance(0.1)
        assert [call.result() for call in calls] == [2, 2, 1]


RETURNED: dict[str, Any] = {
    "instances": lambda items: [ValueError(item) if item % 2 else item for item in items],
    "none": lambda items: None,
    "dict": lambda items: dict.fromkeys(items),
    "short": lambda items: items[1:],
    "streams": lambda items: [(part for part in "ab") for _ in items],
    "unpicklable": lambda items: [threading.Lock() if item == 1 else item for item in items],
}
RAISED: dict[str, Any] = {
    "item errors": lambda items: ItemErrors([item if item else KeyError(item) for item in items]),
    "short item errors": lambda items: ItemErrors(items[1:]),
    "error": lambda items: LookupError(items),
}


async def modal(items: list[tuple[str, int]]) -> Any:
    """A batch function that does what its first item says."""
    mode, numbers = items[0][0], [number for _, number in items]
    if mode in RAISED:
        raise RAISED[mode](numbers)
    return RETURNED[mode](numbers)


async def outcomes(caller: Caller, mode: str) -> list[Any]:
    found: list[Any] = []
    for stream in [caller.call((mode, number)) for number in range(3)]:
        try:
            found.append(await caller.result(stream))
        except Exception as error:
            found.append(error)
    return found


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("instances", [0, ValueError(1), 2]),
        ("item errors", [KeyError(0), 1, 2]),
        ("error", [LookupError([0, 1, 2])] * 3),
    ],
)
async def test_right_item_right_error(mode: str, expected: list[Any]) -> None:
    async with running(modal, max_batch_size=3) as replica:
        assert list(map(repr, await outcomes(Caller(replica), mode))) == list(map(repr, expected))
        assert replica.statistics() == ReplicaStatistics(0, 0, 0, False)


async def test_results_that_fit_no_item_fail_all_and_one_that_cannot_be_sent_only_its_own() -> None:
    async with running(modal, max_batch_size=3) as replica:
        caller = Caller(replica)
        for mode in ("none", "dict", "short", "streams", "short item errors"):
            assert [type(outcome) for outcome in await outcomes(caller, mode)] == [BatchError] * 3, mode
        one, error, three = await outcomes(caller, "unpicklable")
        assert (one, three) == (0, 2)
        assert isinstance(error, EncodingError)
        assert replica.statistics() == ReplicaStatistics(0, 0, 0, False)


FATES = ["list"] * 6 + ["mixed", "item errors", "short", "long", "none", "dict", "str", "gen", "raise"]


class Ledger:
    """A batch function with a random fate for each batch, and who was in which."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.batches = 0
        self.fate: dict[int, tuple[str, tuple[int, ...]]] = {}

    async def __call__(self, items: list[int]) -> Any:
        self.batches += 1
        fates = ["list"] * 6 + [
            "mixed",
            "item errors",
            "short",
            "long",
            "none",
            "dict",
            "str",
            "gen",
            "raise",
        ]
        fate = self._rng.choice(fates)
        for item in items:
            assert item not in self.fate, "an item was in two batches"
            self.fate[item] = fate, tuple(items)
        for _ in range(self._rng.choice((0, 0, 1, 2, 3))):
            await asyncio.sleep(0)
        mixed = [item * 7 if item % 3 else ValueError(item) for item in items]
        if fate == "item errors":
            raise ItemErrors(mixed)
        if fate == "raise":
            raise LookupError(tuple(items))
        return {
            "list": [item * 7 for item in items],
            "mixed": mixed,
            "short": items[1:],
            "long": [*items, 0],
            "none": None,
            "dict": dict.fromkeys(items),
            "str": "x" * len(items),
            "gen": (item for item in items),
        }[fate]

    def function(self) -> Any:
        async def fated(items: list[int]) -> Any:
            return await self(items)

        return fated

    def check(self, item: int, outcome: Any) -> None:
        """Whether this is what became of the item."""
        fate, batch = self.fate[item]
        if fate in ("mixed", "item errors") and item % 3 == 0:
            assert isinstance(outcome, ValueError)
            assert outcome.args == (item,)
        elif fate in ("list", "mixed", "item errors"):
            assert outcome == item * 7
        elif fate == "raise":
            assert isinstance(outcome, LookupError)
            assert outcome.args == (batch,)
        else:
            assert isinstance(outcome, BatchError)
            assert fate not in ("short", "long") or f"got {len(batch)} items" in str(outcome)


async def submit_and_check(replica: Replica, ledger: Ledger, rng: random.Random, batches: int) -> None:
    """Random calls, cancels and waits, until there were so many batches and all is answered."""
    callers = [Caller(replica), Caller(replica)]
    open_: dict[int, tuple[Caller, int]] = {}
    cancelled: set[int] = set()
    item = 0
    while ledger.batches < batches or open_:
        for _ in range(rng.randint(0, 8) if ledger.batches < batches else 0):
            item += 1
            caller = rng.choice(callers)
            open_[item] = caller, caller.call(item)
        if open_ and rng.random() < 0.3:
            cancelled.add(victim := rng.choice(list(open_)))
            open_[victim][0].cancel(open_[victim][1])
        await ticks(rng.randint(0, 3))
        assert isinstance(replica.clock, StepClock)
        replica.clock.step(0.004)
        for number in [number for number, (caller, stream) in open_.items() if caller.is_over(stream)]:
            caller, stream = open_.pop(number)
            await check(ledger, number, number in cancelled, caller, stream)


async def check(ledger: Ledger, number: int, was_cancelled: bool, caller: Caller, stream: int) -> None:
    final = await caller.over(stream)
    if final.type == FrameType.REFUSED:
        assert number not in ledger.fate
    elif not (was_cancelled and final.type == FrameType.ERROR):
        try:
            outcome = await caller.result(stream)
        except Exception as error:
            outcome = error
        ledger.check(number, outcome)


async def test_in_ten_thousand_random_batches_every_item_gets_its_own_outcome() -> None:
    rng = random.Random(2)
    for _ in range(20):
        ledger = Ledger(rng)
        async with running(
            ledger.function(),
            StepClock(),
            max_batch_size=rng.randint(1, 4),
            batch_wait_timeout_s=rng.choice((0.0, 0.0, 0.01)),
            max_concurrent_batches=rng.randint(1, 3),
        ) as replica:
            await submit_and_check(replica, ledger, rng, batches=500)
            await ticks()
            assert replica.statistics() == ReplicaStatistics(0, 0, 0, False)


# Streams


async def test_an_async_generator_is_held_back_while_nobody_reads() -> None:
    made = 0

    async def count() -> AsyncIterator[int]:
        nonlocal made
        while True:
            made += 1
            yield made

    async with running(count) as replica:
        caller = Caller(replica)
        stream = caller.call()
        await ticks(20)
        ahead = made
        assert ahead <= WINDOW // FRAME_COST + 1
        await ticks(20)
        assert made == ahead
        assert caller.take(stream) == ahead - 1  # the last one made waits for credit
        await ticks(20)
        assert made > ahead
        caller.cancel(stream)
        assert (await caller.failure(stream)).status == 499


async def test_a_plain_generator_is_held_back_too_and_closed_when_its_reader_stops() -> None:
    made, closed = 0, threading.Event()

    def count() -> Iterator[int]:
        nonlocal made
        try:
            while True:
                made += 1
                yield made
        finally:
            closed.set()

    async with running(count) as replica:
        caller = Caller(replica)
        stream = caller.call()
        most = WINDOW // FRAME_COST
        await wait_until(lambda: len(caller.link.of(stream)) > made - 1 > most - 10, 5, "the window is full")
        await asyncio.sleep(0.02)
        assert made <= most + 1
        caller.cancel(stream)
        assert (await caller.failure(stream)).status == 499
        assert closed.is_set()
        assert replica.statistics().running == 0


async def test_a_stream_that_is_read_goes_on_to_its_end() -> None:
    async def count() -> AsyncIterator[int]:
        for number in range(1_000):
            yield number

    def count_plainly() -> Iterator[int]:
        yield from range(1_000)

    for function in (count, count_plainly):
        async with running(function) as replica:
            caller = Caller(replica)
            stream = caller.call()
            await wait_until(lambda: caller.take(stream) < 0 or caller.is_over(stream), 5, "all is read")  # noqa: B023
            assert await caller.items(stream) == list(range(1_000))


async def test_an_async_generator_is_closed_when_its_caller_cancels_between_two_items() -> None:
    log: list[str] = []

    async def slow() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            log.append("cancelled")
            raise
        finally:
            await asyncio.sleep(0)
            log.append("closed")

    async with running(slow) as replica:
        caller = Caller(replica)
        stream = caller.call()
        await ticks()
        caller.cancel(stream)
        assert (await caller.failure(stream)).status == 499
    assert log == ["cancelled", "closed"]


async def test_a_generator_that_swallows_its_cancellation_is_cut_off() -> None:
    closed: list[str] = []

    async def stubborn() -> AsyncIterator[int]:
        try:
            while True:
                try:
                    yield 1
                    await asyncio.sleep(0)
                except asyncio.CancelledError:
                    pass
        finally:
            closed.append("closed")

    async def stubborn_end() -> AsyncIterator[int]:
        yield 1
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            closed.append("ended")

    for function in (stubborn, stubborn_end):
        async with running(function) as replica:
            caller = Caller(replica)
            stream = caller.call()
            await ticks()
            caller.cancel(stream)
            assert (await caller.failure(stream)).status == 499
            assert replica.statistics().running == 0
    assert closed == ["closed", "ended"]


async def test_a_plain_generator_cancelled_within_a_step_is_closed_after_it() -> None:
    begun, go_on, closed = threading.Event(), threading.Event(), threading.Event()

    def slow() -> Iterator[int]:
        try:
            begun.set()
            go_on.wait(10)
            yield 1
        finally:
            closed.set()

    async with running(slow) as replica:
        caller = Caller(replica)
        stream = caller.call()
        await wait_until(begun.is_set, 5, "the step has begun")
        caller.cancel(stream)
        await ticks()
        assert not caller.is_over(stream)
        go_on.set()
        assert (await caller.failure(stream)).status == 499
        assert closed.is_set()


async def test_an_error_in_the_middle_visibly_ends_the_stream() -> None:
    async def breaks() -> AsyncIterator[int]:
        yield 1
        raise LookupError("in the middle")

    def breaks_plainly() -> Iterator[Any]:
        yield 1
        yield threading.Lock()

    async with running(breaks) as replica:
        caller = Caller(replica)
        stream = caller.call()
        with pytest.raises(LookupError, match="in the middle"):
            await caller.result(stream)
        assert caller.link.kinds(stream) == [FrameType.ANSWER, FrameType.DATA, FrameType.ERROR]
    async with running(breaks_plainly) as replica:
        caller = Caller(replica)
        stream = caller.call()
        with pytest.raises(EncodingError, match=r"an item of the stream, of type lock,"):
            await caller.result(stream)
        assert caller.link.kinds(stream) == [FrameType.ANSWER, FrameType.DATA, FrameType.ERROR]


async def test_any_async_iterator_is_a_stream() -> None:
    class Two:
        def __init__(self) -> None:
            self.left = 2

        def __aiter__(self) -> Any:
            return self

        async def __anext__(self) -> int:
            if not self.left:
                raise StopAsyncIteration
            self.left -= 1
            return self.left

    async def two() -> Any:
        return Two()

    assert is_stream(Two())
    async with running(two) as replica:
        caller = Caller(replica)
        assert await caller.items(caller.call()) == [1, 0]


# What user code must not be able to do


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
@pytest.mark.parametrize("kind", ["async", "def", "batch", "stream", "arguments"])
async def test_an_exit_is_answered_and_told_and_the_loop_lives(
    kind: str, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    async def leaves() -> None:
        raise error

    def leaves_plainly() -> None:
        raise error

    async def leaves_in_a_batch(items: list[int]) -> list[int]:
        raise error

    async def leaves_in_a_stream() -> AsyncIterator[int]:
        yield 1
        raise error

    functions: dict[str, Any] = {
        "async": leaves,
        "def": leaves_plainly,
        "batch": leaves_in_a_batch,
        "stream": leaves_in_a_stream,
        "arguments": leaves_in_a_batch,
    }
    batches = {"max_batch_size": 2} if kind in ("batch", "arguments") else {}
    record = backend_of(functions[kind], name="leaver", **batches)
    exits: list[BaseException] = []
    replica = Replica(record, id="x", app="app", clock=LoopClock(), on_exit=exits.append)
    await replica.start()
    caller = Caller(replica)
    args: list[Any] = [Leaver(error)] if kind == "arguments" else [1] if kind == "batch" else []
    stream = caller.call(*args)
    failure = await caller.failure(stream)
    assert (failure.kind, failure.status) == (type(error).__name__, 500)
    with pytest.raises(RemoteError, match=type(error).__name__):
        await caller.result(stream)
    await ticks()
    assert [type(exit_) for exit_ in exits] == [type(error)]
    assert replica.statistics().running == 0
    assert [record.getMessage() for record in caplog.records] == [
        f"user code of backend 'leaver' raised {error!r}"
    ]
    await replica.aclose()


class Leaver:
    """Raises while it is unpickled."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        return _leave, (self.error,)


def _leave(error: BaseException) -> None:
    raise error


async def test_without_on_exit_the_replica_goes_on() -> None:
    async def leaves(x: int) -> int:
        if x:
            raise SystemExit(x)
        return x

    async with running(leaves) as replica:
        caller = Caller(replica)
        assert (await caller.failure(caller.call(1))).kind == "SystemExit"
        assert await caller.result(caller.call(0)) == 0


@pytest.mark.parametrize("batch", [False, True])
async def test_a_cancelled_error_of_its_own_is_an_error_answer(batch: bool) -> None:
    async def cancels(x: Any) -> Any:
        raise asyncio.CancelledError("my own")

    def cancels_plainly(x: Any) -> Any:
        raise asyncio.CancelledError("my own")

    for function in (cancels, cancels_plainly):
        async with running(function, max_batch_size=1 if batch else None) as replica:
            caller = Caller(replica)
            stream = caller.call(1)
            failure = await caller.failure(stream)
            assert (failure.kind, failure.status, failure.executed) == ("CancelledError", 500, "yes")
            with pytest.raises(RemoteError, match="CancelledError: my own"):
                await caller.result(stream)


async def test_a_def_may_return_an_awaitable() -> None:
    async def later(x: int) -> int:
        return x + 1

    def now(x: int) -> Any:
        return later(x)

    async with running(now) as replica:
        caller = Caller(replica)
        assert await caller.result(caller.call(1)) == 2


async def test_stop_iteration_is_an_error_and_no_hang() -> None:
    def empty(x: Any) -> Any:
        return next(iter([]))

    async def as_item(items: list[Any]) -> list[Any]:
        return [StopIteration(item) for item in items]

    async with running(empty) as replica:
        caller = Caller(replica)
        with pytest.raises(RuntimeError, match="StopIteration"):
            await caller.result(caller.call(1))
    async with running(as_item, max_batch_size=2) as replica:
        caller = Caller(replica)
        with pytest.raises(RemoteError, match="StopIteration: 1"):
            await caller.result(caller.call(1))


# Context


def seen() -> tuple[Context, str]:
    before = color.get()
    color.set("a request's")
    return context(), before


async def test_user_code_knows_where_it_runs() -> None:
    async def asynchronous() -> Any:
        return seen()

    def plain() -> Any:
        return seen()

    async def generator() -> AsyncIterator[Any]:
        yield seen()

    def plain_generator() -> Iterator[Any]:
        yield seen()

    color.set("the starter's")
    for function in (asynchronous, plain, generator, plain_generator):
        clock = StepClock()
        async with running(function, clock) as replica:
            color.set("the caller's")
            caller = Caller(replica)
            for _ in range(2):
                stream = caller.call(deadline_ms=2_000)
                final = await caller.over(stream)
                found = (
                    await caller.result(stream)
                    if final.type == FrameType.ANSWER
                    else (await caller.items(stream))[0]
                )
                where, before = found
                assert where == Context(
                    "app", function.__name__, f"{function.__name__}#1", f"r{stream}", clock.time() + 2
                )
                assert before == "the starter's"
            color.set("the starter's")


async def test_a_batch_runs_for_its_first_item_and_to_its_last_deadline() -> None:
    async def batch(items: list[int]) -> Any:
        return [seen()] * len(items)

    async with running(batch, StepClock(), max_batch_size=2) as replica:
        now = replica.clock.time()
        caller = Caller(replica)
        color.set("the caller's")
        one, two = caller.call(1, deadline_ms=1_000), caller.call(2, deadline_ms=3_000)
        (where, before), (again, _) = await caller.result(one), await caller.result(two)
        assert where == again == Context("app", "batch", "batch#1", "r1", now + 3)
        assert before == "none"
        caller.call(3, deadline_ms=1_000)
        where, before = await caller.result(caller.call(4))
        assert (where.request_id, where.deadline, before) == ("r3", None, "none")


async def test_the_life_of_an_object_has_a_context_and_what_it_sets_holds_for_requests() -> None:
    log: list[Context] = []

    class Model:
        def __init__(self) -> None:
            color.set("the model's")
            log.append(context())

        async def reconfigure(self, user_config: Any) -> None:
            log.append(context())

        def check_health(self) -> None:
            log.append(context())

        async def __call__(self) -> str:
            return color.get()

        async def aclose(self) -> None:
            log.append(context())

    async with running(Model, user_config={}) as replica:
        caller = Caller(replica)
        assert await caller.result(caller.call()) == "the model's"
        await replica.configure(replica.config, reconfigure=True)
        await replica.check_health()
    assert log == [Context("app", "Model", "Model#1")] * 6


async def test_user_code_finds_handles_by_the_replicas_resolver() -> None:
    class Known:
        def get_handle(self, name: str, *, sync: bool = False) -> Any:
            return name, sync

    app = App()

    async def find() -> Any:
        return resolve(app, "double", sync=True)

    replica = Replica(backend_of(find), id="x", app="app", clock=LoopClock(), resolver=Known())
    await replica.start()
    caller = Caller(replica)
    assert await caller.result(caller.call()) == ("double", True)
    await replica.aclose()


# Life


async def test_what_a_start_raises_comes_out_and_a_health_check_may_fail_later() -> None:
    healthy = True

    class Fragile:
        def __call__(self) -> None: ...

        def check_health(self) -> None:
            if not healthy:
                raise ReplicaDied("ill")

    async with running(Fragile) as replica:
        healthy = False
        with pytest.raises(ReplicaDied, match="ill"):
            await replica.check_health()
    with pytest.raises(ReplicaDied, match="ill"):
        async with running(Fragile):
            raise AssertionError("unreachable")


async def test_a_drain_refuses_what_is_new_or_waits_and_ends_with_what_runs() -> None:
    gate = Gate()
    async with running(gate.function(), ManualClock(), max_ongoing_requests=1) as replica:
        caller = Caller(replica)
        one, waiting = caller.call(1), caller.call(2)
        await ticks()
        draining = asyncio.ensure_future(replica.drain())
        await ticks()
        late = caller.call(3)
        for stream in (waiting, late):
            assert decode_message(Refusal, await caller.over(stream)).reason == "draining"
        assert repr(replica) == "<Replica gated#1 draining running=1/1 waiting=0>"
        assert not draining.done()
        gate.open()
        assert await draining is True
        assert await caller.result(one) == 1
        assert gate.entered == [1]


async def test_a_drain_gives_up_in_time_and_closing_cuts_off_what_runs() -> None:
    clock, gate = ManualClock(), Gate()
    async with running(gate.function(), clock, graceful_shutdown_timeout_s=7) as replica:
        caller = Caller(replica)
        stream = caller.call(1)
        for timeout_s, limit_s in ((None, 7.0), (3.0, 3.0), (0.0, 0.0)):
            draining = asyncio.ensure_future(replica.drain(timeout_s))
            if limit_s:
                await clock.advance(limit_s - 0.1)
                assert not draining.done()
            await clock.advance(0.1)
            assert await draining is False
    assert gate.cancelled == [1]
    with pytest.raises(Draining, match="has been stopped"):
        await caller.result(stream)


async def test_a_cancelled_drain_leaves_nothing_behind() -> None:
    gate = Gate()
    async with running(gate.function()) as replica:
        Caller(replica).call(1)
        draining = asyncio.ensure_future(replica.drain())
        await ticks()
        draining.cancel()
        with pytest.raises(asyncio.CancelledError):
            await draining


async def test_a_drain_does_not_wait_for_more_items() -> None:
    async def echo(items: list[int]) -> list[int]:
        return items

    async with running(echo, StepClock(), max_batch_size=9, batch_wait_timeout_s=60) as replica:
        caller = Caller(replica)
        stream = caller.call(1)
        await ticks()
        assert await replica.drain() is True
        assert await caller.result(stream) == 1


async def test_idle_waits_with_open_doors() -> None:
    gate, other = Gate(), Gate()
    gates = {"one": gate, "two": other}

    async def work(name: str) -> Any:
        return await gates[name](name)

    async with running(work) as replica:
        caller = Caller(replica)
        assert replica.is_idle and await replica.idle(1)
        one = caller.call("one")
        await ticks()
        assert not replica.is_idle
        assert await replica.idle(0) is False
        waiting = asyncio.ensure_future(replica.idle(5))
        two = caller.call("two")
        gate.open()
        assert await caller.result(one) == "one"
        await ticks()
        assert not waiting.done()
        other.open()
        assert await caller.result(two) == "two"
        assert await waiting is True
        assert replica.is_idle and not replica.statistics().draining


@pytest.mark.parametrize("kind", ["call", "batch"])
async def test_large_answers_keep_their_slots_while_too_much_waits_to_be_read(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 2 * WINDOW
    monkeypatch.setattr(replica_module, "MAX_UNREAD", 2 * size)
    made = 0

    async def large(x: int) -> bytes:
        nonlocal made
        made += 1
        return b"x" * size

    async def batch(items: list[int]) -> list[bytes]:
        return [await large(item) for item in items]

    options: dict[str, Any] = {"max_batch_size": 1} if kind == "batch" else {}
    target = batch if kind == "batch" else large
    async with running(target, max_ongoing_requests=1, **options) as replica:
        callers = [Caller(replica) for _ in range(5)]
        streams = [caller.call(number) for number, caller in enumerate(callers)]
        await ticks(30)
        assert made == 3
        assert replica.statistics().running == 1
        flags = [caller.link.of(stream)[0].flags for caller, stream in zip(callers, streams, strict=True)]
        kinds = [caller.link.kinds(stream)[-1] for caller, stream in zip(callers, streams, strict=True)]
        assert kinds[3:] == [FrameType.QUEUED, FrameType.QUEUED] and flags[3:] == [0, 0]
        freed = [
            frame.flags
            for caller, stream in zip(callers, streams, strict=True)
            for frame in caller.link.of(stream)
            if frame.type == FrameType.ANSWER
        ]
        assert freed == [FREED, FREED, 0]
        third, stream = callers[2], streams[2]
        await wait_until(lambda: third.take(stream) < 0 or third.is_over(stream), 5, "the third is read")
        await ticks(30)
        assert made == 4  # the slot is the next one's, which keeps it
        callers[3].cancel(streams[3])
        assert (await callers[3].failure(streams[3])).executed == "yes"
        await ticks(30)
        assert made == 5
        for caller, stream in zip(callers, streams, strict=True):
            await wait_until(
                lambda caller=caller, stream=stream: caller.take(stream) < 0 or caller.is_over(stream),  # type: ignore[misc]
                5,
                "all is read",
            )
        assert replica.is_idle
        assert replica._unread == 0


async def test_a_result_that_asks_for_the_end_of_the_process_costs_its_mates_nothing() -> None:
    class Evil:
        def __reduce__(self) -> Any:
            raise SystemExit(3)

    async def batch(items: list[int]) -> list[Any]:
        return [Evil() if item == 0 else item for item in items]

    exits: list[BaseException] = []
    record = backend_of(batch, max_batch_size=4)
    replica = Replica(record, id="x", app="app", clock=LoopClock(), on_exit=exits.append)
    await replica.start()
    caller = Caller(replica)
    streams = [caller.call(number) for number in range(3)]
    with pytest.raises(RemoteError, match="SystemExit: 3"):
        await caller.result(streams[0])
    assert [await caller.result(stream) for stream in streams[1:]] == [1, 2]
    assert [repr(error) for error in exits] == ["SystemExit(3)"]
    assert replica.is_idle
    await replica.aclose()


async def test_a_drain_waits_for_large_answers_that_still_go_out() -> None:
    async def large() -> bytes:
        return b"x" * (2 * WINDOW)

    async with running(large, ManualClock()) as replica:
        caller, other = Caller(replica), Caller(replica)
        read, dropped = caller.call(), other.call()
        await ticks()
        assert replica.statistics().running == 0
        draining = asyncio.ensure_future(replica.drain())
        await ticks()
        assert not draining.done()
        other.listener.link_lost(None)
        await ticks()
        assert not draining.done()
        await wait_until(lambda: caller.take(read) < 0 or caller.is_over(read), 5, "all is read")
        assert await draining is True
        assert (await other.failure(dropped)).status == 499


async def test_closing_ends_everything_wherever_it_is() -> None:
    gate = Gate()

    async def large(x: int) -> Any:
        return await gate(x) if x else b"x" * (2 * WINDOW)

    async with running(large, max_ongoing_requests=1) as replica:
        caller = Caller(replica)
        sending = caller.call(0)
        await ticks()
        runs, waits = caller.call(1), caller.call(2)
        await ticks()
        await replica.aclose()
        for stream in (sending, runs):
            assert (await caller.failure(stream)).kind == "Draining"
        assert decode_message(Refusal, await caller.over(waits)).reason == "draining"

    async def echo(items: list[int]) -> list[int]:
        return items

    async with running(echo, StepClock(), max_batch_size=9, batch_wait_timeout_s=60) as replica:
        caller = Caller(replica)
        gathers = caller.call(1)
        await ticks()
        await replica.aclose()
        failure = await caller.failure(gathers)
        assert (failure.kind, failure.executed) == ("Draining", "no")


async def test_what_a_thread_holds_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    clock, gate = ManualClock(), ThreadGate()
    closed = threading.Event()

    class Stuck:
        def __call__(self, x: int) -> None:
            gate.function()(x)

        def close(self) -> None:
            closed.set()

    replica = Replica(backend_of(Stuck), id="x", app="app", clock=clock)
    await replica.start()
    caller = Caller(replica)
    stream = caller.call(1)
    await wait_until(lambda: gate.entered, 5, "the call is in its thread")
    closing = asyncio.ensure_future(replica.aclose())
    await clock.advance(1)
    await clock.advance(4.9)
    assert not closing.done()
    await clock.advance(0.1)
    await closing
    assert [record.getMessage() for record in caplog.records] == [
        "<Replica x draining running=1/1 waiting=0>: 1 requests do not end",
        "<Replica x draining running=1/1 waiting=0>: the clean-up of the backend's object does not end",
    ]
    gate.let()
    assert (await caller.failure(stream)).kind == "Draining"
    assert not closed.is_set()


async def test_closing_leaves_a_request_that_is_given_up_as_it_is() -> None:
    gate = ThreadGate()
    async with running(gate.function()) as replica:
        caller = Caller(replica)
        stream = caller.call(1)
        await wait_until(lambda: gate.entered, 5, "the call is in its thread")
        caller.cancel(stream)
        closing = asyncio.ensure_future(replica.aclose())
        await ticks()
        gate.let()
        await closing
        assert (await caller.failure(stream)).kind == "Cancelled"


class Diary(NullObserver):
    """Keeps what a replica reports."""

    def __init__(self) -> None:
        self.entries: list[Any] = []

    def admitted(self, backend: str, replica: str) -> None:
        self.entries.append("admitted")

    def started(self, backend: str, replica: str, waited_s: float) -> None:
        self.entries.append(("started", waited_s))

    def batch(self, backend: str, replica: str, size: int) -> None:
        self.entries.append(("batch", size))

    def finished(self, backend: str, replica: str, ran_s: float, error: BaseException | None) -> None:
        self.entries.append(("finished", ran_s, type(error)))

    def refused(self, backend: str, where: str, reason: str) -> None:
        self.entries.append(("refused", where, reason))

    def replica_event(self, backend: str, replica: str, event: str) -> None:
        self.entries.append((backend, replica, event))


async def test_an_observer_is_told() -> None:
    clock, diary = StepClock(), Diary()

    async def fails(x: int) -> None:
        raise QueueFull("a nested one")

    record = backend_of(fails, max_ongoing_requests=1)
    replica = Replica(record, id="x", app="app", clock=clock, observer=diary)
    await replica.start()
    caller = Caller(replica)
    streams = [caller.call(number) for number in range(3)]
    clock.step(2)
    failure = await caller.failure(streams[0])
    assert (failure.status, failure.executed) == (503, "yes")
    await caller.over(streams[1])
    await replica.drain()
    await replica.aclose()
    assert diary.entries == [
        ("fails", "x", "started"),
        "admitted",
        "admitted",
        ("refused", "x", "full"),
        ("started", 2.0),
        ("finished", 0.0, QueueFull),
        ("started", 2.0),
        ("finished", 0.0, QueueFull),
        ("fails", "x", "draining"),
        ("fails", "x", "stopped"),
    ]


async def test_what_python_callers_get_is_only_logged_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    async def fails() -> None:
        raise LookupError("gone")

    async with running(fails) as replica:
        caller = Caller(replica)
        with caplog.at_level(logging.DEBUG, "serveit.replica"):
            await caller.over(caller.call())
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert record.getMessage() == "__call__ failed (request r1): LookupError: gone"

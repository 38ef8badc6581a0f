"""Slots for Ray actor tasks, without Ray: held, taken up by a task, free again."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from serveit import context
from serveit.exceptions import DeadlineExceeded, Draining, ProtocolError, RemoteError, ReplicaDied
from serveit.running.failures import Cancelled
from serveit.running.httpjob import Bindings
from serveit.running.listener import Listener
from serveit.running.replica import Replica
from serveit.running.reservation import Reservations
from serveit.wire.frames import (
    END,
    Call,
    Failure,
    Frame,
    FrameType,
    Reserve,
    Reserved,
    decode_message,
    encode_message,
)
from serveit.wire.memory import MemoryLink, memory_pair
from tests.callers import Caller, StepClock, running
from tests.support import wait_until


class Holder(Caller):
    """A caller that asks for slots."""

    def __init__(self, replica: Replica, reservations: Reservations, *, may_call: bool = True) -> None:
        super().__init__(replica)
        self.listener = Listener(
            replica, Bindings(replica.backend), self.link, reservations=reservations, may_call=may_call
        )

    def reserve(self, *, target: str = "__call__", deadline_ms: int | None = None) -> int:
        """Send a RESERVE, as request "r<stream>"; returns its stream."""
        stream = next(self._streams)
        message = Reserve(f"r{stream}", target, deadline_ms)
        self.receive(FrameType.RESERVE, stream, encode_message(message), b"", END)
        return stream


class Rig:
    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.reservations = Reservations(replica)
        self.holder = Holder(replica, self.reservations)

    def task(self, stream: int, *args: Any, **kwargs: Any) -> asyncio.Task[Any]:
        """The actor task for a slot."""
        run = self.reservations.run(f"r{stream}", args, kwargs)
        return asyncio.get_running_loop().create_task(run)

    @property
    def slots(self) -> int:
        return self.replica.statistics().running


@asynccontextmanager
async def rig_of(function: Any, clock: StepClock | None = None, **options: Any) -> AsyncIterator[Rig]:
    async with running(function, clock, **options) as replica:
        yield Rig(replica)


async def echo(x: Any = None) -> Any:
    return x


def is_free_again(frame: Frame) -> bool:
    return (frame.type, frame.flags, frame.body) == (FrameType.DATA, END, b"")


async def ticks(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class Gate:
    """A function that waits until the test says so."""

    def __init__(self) -> None:
        self.entered: list[Any] = []
        self.cancelled: list[Any] = []
        self._open = asyncio.Event()

    def open(self) -> None:
        self._open.set()

    def function(self) -> Any:
        async def gated(x: Any = None) -> Any:
            self.entered.append(x)
            try:
                await self._open.wait()
            except asyncio.CancelledError:
                self.cancelled.append(x)
                raise
            return x

        return gated


# -- the way it goes -------------------------------------------------------------------------


async def test_a_slot_is_held_until_the_task_has_ended() -> None:
    async with rig_of(echo) as rig:
        stream = rig.holder.reserve()
        (held,) = rig.holder.link.of(stream)
        assert (held.type, decode_message(Reserved, held).others) == (FrameType.RESERVED, 0)
        assert rig.slots == 1
        assert repr(rig.reservations) == "<Reservations echo#1 held=1>"
        assert await rig.task(stream, {"any": "value"}) == {"any": "value"}
        assert is_free_again(await rig.holder.over(stream))
        assert rig.slots == 0
        assert repr(rig.reservations) == "<Reservations echo#1 held=0>"
        assert rig.holder.listener._jobs == {}


async def test_values_are_handed_over_as_they_are() -> None:
    thing = object()

    async def same(*, x: Any) -> Any:
        return x

    async with rig_of(same) as rig:
        assert await rig.task(rig.holder.reserve(), x=thing) is thing


async def test_the_task_runs_as_its_request() -> None:
    async def where() -> tuple[str, float | None]:
        return context().request_id, context().deadline

    clock = StepClock()
    async with rig_of(where, clock) as rig:
        assert await rig.task(rig.holder.reserve(deadline_ms=1_500)) == ("r1", clock.time() + 1.5)
        assert clock.armed == 0


async def test_held_slots_count() -> None:
    gate = Gate()
    async with rig_of(gate.function(), max_ongoing_requests=2) as rig:
        one, two, three, four = (rig.holder.reserve() for _ in range(4))
        assert rig.slots == 2
        assert rig.holder.link.kinds(three) == [FrameType.QUEUED]
        assert (await rig.holder.over(four)).type == FrameType.REFUSED
        with pytest.raises(ReplicaDied, match="no longer held"):
            await rig.task(three)  # it has no slot yet
        caller = Caller(rig.replica)
        assert caller.link.kinds(caller.call(1)) == [FrameType.QUEUED]  # calls count the same slots
        task = rig.task(one, "one")
        gate.open()
        assert await task == "one"
        assert rig.holder.link.kinds(three) == [FrameType.QUEUED, FrameType.STARTED, FrameType.RESERVED]
        tasks = [rig.task(two, 2), rig.task(three, 3)]
        assert [await task for task in tasks] == [2, 3]


async def test_held_slots_are_others_load() -> None:
    async with rig_of(echo, max_ongoing_requests=3) as rig:
        rig.holder.reserve(), rig.holder.reserve()
        caller = Caller(rig.replica)
        stream = caller.call(1)
        await caller.result(stream)
        assert caller.listener.told == 2


async def test_tasks_of_a_batch_function_are_batched() -> None:
    batches: list[list[int]] = []

    async def note(items: list[int]) -> list[Any]:
        batches.append(items)
        return [ValueError("three") if item == 3 else item * 10 for item in items]

    clock = StepClock()
    async with rig_of(note, clock, max_batch_size=4, batch_wait_timeout_s=1) as rig:
        streams = [rig.holder.reserve() for _ in range(3)]
        tasks = [rig.task(stream, number) for number, stream in enumerate(streams, 1)]
        caller = Caller(rig.replica)
        call = caller.call(4)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert results[:2] == [10, 20]
        assert isinstance(results[2], ValueError)
        assert await caller.result(call) == 40
        for stream in streams:
            assert is_free_again(await rig.holder.over(stream))
        wrong = rig.task(rig.holder.reserve(), 1, 2)
        with pytest.raises(TypeError, match="give exactly one item, not 2 positional"):
            await wrong
    assert batches == [[1, 2, 3, 4]] or batches == [[4, 1, 2, 3]]


async def test_a_def_function_runs_in_its_threads() -> None:
    def plain(x: int) -> int:
        return x + 1

    async with rig_of(plain) as rig:
        assert await rig.task(rig.holder.reserve(), 1) == 2


# -- errors ----------------------------------------------------------------------------------


async def test_what_the_function_raises_is_the_task_s_and_the_slot_is_free() -> None:
    async def fail() -> None:
        raise LookupError("nothing there")

    async with rig_of(fail) as rig:
        stream = rig.holder.reserve()
        with pytest.raises(LookupError, match="nothing there"):
            await rig.task(stream)
        assert is_free_again(await rig.holder.over(stream))
        assert rig.slots == 0


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError("own")])
async def test_what_cannot_be_raised_in_the_task_is_told(error: BaseException) -> None:
    async def fail() -> None:
        raise error

    async with rig_of(fail) as rig:
        stream = rig.holder.reserve()
        with pytest.raises(RemoteError, match="SystemExit: 3|KeyboardInterrupt|CancelledError: own"):
            await rig.task(stream)
        assert is_free_again(await rig.holder.over(stream))


async def test_an_item_s_error_that_no_future_can_carry() -> None:
    async def stop(items: list[int]) -> list[Any]:
        return [StopIteration(item) for item in items]

    async with rig_of(stop, max_batch_size=2) as rig:
        stream = rig.holder.reserve()
        with pytest.raises(RemoteError, match="StopIteration: 5"):
            await rig.task(stream, 5)
        assert is_free_again(await rig.holder.over(stream))


async def test_a_method_that_is_not_there_takes_no_slot() -> None:
    async with rig_of(echo) as rig:
        stream = rig.holder.reserve(target="nothing")
        with pytest.raises(AttributeError, match="no method 'nothing'"):
            await rig.holder.result(stream)
        assert rig.slots == 0
        with pytest.raises(ReplicaDied, match=f"the slot of request r{stream} on replica echo#1"):
            await rig.task(stream)


async def test_a_task_that_nobody_asked_a_slot_for() -> None:
    async with rig_of(echo) as rig:
        stream = rig.holder.reserve()
        assert await rig.task(stream, 1) == 1
        for unknown in (stream, 77):
            with pytest.raises(ReplicaDied, match="no longer held") as caught:
                await rig.task(unknown, 2)
            assert caught.value.executed == "no"


@pytest.mark.parametrize("kind", ["async", "plain"])
async def test_streams_are_refused_and_closed(kind: str) -> None:
    closed: list[bool] = []

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            closed.append(True)

    async def made() -> Any:
        items = numbers()
        await anext(items)
        return items

    def plain() -> Any:
        yield from itertools.count()

    async with rig_of(made if kind == "async" else plain) as rig:
        stream = rig.holder.reserve()
        with pytest.raises(TypeError, match="no ObjectRef can be: use `async for item in handle.stream"):
            await rig.task(stream)
        assert is_free_again(await rig.holder.over(stream))
        assert rig.slots == 0
    assert closed == ([True] if kind == "async" else [])


# -- giving up -------------------------------------------------------------------------------


async def test_a_slot_that_nobody_takes_up_lapses_at_its_deadline() -> None:
    clock = StepClock()
    async with rig_of(echo, clock, max_ongoing_requests=1) as rig:
        stream = rig.holder.reserve(deadline_ms=500)
        following = rig.holder.reserve()
        clock.step(0.4)
        assert rig.slots == 1
        clock.step(0.2)
        final = await rig.holder.over(stream)
        failure = decode_message(Failure, final)
        assert (failure.status, failure.executed) == (504, "no")
        assert rig.holder.link.kinds(following)[-1] == FrameType.RESERVED
        with pytest.raises(ReplicaDied, match="its deadline has passed"):
            await rig.task(stream)
        assert await rig.task(following, 2) == 2


async def test_the_deadline_ends_a_task_that_runs() -> None:
    gate, clock = Gate(), StepClock()
    async with rig_of(gate.function(), clock) as rig:
        stream = rig.holder.reserve(deadline_ms=500)
        task = rig.task(stream, "x")
        await ticks()
        clock.step(0.4)
        assert not task.done()
        clock.step(0.2)
        with pytest.raises(DeadlineExceeded, match="while the function ran") as caught:
            await task
        assert caught.value.executed == "maybe"
        assert (await rig.holder.over(stream)).type == FrameType.ERROR
        assert (gate.cancelled, rig.slots, clock.armed) == (["x"], 0, 0)
        assert rig.replica.meter.errors == 1


async def test_at_the_deadline_a_def_function_keeps_its_slot_until_it_returns() -> None:
    begun, end = threading.Event(), threading.Event()

    def plain() -> str:
        begun.set()
        end.wait()
        return "too late"

    clock = StepClock()
    async with rig_of(plain, clock) as rig:
        stream = rig.holder.reserve(deadline_ms=500)
        task = rig.task(stream)
        await wait_until(begun.is_set, 5, "the function")
        clock.step(1)
        with pytest.raises(DeadlineExceeded, match="while the function ran"):
            await task
        await ticks()
        assert rig.slots == 1 and not rig.holder.is_over(stream)
        end.set()
        await rig.holder.over(stream)
        assert rig.slots == 0


async def test_the_deadline_ends_a_task_whose_batch_gathers() -> None:
    clock = StepClock()
    batches: list[list[int]] = []

    async def note(items: list[int]) -> list[int]:
        batches.append(items)
        return items

    async with rig_of(note, clock, max_batch_size=4, batch_wait_timeout_s=1) as rig:
        hurried = rig.task(rig.holder.reserve(deadline_ms=500), 1)
        patient = rig.task(rig.holder.reserve(deadline_ms=5_000), 2)
        await ticks()
        clock.step(0.6)
        with pytest.raises(DeadlineExceeded, match="before the function was called") as caught:
            await hurried
        assert (caught.value.executed, rig.slots) == ("no", 1)
        clock.step(0.5)
        assert await patient == 2
        assert clock.armed == 0, "nothing is left of the deadline"
    assert batches == [[2]]


async def test_the_deadline_of_a_task_that_was_cancelled_before() -> None:
    begun, end = threading.Event(), threading.Event()

    def plain() -> None:
        begun.set()
        end.wait()

    clock = StepClock()
    async with rig_of(plain, clock) as rig:
        stream = rig.holder.reserve(deadline_ms=500)
        task = rig.task(stream)
        await wait_until(begun.is_set, 5, "the function")
        task.cancel()
        await asyncio.wait((task,))
        clock.step(1)
        assert task.cancelled() and rig.slots == 1
        end.set()
        assert (await rig.holder.failure(stream)).status == 499


async def test_a_task_that_starts_too_late() -> None:
    clock = StepClock()
    called: list[Any] = []

    async def note(x: Any) -> None:
        called.append(x)

    async with rig_of(note, clock) as rig:
        stream = rig.holder.reserve(deadline_ms=500)
        task = rig.task(stream, "x")
        await asyncio.sleep(0)  # it has its slot now
        clock.step(1)
        with pytest.raises(DeadlineExceeded, match="before the function was called") as caught:
            await task
        assert caught.value.executed == "no"
        await rig.holder.over(stream)
        assert (rig.slots, called) == (0, [])


async def test_a_second_slot_of_the_same_name_does_not_get_the_first_one_s_task() -> None:
    clock = StepClock()
    async with rig_of(echo, clock, max_ongoing_requests=2) as rig:
        first = rig.holder.reserve(deadline_ms=500)
        twin = Holder(rig.replica, rig.reservations)
        second = twin.reserve(deadline_ms=500)
        assert second == first, "so both are r1"
        with pytest.raises(ProtocolError, match="a slot is held for a request r1 already"):
            await twin.result(second)
        assert (rig.slots, clock.armed) == (1, 1)
        assert repr(rig.reservations) == "<Reservations echo#1 held=1>"
        assert await rig.task(first, 1) == 1
        again = Holder(rig.replica, rig.reservations)
        assert await rig.task(again.reserve(), 2) == 2  # the name is free


@pytest.mark.parametrize("how", ["cancel", "link"])
async def test_a_held_slot_is_its_caller_s(how: str) -> None:
    clock = StepClock()
    async with rig_of(echo, clock) as rig:
        stream = rig.holder.reserve(deadline_ms=500)
        if how == "cancel":
            rig.holder.cancel(stream)
            assert (await rig.holder.failure(stream)).executed == "no"
        else:
            rig.holder.link.closed = True
            rig.holder.listener.link_lost(None)
        assert (rig.slots, clock.armed) == (0, 0)
        with pytest.raises(ReplicaDied, match="its caller was lost"):
            await rig.task(stream)


async def test_a_waiting_reservation_can_be_cancelled() -> None:
    async with rig_of(echo, max_ongoing_requests=1) as rig:
        held, waits = rig.holder.reserve(), rig.holder.reserve()
        rig.holder.cancel(waits)
        assert (await rig.holder.failure(waits)).status == 499
        assert await rig.task(held, 1) == 1
        assert rig.slots == 0


@pytest.mark.parametrize("how", ["cancel", "link"])
async def test_a_slot_with_a_task_is_the_task_s(how: str) -> None:
    gate = Gate()
    async with rig_of(gate.function()) as rig:
        stream = rig.holder.reserve()
        task = rig.task(stream, "x")
        await ticks()
        if how == "cancel":
            rig.holder.cancel(stream)
        else:
            rig.holder.link.closed = True
            rig.holder.listener.link_lost(None)
        await ticks()
        assert (rig.slots, gate.cancelled) == (1, [])
        gate.open()
        assert await task == "x"
        assert rig.slots == 0


async def test_a_cancelled_task_cancels_the_function() -> None:
    gate = Gate()
    async with rig_of(gate.function()) as rig:
        stream = rig.holder.reserve()
        task = rig.task(stream, "x")
        await ticks()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        failure = await rig.holder.failure(stream)
        assert (failure.status, failure.executed) == (499, "yes")
        assert (gate.cancelled, rig.slots) == (["x"], 0)


async def test_a_cancelled_task_leaves_its_batch() -> None:
    clock = StepClock()
    batches: list[list[int]] = []

    async def note(items: list[int]) -> list[int]:
        batches.append(items)
        return items

    async with rig_of(note, clock, max_batch_size=4, batch_wait_timeout_s=1) as rig:
        one, two = (rig.task(rig.holder.reserve(), number) for number in (1, 2))
        await ticks()
        one.cancel()
        with pytest.raises(asyncio.CancelledError):
            await one
        assert rig.slots == 1
        clock.step(1)
        assert await two == 2
    assert batches == [[2]]


async def test_a_task_cancelled_as_it_ends() -> None:
    gate = Gate()
    async with rig_of(gate.function()) as rig:
        stream = rig.holder.reserve()
        task = rig.task(stream, "x")
        await ticks()
        gate.open()
        await wait_until(lambda: rig.slots == 0, 5, "the function's end")
        task.cancel()
        await asyncio.wait((task,))
        assert is_free_again(await rig.holder.over(stream))


# -- the end ---------------------------------------------------------------------------------


async def test_a_drain_waits_for_held_slots_and_their_tasks() -> None:
    gate = Gate()
    async with rig_of(gate.function(), max_ongoing_requests=1) as rig:
        held, waits = rig.holder.reserve(), rig.holder.reserve()
        draining = asyncio.ensure_future(rig.replica.drain())
        await ticks()
        assert (await rig.holder.over(waits)).type == FrameType.REFUSED
        assert (await rig.holder.over(rig.holder.reserve())).type == FrameType.REFUSED
        assert not draining.done()
        task = rig.task(held, "x")
        await ticks()
        gate.open()
        assert await task == "x"
        assert await draining is True


async def test_closing_ends_what_is_held_and_what_runs() -> None:
    gate = Gate()
    async with rig_of(gate.function()) as rig:
        held, claimed = rig.holder.reserve(), rig.holder.reserve()
        task = rig.task(claimed, "x")
        await ticks()
        await rig.replica.aclose()
        assert (await rig.holder.failure(held)).executed == "no"
        assert (await rig.holder.failure(claimed)).executed == "yes"
        with pytest.raises(Draining):
            await task
        with pytest.raises(ReplicaDied):
            await rig.task(held)
        assert not isinstance(task.exception(), Cancelled)


# -- who may ask -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FrameType.CALL, FrameType.RESERVE])
async def test_a_proxy_may_send_neither_calls_nor_reservations(kind: FrameType) -> None:
    async with rig_of(echo) as rig:
        proxy = Holder(rig.replica, rig.reservations, may_call=False)
        metas = {
            FrameType.CALL: encode_message(Call("r1", "__call__", [])),
            FrameType.RESERVE: encode_message(Reserve("r1", "__call__")),
        }
        with pytest.raises(ProtocolError, match=f"must not send frames of type {kind:d}"):
            proxy.receive(kind, 1, metas[kind], b"", END)
        assert rig.slots == 0
        link, far = memory_pair()  # and over a link: it ends
        far.receiver = Listener(rig.replica, Bindings(rig.replica.backend), far, may_call=False)
        link.send(kind, 1, metas[kind], b"", END)
        await wait_until(lambda: _is_closed(link), 5, "the link to be closed")


def _is_closed(link: MemoryLink) -> bool:
    return link.closed


async def test_a_stream_is_opened_once() -> None:
    async with rig_of(echo) as rig:
        stream = rig.holder.reserve()
        with pytest.raises(ProtocolError, match="stream 1 is open already"):
            rig.holder.receive(FrameType.RESERVE, stream, encode_message(Reserve("r9", "__call__")), b"", END)


async def test_a_replica_that_goes_says_so() -> None:
    async with rig_of(echo) as rig:
        rig.holder.listener.go_away()
        assert [frame.type for frame in rig.holder.link.sent] == [FrameType.GOAWAY]

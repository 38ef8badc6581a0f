"""Callers that hold back because of others are told when these have ended."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from serveit.calling.handle import CallExchange
from serveit.calling.router import Router
from serveit.clock import DeadlineWheel, LoopClock
from serveit.control.snapshot import BackendInfo, ReplicaInfo
from serveit.observe import NullObserver
from serveit.running import notices
from serveit.running.httpjob import Bindings
from serveit.running.listener import Listener
from serveit.running.replica import Replica
from serveit.wire.frames import Call, FrameType, Load, decode_message, encode_message
from serveit.wire.link import Link, Receiver
from serveit.wire.memory import memory_pair
from serveit.wire.pickles import dump
from tests.callers import Caller, StepClock, running
from tests.support import wait_until


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "DELAY_S", 0.0)


class Work:
    """Calls that wait until the test lets those of their name end; "" waits for nothing."""

    def __init__(self) -> None:
        self.gates: dict[str, asyncio.Event] = {}
        self.running = 0

    def let(self, name: str) -> None:
        self.gates.pop(name).set()

    def function(self) -> object:
        async def work(name: str) -> str:
            self.running += 1
            try:
                if name:
                    await self.gates.setdefault(name, asyncio.Event()).wait()
                return name
            finally:
                self.running -= 1

        return work


async def ticks(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def told(caller: Caller) -> list[int]:
    """What it was told without having asked."""
    return [
        decode_message(Load, frame).others
        for frame in caller.link.sent
        if frame.type == FrameType.PING and frame.stream == 0
    ]


async def test_who_holds_back_is_told_once_the_others_have_ended() -> None:
    work = Work()
    async with running(work.function(), max_ongoing_requests=10) as replica:
        ours, other = Caller(replica), Caller(replica)
        others = [other.call("theirs") for _ in range(9)]
        assert await ours.result(ours.call("")) == ""  # hears of nine others
        ours.call("ours")
        await ticks()
        assert (told(ours), ours.listener.told) == ([], 9)
        work.let("theirs")
        for stream in others:
            await other.over(stream)
        await ticks()
        assert (told(ours), told(other)) == ([0], [])
        assert replica.admission.notices.lanes == {}
        again = [other.call("again") for _ in range(9)]
        await ticks()
        work.let("again")
        for stream in again:
            await other.over(stream)
        await ticks()
        assert told(ours) == [0]  # it does not hold back
        work.let("ours")


async def test_it_is_told_again_when_that_was_not_enough() -> None:
    work = Work()
    async with running(work.function(), max_ongoing_requests=3) as replica:
        ours, other = Caller(replica), Caller(replica)
        other.call("one"), other.call("two")
        await ours.result(ours.call(""))
        ours.call("ours")
        ours.receive(FrameType.CALL, 99, encode_message(Call("r", "__call__", [9])))  # its body is to come
        await ticks()
        work.let("one")
        await ticks()
        assert told(ours) == [1]  # with what it has asked for: full still
        work.let("two")
        await ticks()
        assert told(ours) == [1, 0]
        ours.cancel(99)
        work.let("ours")


async def test_slots_have_to_be_free_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "DELAY_S", 0.005)
    work, clock = Work(), StepClock()
    async with running(work.function(), clock, max_ongoing_requests=2) as replica:
        ours, other = Caller(replica), Caller(replica)
        other.call("theirs")
        await ours.result(ours.call(""))
        ours.call("ours")
        await ticks()
        clock.step(0.005)
        work.let("theirs")
        await ticks()
        clock.step(0.004)
        assert told(ours) == []
        other.call("next")
        clock.step(0.004)
        assert (told(ours), clock.armed) == ([], 0)  # full again
        await ticks()
        work.let("next")
        await ticks()
        clock.step(0.005)
        assert (told(ours), clock.armed) == ([0], 0)
        work.let("ours")


async def test_an_upload_counts_as_its_caller_s_own() -> None:
    work = Work()
    async with running(work.function(), max_ongoing_requests=2) as replica:
        ours, other = Caller(replica), Caller(replica)
        other.call("theirs")
        await ours.result(ours.call(""))
        ours.receive(FrameType.CALL, 99, encode_message(Call("r", "__call__", [9])))
        await wait_until(lambda: "theirs" in work.gates, 5, "theirs to run")
        work.let("theirs")
        await ticks()
        assert told(ours) == [0]
        ours.cancel(99)


async def test_who_was_refused_is_told_whatever_the_figures_say() -> None:
    work = Work()
    async with running(work.function(), max_ongoing_requests=2) as replica:
        ours, other = Caller(replica), Caller(replica)
        other.call("theirs"), other.call("theirs")
        waits, refused = ours.call("ours"), ours.call("")
        await ticks()
        assert (await ours.over(refused)).type == FrameType.REFUSED
        work.let("theirs")
        await ticks()
        assert ours.link.kinds(waits) == [FrameType.QUEUED, FrameType.STARTED]
        assert told(ours) == [0]
        work.let("ours")


async def test_nobody_is_told_while_no_slot_is_free_or_the_replica_drains() -> None:
    work = Work()
    async with running(work.function(), max_ongoing_requests=2) as replica:
        ours, other = Caller(replica), Caller(replica)
        for name in ("one", "two", "three"):
            other.call(name)
        ours.call(""), ours.call("")  # one waits, one is refused
        await ticks()
        work.let("one")  # ours runs, then three
        await ticks()
        assert replica.statistics().running == 2
        assert told(ours) == []
        draining = asyncio.ensure_future(replica.drain())
        await ticks()
        work.let("two")
        work.let("three")
        await draining
        await ticks()
        assert told(ours) == []


async def test_nothing_is_sent_where_nobody_holds_back() -> None:
    work = Work()
    async with running(work.function(), max_ongoing_requests=10) as replica:
        ours, other = Caller(replica), Caller(replica)
        for _ in range(20):
            for caller in ours, other, ours:
                caller.call("")
            await ticks(3)
        await ticks()
        assert (told(ours), told(other)) == ([], [])
        alone = Caller(replica)
        for _ in range(10):
            alone.call("all of it")
        await ticks()
        work.let("all of it")
        await ticks()
        assert told(alone) == []


async def test_a_caller_that_is_gone_is_forgotten() -> None:
    work = Work()
    async with running(work.function(), max_ongoing_requests=2) as replica:
        ours, other = Caller(replica), Caller(replica)
        other.call("theirs"), other.call("theirs")
        ours.call(""), ours.call("")
        assert list(replica.admission.notices.lanes) == [ours.listener]
        assert repr(replica.admission) == "<Admission running=2/2 waiting=1>"
        ours.link.closed = True
        ours.listener.link_lost(None)
        assert replica.admission.notices.lanes == {}
        await wait_until(lambda: "theirs" in work.gates, 5, "theirs to run")
        work.let("theirs")


# -- with routers ----------------------------------------------------------------------------


@asynccontextmanager
async def routers(replica: Replica, count: int, limit: int) -> AsyncIterator[list[Router]]:
    clock = LoopClock()
    wheel = DeadlineWheel(clock)
    bindings = Bindings(replica.backend)

    async def connect(info: ReplicaInfo, receiver: Receiver) -> Link:
        near, far = memory_pair()
        near.receiver, far.receiver = receiver, Listener(replica, bindings, far)
        return near

    info = BackendInfo("work", (ReplicaInfo(replica.id, replica.id),), limit)
    made = [
        Router(info, default_queue=100, connect=connect, clock=clock, wheel=wheel, observer=NullObserver())
        for _ in range(count)
    ]
    for router in made:
        await router.update(info)
    yield made
    for router in made:
        router.close()
    wheel.close()
    await ticks()


def submit(router: Router, name: str) -> CallExchange:
    exchange = CallExchange("__call__", dump(((name,), {}), "the name"), None)
    router.submit(exchange)
    return exchange


async def test_what_waits_runs_when_the_others_have_ended() -> None:
    work = Work()
    async with running(work.function(), max_ongoing_requests=10) as replica, routers(replica, 2, 10) as made:
        ours, other = made
        theirs = [submit(other, "theirs") for _ in range(10)]
        await ticks()
        mine = [submit(ours, "ours") for _ in range(5)]
        await ticks()
        assert work.running == 10
        work.let("theirs")
        await asyncio.gather(*(exchange.result() for exchange in theirs))
        await wait_until(lambda: work.running == 5, 5, "all of ours to run")
        work.let("ours")
        await asyncio.gather(*(exchange.result() for exchange in mine))


@pytest.mark.parametrize("seed", range(5))
async def test_no_request_waits_beside_free_slots(seed: int) -> None:
    """Whatever has happened: once all is quiet, slots are full or nobody waits."""
    work, rng = Work(), random.Random(seed)
    async with running(work.function(), max_ongoing_requests=4) as replica, routers(replica, 3, 4) as made:
        exchanges: list[CallExchange] = []
        for number in range(150):
            router = rng.choice(made)
            exchanges.append(submit(router, rng.choice(("", f"long {number}"))))
            if work.gates and rng.random() < 0.45:
                work.let(rng.choice(list(work.gates)))
            if rng.random() < 0.1:
                rng.choice(exchanges).cancel()
            await ticks(rng.choice((0, 1, 20)))
            if rng.random() < 0.3:
                await ticks(30)
                waiting = sum(router.statistics().waiting for router in made)
                assert not waiting or replica.statistics().running == 4, made
        while work.gates:
            work.let(next(iter(work.gates)))
            await ticks(30)
        assert all(exchange.answer.done() for exchange in exchanges)

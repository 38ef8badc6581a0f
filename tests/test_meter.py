"""What a replica counts of itself."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from serveit.running.replica import Replica
from serveit.testing import ManualClock
from serveit.wire.frames import Figures
from tests.callers import Caller, running
from tests.support import wait_until


def figures(replica: Replica) -> Figures:
    return replica.meter.figures(replica.statistics())


async def half(number: int) -> int:
    if number % 2:
        raise ValueError(f"{number} is odd")
    return number // 2


async def halves(numbers: list[int]) -> list[int]:
    return [number // 2 for number in numbers]


async def test_requests_and_those_that_failed() -> None:
    async with running(half) as replica:
        caller = Caller(replica)
        assert await caller.result(caller.call(2)) == 1
        for wrong in (caller.call(3), caller.call(2, 2), caller.call(2, target="unknown")):
            assert await caller.failure(wrong)
        now = figures(replica)
        assert (now.requests, now.errors, now.running, now.waiting) == (4, 3, 0, 0)
        assert sum(now.queued.counts) == sum(now.processed.counts) == 3, "one was never started"
        assert sum(now.batches.counts) == 0 and now.refusals == {}


async def test_durations_are_the_clock_s() -> None:
    clock, may_end = ManualClock(), asyncio.Event()

    async def wait() -> None:
        await may_end.wait()

    async with running(wait, clock, max_ongoing_requests=1) as replica:
        caller = Caller(replica)
        streams = [caller.call(), caller.call()]
        await clock.advance(2.0)
        now = figures(replica)
        assert (now.requests, now.running, now.waiting) == (2, 1, 1)
        may_end.set()
        await clock.settle()
        for stream in streams:
            await caller.result(stream)
        now = figures(replica)
        assert now.queued.sum == pytest.approx(2.0), "the second waited for the first"
        assert now.processed.sum == pytest.approx(2.0)
        assert (now.running, now.waiting) == (0, 0)


@pytest.mark.parametrize("batches", [False, True])
async def test_a_wait_for_a_thread_is_none_in_user_code(batches: bool) -> None:
    clock, may_end = ManualClock(), threading.Event()
    begun: list[Any] = []

    def wait(item: Any) -> Any:
        begun.append(item)
        assert may_end.wait(5)
        return item

    options = {"max_batch_size": 1, "max_concurrent_batches": 3} if batches else {"max_ongoing_requests": 3}
    async with running(wait, clock, **options) as replica:
        caller = Caller(replica)
        streams = [caller.call(number) for number in range(3)]
        await wait_until(lambda: len(begun) == 1, 5, "one has the thread")
        caller.cancel(streams[2])
        await clock.advance(2.0)
        may_end.set()
        for stream in streams:
            await caller.over(stream)
        now = figures(replica)
        assert (now.requests, now.errors, len(begun)) == (3, 0, 2)
        assert sum(now.queued.counts) == sum(now.processed.counts) == 3
        assert now.queued.sum == pytest.approx(2.0), "the second waited for the first"
        assert now.processed.sum == pytest.approx(2.0)


async def test_what_its_caller_cancelled_is_no_error() -> None:
    never = asyncio.Event()

    async def wait() -> None:
        await never.wait()

    async with running(wait, max_ongoing_requests=1) as replica:
        caller = Caller(replica)
        streams = [caller.call(), caller.call()]
        for stream in reversed(streams):
            caller.cancel(stream)
        for stream in streams:
            await caller.over(stream)
        now = figures(replica)
        assert (now.requests, now.errors) == (2, 0)
        assert sum(now.processed.counts) == 1, "one has run"


async def test_a_deadline_that_passes_is_an_error() -> None:
    clock, may_end = ManualClock(), asyncio.Event()

    async def wait() -> None:
        await may_end.wait()

    async with running(wait, clock, max_ongoing_requests=1) as replica:
        caller = Caller(replica)
        first, late = caller.call(), caller.call(deadline_ms=100)
        await clock.advance(1.0)
        may_end.set()
        await clock.settle()
        await caller.result(first)
        assert (await caller.failure(late)).status == 504
        assert (figures(replica).requests, figures(replica).errors) == (2, 1)


async def test_a_deadline_that_the_caller_sees_first_is_an_error() -> None:
    """As routers do: they cancel what is late."""
    clock, never = ManualClock(), asyncio.Event()

    async def wait() -> None:
        await never.wait()

    async def begin() -> AsyncIterator[int]:
        yield 1
        await never.wait()

    async with running(wait, clock) as replica:
        caller = Caller(replica)
        late, left = caller.call(deadline_ms=100), caller.call(deadline_ms=1000)
        await clock.advance(0.1)
        for stream in (late, left):
            caller.cancel(stream)
            await caller.over(stream)
        assert (figures(replica).requests, figures(replica).errors) == (2, 1)
    async with running(begin, clock) as replica:
        caller = Caller(replica)
        stream = caller.call(deadline_ms=100)
        await clock.advance(1.0)
        caller.cancel(stream)
        await caller.over(stream)
        assert figures(replica).errors == 0, "its answer had begun in time"


async def test_refusals_by_reason() -> None:
    may_end = asyncio.Event()

    async def wait() -> None:
        await may_end.wait()

    async with running(wait, max_ongoing_requests=1) as replica:
        caller = Caller(replica)
        first, waits, refused, again = (caller.call() for _ in range(4))
        await wait_until(lambda: caller.is_over(refused) and caller.is_over(again), 5, "they are refused")
        assert figures(replica).refusals == {"full": 2}
        replica.close_doors()
        for stream in (waits, caller.call()):
            await caller.over(stream)
        may_end.set()
        await caller.result(first)
        now = figures(replica)
        assert now.refusals == {"full": 2, "draining": 2}
        assert (now.requests, now.errors) == (2, 0), "one was let in, and sent away before it ran"


async def test_batches_by_size() -> None:
    clock = ManualClock()
    async with running(halves, clock, max_batch_size=4, batch_wait_timeout_s=1.0) as replica:
        caller = Caller(replica)
        streams = [caller.call(number) for number in range(5)]
        wrong = caller.call()
        await clock.advance(2.0)
        assert [await caller.result(stream) for stream in streams] == [0, 0, 1, 1, 2]
        assert await caller.failure(wrong)
        now = figures(replica)
        assert (now.requests, now.errors) == (6, 1)
        assert (sum(now.batches.counts), now.batches.sum) == (2, 5)
        assert now.batches.cumulated[:3] == [1, 1, 2], "one of 1, one of 4"
        assert sum(now.processed.counts) == 5, "items"

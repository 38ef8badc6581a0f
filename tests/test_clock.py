"""The loop's clock, and deadlines: never early, at most a tick late, exactly once."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serveit.clock import MAX_EMPTY, NEVER, DeadlineWheel, LoopClock
from tests.support import wait_until

TICK_S = 0.01


class FakeTimer:
    cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class FakeClock:
    """Stands still until it is told to go on; keeps its timers in sight."""

    def __init__(self, now: float = 1_000.0) -> None:
        self.now = now
        self.timers: list[tuple[float, int, FakeTimer, Callable[[], Any]]] = []
        self._count = itertools.count()

    def time(self) -> float:
        return self.now

    def call_later(self, delay_s: float, callback: Callable[..., Any], *args: Any) -> FakeTimer:
        assert delay_s >= 0
        timer = FakeTimer()
        entry = (self.now + delay_s, next(self._count), timer, lambda: callback(*args))
        heapq.heappush(self.timers, entry)
        return timer

    @property
    def armed(self) -> list[float]:
        return [when for when, _, timer, _ in self.timers if not timer.cancelled]

    def run_to(self, when: float, most: int = 10_000) -> None:
        """Let time pass up to `when`; each timer fires at its own time."""
        for _ in range(most):
            if not self.timers or self.timers[0][0] > when:
                self.now = max(self.now, when)
                return
            at, _, timer, callback = heapq.heappop(self.timers)
            self.now = max(self.now, at)
            if not timer.cancelled:
                callback()
        raise AssertionError("the timers never come to an end")


class Item:
    def __init__(self, clock: FakeClock, deadline: float) -> None:
        self.clock = clock
        self.deadline = deadline
        self.expired_at: list[float] = []
        self.on_expiry: Callable[[], object] = lambda: None

    def expire(self) -> None:
        self.expired_at.append(self.clock.now)
        self.on_expiry()


class Fixture:
    def __init__(self, now: float = 1_000.0) -> None:
        self.clock = FakeClock(now)
        self.wheel = DeadlineWheel(self.clock, TICK_S)

    def item(self, after_s: float) -> tuple[Item, int]:
        item = Item(self.clock, self.clock.now + after_s)
        return item, self.wheel.add(item, item.deadline)


@pytest.fixture
def at() -> Fixture:
    return Fixture()


# -- deadlines ------------------------------------------------------------------------------------


@given(
    st.floats(0, 1e6),
    st.lists(st.tuples(st.floats(0, 5), st.floats(-1, 5), st.booleans()), max_size=20),
)
def test_never_early_and_at_most_a_tick_late(start: float, arrivals: list[tuple[float, float, bool]]) -> None:
    at = Fixture(start)
    added: list[tuple[Item, float, bool]] = []
    for when, after_s, discarded in sorted(arrivals):
        at.clock.run_to(max(at.clock.now, start + when))
        item, bucket = at.item(after_s)
        added.append((item, at.clock.now, discarded))
        if discarded:
            at.wheel.discard(item, bucket)
    at.clock.run_to(at.clock.now + 10)
    for item, added_at, discarded in added:
        if discarded:
            assert item.expired_at == []
            continue
        (expired_at,) = item.expired_at
        assert expired_at >= item.deadline
        assert expired_at <= max(item.deadline, added_at) + TICK_S * 1.001 + 1e-9
    assert len(at.wheel) == 0
    assert at.clock.armed == [], "no timer stays when nothing is watched"


def test_one_timer_is_armed_for_the_earliest(at: Fixture) -> None:
    assert at.clock.armed == []
    late, _ = at.item(5)
    assert len(at.clock.armed) == 1
    early, _ = at.item(1)
    at.item(3)
    at.item(3)
    (armed,) = at.clock.armed
    assert early.deadline <= armed <= early.deadline + TICK_S
    assert len(at.wheel) == 4
    at.clock.run_to(at.clock.now + 2)
    assert early.expired_at and not late.expired_at
    assert len(at.clock.armed) == 1
    assert "3 deadlines, armed for 1003.0" in repr(at.wheel)


def test_items_expire_in_the_order_of_their_buckets_after_a_long_pause(at: Fixture) -> None:
    seen: list[float] = []
    for after_s in (0.5, 0.1, 0.3):
        item, _ = at.item(after_s)
        item.on_expiry = lambda item=item: seen.append(item.deadline)  # type: ignore[misc]
    at.clock.now += 60  # the loop was blocked
    at.clock.run_to(at.clock.now)
    assert seen == sorted(seen) and len(seen) == 3


def test_a_deadline_that_has_passed_expires_in_the_next_turn_and_not_within_add(at: Fixture) -> None:
    item, _ = at.item(-5)
    assert item.expired_at == []
    at.clock.run_to(at.clock.now)
    assert item.expired_at == [at.clock.now]


def test_a_discarded_item_is_forgotten_and_may_be_discarded_again(at: Fixture) -> None:
    item, bucket = at.item(1)
    at.wheel.discard(item, bucket)
    at.wheel.discard(item, bucket)
    assert len(at.wheel) == 0
    at.clock.run_to(at.clock.now + 2)
    assert item.expired_at == []
    at.wheel.discard(item, bucket)
    assert repr(at.wheel) == "<DeadlineWheel 0 deadlines, idle>"


def test_buckets_emptied_before_their_time_are_passed_over(at: Fixture) -> None:
    emptied = [at.item(n) for n in (1, 2, 3)]
    last, _ = at.item(4)
    for item, bucket in emptied:
        at.wheel.discard(item, bucket)
    at.clock.run_to(at.clock.now + 1.5)
    (armed,) = at.clock.armed
    assert armed >= last.deadline
    assert len(at.wheel._buckets) == 1


def test_an_emptied_bucket_takes_little_memory_until_its_time(at: Fixture) -> None:
    many = [at.item(60) for _ in range(1_000)]
    bucket = many[0][1]
    grown = sys.getsizeof(at.wheel._buckets[bucket])
    for item, number in many:
        at.wheel.discard(item, number)
    assert sys.getsizeof(at.wheel._buckets[bucket]) == sys.getsizeof(set()) < grown / 20


def test_far_deadlines_that_are_met_leave_no_buckets(at: Fixture) -> None:
    kept, bucket = at.item(90_000)
    for n in range(5 * MAX_EMPTY):
        item, number = at.item(80_000 + n)
        at.wheel.discard(item, number)
        at.wheel.discard(item, number)  # twice counts once
    assert len(at.wheel._buckets) <= MAX_EMPTY + 2
    assert sorted(at.wheel._order) == sorted(at.wheel._buckets)
    assert at.wheel._empty == sum(not members for members in at.wheel._buckets.values())
    assert len(at.wheel) == 1
    near, _ = at.item(1)
    at.clock.run_to(at.clock.now + 100_000)
    assert near.expired_at and kept.expired_at
    assert at.wheel._empty == len(at.wheel._buckets) == 0


def test_buckets_in_use_are_not_swept(at: Fixture) -> None:
    items = [at.item(n) for n in range(1, 2 * MAX_EMPTY)]
    for item, bucket in items[: MAX_EMPTY - 1]:
        at.wheel.discard(item, bucket)
    again = [at.item(n)[0] for n in range(1, MAX_EMPTY)]  # in the emptied ones
    assert at.wheel._empty == 0
    at.clock.run_to(at.clock.now + 2 * MAX_EMPTY, most=10**6)
    assert all(item.expired_at for item in again)
    assert all(item.expired_at for item, _ in items[MAX_EMPTY - 1 :])


def test_items_may_be_added_while_others_expire(at: Fixture) -> None:
    first, _ = at.item(1)
    added: list[Item] = []
    first.on_expiry = lambda: added.extend(at.item(after_s)[0] for after_s in (-1, 0, 0.5))
    at.clock.run_to(at.clock.now + 2)
    assert [len(item.expired_at) for item in [first, *added]] == [1, 1, 1, 1]
    assert len(at.wheel) == 0


def test_an_item_may_discard_another_whose_turn_it_is(at: Fixture) -> None:
    pairs = [at.item(1) for _ in range(2)]
    (one, bucket), (other, _) = pairs
    one.on_expiry = lambda: at.wheel.discard(other, bucket)
    other.on_expiry = lambda: at.wheel.discard(one, bucket)
    later, later_bucket = at.item(1.5)
    at.clock.now += 5
    at.clock.run_to(at.clock.now)
    assert len(one.expired_at) + len(other.expired_at) == 1
    assert len(later.expired_at) == 1
    assert len(at.wheel) == 0


def test_what_waits_for_its_turn_counts_and_close_forgets_it(at: Fixture) -> None:
    pair = [at.item(1)[0] for _ in range(2)]
    counts: list[int] = []

    def close() -> None:
        counts.append(len(at.wheel))
        at.wheel.close()

    for item in pair:
        item.on_expiry = close
    at.clock.run_to(at.clock.now + 2)
    assert counts == [1]
    assert sum(len(item.expired_at) for item in pair) == 1


def test_an_expiry_that_raises_costs_the_others_nothing(
    at: Fixture, caplog: pytest.LogCaptureFixture
) -> None:
    items = [at.item(1)[0] for _ in range(3)]

    def fail() -> None:
        raise ZeroDivisionError("in expire")

    for item in items:
        item.on_expiry = fail
    at.clock.run_to(at.clock.now + 2)
    assert [len(item.expired_at) for item in items] == [1, 1, 1]
    assert caplog.text.count("ZeroDivisionError: in expire") == 3
    assert caplog.records[0].message == "a deadline passed, and that could not be handled"


def test_an_infinite_deadline_never_comes_and_a_far_one_does_not_hurt(at: Fixture) -> None:
    endless, bucket = at.item(math.inf)
    assert bucket == NEVER
    assert at.clock.armed == []
    at.wheel.discard(endless, bucket)
    far, _ = at.item(1e15)
    near, _ = at.item(1)
    at.clock.run_to(at.clock.now + 2)
    assert near.expired_at and not far.expired_at
    with pytest.raises(ValueError, match="NaN"):
        at.item(math.nan)


def test_close_forgets_everything_and_the_wheel_may_be_used_again(at: Fixture) -> None:
    item, bucket = at.item(1)
    at.wheel.close()
    assert at.clock.armed == [] and len(at.wheel) == 0
    at.wheel.discard(item, bucket)
    at.wheel.close()
    again, _ = at.item(1)
    at.clock.run_to(at.clock.now + 5)
    assert item.expired_at == [] and len(again.expired_at) == 1


def test_a_timer_that_fires_a_little_early_expires_nothing_early(at: Fixture) -> None:
    item, _ = at.item(1)
    when, _, timer, fire = at.clock.timers[0]
    at.clock.now = when - 1e-9
    timer.cancel()
    fire()
    assert item.expired_at == []
    at.clock.run_to(when + TICK_S)
    assert len(item.expired_at) == 1


# -- the loop's clock -----------------------------------------------------------------------------


async def test_the_loop_clock_is_the_loops() -> None:
    clock = LoopClock()
    loop = asyncio.get_running_loop()
    before = loop.time()
    assert before <= clock.time() <= loop.time()
    called: list[object] = []
    clock.call_later(0, called.append, 1)
    clock.call_later(0, called.append, 2).cancel()
    await wait_until(lambda: called, 5, "the timer fires")
    await asyncio.sleep(0)
    assert called == [1]


async def test_a_wheel_on_the_loop_clock_is_never_early() -> None:
    clock = LoopClock()
    wheel = DeadlineWheel(clock, tick_s=0.001)
    expired: dict[int, float] = {}

    class Late:
        def __init__(self, n: int) -> None:
            self.deadline = clock.time() + n * 0.0007
            self.n = n

        def expire(self) -> None:
            expired[self.n] = clock.time()

    items = [Late(n) for n in range(20)]
    for item in items:
        wheel.add(item, item.deadline)
    await wait_until(lambda: len(expired) == len(items), 5, "all expire")
    assert all(expired[item.n] >= item.deadline for item in items)
    wheel.close()

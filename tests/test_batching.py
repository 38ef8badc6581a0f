from __future__ import annotations

import asyncio
import contextvars
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import serveit
from serveit import App, BatchError, ItemErrors
from serveit.running.batching import Batcher, BatcherStatistics, batch_outcomes, failed_outcomes
from serveit.testing import ManualClock
from serveit.types import Clock
from tests.callers import StepClock

color: contextvars.ContextVar[str] = contextvars.ContextVar("color", default="none")


class Runs:
    """A `run` that notes its batches and ends each when it is told to."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.open: list[asyncio.Future[None]] = []

    async def __call__(self, batch: list[int]) -> None:
        self.batches.append(batch)
        self.open.append(asyncio.get_running_loop().create_future())
        await self.open[-1]

    async def end(self, index: int = -1) -> None:
        self.open.pop(index).set_result(None)
        await ticks()

    async def end_all(self) -> None:
        while self.open:
            await self.end()


async def ticks(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def batcher(
    run: Callable[[list[int]], Any],
    clock: Clock,
    *,
    size: int = 2,
    wait_s: float = 0.0,
    concurrent: int = 1,
    wanted: Callable[[int], bool] = lambda _: True,
    context: contextvars.Context | None = None,
) -> Batcher[int]:
    return Batcher(
        run,
        max_size=size,
        wait_s=wait_s,
        max_concurrent=concurrent,
        clock=clock,
        wanted=wanted,
        context=context,
    )


async def test_the_first_runs_alone_at_once_and_the_rest_in_few_batches() -> None:
    clock = ManualClock()
    sizes: list[int] = []
    begun: list[float] = []

    async def fifty_ms(batch: list[int]) -> None:
        sizes.append(len(batch))
        begun.append(clock.time())
        over = asyncio.Event()
        clock.call_later(0.05, over.set)
        await over.wait()

    gathers = batcher(fifty_ms, clock, size=8)
    start = clock.time()
    for item in range(24):
        gathers.put(item)
        await clock.advance(0.005)
    await clock.advance(1)
    assert sizes[0] == 1
    assert begun[0] == start
    assert sum(sizes) == 24
    assert len(sizes) <= 6


async def test_three_at_once_make_a_batch_of_two_and_after_the_wait_one_of_one() -> None:
    clock, runs = ManualClock(), Runs()
    gathers = batcher(runs, clock, size=2, wait_s=1.0)
    for item in range(3):
        gathers.put(item)
    await clock.settle()
    assert runs.batches == [[0, 1]]
    await runs.end()
    await clock.advance(0.99)
    assert runs.batches == [[0, 1]]
    await clock.advance(0.01)
    assert runs.batches == [[0, 1], [2]]
    await runs.end_all()


async def test_the_wait_counts_from_the_arrival_of_the_first_item() -> None:
    clock, runs = ManualClock(), Runs()
    gathers = batcher(runs, clock, size=9, wait_s=1.0)
    gathers.put(0)
    await clock.advance(0.6)
    gathers.put(1)
    await clock.advance(0.4)
    assert runs.batches == [[0, 1]]
    gathers.put(2)
    await clock.advance(2)  # it has waited long enough when the slot is free
    await runs.end()
    assert runs.batches == [[0, 1], [2]]
    await runs.end_all()


async def test_items_of_one_tick_go_together_and_a_full_batch_does_not_wait() -> None:
    runs = Runs()
    gathers = batcher(runs, StepClock(), size=3, wait_s=60.0)
    for item in range(7):
        gathers.put(item)
    await ticks()
    assert runs.batches == [[0, 1, 2]]
    assert gathers.statistics() == BatcherStatistics(gathering=4, batches_running=1)
    assert repr(gathers) == "<Batcher gathering=4/3 running=1/1>"
    await runs.end()
    assert runs.batches == [[0, 1, 2], [3, 4, 5]]
    await runs.end_all()


async def test_so_many_batches_run_at_once() -> None:
    runs = Runs()
    gathers = batcher(runs, StepClock(), size=1, concurrent=2)
    for item in range(3):
        gathers.put(item)
    await ticks()
    assert runs.batches == [[0], [1]]
    await runs.end(0)
    assert runs.batches == [[0], [1], [2]]
    await runs.end_all()


async def test_a_discarded_item_goes_into_no_batch_and_the_last_one_takes_the_timer_along() -> None:
    clock, runs = StepClock(), Runs()
    gathers = batcher(runs, clock, wait_s=1.0)
    gathers.put(0)
    gathers.put(1)
    gathers.discard(0)
    await ticks()
    assert clock.armed == 1
    gathers.discard(7)
    assert clock.armed == 1
    gathers.discard(1)
    assert clock.armed == 0
    clock.step(2)
    await ticks()
    assert runs.batches == []


async def test_those_that_are_not_wanted_any_more_are_left_out() -> None:
    runs = Runs()
    gathers = batcher(runs, StepClock(), size=3, wanted=lambda item: item % 2 == 1)
    for item in range(6):
        gathers.put(item)
    await ticks()
    assert runs.batches == [[1, 3, 5]]
    gathers.put(8)
    await runs.end()
    assert runs.batches == [[1, 3, 5]]
    assert gathers.statistics().gathering == 0


async def test_new_options_hold_for_what_is_queued() -> None:
    clock, runs = StepClock(), Runs()
    gathers = batcher(runs, clock, size=4, wait_s=60.0)
    gathers.put(0)
    gathers.put(1)
    await ticks()
    assert runs.batches == []
    gathers.adjust(max_size=1, wait_s=60.0, max_concurrent=2)
    await ticks()
    assert runs.batches == [[0], [1]]
    gathers.adjust(max_size=2, wait_s=60.0, max_concurrent=3)
    gathers.put(2)
    await ticks()
    assert len(runs.batches) == 2
    gathers.hurry()
    await ticks()
    assert runs.batches == [[0], [1], [2]]
    assert gathers.max_size == 2
    await runs.end_all()


async def test_each_batch_runs_in_a_copy_of_the_context() -> None:
    seen: list[str] = []

    async def paint(batch: list[int]) -> None:
        seen.append(color.get())
        color.set("red")

    context = contextvars.Context()
    context.run(color.set, "white")
    gathers = batcher(paint, StepClock(), size=1, context=context)
    color.set("the caller's")
    gathers.put(0)
    gathers.put(1)
    await ticks(10)
    assert seen == ["white", "white"]


@given(data=st.data())
@settings(max_examples=60)
def test_every_item_is_in_one_batch_in_its_order_and_no_batch_is_too_large(data: st.DataObject) -> None:
    size, concurrent = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    wait_s = data.draw(st.sampled_from([0.0, 0.5, 3.0]))
    steps = data.draw(st.lists(st.sampled_from(["put", "put", "put", "tick", "time", "end"]), max_size=60))

    async def main() -> None:
        clock, runs = StepClock(), Runs()
        gathers = batcher(runs, clock, size=size, wait_s=wait_s, concurrent=concurrent)
        count = 0
        for step in steps:
            if step == "put":
                gathers.put(count)
                count += 1
            elif step == "tick":
                await ticks()
            elif step == "time":
                clock.step(0.4)
            elif runs.open:
                await runs.end(random.randrange(len(runs.open)))
            assert len(runs.open) <= concurrent
        for _ in range(count + 1):
            clock.step(3)
            await ticks()
            await runs.end_all()
        assert [item for batch in runs.batches for item in batch] == list(range(count))
        assert all(1 <= len(batch) <= size for batch in runs.batches)
        assert gathers.statistics() == BatcherStatistics(0, 0)

    asyncio.run(main())


class Loud:
    """A sequence whose own code fails."""

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Any:
        raise OverflowError("too loud")


class Boastful(list[int]):
    """Says that it is longer than it is."""

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize("value", [[1, 2], (1, 2), deque([1, 2]), {1: 1, 2: 2}.values()])
def test_any_sequence_is_a_result(value: Any) -> None:
    assert batch_outcomes(value, 2, "b") == [1, 2]


def test_an_array_is_a_row_per_item() -> None:
    numpy = pytest.importorskip("numpy")
    rows = batch_outcomes(numpy.arange(6).reshape(2, 3), 2, "b")
    assert [row.tolist() for row in rows] == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(TypeError, match="0-d"):
        batch_outcomes(numpy.array(1), 2, "b")


@pytest.mark.parametrize("value", [None, "ab", b"ab", bytearray(2), {1: 1, 2: 2}, {1, 2}, 2, iter([1, 2])])
def test_what_is_no_sequence_is_named(value: Any) -> None:
    said = f"batch function of backend 'b' must return a list .* got {type(value).__name__}"
    with pytest.raises(BatchError, match=said):
        batch_outcomes(value, 2, "b")


@pytest.mark.parametrize("value", [[], [1], [1, 2, 3]])
def test_a_wrong_length_names_both(value: list[int]) -> None:
    with pytest.raises(BatchError, match=f"got 2 items and returned {len(value)} results"):
        batch_outcomes(value, 2, "b")


def test_a_sequence_that_lies_or_fails_is_no_result() -> None:
    with pytest.raises(BatchError, match="returned 1 results"):
        batch_outcomes(Boastful([1]), 2, "b")
    with pytest.raises(OverflowError):
        batch_outcomes(Loud(), 2, "b")


def test_what_is_raised_fails_all_but_for_item_errors() -> None:
    error = KeyError("x")
    assert failed_outcomes(error, 3, "b") == [error] * 3
    assert failed_outcomes(ItemErrors([1, error]), 2, "b") == [1, error]
    short = failed_outcomes(ItemErrors([1, error]), 3, "b")
    assert [type(outcome) for outcome in short] == [BatchError] * 3
    assert "got 3 items and returned 2 results" in str(short[0])


async def test_calls_five_ms_apart_really_gather_while_a_batch_runs() -> None:
    app = App()
    sizes: list[int] = []

    @app.backend(max_batch_size=8)
    async def work(items: list[int]) -> list[int]:
        sizes.append(len(items))
        await asyncio.sleep(0.05)
        return [item * 2 for item in items]

    async with serveit.serve(app, local=True, http={"location": None}) as client:
        handle = client.get_handle("work")
        calls = []
        for item in range(24):
            calls.append(asyncio.ensure_future(handle.call(item)))
            await asyncio.sleep(0.005)
        assert await asyncio.gather(*calls) == [item * 2 for item in range(24)]
    assert sizes[0] == 1
    assert sum(sizes) == 24
    assert len(sizes) <= 6

"""Handles: streams and `map`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from serveit import App
from tests.flow import apps
from tests.flow.conftest import Served
from tests.flow.gates import Gate
from tests.support import wait_until


@pytest.fixture
def app() -> App:
    return apps.handles


async def test_items_come_one_by_one(served: Served) -> None:
    assert [item async for item in served.handle("Desk").count.stream(5)] == [0, 1, 2, 3, 4]
    assert [item async for item in served.handle("Desk").count.stream(0)] == []
    assert [item async for item in served.handle("Plain").words.stream("a def b")] == ["a", "def", "b"]
    assert len([item async for item in served.handle("Desk").count.stream(5_000)]) == 5_000


async def test_a_stream_that_fails_gives_its_items_first(served: Served) -> None:
    items = []
    with pytest.raises(apps.OwnError, match="2 is bad") as caught:
        async for item in served.handle("Desk").count.stream(5, bad=2):
            items.append(item)  # noqa: PERF401
    assert items == [0, 1] and caught.value.code == 2
    assert "in count" in str(caught.value.__cause__)


async def test_a_stream_is_no_value_and_a_value_no_stream(served: Served) -> None:
    with pytest.raises(TypeError, match="returned a stream, not a value"):
        await served.handle("Desk").count.call(3)
    with pytest.raises(TypeError, match="returned a value, not a stream"):
        await anext(served.handle("Desk").explain.stream(3))


async def test_who_stops_reading_closes_the_generator(served: Served, gate: Gate) -> None:
    stream = served.handle("Desk").endless.stream(str(gate.folder))
    assert len(await anext(stream)) == 1
    await stream.aclose()  # type: ignore[attr-defined]
    await wait_until(lambda: "closed" in gate.notes, 5, "the generator is closed")


async def test_who_does_not_read_holds_the_generator_back(served: Served, gate: Gate) -> None:
    stream = served.handle("Desk").endless.stream(str(gate.folder), 100_000)
    await anext(stream)
    made = 0
    while len(gate.notes) != made:
        made = len(gate.notes)
        await asyncio.sleep(0.05)
    assert made < 20, "800 kB each: the credit, the sockets' buffers, and little more"
    for _ in range(100):
        await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    await wait_until(lambda: "closed" in gate.notes, 5, "the generator is closed")


async def numbers(count: int) -> AsyncIterator[int]:
    for number in range(count):
        yield number


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("max_in_flight", [1, 7, 64])
async def test_map_keeps_the_order(served: Served, is_async: bool, max_in_flight: int) -> None:
    items: Any = numbers(100) if is_async else range(100)
    results = [x async for x in served.handle("double").map(items, max_in_flight=max_in_flight)]
    assert results == [2 * number for number in range(100)]


async def test_unordered_results_come_with_their_index(served: Served) -> None:
    pairs = [pair async for pair in served.handle("Desk").hurry.map(range(10), ordered=False)]
    assert sorted(pairs) == [(number, number) for number in range(10)]
    assert pairs[0][0] > 0, "the first to be asked is the last to be ready"


async def test_the_first_error_ends_a_map(served: Served) -> None:
    def items() -> Iterator[Any]:
        yield from (1, 2, "x")
        yield 3

    results = []
    with pytest.raises(TypeError, match="unsupported operand"):
        async for result in served.handle("Desk").hurry.map(items(), max_in_flight=1):
            results.append(result)  # noqa: PERF401
    assert results == [1, 2]


async def test_a_map_closed_early_cancels_what_is_under_way(served: Served, gate: Gate) -> None:
    results = served.handle("Desk").wait.map([str(gate.folder)] * 5, ordered=False)
    first = asyncio.ensure_future(anext(results))
    await wait_until(lambda: gate.notes == ["in"] * 5, 5, "all run")
    first.cancel()
    await wait_until(lambda: gate.notes[5:] == ["CancelledError"] * 5, 5, "all are cancelled")

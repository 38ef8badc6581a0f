"""Batch functions: lists in, lists out, whoever calls."""

from __future__ import annotations

import asyncio

import pytest

from serveit import App
from serveit.exceptions import BatchError
from tests.flow import apps
from tests.flow.answers import problem
from tests.flow.conftest import Served


@pytest.fixture
def app() -> App:
    return apps.batches


async def test_calls_are_gathered(served: Served) -> None:
    half = served.handle("Half")
    await half.batch_sizes.call()
    assert await asyncio.gather(*(half.call(2 * number) for number in range(32))) == list(range(32))
    sizes = await half.batch_sizes.call()
    assert sum(sizes) == 32 and len(sizes) <= 8 and max(sizes) <= 8


async def test_http_and_handles_share_batches(served: Served) -> None:
    half = served.handle("Half")
    await half.batch_sizes.call()
    reply, called = await asyncio.gather(served.http.post("/half", json=4), half.call(6))
    assert (reply.json(), called) == (2, 3)
    assert sum(await half.batch_sizes.call()) == 2


async def test_an_item_that_fails_fails_alone(served: Served) -> None:
    half = served.handle("Half")
    results = await asyncio.gather(*(half.call(n) for n in (2, 3, 4, 5)), return_exceptions=True)
    assert [results[0], results[2]] == [1, 2]
    assert [str(results[1]), str(results[3])] == ["3 is odd", "5 is odd"]
    assert all(isinstance(results[index], ValueError) for index in (1, 3))
    replies = await asyncio.gather(*(served.http.post("/half", json=n) for n in (2, 3)))
    assert replies[0].json() == 1
    problem(replies[1], 500, "yes")


async def test_an_exception_fails_the_batch(served: Served) -> None:
    half = served.handle("Half")
    results = await asyncio.gather(*(half.call(n) for n in (2, 13)), return_exceptions=True)
    assert isinstance(results[1], apps.OwnError) and results[1].code == 13
    assert isinstance(results[0], apps.OwnError) or results[0] == 1  # if it was in another batch
    assert await half.call(4) == 2


async def test_results_that_do_not_fit_are_named(served: Served) -> None:
    with pytest.raises(BatchError, match="1 item.* 0 |0 results.* 1 item"):
        await served.handle("Half").call(101)
    problem(await served.http.post("/half", json=101), 500, "yes")


async def test_a_batch_of_a_def(served: Served) -> None:
    upper = served.handle("upper")
    assert await asyncio.gather(*(upper.call(text) for text in "abcdefgh")) == list("ABCDEFGH")
    assert (await served.http.post("/upper", json="text")).text == "TEXT"


async def test_an_item_is_one_argument(served: Served) -> None:
    with pytest.raises(TypeError, match="one item"):
        await served.handle("Half").call(1, 2)
    assert problem(await served.http.post("/half", json="two"), 422)
    assert problem(await served.http.get("/half"), 405)


async def test_map_fills_batches(served: Served) -> None:
    half = served.handle("Half")
    await half.batch_sizes.call()
    assert [x async for x in half.map(range(0, 200, 2), max_in_flight=32)] == list(range(0, 100))
    sizes = await half.batch_sizes.call()
    assert sum(sizes) == 100 and len(sizes) <= 40


async def test_a_cancelled_item_leaves_its_batch(served: Served) -> None:
    half = served.handle("Half")
    one, two = (asyncio.ensure_future(half.call(number)) for number in (2, 4))
    await asyncio.sleep(0.005)
    one.cancel()
    assert await two == 2

"""Batch functions: lists in, lists out, whoever calls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from serveit import App
from serveit.exceptions import BatchError
from tests.flow import apps
from tests.flow.answers import problem
from tests.flow.conftest import Serve, Served
from tests.flow.models import WAIT_S, WRONG, models


@pytest.fixture
def app() -> App:
    return apps.batches


@pytest.fixture
async def gathering(serve: Serve) -> AsyncIterator[Served]:
    """A backend whose batches of four wait to be filled."""
    async with serve(models) as served:
        yield served


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


async def test_http_and_handles_fill_one_batch(gathering: Served) -> None:
    assert (await gathering.http.get("/call")).status_code == 200  # its connection is there
    call = gathering.handle("Gathering").call
    found = await asyncio.gather(
        *(gathering.http.post("/gather", json=word) for word in "ab"), *(call(word) for word in "cd")
    )
    answers = [reply.json() for reply in found[:2]] + list(found[2:])
    assert answers == [["__call__", ["a", "b", "c", "d"], word] for word in "abcd"]


async def test_methods_share_no_batch(gathering: Served) -> None:
    handle = gathering.handle("Gathering")
    calls = [way.call(word) for word in "abcd" for way in (handle, handle.other)]
    found = await asyncio.gather(*calls)
    expected = [[name, ["a", "b", "c", "d"], word] for word in "abcd" for name in ("__call__", "other")]
    assert found == expected


async def test_the_wait_begins_with_the_first_item_also_after_idling(gathering: Served) -> None:
    handle = gathering.handle("Gathering")
    await asyncio.sleep(1.2 * WAIT_S)  # longer than a batch waits: the original then served the first alone
    begun = time.monotonic()
    first = asyncio.ensure_future(handle.call("first"))
    await asyncio.sleep(WAIT_S / 10)
    assert not first.done()
    second = await handle.call("second")
    assert (await first)[1] == second[1] == ["first", "second"]
    assert time.monotonic() - begun > 0.9 * WAIT_S


async def test_a_def_runs_off_the_loop(gathering: Served) -> None:
    handle = gathering.handle("Gathering")
    threads = set(await asyncio.gather(*(handle.plain.call(word) for word in "abcd")))
    assert len(threads) == 1 and await handle.loop_thread.call() not in threads


@pytest.mark.parametrize("fault", [*WRONG, "generator"], ids=str)
async def test_what_is_no_list_of_results_is_named(gathering: Served, fault: str) -> None:
    wrong = gathering.handle("Gathering").wrong
    results = await asyncio.gather(*(wrong.call(fault) for _ in range(4)), return_exceptions=True)
    named = {
        "None": "got NoneType",
        "shorter": "got 4 items and returned 3",
        "longer": "4 items and returned 5",
    }
    for error in results:
        assert isinstance(error, BatchError) and error.executed == "yes"
        assert "batch function of backend 'Gathering'" in str(error)
        assert named.get(fault, f"got {fault}") in str(error)


async def test_item_errors_fail_their_items(gathering: Served) -> None:
    raising = gathering.handle("Gathering").raising
    results = await asyncio.gather(*(raising.call(number) for number in (2, 3, 4, 5)), return_exceptions=True)
    assert [results[0], results[2]] == [1, 2]
    assert [repr(error) for error in results[1::2]] == ["ValueError('3 is odd')", "ValueError('5 is odd')"]

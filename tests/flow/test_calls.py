"""Handles: arguments, results, exceptions, options."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import numpy as np
import pytest

from serveit import App, Handle
from serveit.exceptions import DeadlineExceeded, EncodingError, RemoteError, RemoteTraceback
from tests.flow import apps
from tests.flow.conftest import Served
from tests.flow.gates import Gate
from tests.support import wait_until


@pytest.fixture
def app() -> App:
    return apps.handles


async def test_arguments_and_results_arrive_as_they_were_given(served: Served) -> None:
    desk = served.handle("Desk")
    for value in (7, None, "text", b"octets", [1, {"a": (2, 3)}], {1, 2}, 2 + 3j, float("inf"), Desk_like(3)):
        assert await desk.call(value) == value
    assert await desk.call() == ((), {})
    assert await desk.call(1, 2, key="word") == ((1, 2), {"key": "word"})


class Desk_like:
    def __init__(self, x: int) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Desk_like) and other.x == self.x

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("count", [0, 10, 100_000, 4_000_000])
async def test_arrays_of_all_sizes_both_ways_and_writable(served: Served, count: int) -> None:
    array = np.arange(count + 1, dtype=np.float64)
    result: Any = await served.handle("Desk").written.call(array)
    assert array[0] == 0, "the caller's own is not touched"
    result[:1] += 1
    assert result[0] == 8 and np.array_equal(result[1:], array[1:])


async def test_large_octets_both_ways_at_the_same_time(served: Served) -> None:
    desk = served.handle("Desk")
    bodies = [bytes([number]) * 16 * 1024 * 1024 for number in range(4)]
    assert await asyncio.gather(*(desk.call(body) for body in bodies)) == bodies


async def test_many_calls_at_once_get_each_its_own_answer(served: Served) -> None:
    desk = served.handle("Desk")
    assert await asyncio.gather(*(desk.call(number) for number in range(1_000))) == list(range(1_000))


async def test_methods_and_options(served: Served) -> None:
    desk = served.handle("Desk")
    assert await desk.explain.call(3) == "3!"
    assert await desk.options(method_name="explain").call(3) == "3!"
    assert await desk.options(timeout_s=5).explain.call(4) == "4!"
    assert await desk.call(5) == 5, "options make a copy"
    assert repr(desk.explain) == f"<Handle {served.app_name}/Desk.explain>"
    with pytest.raises(AttributeError, match="did you mean 'explain'"):
        await desk.explian.call(3)
    with pytest.raises(TypeError, match="timeout"):
        desk.options(timeout=3)


async def test_a_route_has_a_handle_too(served: Served) -> None:
    assert await served.handle("doubles").call(21) == 42


async def test_unknown_names_are_suggested(served: Served) -> None:
    with pytest.raises(KeyError, match="no backend or endpoint 'Desck': did you mean 'Desk'"):
        served.handle("Desck")
    with pytest.raises(KeyError, match="no backend or endpoint 'duoble': did you mean"):
        served.sync_handle("duoble")


async def test_wrong_arguments_are_the_functions_own_error(served: Served) -> None:
    with pytest.raises(TypeError, match="explain.* missing 1 required positional argument: 'number'"):
        await served.handle("Desk").explain.call()


async def test_an_exception_arrives_as_itself_with_its_traceback(served: Served) -> None:
    with pytest.raises(apps.OwnError, match="nothing under that name") as caught:
        await served.handle("Desk").fail.call("own")
    assert caught.value.code == 7
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert "in fail" in str(caught.value.__cause__) and "apps.py" in str(caught.value.__cause__)
    with pytest.raises(apps.WordedError, match="^no such name: try another$") as worded:
        await served.handle("Desk").fail.call("worded")
    assert worded.value.name == "such name" and "in fail" in str(worded.value.__cause__)


@pytest.mark.parametrize(
    ("how", "text"), [("not rebuilt", "NotRebuilt: 1 and 2"), ("not pickled", "LookupError: .*holds a lock")]
)
async def test_an_exception_that_cannot_be_rebuilt_is_described(served: Served, how: str, text: str) -> None:
    with pytest.raises(RemoteError, match=text) as caught:
        await served.handle("Desk").fail.call(how)
    assert "in fail" in str(caught.value) and caught.value.executed == "yes"


async def test_what_does_not_pickle(served: Served) -> None:
    desk = served.handle("Desk")
    with pytest.raises(EncodingError, match="result.*Unpicklable") as caught:
        await desk.fail.call("result")
    assert caught.value.executed == "yes"
    with pytest.raises(EncodingError, match="argument of 'Desk'") as caught:
        await desk.call(apps.Unpicklable())
    assert caught.value.executed == "no"
    assert await desk.call(1) == 1


async def test_a_timeout_cancels_what_runs(served: Served, gate: Gate) -> None:
    with pytest.raises(DeadlineExceeded) as caught:
        await served.handle("Desk").options(timeout_s=0.2).wait.call(str(gate.folder))
    assert caught.value.executed == "maybe"
    await wait_until(lambda: gate.notes == ["in", "CancelledError"], 5, "it is cancelled")


async def test_cancelling_the_caller_cancels_what_runs(served: Served, gate: Gate) -> None:
    call = asyncio.ensure_future(served.handle("Desk").wait.call(str(gate.folder)))
    await wait_until(lambda: gate.notes == ["in"], 5, "it runs")
    call.cancel()
    await wait_until(lambda: gate.notes == ["in", "CancelledError"], 5, "it is cancelled")


async def test_a_def_runs_on_one_thread(served: Served) -> None:
    plain = served.handle("Plain")
    assert await asyncio.gather(*(plain.call(number) for number in range(200))) == list(range(200))
    assert await plain.seen.call() == (1, 1)


async def test_a_def_that_is_given_up_keeps_its_slot(served: Served, gate: Gate) -> None:
    plain = served.handle("Plain")
    with pytest.raises(DeadlineExceeded) as caught:
        await plain.options(timeout_s=0.1).wait.call(str(gate.folder))
    assert caught.value.executed == "maybe"
    after = asyncio.ensure_future(plain.call(1))
    with pytest.raises(DeadlineExceeded) as caught:
        await plain.options(timeout_s=0.1).call(1)
    assert caught.value.executed == "no"
    assert not after.done()
    gate.open()
    assert await after == 1


async def test_a_pickled_handle(served: Served, kind: str) -> None:
    handle = served.handle("Desk").options(timeout_s=5).explain
    if kind == "local":
        with pytest.raises(TypeError, match="cannot be pickled: without Ray"):
            pickle.dumps(handle)
    else:
        again: Handle[..., Any] = pickle.loads(pickle.dumps(handle))
        assert repr(again) == repr(handle)

        async def use() -> Any:
            return await again.call(3)

        # In a loop of its own: where it is used first it connects, for as long as the loop runs.
        assert await asyncio.to_thread(asyncio.run, use()) == "3!"

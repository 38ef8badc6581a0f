"""What user code can do: call other backends, and learn where it runs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serveit import App
from serveit.exceptions import DeadlineExceeded, RemoteTraceback
from tests.flow import apps
from tests.flow.conftest import Served
from tests.flow.gates import Gate
from tests.support import wait_until


@pytest.fixture
def app() -> App:
    return apps.handles


async def test_async_code_calls_other_backends(served: Served) -> None:
    assert await served.handle("Desk").through.call(4) == [8, 8, 8]
    assert [item async for item in served.handle("Desk").nested_stream.stream(3)] == [0, -1, -2]


async def test_a_def_calls_other_backends(served: Served) -> None:
    assert await served.handle("Plain").through.call(4) == [8, 2, 4]
    assert await served.handle("Plain").stream_through.call(3) == [0, 1, 2]


async def test_many_nested_calls_at_once(served: Served) -> None:
    calls = [served.handle("Desk").through.call(number) for number in range(100)]
    assert await asyncio.gather(*calls) == [[2 * number] * 3 for number in range(100)]


async def test_blocking_in_async_code_is_refused(served: Served) -> None:
    told: Any = await served.handle("Desk").blocking_inside.call()
    assert "an event loop is running in this thread" in told and "await handle.call(...)" in told


async def test_what_a_nested_call_raises_comes_out(served: Served) -> None:
    with pytest.raises(apps.OwnError, match="nothing under that name") as caught:
        await served.handle("Desk").nested_failure.call()
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert "in nested_failure" in str(caught.value.__cause__)


async def test_the_context_names_app_backend_and_replica(served: Served) -> None:
    desk = served.handle("Desk")
    first, second = [await desk.where.call() for _ in range(2)]
    assert isinstance(first, dict) and isinstance(second, dict)
    assert (first["app"], first["backend"]) == (served.app_name, "Desk")
    assert first["replica"].startswith("Desk#") and first["id"] and first["id"] != second["id"]
    assert await served.handle("Plain").where.call() == "Plain"


@pytest.mark.parametrize("way", ["Desk", "Plain"])
async def test_nested_calls_inherit_the_time_that_is_left(served: Served, gate: Gate, way: str) -> None:
    with pytest.raises(DeadlineExceeded):
        await served.handle(way).options(timeout_s=0.2).around.call(str(gate.folder))
    await wait_until(lambda: gate.notes == ["in", "CancelledError"], 5, "the inner one is cancelled, too")


async def test_the_deadline_is_in_the_context(served: Served) -> None:
    left = await served.handle("Desk").options(timeout_s=20).time_left.call()
    assert isinstance(left, float) and 15 < left <= 20
    assert await served.handle("Desk").time_left.call() is None


async def test_a_cancelled_caller_cancels_what_was_called_for_it(served: Served, gate: Gate) -> None:
    call = asyncio.ensure_future(served.handle("Desk").around.call(str(gate.folder)))
    await wait_until(lambda: gate.notes == ["in"], 5, "the inner one runs")
    call.cancel()
    await wait_until(lambda: gate.notes == ["in", "CancelledError"], 5, "the inner one is cancelled")

"""Blocking handles, from threads without an event loop."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from serveit import App
from serveit.exceptions import DeadlineExceeded
from tests.flow import apps
from tests.flow.conftest import Served
from tests.flow.gates import Gate
from tests.support import wait_until


@pytest.fixture
def app() -> App:
    return apps.handles


async def test_the_same_names_blocking(served: Served) -> None:
    desk = served.sync_handle("Desk")

    def use() -> list[Any]:
        return [
            desk.call(7),
            desk.explain.call(3),
            desk.options(timeout_s=5, method_name="explain").call(4),
            list(desk.count.stream(3)),
            list(desk.map(range(5))),
            sorted(desk.map(range(3), ordered=False)),
        ]

    answers = await asyncio.to_thread(use)
    assert answers == [7, "3!", "4!", [0, 1, 2], [0, 1, 2, 3, 4], [(0, 0), (1, 1), (2, 2)]]
    assert repr(desk) == f"<SyncHandle {served.app_name}/Desk>"


async def test_from_eight_threads_at_once(served: Served) -> None:
    handle = served.sync_handle("double")
    results: dict[int, list[int]] = {}

    def use(number: int) -> None:
        results[number] = [handle.call(100 * number + index) for index in range(25)]

    threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert results == {n: [2 * (100 * n + index) for index in range(25)] for n in range(8)}


async def test_a_thread_without_a_loop_gets_its_handle_itself(served: Served) -> None:
    def use() -> Any:
        return [
            client.get_handle("double", sync=True).call(4),
            client.get_handle("Desk").sync.explain.call(5),
        ]

    client = served.client
    assert await asyncio.to_thread(use) == [8, "5!"]


async def test_in_a_running_loop_it_names_the_async_way(served: Served) -> None:
    with pytest.raises(RuntimeError, match=r"an event loop is running.*`await handle.call\(\.\.\.\)`"):
        served.sync_handle("double").call(1)
    with pytest.raises(RuntimeError, match="async for item in handle.stream"):
        served.handle("double").sync.stream(1)


async def test_what_the_function_raises(served: Served) -> None:
    with pytest.raises(apps.OwnError) as caught:
        await asyncio.to_thread(served.sync_handle("Desk").fail.call, "own")
    assert "in fail" in str(caught.value.__cause__)


async def test_a_timeout(served: Served, gate: Gate) -> None:
    wait = served.sync_handle("Desk").options(timeout_s=0.1).wait
    with pytest.raises(DeadlineExceeded):
        await asyncio.to_thread(wait.call, str(gate.folder))


async def test_a_stream_closed_early_closes_the_generator(served: Served, gate: Gate) -> None:
    def use() -> None:
        stream: Any = served.sync_handle("Desk").endless.stream(str(gate.folder))
        next(stream)
        stream.close()

    await asyncio.to_thread(use)
    await wait_until(lambda: "closed" in gate.notes, 5, "the generator is closed")

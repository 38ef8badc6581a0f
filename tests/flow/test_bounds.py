"""How many run at once, and what waits: the replica's bounds hold for all its callers together."""

from __future__ import annotations

import asyncio

import pytest

from serveit import App
from serveit.exceptions import DeadlineExceeded, QueueFull
from tests.flow import apps
from tests.flow.answers import problem
from tests.flow.conftest import Serve, Served
from tests.flow.gates import Gate
from tests.rawhttp import connected
from tests.support import wait_until


@pytest.fixture
def app() -> App:
    return apps.bounds


async def test_callers_and_http_together_never_run_more_than_allowed(served: Served, gate: Gate) -> None:
    folder = str(gate.folder)
    calls = [served.handle("three").call(folder) for _ in range(12)]
    gets = [served.http.get("/three", params={"folder": folder}) for _ in range(12)]
    answers = await asyncio.gather(*calls, *gets)
    assert answers[:12] == ["done"] * 12 and [reply.text for reply in answers[12:]] == ["done"] * 12
    assert gate.notes.count("in") == 24
    assert gate.peak == 3


async def test_a_full_queue_over_http_is_a_503_that_says_when_to_come_back(
    served: Served, gate: Gate
) -> None:
    def ask() -> asyncio.Future[object]:
        return asyncio.ensure_future(served.http.get("/one", params={"folder": str(gate.folder)}))

    first = ask()
    await wait_until(lambda: gate.notes == ["in"], 5, "one runs")
    others = [ask() for _ in range(3)]  # one is next, and two are too many
    await asyncio.wait(others, return_when=asyncio.FIRST_COMPLETED)
    gate.open()
    replies = [await each for each in others]
    refused = [reply for reply in replies if reply.status_code != 200]  # type: ignore[attr-defined]
    assert 1 <= len(refused) <= 2
    for reply in refused:
        assert "max_queued_requests=0" in problem(reply, 503)["detail"]  # type: ignore[arg-type]
        assert reply.headers["retry-after"] == "1"  # type: ignore[attr-defined]
    assert (await first).text == "done"  # type: ignore[attr-defined]
    assert gate.notes.count("in") == 4 - len(refused)


async def test_a_full_queue_of_a_handle_names_the_way_out(served: Served, gate: Gate) -> None:
    handle = served.handle("one")
    first = asyncio.ensure_future(handle.call(str(gate.folder)))
    await wait_until(lambda: gate.notes == ["in"], 5, "one runs")
    second = asyncio.ensure_future(handle.call(str(gate.folder)))
    await asyncio.sleep(0)
    with pytest.raises(QueueFull, match=r"max_queued_requests=0.*map\(items, max_in_flight=") as caught:
        await handle.call(str(gate.folder))
    assert caught.value.executed == "no"
    gate.open()
    assert [await first, await second] == ["done", "done"]


async def test_a_deadline_that_passes_in_the_queue_means_not_executed(served: Served, gate: Gate) -> None:
    folder = str(gate.folder)
    first = asyncio.ensure_future(served.handle("queue").call(folder))
    await wait_until(lambda: gate.notes == ["in"], 5, "one runs")
    late = served.http.get("/queue", params={"folder": folder}, headers={"x-request-timeout-ms": "100"})
    problem(await late, 504, "no")
    for _ in range(2):  # waiting there, and waiting here
        with pytest.raises(DeadlineExceeded) as caught:
            await served.handle("queue").options(timeout_s=0.1).call(folder)
        assert caught.value.executed == "no"
    gate.open()
    assert await first == "done"
    assert gate.notes == ["in", "out"]


async def test_what_is_queued_never_starts_when_its_caller_leaves(served: Served, gate: Gate) -> None:
    folder = str(gate.folder)
    first = asyncio.ensure_future(served.handle("queue").call(folder))
    await wait_until(lambda: gate.notes == ["in"], 5, "one runs")
    calls = [asyncio.ensure_future(served.handle("queue").call(folder)) for _ in range(3)]
    async with connected(served.url) as wire:
        await wire.send(f"GET {served.prefix}/queue?folder={folder} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        await asyncio.sleep(0.05)
        wire.reset()
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    await asyncio.sleep(0.05)
    gate.open()
    assert await first == "done"
    assert await served.handle("queue").call(folder) == "done"
    assert gate.notes == ["in", "out"] * 2


async def test_http_and_handles_take_turns(served: Served, gate: Gate) -> None:
    folder = str(gate.folder)
    calls = [asyncio.ensure_future(served.handle("three").call(folder)) for _ in range(60)]
    await wait_until(lambda: gate.notes, 5, "it is busy")
    assert (await served.http.get("/three", params={"folder": folder})).text == "done"
    assert not all(call.done() for call in calls), "it has not had to wait for all the others"
    assert await asyncio.gather(*calls) == ["done"] * 60
    assert gate.peak == 3


@pytest.mark.parametrize(("backend", "at_once", "more"), [("Desk", 100, 20), ("Plain", 1, 9)])
async def test_what_runs_at_once_by_default(
    serve: Serve, gate: Gate, backend: str, at_once: int, more: int
) -> None:
    """`async def` 100, `def` one after the other; whoever asks."""
    folder = str(gate.folder)
    async with serve(apps.handles) as served:
        wait = served.handle(backend).options(method_name="wait")
        calls = [asyncio.ensure_future(wait.call(folder)) for _ in range(at_once + more)]
        await wait_until(lambda: len(gate.notes) >= at_once, 5, "as many as may run do")
        async with asyncio.timeout(5):
            while await load_of(served, backend) != (at_once, 1):
                pass  # one more is handed to the replica, the others wait here
        gate.open()
        assert await asyncio.gather(*calls) == ["done"] * (at_once + more)
    assert gate.peak == at_once


async def load_of(served: Served, backend: str) -> tuple[int, int]:
    """What runs in its one replica, and what waits there."""
    (told,) = (await served.client.status())["backends"][backend].values()
    return told["running"], told["waiting"]

from __future__ import annotations

import asyncio
import gc
import socket
import sys
import threading

import pytest

from tests.support import Leftovers, leaving_no_tasks, wait_until


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """Not checked here: these tests leave things behind on purpose, and clear them away themselves."""


async def test_wait_until_returns_as_soon_as_it_holds() -> None:
    seen: list[int] = []
    asyncio.get_running_loop().call_soon(seen.append, 1)
    await wait_until(lambda: seen, 5, "a callback")
    assert seen == [1]


async def test_wait_until_says_what_did_not_happen() -> None:
    with pytest.raises(AssertionError, match=r"not within 0\.01 s: pigs fly"):
        await wait_until(lambda: False, 0.01, "pigs fly")


def test_a_thread_that_ends_is_nothing_left_behind() -> None:
    with Leftovers() as leftovers:
        threading.Thread(target=lambda: None).start()
        assert leftovers.found() == []


def test_a_thread_that_goes_on_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.GRACE_S", 0.01)
    stop = threading.Event()
    with Leftovers() as leftovers:
        thread = threading.Thread(target=stop.wait, name="forgotten")
        thread.start()
        (found,) = leftovers.found()
    stop.set()
    thread.join()
    assert "forgotten" in found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sockets are found in /proc")
def test_an_open_socket_is_found() -> None:
    with Leftovers() as leftovers, socket.create_server(("127.0.0.1", 0)) as server:
        (found,) = leftovers.found()
        assert str(server.getsockname()[1]) in found


def test_an_exception_that_nobody_saw_is_found() -> None:
    async def lose_a_failure() -> None:
        task = asyncio.ensure_future(fail())
        await asyncio.wait([task])

    async def fail() -> None:
        raise ValueError("lost")

    with Leftovers() as leftovers:
        asyncio.run(lose_a_failure())
        gc.collect()
        (found,) = leftovers.found()
    assert "was never retrieved" in found


async def test_a_task_that_goes_on_fails_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.GRACE_S", 0.01)
    started: list[asyncio.Task[bool]] = []

    async def careless() -> None:
        started.append(asyncio.create_task(asyncio.Event().wait()))

    with pytest.raises(AssertionError, match="left tasks running"):
        await leaving_no_tasks(careless)()
    started[0].cancel()


async def test_a_task_that_ends_soon_does_not() -> None:
    ended: list[bool] = []

    async def careful() -> None:
        task = asyncio.create_task(asyncio.sleep(0, True))
        task.add_done_callback(lambda done: ended.append(done.result()))

    await leaving_no_tasks(careful)()
    assert ended == [True]

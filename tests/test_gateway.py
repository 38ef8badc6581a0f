from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from serveit.calling.directory import Directory
from serveit.calling.gateway import Gateway, open_portal
from serveit.calling.handle import HandleOptions
from serveit.clock import DeadlineWheel
from serveit.exceptions import NeedsRay
from serveit.observe import NullObserver
from serveit.testing import ManualClock


async def nowhere(*_: Any) -> Any:
    raise OSError("nobody is there")


def make_directory() -> Directory:
    clock = ManualClock()
    return Directory(
        "main",
        default_queue=10,
        connect=nowhere,
        clock=clock,
        wheel=DeadlineWheel(clock),
        observer=NullObserver(),
    )


@asynccontextmanager
async def opened(tasks: Any = None) -> AsyncIterator[Gateway]:
    async with contextlib.AsyncExitStack() as stack:
        portal = await open_portal(stack)
        yield Gateway(make_directory(), asyncio.get_running_loop(), portal, tasks)


async def test_it_is_its_loops_way_to_an_app() -> None:
    async with opened() as gateway:
        assert gateway.app == "main"
        assert gateway.is_here()
        assert not gateway.closed
        gateway.directory.closed = True
        assert gateway.closed


async def test_another_loop_is_told_of_the_blocking_form() -> None:
    async with opened() as gateway:

        async def elsewhere() -> None:
            assert not gateway.is_here()
            await gateway.enter("<Handle 'double'>")

        with pytest.raises(RuntimeError, match=r"<Handle 'double'>.*another event loop.*handle\.sync"):
            await asyncio.to_thread(asyncio.run, elsewhere())


async def test_tasks_are_there_or_missed() -> None:
    tasks = object()
    async with opened(tasks) as gateway:
        assert gateway.needs_tasks() is tasks
    async with opened() as gateway:
        with pytest.raises(NeedsRay, match=r"'main' runs without Ray: use `await handle\.call"):
            gateway.needs_tasks()


async def test_its_handles_stay_in_their_process() -> None:
    async with opened() as gateway:
        with pytest.raises(TypeError, match=r"'double' cannot be pickled.*app\.handle"):
            gateway.reduce("double", HandleOptions(), sync=False)


class TestPortal:
    async def test_leads_into_the_loop_from_other_threads(self) -> None:
        here = threading.current_thread()

        async def where() -> threading.Thread:
            return threading.current_thread()

        async with contextlib.AsyncExitStack() as stack:
            portal = await open_portal(stack)
            assert await asyncio.to_thread(portal.call, where) is here

    async def test_ends_what_still_runs_at_its_end(self) -> None:
        entered = threading.Event()

        async def endless() -> None:
            entered.set()
            await asyncio.Event().wait()

        async with contextlib.AsyncExitStack() as stack:
            portal = await open_portal(stack)
            running = await asyncio.to_thread(portal.start_task_soon, endless)
            await asyncio.to_thread(entered.wait, 5.0)
        assert running.cancelled()

    async def test_whoever_closes_it_may_be_another_task(self) -> None:
        stack = contextlib.AsyncExitStack()
        portal = await asyncio.create_task(open_portal(stack))
        await asyncio.create_task(stack.aclose())
        with pytest.raises(RuntimeError, match="not running"):
            await asyncio.to_thread(portal.call, asyncio.sleep, 0)

    async def test_whoever_gives_up_while_it_opens_closes_it(self) -> None:
        stack = contextlib.AsyncExitStack()
        opening = asyncio.ensure_future(open_portal(stack))
        await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        await stack.aclose()

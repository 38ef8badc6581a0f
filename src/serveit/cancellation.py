"""Work that is seen to its end though whoever waits for it is cancelled: what has begun to close, closes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from anyio import CancelScope

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine


def is_cancelled() -> bool:
    """Whether somebody wants this very task to end."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def outlast(work: Coroutine[Any, Any, Any] | asyncio.Task[Any]) -> None:
    """See it to its end, however often this is cancelled meanwhile; then be cancelled."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    with CancelScope(shield=True):  # an anyio scope would try again at every turn of the loop
        while not task.done():
            try:
                await asyncio.wait((task,))
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is not None and not task.cancelled() and task.exception() is None:
        raise cancelled
    task.result()


async def hurried(work: Coroutine[Any, Any, Any], hurry: Callable[[], None]) -> None:
    """See it to its end; where this is cancelled, `hurry` is called, which makes that come soon."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        hurry()
        await outlast(task)
        raise

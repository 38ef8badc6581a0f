"""Gathers single items into batches; asyncio only, and it knows nothing of requests.

Hot path: `put` once per item. A batch is formed for a free slot, never before there is one: then
whatever is queued goes along.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from serveit.exceptions import BatchError, ItemErrors

if TYPE_CHECKING:
    from contextvars import Context

    from serveit.types import Clock, Timer

E = TypeVar("E")


@dataclass(frozen=True)
class BatcherStatistics:
    """A batcher at one moment."""

    gathering: int
    batches_running: int


class Batcher(Generic[E]):
    """Forms batches of up to `max_size` and runs up to `max_concurrent` of them at once.

    It waits for a slot, then takes what is queued; only if that does not fill a batch it waits for
    more, until `wait_s` after the arrival of the batch's first item. With `wait_s` 0 nothing waits
    while a slot is idle. Items that arrive in one tick of the loop are gathered together.
    """

    def __init__(
        self,
        run: Callable[[list[E]], Awaitable[None]],
        *,
        max_size: int,
        wait_s: float,
        max_concurrent: int,
        clock: Clock,
        wanted: Callable[[E], bool],
        context: Context | None = None,
    ) -> None:
        """
        Args:
            run: runs one batch of 1 to `max_size` items; must not raise.
            max_size: items in a batch at most.
            wait_s: seconds from the first item's arrival.
            max_concurrent: batches at once.
            clock: where time comes from.
            wanted: asked for each item when its batch is formed; those not wanted are left out.
            context: each batch runs in a copy of it; None for whatever context formed the batch.
        """
        self.max_size = max_size
        self.wait_s = wait_s
        self.max_concurrent = max_concurrent
        self._run = run
        self._clock = clock
        self._wanted = wanted
        self._context = context
        self._queue: deque[tuple[E, float]] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._timer: Timer | None = None
        self._scheduled = False
        self._is_hurried = False

    def __repr__(self) -> str:
        running = f"running={len(self._running)}/{self.max_concurrent}"
        return f"<Batcher gathering={len(self._queue)}/{self.max_size} {running}>"

    def statistics(self) -> BatcherStatistics:
        return BatcherStatistics(gathering=len(self._queue), batches_running=len(self._running))

    def put(self, item: E) -> None:
        """Queue an item for the next batch."""
        self._queue.append((item, self._clock.time()))
        self._schedule()

    def discard(self, item: E) -> None:
        """Forget an item that has not gone into a batch yet."""
        self._queue = deque(entry for entry in self._queue if entry[0] is not item)
        if not self._queue:
            self._stop_timer()

    def adjust(self, *, max_size: int, wait_s: float, max_concurrent: int) -> None:
        """Change the options while it runs; what is queued follows the new ones."""
        self.max_size, self.wait_s, self.max_concurrent = max_size, wait_s, max_concurrent
        self._schedule()

    def hurry(self) -> None:
        """Wait for no more items, whatever the options say: nobody will send any."""
        self._is_hurried = True
        self._schedule()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._form)

    def _form(self) -> None:
        self._scheduled = False
        self._stop_timer()
        while self._queue and len(self._running) < self.max_concurrent:
            wait_s = 0.0 if self._is_hurried else self.wait_s
            missing_s = self._queue[0][1] + wait_s - self._clock.time()
            if len(self._queue) < self.max_size and missing_s > 0:
                self._timer = self._clock.call_later(missing_s, self._form)
                return
            batch = self._take()
            if batch:
                context = self._context.copy() if self._context is not None else None
                task = asyncio.get_running_loop().create_task(self._run_batch(batch), context=context)
                self._running.add(task)
                task.add_done_callback(self._finished)

    def _take(self) -> list[E]:
        batch: list[E] = []
        while self._queue and len(batch) < self.max_size:
            item, _ = self._queue.popleft()
            if self._wanted(item):
                batch.append(item)
        return batch

    async def _run_batch(self, batch: list[E]) -> None:
        await self._run(batch)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._form()


def batch_outcomes(value: Any, count: int, backend: str) -> Sequence[Any]:
    """A batch function's return value as one outcome per item.

    Raises:
        BatchError: it is no sequence, or of another length; both are named.
        Exception: what its own code raises when it is made a list.
    """
    sized = hasattr(value, "__len__") and hasattr(value, "__iter__")
    if not sized or isinstance(value, (str, bytes, bytearray, Mapping, Set)):
        raise BatchError(
            f"batch function of backend {backend!r} must return a list with one result per item, "
            f"got {type(value).__name__}"
        )
    outcomes = list(value)
    if len(outcomes) != count:
        raise BatchError(
            f"batch function of backend {backend!r} got {count} items and returned {len(outcomes)} results"
        )
    return outcomes


def failed_outcomes(error: BaseException, count: int, backend: str) -> Sequence[Any]:
    """What a batch function raised as one outcome per item: `ItemErrors` has one each, the rest fails all."""
    if isinstance(error, ItemErrors):
        try:
            return batch_outcomes(error.outcomes, count, backend)
        except BatchError as wrong:
            error = wrong
    return [error] * count

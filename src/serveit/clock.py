"""The real clock, and one coarse wheel of deadlines in place of a timer a request."""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from serveit.types import Clock, Timer

logger = logging.getLogger("serveit.clock")


class LoopClock:
    """The running event loop's clock; made inside the loop that it serves."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.time: Callable[[], float] = loop.time
        self._call_later = loop.call_later

    def call_later(self, delay_s: float, callback: Callable[..., Any], *args: Any) -> Timer:
        return self._call_later(delay_s, callback, *args)


class Expirable(Protocol):
    """Something with a deadline."""

    def expire(self) -> None:
        """Called once, on the loop, up to one tick after the deadline."""


NEVER = -1
"""The bucket of what has no end."""
MAX_EMPTY = 8192
"""Empty buckets that are kept for their next use: more than a minute's, the usual deadline's."""


class DeadlineWheel:
    """Deadlines in buckets of `tick_s`; one timer, armed for the earliest bucket that holds any.

    Hot path: `add` and `discard` once per request with a deadline, each one set operation. A request
    expires up to one tick late, never early (after Varghese and Lauck's hashed wheels, 1987).

    All mutable state: `_buckets` (by number; bucket n expires at n ticks), `_order` (a heap of their
    numbers), `_empty` (how many buckets hold nothing any more), `_timer` and `_armed_for` (its bucket),
    `_due` (what the `_fire` under way has still to expire).
    """

    def __init__(self, clock: Clock, tick_s: float = 0.01) -> None:
        self._clock = clock
        self._tick_s = tick_s
        self._buckets: dict[int, set[Expirable]] = {}
        self._order: list[int] = []
        self._empty = 0
        self._timer: Timer | None = None
        self._armed_for = 0
        self._due: set[Expirable] = set()

    def __len__(self) -> int:
        return sum(map(len, self._buckets.values())) + len(self._due)

    def __repr__(self) -> str:
        armed = f"armed for {self._armed_for * self._tick_s:.2f}" if self._timer is not None else "idle"
        return f"<DeadlineWheel {len(self)} deadlines, {armed}>"

    def add(self, item: Expirable, deadline: float) -> int:
        """Watch `item`; returns the bucket to name in `discard`.

        Args:
            item: expired once, unless it is discarded before.
            deadline: on the wheel's clock; past ones expire in the next turn of the loop, an infinite
                one never.
        """
        try:
            bucket = int(deadline / self._tick_s) + 1
        except OverflowError:
            return NEVER
        members = self._buckets.get(bucket)
        if members is None:
            self._buckets[bucket] = {item}
            heapq.heappush(self._order, bucket)
            if self._timer is None or bucket < self._armed_for:
                self._arm()
        else:
            if not members:
                self._empty -= 1
            members.add(item)
        return bucket

    def discard(self, item: Expirable, bucket: int) -> None:
        """Forget `item`; it will not expire, even if its turn is now."""
        members = self._buckets.get(bucket)
        if members:
            members.discard(item)
            if not members:
                members.clear()  # an empty set keeps the table that it grew; thousands wait for their time
                self._empty += 1
                if self._empty > MAX_EMPTY and self._empty * 2 > len(self._buckets):
                    self._sweep()
        if self._due:
            self._due.discard(item)

    def close(self) -> None:
        """Forget everything."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._buckets.clear()
        self._order.clear()
        self._due.clear()
        self._empty = 0

    def _sweep(self) -> None:
        """Drop the empty buckets: the time of those with far deadlines comes late or never."""
        self._buckets = {bucket: members for bucket, members in self._buckets.items() if members}
        self._order = list(self._buckets)
        heapq.heapify(self._order)
        self._empty = 0

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._order and not self._buckets[self._order[0]]:
            del self._buckets[heapq.heappop(self._order)]
            self._empty -= 1
        if self._order:
            self._armed_for = self._order[0]
            delay_s = max(0.0, self._armed_for * self._tick_s - self._clock.time())
            self._timer = self._clock.call_later(delay_s, self._fire)

    def _fire(self) -> None:
        self._timer = None
        now = self._clock.time()
        due: list[Expirable] = []
        while self._order and self._order[0] * self._tick_s <= now:
            members = self._buckets.pop(heapq.heappop(self._order))
            self._empty -= not members
            due.extend(members)
        self._due.update(due)
        self._arm()
        for item in due:
            # One that expires may discard another.
            if item not in self._due:
                continue
            self._due.discard(item)
            try:
                item.expire()
            except Exception:
                logger.exception("a deadline passed, and that could not be handled")

"""What a replica counts of itself, for the proxies to expose (`web/exposition`).

Hot path: `admitted`, `started` and `finished` once per request; sums in plain numbers, and no locks.
What `Histogram.add` does is written out there: a call costs as much as the rest of it.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from serveit.histogram import SECONDS, SIZES, Histogram
from serveit.observe import NullObserver
from serveit.running.failures import Cancelled
from serveit.wire.frames import Figures


@dataclass(frozen=True)
class ReplicaStatistics:
    """A replica at one moment."""

    running: int
    waiting: int
    gathering: int
    draining: bool


class ReplicaMeter(NullObserver):
    """The observer of one replica. All mutable state: the counts, from its start on."""

    def __init__(self) -> None:
        self.requests = 0
        self.errors = 0
        self.refusals: dict[str, int] = {}
        self.queued = Histogram.of(SECONDS)
        self.processed = Histogram.of(SECONDS)
        self.batches = Histogram.of(SIZES)

    def figures(self, now: ReplicaStatistics) -> Figures:
        """All that it has counted, and what runs and waits now."""
        return Figures(
            now.running,
            now.waiting,
            self.requests,
            self.errors,
            self.refusals,
            self.queued,
            self.processed,
            self.batches,
        )

    # -- observe.Observer --------------------------------------------------------------------

    def admitted(self, backend: str, replica: str) -> None:
        self.requests += 1

    def started(self, backend: str, replica: str, waited_s: float) -> None:
        queued = self.queued
        queued.counts[bisect_left(SECONDS, waited_s)] += 1
        queued.sum += waited_s

    def batch(self, backend: str, replica: str, size: int) -> None:
        self.batches.add(size)

    def finished(self, backend: str, replica: str, ran_s: float, error: BaseException | None) -> None:
        processed = self.processed
        processed.counts[bisect_left(SECONDS, ran_s)] += 1
        processed.sum += ran_s

    def failed(self, backend: str, replica: str, error: BaseException) -> None:
        if not isinstance(error, Cancelled):
            self.errors += 1

    def refused(self, backend: str, where: str, reason: str) -> None:
        self.refusals[reason] = self.refusals.get(reason, 0) + 1

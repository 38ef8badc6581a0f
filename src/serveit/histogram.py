"""A histogram as plain numbers: recorded on the hot path, sent from process to process as it is."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

import msgspec

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Bounds for durations: from what serveit itself takes to the usual deadline."""
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
"""Bounds for sizes of batches."""


class Histogram(msgspec.Struct, array_like=True):
    """How many values there were up to each bound, and their sum. Hot path: `add`.

    Attributes:
        bounds: upper ones, inclusive and in rising order.
        counts: of the values between each bound and the one before; the last, of those above all bounds.
        sum: of the values.
    """

    bounds: tuple[float, ...]
    counts: list[int]
    sum: float = 0.0

    def __post_init__(self) -> None:
        if len(self.counts) != len(self.bounds) + 1:
            raise ValueError(f"a histogram of {len(self.bounds)} bounds has not {len(self.counts)} counts")

    @classmethod
    def of(cls, bounds: tuple[float, ...]) -> Histogram:
        """An empty one."""
        return cls(bounds, [0] * (len(bounds) + 1))

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def cumulated(self) -> list[int]:
        """How many values are at most each bound; the last is how many there are."""
        return list(accumulate(self.counts))

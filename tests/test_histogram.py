"""Histograms: where values are counted, and how they travel."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serveit.histogram import SECONDS, SIZES, Histogram


def test_bounds_are_inclusive_and_all_above_the_last_is_counted_too() -> None:
    histogram = Histogram.of((1.0, 2.0))
    for value in (0.0, 1.0, 1.5, 2.0, 2.1, 1e9):
        histogram.add(value)
    assert histogram.counts == [2, 2, 2]
    assert histogram.cumulated == [2, 4, 6]
    assert histogram.sum == sum((0.0, 1.0, 1.5, 2.0, 2.1, 1e9))


@pytest.mark.parametrize("bounds", [SECONDS, SIZES])
def test_bounds_rise(bounds: tuple[float, ...]) -> None:
    assert list(bounds) == sorted(set(bounds))


@given(st.lists(st.floats(0, 100), max_size=50))
def test_every_value_is_in_the_first_bucket_that_takes_it(values: list[float]) -> None:
    histogram = Histogram.of(SECONDS)
    for value in values:
        histogram.add(value)
    below = [sum(value <= bound for value in values) for bound in SECONDS]
    assert histogram.cumulated == [*below, len(values)]


def test_it_travels_as_it_is() -> None:
    histogram = Histogram.of(SIZES)
    histogram.add(7)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(histogram), type=Histogram) == histogram


def test_counts_that_do_not_fit_the_bounds_are_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="a histogram of 2 bounds has not 1 counts"):
        msgspec.msgpack.decode(msgspec.msgpack.encode([[1.0, 2.0], [0], 0.0]), type=Histogram)

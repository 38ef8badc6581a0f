"""What an ingress counts of the requests that come over HTTP, route by route; `exposition` shows it.

Hot path: `RouteMeter.end` once per request. A request's meter is found by its route's place in the table;
labels are made when somebody asks. What `Histogram.add` does is written out.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

from serveit.histogram import SECONDS, Histogram

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from serveit.web.table import Entry

NO_ROUTE = ""
"""The app, route and method of requests that no route takes: whatever they ask for, they are one series."""


class RouteMeter:
    """The requests of one route. All mutable state: `in_flight` (whoever begins one adds 1, `end` takes it
    off), `answers` (by method and status), `durations`."""

    __slots__ = ("answers", "app", "durations", "in_flight", "route")

    def __init__(self, app: str, route: str) -> None:
        """
        Args:
            app: its name.
            route: the pattern, with the app's prefix.
        """
        self.app = app
        self.route = route
        self.in_flight = 0
        self.answers: dict[tuple[str, int], int] = {}
        self.durations = Histogram.of(SECONDS)

    def __repr__(self) -> str:
        return f"<RouteMeter {self.app} {self.route} in_flight={self.in_flight}>"

    def end(self, method: str, status: int, took_s: float) -> None:
        """It has been answered, or broken off.

        Args:
            method: one of the route's.
            status: 499 if the client left.
            took_s: from its arrival to the last of its answer.
        """
        self.in_flight -= 1
        answers, answer = self.answers, (method, status)
        answers[answer] = answers[answer] + 1 if answer in answers else 1
        durations = self.durations
        durations.counts[bisect_left(SECONDS, took_s)] += 1
        durations.sum += took_s


class UnmatchedMeter(RouteMeter):
    """The requests that no route takes; their methods may be anything."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(NO_ROUTE, NO_ROUTE)

    def end(self, method: str, status: int, took_s: float) -> None:
        super().end(NO_ROUTE, status, took_s)


class RouteMeters:
    """The meters of the routes that there are. All mutable state: `by_order` and what the meters have.

    Attributes:
        by_order: those of the table in force, by the order of its entries.
        unmatched: for what no route takes.
    """

    def __init__(self) -> None:
        self.unmatched = UnmatchedMeter()
        self.by_order: list[RouteMeter] = []

    def follow(self, entries: Sequence[Entry]) -> None:
        """There is another table. Routes that it has kept go on counting, the others are forgotten."""
        known = {(meter.app, meter.route): meter for meter in self.by_order}
        by_order = []
        for entry in entries:
            key = entry.app, entry.path
            meter = known.get(key)
            if meter is None:
                meter = known[key] = RouteMeter(*key)
            by_order.append(meter)
        self.by_order = by_order

    def __iter__(self) -> Iterator[RouteMeter]:
        """Each once: routes of one path that take different methods share theirs."""
        return iter(dict.fromkeys((*self.by_order, self.unmatched)))

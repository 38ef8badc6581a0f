"""`/-/metrics`: what this proxy and the replicas it speaks for have counted, as Prometheus reads it.

The replicas are asked over the channels that their requests take; who does not answer in time is left out.
docs/metrics.md has the table of what there is.
"""

from __future__ import annotations

import asyncio
import functools
import re
from importlib.metadata import version
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client import ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from serveit.exceptions import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from prometheus_client.core import Metric

    from serveit.calling.connection import Connection
    from serveit.calling.directory import Directory
    from serveit.calling.router import Router
    from serveit.control.snapshot import ReplicaInfo
    from serveit.histogram import Histogram
    from serveit.types import HeaderList
    from serveit.web.metering import RouteMeters
    from serveit.wire.frames import Figures

ANSWER_S = 1.0
"""What replicas get to tell their figures: one whose event loop is held up by user code does not."""

EOF = b"# EOF\n"
"""The end of a page in OpenMetrics."""
_ACCEPT = re.compile(rb"[\w .,;=*/+-]*")

ROUTE = ("app", "route")
BACKEND = ("app", "backend")
REPLICA = ("app", "backend", "replica")


class Scope(NamedTuple):
    """What of an instance one of its proxies exposes: all of them together expose everything once."""

    has: Callable[[ReplicaInfo], bool]
    """Whether it speaks for a replica."""
    is_first: bool
    """Whether it exposes what the controller counts: the head node's does."""


EVERYTHING = Scope(lambda replica: True, True)
"""For the only one that there is."""


class Exposition:
    """All mutable state is that of what it reads."""

    def __init__(
        self,
        directories: Mapping[str, Directory],
        meters: RouteMeters,
        scope: Scope,
        answer_s: float = ANSWER_S,
    ) -> None:
        """
        Args:
            directories: by app name; what they know when it is asked.
            meters: of the requests over HTTP.
            scope: which replicas this process speaks for.
            answer_s: what they get to answer.
        """
        self._directories = directories
        self._meters = meters
        self._scope = scope
        self._answer_s = answer_s
        self._process = ProcessCollector(registry=None)

    async def page(self, headers: HeaderList) -> tuple[bytes, bytes]:
        """The content type that the client prefers, and the text in it.

        Args:
            headers: of its request.
        """
        told = await self._told()
        encode, content_type = _encoder(headers)
        parts = []
        for family in chain(self._families(told), self._process.collect()):
            parts.append(encode(_Only(family)).removesuffix(EOF))
            await asyncio.sleep(0)  # a page of a hundred replicas takes a while; requests come in between
        if content_type.startswith("application/openmetrics"):
            parts.append(EOF)
        return content_type.encode(), b"".join(parts)

    # -- asking ------------------------------------------------------------------------------

    def _routers(self) -> Iterator[tuple[str, Router]]:
        for app, directory in self._directories.items():
            for router in directory.routers.values():
                yield app, router

    async def _told(self) -> list[_Told]:
        """What the replicas have to say, or None for those that say nothing."""
        asked = [
            ((app, router.info.name, connection.replica.id), _ask(connection))
            for app, router in self._routers()
            for connection in router.connections
            if self._scope.has(connection.replica)
        ]
        if waiting := [future for _, future in asked if future is not None]:
            await asyncio.wait(waiting, timeout=self._answer_s)  # who shares an answer goes on waiting
        return [_Told(labels, _answer(future)) for labels, future in asked]

    # -- showing -----------------------------------------------------------------------------

    def _families(self, told: Sequence[_Told]) -> Iterator[Metric]:
        yield InfoMetricFamily("serveit", "The serveit that runs.", {"version": _version()})
        yield from self._http()
        yield from self._of_routers()
        if self._scope.is_first:
            yield from self._of_controller()
        yield from _of_replicas(told)

    def _http(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "serveit_http_requests",
            "Requests over HTTP that were answered or broken off.",
            labels=(*ROUTE, "method", "status"),
        )
        durations = HistogramMetricFamily(
            "serveit_http_request_duration_seconds",
            "From a request's arrival to the last of its answer.",
            labels=ROUTE,
        )
        in_flight = GaugeMetricFamily(
            "serveit_http_requests_in_flight", "Requests over HTTP that are being answered.", labels=ROUTE
        )
        for meter in self._meters:
            labels = meter.app, meter.route
            for (method, status), count in meter.answers.items():
                requests.add_metric((*labels, method, str(status)), count)
            _add(durations, labels, meter.durations)
            in_flight.add_metric(labels, meter.in_flight)
        yield from (requests, durations, in_flight)

    def _of_routers(self) -> Iterator[Metric]:
        queued = GaugeMetricFamily(
            "serveit_router_queued_requests",
            "Requests over HTTP that wait here for a replica with room.",
            labels=BACKEND,
        )
        refusals = CounterMetricFamily(
            "serveit_router_refusals",
            "Requests over HTTP that were refused because max_queued_requests waited already.",
            labels=BACKEND,
        )
        for app, router in self._routers():
            statistics = router.statistics()
            queued.add_metric((app, router.info.name), statistics.waiting)
            refusals.add_metric((app, router.info.name), statistics.refused)
        yield from (queued, refusals)

    def _of_controller(self) -> Iterator[Metric]:
        starts = CounterMetricFamily(
            "serveit_replica_starts", "Replicas that have become ready.", labels=BACKEND
        )
        deaths = CounterMetricFamily(
            "serveit_replica_deaths",
            "Replicas that ended though nobody ended them, while they started or later.",
            labels=BACKEND,
        )
        for app, router in self._routers():
            info = router.info
            starts.add_metric((app, info.name), info.num_started)
            deaths.add_metric((app, info.name), info.num_died)
        yield from (starts, deaths)


class _Told(NamedTuple):
    """A replica's labels, and its figures if it has told them."""

    labels: tuple[str, str, str]
    figures: Figures | None


class _Only(Collector):
    """One family, as `prometheus_client` takes it."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return (self._family,)


@functools.cache
def _version() -> str:
    return version("serveit")


def _ask(connection: Connection) -> asyncio.Future[Figures] | None:
    try:
        return connection.figures()
    except ProtocolError:  # it is being connected, or lost
        return None


def _answer(future: asyncio.Future[Figures] | None) -> Figures | None:
    if future is None or not future.done() or future.cancelled():
        return None
    return future.result()


def _of_replicas(told: Sequence[_Told]) -> Iterator[Metric]:
    answers = GaugeMetricFamily(
        "serveit_replica_up",
        "1 if the replica told its figures in time; 0 if it did not, and they are missing here.",
        labels=REPLICA,
    )
    for each in told:
        answers.add_metric(each.labels, each.figures is not None)
    yield answers
    known = [(each.labels, each.figures) for each in told if each.figures is not None]
    yield from _numbers_of_replicas(known)
    yield from _histograms_of_replicas(known)


def _numbers_of_replicas(known: Sequence[tuple[Sequence[str], Figures]]) -> Iterator[Metric]:
    requests = CounterMetricFamily(
        "serveit_replica_requests", "Requests and calls that the replica took in.", labels=REPLICA
    )
    errors = CounterMetricFamily(
        "serveit_replica_errors",
        "Those of them that failed; not those that their callers cancelled.",
        labels=REPLICA,
    )
    refusals = CounterMetricFamily(
        "serveit_replica_refusals",
        "Requests and calls that it did not take in; their callers try elsewhere.",
        labels=(*REPLICA, "reason"),
    )
    running = GaugeMetricFamily(
        "serveit_replica_running_requests", "Requests and calls that hold a slot.", labels=REPLICA
    )
    waiting = GaugeMetricFamily(
        "serveit_replica_waiting_requests", "Requests and calls in its waiting room.", labels=REPLICA
    )
    for labels, figures in known:
        requests.add_metric(labels, figures.requests)
        errors.add_metric(labels, figures.errors)
        for reason, count in figures.refusals.items():
            refusals.add_metric((*labels, reason), count)
        running.add_metric(labels, figures.running)
        waiting.add_metric(labels, figures.waiting)
    yield from (requests, errors, refusals, running, waiting)


def _histograms_of_replicas(known: Sequence[tuple[Sequence[str], Figures]]) -> Iterator[Metric]:
    queued = HistogramMetricFamily(
        "serveit_replica_queue_duration_seconds",
        "From a request's arrival at the replica until user code runs.",
        labels=REPLICA,
    )
    processed = HistogramMetricFamily(
        "serveit_replica_processing_duration_seconds",
        "In user code, until the end of the answer.",
        labels=REPLICA,
    )
    batches = HistogramMetricFamily(
        "serveit_batch_size", "Items of the batches that went to user code.", labels=REPLICA
    )
    for labels, figures in known:
        _add(queued, labels, figures.queued)
        _add(processed, labels, figures.processed)
        if any(figures.batches.counts):
            _add(batches, labels, figures.batches)
    yield from (queued, processed, batches)


def _add(family: HistogramMetricFamily, labels: Sequence[str], histogram: Histogram) -> None:
    bounds = (*map(floatToGoString, histogram.bounds), "+Inf")
    family.add_metric(labels, list(zip(bounds, histogram.cumulated, strict=True)), histogram.sum)


def _encoder(headers: HeaderList) -> tuple[Callable[[Collector], bytes], str]:
    """By the client's Accept; the plain text of old where that says nothing that can be read."""
    accept = b",".join(value for name, value in headers if name == b"accept")
    if not _ACCEPT.fullmatch(accept):  # parts of it are sent back
        accept = b""
    try:
        return choose_encoder(accept.decode())
    except (TypeError, ValueError):  # as it has with versions that are no numbers
        return choose_encoder("")

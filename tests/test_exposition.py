"""What is exposed, of whom, and how: with replicas in the test's hands."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from serveit.control.snapshot import AppInfo, ReplicaInfo, RouteInfo
from serveit.histogram import Histogram
from serveit.web.exposition import EVERYTHING, Exposition, Scope, _encoder
from serveit.web.metering import RouteMeters
from serveit.web.table import RouteTable
from serveit.wire.frames import Figures, FrameType
from tests.fake_replicas import Rig
from tests.support import wait_until

SOON_S = 0.05
LABELS = {"app": "a", "backend": "model"}

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def key(name: str, **labels: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return name, tuple(sorted(labels.items()))


def of_replica(name: str, replica: str, **more: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return key(f"serveit_replica_{name}", **LABELS, replica=replica, **more)


def samples(text: str) -> Samples:
    families = list(parse(text))
    assert len({family.name for family in families}) == len(families)
    return {key(s.name, **s.labels): s.value for family in families for s in family.samples}


def figures() -> Figures:
    queued, processed, batches = (Histogram.of(bounds) for bounds in ((0.1, 1.0), (0.1, 1.0), (1.0, 2.0)))
    for value in (0.05, 0.5, 5.0):
        queued.add(value)
    processed.add(0.1)
    batches.add(2)
    return Figures(1, 2, 3, 4, {"full": 5}, queued, processed, batches)


class Exposed:
    """A router and its replicas, and what is exposed of them."""

    def __init__(self, scope: Scope = EVERYTHING) -> None:
        self.rig = Rig()
        self.meters = RouteMeters()
        directory: Any = SimpleNamespace(routers={"model": self.rig.router})
        self.exposition = Exposition({"a": directory}, self.meters, scope, SOON_S)

    async def page(self, *answering: str, accept: bytes = b"") -> tuple[bytes, str]:
        """What is exposed, once those replicas have answered."""
        asking = asyncio.ensure_future(self.exposition.page([(b"accept", accept)]))
        await asyncio.sleep(0)
        for replica in answering:
            self.rig[replica].say(FrameType.METRICS, 0, figures())
        content_type, body = await asking
        return content_type, body.decode()

    async def samples(self, *answering: str) -> Samples:
        return samples((await self.page(*answering))[1])


async def test_what_a_replica_told() -> None:
    exposed = Exposed()
    await exposed.rig.update("m#1", "m#2")
    told = await exposed.samples("m#1", "m#2")
    for replica in ("m#1", "m#2"):
        assert told[of_replica("up", replica)] == 1
        assert told[of_replica("running_requests", replica)] == 1
        assert told[of_replica("waiting_requests", replica)] == 2
        assert told[of_replica("requests_total", replica)] == 3
        assert told[of_replica("errors_total", replica)] == 4
        assert told[of_replica("refusals_total", replica, reason="full")] == 5
        buckets = [
            told[of_replica("queue_duration_seconds_bucket", replica, le=le)] for le in ("0.1", "1.0", "+Inf")
        ]
        assert buckets == [1, 2, 3]
        assert told[of_replica("queue_duration_seconds_count", replica)] == 3
        assert told[of_replica("queue_duration_seconds_sum", replica)] == pytest.approx(5.55)
        assert told[of_replica("processing_duration_seconds_bucket", replica, le="0.1")] == 1
        assert told[key("serveit_batch_size_sum", **LABELS, replica=replica)] == 2


async def test_one_that_does_not_answer_is_left_out_and_the_rest_is_there() -> None:
    exposed = Exposed()
    await exposed.rig.update("m#1", "m#2")
    told = await exposed.samples("m#2")
    assert told[of_replica("up", "m#1")] == 0
    assert of_replica("requests_total", "m#1") not in told
    assert told[of_replica("requests_total", "m#2")] == 3
    assert (await exposed.samples("m#1", "m#2"))[of_replica("up", "m#1")] == 1


async def test_one_that_is_lost_or_being_connected_is_not_waited_for() -> None:
    exposed = Exposed()
    exposed.rig.replicas.gates["m#2"] = asyncio.Event()
    updating = asyncio.ensure_future(exposed.rig.update("m#1", "m#2"))
    await wait_until(lambda: "m#1" in exposed.rig.replicas.by_id, 5, "one is connected")
    await asyncio.sleep(0)
    asking = asyncio.ensure_future(exposed.exposition.page([]))
    await asyncio.sleep(0)
    exposed.rig["m#1"].lose()
    told = samples((await asking)[1].decode())
    assert told[of_replica("up", "m#1")] == told[of_replica("up", "m#2")] == 0
    exposed.rig.replicas.gates["m#2"].set()
    await updating


async def test_who_is_gone_disappears() -> None:
    exposed = Exposed()
    await exposed.rig.update("m#1", "m#2")
    await exposed.samples("m#1", "m#2")
    await exposed.rig.update("m#2")
    await asyncio.sleep(0)
    told = await exposed.samples("m#2")
    assert {dict(labels)["replica"] for name, labels in told if name == "serveit_replica_up"} == {"m#2"}


async def test_others_are_for_others() -> None:
    exposed = Exposed(Scope(lambda replica: replica == ReplicaInfo("m#2", "m#2"), is_first=False))
    await exposed.rig.update("m#1", "m#2", num_started=2)
    told = await exposed.samples("m#2")
    assert {dict(labels)["replica"] for name, labels in told if name == "serveit_replica_up"} == {"m#2"}
    assert not exposed.rig["m#1"].frames
    assert key("serveit_replica_starts_total", **LABELS) not in told
    assert key("serveit_router_queued_requests", **LABELS) in told, "each has its own"


async def test_what_routers_and_the_controller_have_counted() -> None:
    exposed = Exposed()
    rig = exposed.rig
    rig.default_queue = 2
    rig.router._default_queue = 2
    await rig.update("m#1", num_started=7, num_died=6, limit=1, prefetch=0)
    for _ in range(3):
        rig.submit()
    for _ in range(4):
        with pytest.raises(Exception, match="are waiting already"):
            rig.submit()
    told = await exposed.samples("m#1")
    assert told[key("serveit_router_queued_requests", **LABELS)] == 2
    assert told[key("serveit_router_refusals_total", **LABELS)] == 4
    assert told[key("serveit_replica_starts_total", **LABELS)] == 7
    assert told[key("serveit_replica_deaths_total", **LABELS)] == 6
    rig.router.close()


async def test_requests_by_route() -> None:
    exposed = Exposed()
    routes = (RouteInfo("/<x>", "/.*", ("GET",), "model", "/p"),)
    table = RouteTable([AppInfo("a", (), (), routes)])
    exposed.meters.follow(table.entries)
    (meter,) = exposed.meters.by_order
    for _ in range(3):
        meter.in_flight += 1
    meter.end("GET", 200, 0.003)
    meter.end("GET", 500, 3.0)
    told = await exposed.samples()
    route = {"app": "a", "route": "/p/<x>"}
    assert told[key("serveit_http_requests_total", **route, method="GET", status="200")] == 1
    assert told[key("serveit_http_requests_total", **route, method="GET", status="500")] == 1
    assert told[key("serveit_http_requests_in_flight", **route)] == 1
    assert told[key("serveit_http_request_duration_seconds_bucket", **route, le="0.005")] == 1
    assert told[key("serveit_http_request_duration_seconds_count", **route)] == 2


async def test_the_process_and_its_version() -> None:
    told = await Exposed().samples()
    assert [value for (name, _), value in told.items() if name == "serveit_info"] == [1]
    if "process_open_fds" in {name for name, _ in told}:  # read from /proc, which not every system has
        assert told[key("process_resident_memory_bytes")] > 1e6


async def test_two_scrapes_at_once_share_what_they_ask() -> None:
    exposed = Exposed()
    await exposed.rig.update("m#1")
    one, two = await asyncio.gather(exposed.page(), exposed.page("m#1"))
    assert samples(one[1])[of_replica("up", "m#1")] == samples(two[1])[of_replica("up", "m#1")] == 1
    assert len(exposed.rig["m#1"].sent(FrameType.METRICS)) == 1


async def test_the_format_is_the_one_that_the_client_prefers() -> None:
    exposed = Exposed()
    await exposed.rig.update("m#1")
    content_type, text = await exposed.page("m#1", accept=b"application/openmetrics-text; version=1.0.0")
    assert content_type.startswith(b"application/openmetrics-text; version=1.0.0")
    assert text.count("# EOF") == 1
    assert "serveit_replica_requests" in {family.name for family in parse_openmetrics(text)}  # type: ignore[no-untyped-call]
    content_type, text = await exposed.page("m#1", accept=b"text/html,*/*;q=0.8")
    assert content_type == b"text/plain; version=0.0.4; charset=utf-8"
    assert list(parse(text))


ODD = [b"text/plain; version=x", b"application/openmetrics-text; version=1.0.0\xbb", b"\xff", b",;="]


@pytest.mark.parametrize("accept", ODD)
def test_whatever_the_client_accepts_it_gets_an_answer(accept: bytes) -> None:
    encode, content_type = _encoder([(b"accept", accept)])
    assert content_type.isascii() and isinstance(encode(CollectorRegistry()), bytes)


@given(st.binary(max_size=40))
def test_no_accept_makes_a_content_type_that_cannot_be_sent(octets: bytes) -> None:
    for kind in (b"text/plain;version=", b"application/openmetrics-text;version=", b""):
        _, content_type = _encoder([(b"accept", kind + octets)])
        assert content_type.isascii() and content_type.isprintable()

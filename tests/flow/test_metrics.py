"""Metrics: what is asked for is what is counted, once."""

from __future__ import annotations

import asyncio

import pytest

from serveit import App
from serveit.exceptions import NeedsRay
from serveit.web.exposition import ANSWER_S
from tests.flow.conftest import Served
from tests.flow.measured import measured
from tests.scrapes import Scrape, scraped


@pytest.fixture
def app() -> App:
    return measured


async def scrape(served: Served) -> Scrape:
    return await scraped(served.client.url or "", app=served.app_name)


async def test_requests_over_http_are_counted_by_route_method_and_status(served: Served) -> None:
    before = await scrape(served)
    for path, method, status in (
        ("/hello/Ada", "GET", 200),
        ("/hello/Bob", "GET", 200),
        ("/hello/Bob", "HEAD", 200),
        ("/hello/Eve?times=often", "GET", 422),
        ("/fails", "GET", 500),
        ("/nowhere/1", "GET", 404),
        ("/nowhere/2", "PROPFIND", 404),
        ("/hello/Ada", "DELETE", 405),
    ):
        assert (await served.http.request(method, path)).status_code == status
    after = await scrape(served)
    counted = after.since(before, "serveit_http_requests_total", "route", "method", "status")
    route = f"{served.prefix}/hello/<name>"
    assert counted == {
        (route, "GET", "200"): 2,
        (route, "HEAD", "200"): 1,
        (route, "GET", "422"): 1,
        (f"{served.prefix}/fails", "GET", "500"): 1,
    }
    durations = after.since(before, "serveit_http_request_duration_seconds_count", "route")
    assert durations == {(route,): 4, (f"{served.prefix}/fails",): 1}
    assert set(after.values("serveit_http_requests_in_flight", "route").values()) == {0}


async def test_what_no_route_takes_is_one_series_and_probes_are_none(served: Served) -> None:
    url = served.client.url or ""
    before = await scraped(url, app="")
    for path, status in ((f"{url}/-/healthz", 200), (f"{url}/-/nothing", 404)):
        assert (await served.http.get(path)).status_code == status
    for path in ("/nowhere/1", "/nowhere/2"):
        assert (await served.http.request("PROPFIND", path)).status_code == 404
    after = await scraped(url, app="")
    counted = after.since(before, "serveit_http_requests_total", "route", "method", "status")
    assert counted == {("", "", "404"): 2}


async def test_replicas_count_what_comes_by_every_way(served: Served) -> None:
    before = await scrape(served)
    for path in ("/hello/Ada", "/hello/Eve?times=often", "/fails", "/shadowed/Ada"):
        await served.http.get(path)
    assert await served.handle("hello").call("Bob") == "Bob"
    with pytest.raises(RuntimeError):
        await served.handle("fails").call()
    replies = await asyncio.gather(*(served.http.post("/half", json=number) for number in range(4)))
    assert [reply.json() for reply in replies] == [0, 0, 1, 1]
    after = await scrape(served)
    backends = after.since(before, "serveit_replica_requests_total", "backend")
    assert backends == {("hello",): 4, ("fails",): 2, ("shade",): 1, ("half",): 4}
    assert after.since(before, "serveit_replica_errors_total", "backend") == {("hello",): 1, ("fails",): 2}
    for name in ("queue", "processing"):
        started = after.since(before, f"serveit_replica_{name}_duration_seconds_count", "backend")
        assert started == backends
    assert after.since(before, "serveit_batch_size_sum", "backend") == {("half",): 4}
    assert after.since(before, "serveit_batch_size_count", "backend") == {("half",): 1}
    for name in ("running", "waiting"):
        assert set(after.values(f"serveit_replica_{name}_requests", "backend").values()) == {0}


async def test_actor_tasks_are_counted_as_calls(served: Served, kind: str) -> None:
    before = await scrape(served)
    hello = served.handle("hello")
    if kind == "local":
        with pytest.raises(NeedsRay):
            await hello.remote("Ada")
        expected = {}
    else:
        assert await (await hello.remote("Ada")) == "Ada"
        expected = {("hello",): 1}
    after = await scrape(served)
    for name in ("requests_total", "queue_duration_seconds_count", "processing_duration_seconds_count"):
        assert after.since(before, f"serveit_replica_{name}", "backend") == expected
    assert after.since(before, "serveit_replica_errors_total", "backend") == {}


async def test_every_replica_is_there_and_has_been_started(served: Served) -> None:
    now = await scrape(served)
    up = now.values("serveit_replica_up", "backend", "replica")
    assert sorted(backend for backend, _ in up) == ["blocks", "fails", "half", "hello", "hello", "shade"]
    assert set(up.values()) == {1}
    starts = now.values("serveit_replica_starts_total", "backend")
    assert starts == {("hello",): 2, ("fails",): 1, ("half",): 1, ("shade",): 1, ("blocks",): 1}
    assert set(now.values("serveit_replica_deaths_total", "backend").values()) == {0}
    assert set(now.values("serveit_router_queued_requests", "backend").values()) == {0}


async def test_a_replica_whose_loop_is_held_up_is_left_out(served: Served, kind: str) -> None:
    if kind == "local":  # there it holds up the server as well
        await served.handle("blocks").call(0.0)
        assert (await scrape(served)).values("serveit_replica_up", "backend")[("blocks",)] == 1
        return
    blocked = asyncio.ensure_future(served.handle("blocks").call(3 * ANSWER_S))
    scrapes: list[Scrape] = []

    async def look() -> bool:
        scrapes.append(await scrape(served))
        return scrapes[-1].values("serveit_replica_up", "backend")[("blocks",)] == 0

    while not await look():
        assert not blocked.done()
    assert not blocked.done(), "the scrape did not wait for it"
    assert ("blocks",) not in scrapes[-1].values("serveit_replica_requests_total", "backend")
    assert scrapes[-1].values("serveit_replica_up", "backend")[("fails",)] == 1
    await blocked
    assert not await look(), "it is free"


async def test_head_and_get(served: Served) -> None:
    url = f"{served.client.url}/-/metrics"
    got, head = await served.http.get(url), await served.http.head(url)
    assert (
        got.headers["content-type"]
        == head.headers["content-type"]
        == "text/plain; version=0.0.4; charset=utf-8"
    )
    assert head.status_code == 200 and head.content == b"" and int(head.headers["content-length"]) > 1000
    assert (await served.http.post(url)).status_code == 405
    listed = (await served.http.get(f"{served.client.url}/-/nothing")).json()["detail"]
    assert listed.endswith("/-/healthz, /-/metrics, /-/readyz, /-/routes")
    accepting = {"accept": "application/openmetrics-text; version=1.0.0"}
    assert (await served.http.get(url, headers=accepting)).text.endswith("# EOF\n")

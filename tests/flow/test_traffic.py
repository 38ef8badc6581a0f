"""Routes that lead to several backends."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from serveit import App
from serveit.declare.traffic import Traffic, choose_sticky
from tests.flow import apps
from tests.flow.conftest import Serve, Served
from tests.flow.gates import Gate
from tests.support import wait_until


@pytest.fixture
def app() -> App:
    return apps.traffic


async def asked(served: Served, backend: str) -> list[str]:
    texts: list[str] = await served.handle(backend).texts.call()
    return texts


async def load_of(served: Served, backend: str) -> list[tuple[int, int]]:
    """Of each of its replicas, what runs and what waits there."""
    status = (await served.client.status())["backends"][backend]
    return [(told["running"], told["waiting"]) for told in status.values()]


def within_4_sigma(hits: int, share: float, n: int) -> bool:
    return abs(hits - n * share) <= 4 * math.sqrt(n * share * (1 - share))


async def test_a_split_follows_the_weights(served: Served) -> None:
    over_http = Counter([(await served.http.get("/split/a")).text for _ in range(200)])
    called = Counter([await served.handle("split").call("a") for _ in range(200)])
    for counts in over_http, called:
        assert counts["v1"] + counts["v2"] == 200
        assert within_4_sigma(counts["v1"], 0.5, 200)


async def test_a_shard_key_goes_the_same_way_in_every_process(served: Served) -> None:
    """The way that this process works out: so it is after a restart, too, and on every proxy."""
    split = Traffic((("v1", 0.5), ("v2", 0.5)))
    keys = [f"user-{number}" for number in range(20)] + ["", "héllo", "日本"]
    for key in keys:
        way = choose_sticky(split, key)
        fields = {b"x-serve-shard-key": key.encode()}
        assert {(await served.http.get("/split/a", headers=fields)).text for _ in range(2)} == {way}
        assert {await served.handle("split").options(shard_key=key).call("a") for _ in range(2)} == {way}
        blocking = served.sync_handle("split").options(shard_key=key)
        assert await asyncio.to_thread(blocking.call, "a") == way
    assert {choose_sticky(split, key) for key in keys} == {"v1", "v2"}


async def test_shadows_get_copies(served: Served) -> None:
    await asked(served, "v2")
    assert (await served.http.get("/shadowed/http")).text == "v1"
    assert await served.handle("shadowed").call("call") == "v1"
    seen: list[str] = []
    for _ in range(50):
        seen += await asked(served, "v2")
        if len(seen) >= 2:
            break
    assert sorted(seen) == ["call", "http"]


async def test_traffic_can_be_moved(app: App, serve: Serve) -> None:
    async with serve(app) as served:

        async def ways() -> set[str]:
            over_http = {(await served.http.get("/moved/a")).text for _ in range(5)}
            return over_http | {await served.handle("moved").call("a") for _ in range(5)}

        try:
            await served.client.set_traffic("moved", {"v3": 1.0})
            assert await ways() == {"v3"}
            assert await load_of(served, "v1") == [(0, 0)], "it keeps its replica, for the way back"
            await served.client.set_traffic("moved", {"v1": 0.0, "v2": 1.0})
            assert await ways() == {"v2"}
            with pytest.raises(ValueError, match="sum"):
                await served.client.set_traffic("moved", {"v1": 0.5})
            with pytest.raises(ValueError, match="v9"):
                await served.client.set_traffic("moved", {"v9": 1.0})
            with pytest.raises(KeyError, match="no endpoint 'mved': did you mean 'moved'"):
                await served.client.set_traffic("mved", {"v1": 1.0})
            assert await ways() == {"v2"}
        finally:
            await served.client.set_traffic("moved", {"v1": 1.0})
        assert await ways() == {"v1"}


async def test_shadows_can_be_added(app: App, serve: Serve) -> None:
    async with serve(app) as served:
        await asked(served, "v3")
        try:
            await served.client.shadow_traffic("moved", "v3", 1.0)
            assert (await served.http.get("/moved/one")).text == "v1"
            assert await served.handle("moved").call("two") == "v1"
            seen: list[str] = []
            for _ in range(50):
                seen += await asked(served, "v3")
                if len(seen) >= 2:
                    break
            assert sorted(seen) == ["one", "two"]
        finally:
            await served.client.shadow_traffic("moved", "v3", 0.0)
        await served.handle("moved").call("three")
        assert await asked(served, "v3") == []


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.1])
async def test_a_shadow_gets_its_fraction(app: App, serve: Serve, fraction: float) -> None:
    async with serve(app) as served:
        await asked(served, "v3")
        await served.client.shadow_traffic("moved", "v3", fraction)
        try:
            over_http = [(await served.http.get("/moved/http")).text for _ in range(200)]
            called = [await served.handle("moved").call("call") for _ in range(200)]
            assert over_http + called == ["v1"] * 400, "clients get the main answer"
            # Copies arrive in the order in which they are sent: when these are there, so are the others.
            await served.client.shadow_traffic("moved", "v3", 1.0)
            await served.http.get("/moved/last http")
            await served.handle("moved").call("last call")
        finally:
            await served.client.shadow_traffic("moved", "v3", 0.0)
        seen: Counter[str] = Counter()
        async with asyncio.timeout(5):
            while not (seen["last http"] and seen["last call"]):
                seen += Counter(await asked(served, "v3"))
        assert within_4_sigma(seen["http"], fraction, 200)
        assert within_4_sigma(seen["call"], fraction, 200)


async def test_a_shadow_that_fails_is_nobodys_concern(served: Served) -> None:
    for _ in range(20):
        assert (await served.http.get("/guarded", params={"text": "fail"})).text == "narrow"
        assert await served.handle("guarded").call("fail") == "narrow"


async def test_a_shadow_that_is_stuck_holds_so_many_copies_and_nobody_up(served: Served, gate: Gate) -> None:
    """What the main backend may take is not taken by copies either: it has one place, and no queue."""
    folder = str(gate.folder)
    for _ in range(20):
        assert (await served.http.get("/guarded", params={"text": folder})).text == "narrow"
        assert await served.handle("guarded").call(folder) == "narrow"
    async with asyncio.timeout(5):
        while await load_of(served, "bad_shadow") != [(2, 0)]:
            pass  # one that had to wait there is being taken back
    assert gate.notes == ["in", "in"]
    gate.open()
    await wait_until(lambda: gate.notes.count("out") == 2, 5, "the copies end")
    for _ in range(3):
        assert await served.handle("guarded").call(folder) == "narrow"
    await wait_until(lambda: gate.notes.count("out") > 2, 5, "copies are sent again")


async def test_when_a_change_has_returned_nothing_goes_the_old_way(app: App, serve: Serve) -> None:
    """Neither through the proxy, nor by handles here, in a thread, or in a replica; under load."""
    async with serve(app) as served:
        loop = asyncio.get_running_loop()
        blocking = served.sync_handle("moved")

        async def http() -> str:
            return (await served.http.get("/moved/a")).text

        asks: list[Callable[[], Awaitable[str]]] = [
            http,
            lambda: served.handle("moved").call("a"),
            lambda: served.handle("inside").call("a"),
            lambda: asyncio.to_thread(blocking.call, "a"),
        ]

        def asked_again(since: float) -> bool:
            return all(sum(begun > since for begun, _ in known) > 2 for known in answers)

        answers: list[list[tuple[float, str]]] = [[] for _ in asks]
        stop = False

        async def ask_on(number: int) -> None:
            while not stop:
                begun = loop.time()
                answers[number].append((begun, await asks[number]()))

        asking = [asyncio.ensure_future(ask_on(number)) for number in range(len(asks))]
        try:
            for change in range(6):
                to = f"v{change % 3 + 1}"
                await served.client.set_traffic("moved", {to: 1.0})
                since = loop.time()
                await wait_until(partial(asked_again, since), 10, "each has asked again")
                assert {way for known in answers for begun, way in known if begun > since} == {to}
        finally:
            stop = True
            await asyncio.gather(*asking)
            await served.client.set_traffic("moved", {"v1": 1.0})


@pytest.mark.parametrize(
    ("traffic", "error", "text"),
    [
        ({"v1": 0.5, "v2": 0.6}, ValueError, "the weights must sum to 1, got 1.1 "),
        ({"v1": 1.5, "v2": -0.5}, ValueError, "must be ≥ 0 and finite, got -0.5"),
        ({"v1": math.nan}, ValueError, "finite, got nan"),
        ({}, ValueError, "no backend in the traffic"),
        ({"v9": 1.0}, ValueError, "unknown backend 'v9'"),
        ({"v1": "1"}, TypeError, "must be a number, got '1'"),
        ({1: 1.0}, TypeError, "the backend's name, a str, got 1"),
        (["v1"], TypeError, "must be a dict"),
        (None, TypeError, "must be a dict"),
        (
            {"v1": 0.5, "misfit": 0.5},
            ValueError,
            "'moved' cannot lead to backend 'misfit': .*'word' is",
        ),
    ],
)
async def test_what_is_refused_changes_nothing(
    served: Served, traffic: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        await served.client.set_traffic("moved", traffic)
    assert {(await served.http.get("/moved/a")).text, await served.handle("moved").call("a")} == {"v1"}


@pytest.mark.parametrize(
    ("endpoint", "backend", "fraction", "error", "text"),
    [
        ("moved", "v9", 0.5, ValueError, "unknown backend 'v9'"),
        ("moved", "v9", 0.0, ValueError, "unknown backend 'v9'"),
        ("mved", "v3", 0.5, KeyError, "no endpoint 'mved': did you mean 'moved'"),
        (None, "v3", 0.5, KeyError, "no endpoint None"),
        ("moved", "v3", 1.5, ValueError, r"must be in \[0, 1\], got 1.5"),
        ("moved", "v3", "all", TypeError, "must be a number, got 'all'"),
        ("moved", "misfit", 0.5, ValueError, "'moved' cannot lead to backend 'misfit'"),
    ],
)
async def test_shadows_that_are_refused(
    served: Served, endpoint: Any, backend: str, fraction: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        await served.client.shadow_traffic(endpoint, backend, fraction)
    routes = await served.client.routes()
    assert routes[f"{served.prefix}/moved/<text>"] == ["moved", ["GET", "HEAD"]]

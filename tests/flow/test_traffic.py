"""Routes that lead to several backends."""

from __future__ import annotations

from collections import Counter

import pytest

from serveit import App
from tests.flow import apps
from tests.flow.conftest import Serve, Served


@pytest.fixture
def app() -> App:
    return apps.traffic


async def asked(served: Served, backend: str) -> list[str]:
    texts: list[str] = await served.handle(backend).texts.call()
    return texts


async def test_a_split_follows_the_weights(served: Served) -> None:
    counts = Counter([(await served.http.get("/split/a")).text for _ in range(100)])
    assert set(counts) == {"v1", "v2"} and min(counts.values()) > 20
    counts = Counter([await served.handle("split").call("a") for _ in range(100)])
    assert set(counts) == {"v1", "v2"} and min(counts.values()) > 20


async def test_the_same_shard_key_goes_the_same_way(served: Served) -> None:
    ways = {}
    for key in map(str, range(20)):
        fields = {"x-serve-shard-key": key}
        over_http = {(await served.http.get("/split/a", headers=fields)).text for _ in range(3)}
        called = {await served.handle("split").options(shard_key=key).call("a") for _ in range(3)}
        assert over_http == called and len(called) == 1
        ways[key] = called.pop()
    assert set(ways.values()) == {"v1", "v2"}


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


async def test_unknown_shadows_are_refused(served: Served) -> None:
    with pytest.raises(ValueError, match="v9"):
        await served.client.shadow_traffic("moved", "v9", 0.5)

"""Apps that come, change, fail and go in a running instance."""

from __future__ import annotations

import asyncio
import pickle
import re
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2
import pytest
import ray

import serveit
from serveit import App, Handle
from serveit.cluster.instance import make_spec, open_instance
from serveit.exceptions import DeadlineExceeded, NotServing, RemoteTraceback
from tests.cluster import apps
from tests.cluster.instance import KEEPER, Instance

pytestmark = pytest.mark.cluster


def actors() -> set[str]:
    """The names of the live actors of the instance."""
    named: Any = ray.util.list_named_actors(all_namespaces=True)
    return {actor["name"] for actor in named if actor["namespace"] == "serveit"}


async def fetch(url: str | None, path: str) -> tuple[int, str]:
    async with httpx2.AsyncClient(base_url=str(url), timeout=20) as http:
        reply = await http.get(path)
    return reply.status_code, reply.text


async def test_an_app_is_there_for_as_long_as_it_is_served(instance: Instance) -> None:
    before = await asyncio.to_thread(actors)
    async with serveit.serve(apps.first, name="brief", prefix="/brief") as client:
        assert client.url == instance.url
        assert await client.get_handle("one").call() == "first"
        assert await fetch(client.url, "/brief/version") == (200, "first")
    assert (await fetch(instance.url, "/brief/version"))[0] == 404
    assert await asyncio.to_thread(actors) == before


async def test_a_constructor_that_raises_fails_the_deploy_with_that(instance: Instance) -> None:
    before = await asyncio.to_thread(actors)
    for _ in range(2):
        with pytest.raises(apps.OwnError, match="no model file") as caught:
            async with serveit.serve(apps.broken, name="broken", prefix="/broken"):
                pytest.fail("it is broken")
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        assert "in __init__" in str(caught.value.__cause__)
        assert "replica Broken#" in str(caught.value.__notes__)
    assert await asyncio.to_thread(actors) == before
    with pytest.raises(NotServing):
        async with serveit.connect(address=None, app="broken"):
            pytest.fail("it is not there")


async def test_the_next_version_takes_the_place_of_the_last(instance: Instance) -> None:
    async with serveit.connect(address=None, app=KEEPER) as keeper:
        await keeper.deploy(apps.first, name="versions", prefix="/versions")
        assert await fetch(instance.url, "/versions/version") == (200, "first")
        asking = asyncio.ensure_future(_ask_on(instance, "/versions/version", "second"))
        await keeper.deploy(apps.second, name="versions", prefix="/versions")
        assert set(await asking) <= {(200, "first"), (200, "second")}
        assert await fetch(instance.url, "/versions/more") == (200, "more")
    async with serveit.connect(address=None, app="versions") as client:
        assert await client.get_handle("other").call() == "second"
        with pytest.raises(KeyError, match="no backend or endpoint 'one'"):
            client.get_handle("one")
        with pytest.raises(apps.OwnError):
            await client.deploy(apps.broken, name="versions", prefix="/versions")
        assert await client.get_handle("other").call() == "second", "what ran runs on"
        await client.delete()
    assert (await fetch(instance.url, "/versions/version"))[0] == 404


async def test_names_that_come_and_go(instance: Instance) -> None:
    async with serveit.connect(address=None, app=KEEPER) as keeper:
        await keeper.deploy(apps.first, name="names", prefix="/names")
    async with serveit.connect(address=None, app="names") as client:
        one, routed = client.get_handle("one"), client.get_handle("/version")
        uses: list[Callable[[], Awaitable[Any]]] = [one.call, one.remote, lambda: _elsewhere(one)]
        uses.append(lambda: asyncio.to_thread(one.sync.call))
        with pytest.raises(DeadlineExceeded, match="app 'names' has no backend or endpoint 'other'"):
            await client.get_handle("other", missing_ok=True).options(timeout_s=0.1).call()
        later, more = (client.get_handle(name, missing_ok=True) for name in ("other", "/more"))
        blocking = client.get_handle("other", sync=True, missing_ok=True)
        ways = (
            later.call(),
            more.call(),
            asyncio.to_thread(blocking.call),
            _elsewhere(later),
            later.remote(),
        )
        waiting = asyncio.gather(*ways)
        await client.deploy(apps.second, name="names", prefix="/names")
        *answers, ref = await waiting
        assert [*answers, await ref] == ["second", "more", "second", "second", "second"]
        assert await routed.call() == "second" and await later.call() == "second"
        for use in uses:
            with pytest.raises(KeyError, match="app 'names' has no backend or endpoint 'one': there is"):
                await use()
        await client.delete()
        for use in (*uses, later.call, routed.call):
            with pytest.raises(NotServing, match="there is no running app 'names'"):
                await use()


async def _elsewhere(handle: Handle[..., Any]) -> Any:
    """A call from an event loop of its own, through the handle's pickle."""
    call = pickle.loads(pickle.dumps(handle)).call
    return await asyncio.to_thread(asyncio.run, call())


async def _ask_on(instance: Instance, path: str, until: str) -> list[tuple[int, str]]:
    answers: list[tuple[int, str]] = []
    async with httpx2.AsyncClient(base_url=instance.url, timeout=20) as http:
        while not answers or answers[-1] == (200, "first"):
            reply = await http.get(path)
            answers.append((reply.status_code, reply.text))
    assert answers[-1] == (200, until)
    return answers


async def test_a_route_belongs_to_one_app(instance: Instance) -> None:
    async with serveit.serve(apps.first, name="owner-of-it", prefix="/clash") as client:
        with pytest.raises(ValueError, match="GET /clash/version .*taken by app 'owner-of-it'.*prefix"):
            async with serveit.serve(apps.second, name="latecomer", prefix="/clash"):
                pytest.fail("it is taken")
        assert await fetch(client.url, "/clash/version") == (200, "first")


async def test_http_options_are_the_instances(instance: Instance) -> None:
    with pytest.raises(ValueError, match="serves HTTP already"):
        async with serveit.serve(App(), name="other-options", http={"port": 0, "debug": True}):
            pytest.fail("it has other options")


async def test_an_app_that_does_not_run(instance: Instance) -> None:
    with pytest.raises(NotServing, match="no running app 'keepr': did you mean 'keeper'"):
        async with serveit.connect(address=None, app="keepr"):
            pytest.fail("there is none")


async def test_two_apps_in_one_loop(instance: Instance) -> None:
    async with serveit.serve(apps.first, name="outer", prefix="/outer") as outer:
        handle, blocking = outer.get_handle("one"), outer.get_handle("one", sync=True)
        async with serveit.serve(apps.second, name="inner", prefix="/inner") as inner:
            assert await inner.get_handle("other").call() == "second"
        assert await handle.call() == "first"
        assert await asyncio.to_thread(blocking.call) == "first"


def test_blocking_programs(instance: Instance) -> None:
    with serveit.serve(apps.first, name="blocking", prefix="/blocking") as client:
        assert client.get_handle("one").call() == "first"
        client.update("one", num_replicas=2)
        assert len(client.status()["backends"]["one"]) == 2
        assert list(client.routes()) == ["/blocking/version"]
    with serveit.connect(address=None, app=KEEPER) as client, pytest.raises(KeyError):
        client.get_handle("one")


async def test_more_than_the_cluster_has(instance: Instance) -> None:
    """It is said while it is waited for, and in the end."""
    app = App()

    @app.backend(ray_actor_options={"num_cpus": 1000, "resources": {"tpu": 1}})
    def huge() -> None: ...

    told: list[str] = []
    async with open_instance(instance.address) as running:
        spec = await make_spec(app, name="huge", deploy_timeout_s=2.5)
        with pytest.raises(NotServing) as raised:
            await running.deploy(spec, lambda progress: told.extend(progress.waiting))
        assert "huge" not in (await running.status())["apps"]
    needs = r"needs 1000 CPU, \d+ free \(no node has more than 8\) and 1 tpu, 0 free \(no node has any\)"
    assert re.fullmatch(rf"replica huge#\d+ {needs}; waiting for \d s", told[0])
    assert re.search(rf"has waited 2.5 s for its process to exist: it {needs}; give", str(raised.value))


async def test_no_room_for_a_surge(instance: Instance) -> None:
    """The old version goes on; in place there is room."""
    resources: Any = ray.cluster_resources  # typed by nobody
    cpus = resources()["CPU"]

    def make(version: int, max_surge: int) -> App:
        app = App()

        @app.backend(ray_actor_options={"num_cpus": cpus}, max_surge=max_surge)
        async def which() -> int:
            return version

        return app

    async with open_instance(instance.address) as running:
        await running.deploy(await make_spec(make(1, 1), name="tight", prefix="/tight"))
        async with serveit.connect(None, app="tight") as client:
            with pytest.raises(NotServing, match="update in place with max_surge=0"):
                await running.deploy(await make_spec(make(2, 1), name="tight", deploy_timeout_s=1.5))
            assert await client.get_handle("which").call() == 1
            status = await client.status()
            assert status["state"] == "FAILED" and f"needs {cpus:g} CPU, 0 free" in status["message"]
            await running.deploy(await make_spec(make(3, 0), name="tight"))
            assert await client.get_handle("which").call() == 3
            await client.delete()

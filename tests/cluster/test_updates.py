"""Rolling updates under load: no request fails, and what does not come up changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx2
import pytest

from serveit import App
from serveit.client import Client
from tests.cluster import versions
from tests.cluster.apps import OwnError
from tests.cluster.instance import Instance
from tests.cluster.versions import SETTLED_S, deployed, eventually, load, processes, versioned

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

NUM_UPDATES = 10
SOME = 30
"""Requests that tell what is there now."""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


async def redeploy(client: Client, app: App, name: str) -> None:
    await client.deploy(app, name=name, prefix=f"/{name}")


@pytest.mark.parametrize("num_replicas", [1, 2])
async def test_ten_updates_fail_no_request(instance: Instance, log: Path, num_replicas: int) -> None:
    name = f"rolling-{num_replicas}"
    async with deployed(versioned("v0", log, num_replicas=num_replicas), name) as client:
        async with load(client, name, log) as ledger:
            await ledger.more(SOME)
            for number in range(1, NUM_UPDATES + 1):
                before = await processes(client)
                await redeploy(client, versioned(f"v{number}", log, num_replicas=num_replicas), name)
                mark = ledger.mark
                await ledger.more(SOME)
                assert ledger.versions(since=mark) == {f"v{number}"}, "the deploy had returned"
                after = await processes(client)
                assert len(after) == num_replicas and not after & before
        report = ledger.report().check()
    assert set(report.versions) == {f"v{number}" for number in range(NUM_UPDATES + 1)}
    assert len(report.pids) == (NUM_UPDATES + 1) * num_replicas, "each replica had its share"


# -- new versions that do not come up --------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path) -> Iterator[Path]:
    """A folder for a module of the test's, which replicas find as well."""
    sys.path.insert(0, str(tmp_path))
    known = set(sys.modules)
    yield tmp_path
    sys.path.remove(str(tmp_path))
    for name in set(sys.modules) - known:
        if getattr(sys.modules[name], "__file__", None) == str(tmp_path / f"{name}.py"):
            del sys.modules[name]


def failing_import(folder: Path) -> App:
    """An app whose module could be imported once, and cannot any more."""
    path = folder / "fails_to_import.py"
    path.write_text(
        textwrap.dedent("""
            from pathlib import Path
            from serveit import App
            from tests.cluster.apps import OwnError

            app = App()

            @app.route("/ask")
            async def Ask(id: str) -> str:
                return "never"

            if Path(__file__).with_suffix(".broken").exists():
                raise OwnError("v1 fails in import")
            """)
    )
    importlib.invalidate_caches()
    app: App = importlib.import_module(path.stem).app
    path.with_suffix(".broken").touch()
    return app


@pytest.mark.parametrize("where", ["import", "__init__", "check_health"])
async def test_a_bad_version_changes_nothing(instance: Instance, log: Path, module: Path, where: str) -> None:
    name = f"bad-{where.strip('_').replace('_', '-')}"
    bad = failing_import(module) if where == "import" else versioned("v1", log, fails=where, num_replicas=2)
    async with deployed(versioned("v0", log, num_replicas=2), name) as client:
        before = await processes(client)
        async with load(client, name, log) as ledger:
            await ledger.more(SOME)
            with pytest.raises(OwnError, match=f"v1 fails in {where}"):
                await redeploy(client, bad, name)
            await ledger.more(SOME)
            assert await processes(client) == before and len(before) == 2
            status = await client.status()
            assert status["state"] == "FAILED" and f"v1 fails in {where}" in status["message"]
            await redeploy(client, versioned("v2", log, num_replicas=2), name)
            mark = ledger.mark
            await ledger.more(SOME)
        assert set(ledger.report(until=mark).check().pids) >= before
        assert set(ledger.report().check().versions) == {"v0", "v2"}
        assert ledger.versions(since=mark) == {"v2"}
        assert (await client.status())["state"] == "RUNNING", "a good version clears it"


# -- in place --------------------------------------------------------------------------------------


async def test_in_place_there_are_never_more_processes(instance: Instance, log: Path) -> None:
    async with deployed(versioned("v0", log, num_replicas=2, max_surge=0, also="/old"), "in-place") as client:
        async with load(client, "in-place", log) as ledger, most_actors("in-place") as peak:
            await ledger.more(SOME)
            for number in range(1, 4):
                also = "/new" if number % 2 else "/old"
                app = versioned(f"v{number}", log, num_replicas=2, max_surge=0, also=also)
                await redeploy(client, app, "in-place")
                mark = ledger.mark
                await ledger.more(SOME)
                assert ledger.versions(since=mark) == {f"v{number}"}
                assert set(await client.routes()) == {"/in-place/ask", f"/in-place{also}"}
        ledger.report().check()
        assert peak == {2}


@contextlib.asynccontextmanager
async def most_actors(app: str) -> AsyncIterator[set[int]]:
    """The largest number of an app's replicas that were there at once, while inside; a set of one."""
    peak = {0}

    async def look() -> None:
        while True:
            count = len(await asyncio.to_thread(versions.actors, app))
            peak.add(max(peak.pop(), count))
            await asyncio.sleep(versions.PAUSE_S)

    looking = asyncio.create_task(look())
    try:
        yield peak
    finally:
        looking.cancel()
        await asyncio.wait((looking,))


# -- several apps ----------------------------------------------------------------------------------


async def test_two_apps_update_independently(instance: Instance, tmp_path: Path) -> None:
    logs = {name: tmp_path / name for name in ("changing", "staying")}
    async with (
        deployed(versioned("v0", logs["changing"]), "changing") as client,
        deployed(versioned("s0", logs["staying"], num_replicas=2), "staying") as other,
    ):
        before = await processes(other)
        async with (
            load(client, "changing", logs["changing"], rate=100) as ledger,
            load(other, "staying", logs["staying"], rate=100) as others,
        ):
            for number in range(1, 4):
                await redeploy(client, versioned(f"v{number}", logs["changing"]), "changing")
                await ledger.more(SOME)
        assert set(ledger.report().check().versions) == {"v0", "v1", "v2", "v3"}
        report = others.report().check()
        assert report.versions == {"s0": report.sent}
        assert await processes(other) == before == set(report.pids)


async def test_a_second_app_at_the_same_prefix_is_refused(instance: Instance, log: Path) -> None:
    async with deployed(versioned("v0", log), "first-there") as client:
        async with load(client, "first-there", log) as ledger:
            await ledger.more(SOME)
            with pytest.raises(ValueError, match="GET /first-there/ask .* taken by app 'first-there'"):
                await client.deploy(versioned("v1", log), name="second-there", prefix="/first-there")
            await ledger.more(SOME)
        report = ledger.report().check()
        assert report.versions == {"v0": report.sent}
        assert await asyncio.to_thread(versions.actors, "second-there") == set()


# -- what still runs -------------------------------------------------------------------------------


def calling(version: int, helper: str) -> App:
    """An app whose requests take a while, and then ask a backend of the same version."""
    app = App()

    @app.backend(name=helper, graceful_shutdown_timeout_s=0.2)
    async def helped() -> int:
        return version

    @app.route("/slow")
    @app.backend(name="slow", graceful_shutdown_timeout_s=0.2)
    async def slow(wait_s: float) -> int:
        await asyncio.sleep(wait_s)
        answer: int = await app.handle(helper).call()
        return answer

    return app


async def test_a_request_has_its_deadline_and_its_helpers(instance: Instance) -> None:
    """The old version's, of which a backend is no more: longer than what a drain waits without a deadline."""
    async with (
        deployed(calling(1, "helper"), "calling") as client,
        httpx2.AsyncClient(base_url=f"{client.url}/calling", timeout=30) as http,
    ):
        asking = asyncio.ensure_future(http.get("/slow", params={"wait_s": 4}))
        await wait_until_running(client, "slow")
        await redeploy(client, calling(2, "assistant"), "calling")
        assert (await http.get("/slow", params={"wait_s": 0})).text == "2"
        assert not asking.done(), "it was running before the update, and still is"
        answer = await asking
        assert (answer.status_code, answer.text) == (200, "1")


async def wait_until_running(client: Client, backend: str) -> None:
    async def runs() -> bool:
        replicas = (await client.status())["backends"][backend].values()
        return any(told.get("running") for told in replicas)

    await eventually(runs, SETTLED_S, "the request runs")

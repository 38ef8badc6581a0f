"""Options that are changed while they are in use."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.flow import apps
from tests.flow.answers import problem
from tests.flow.conftest import Serve, Served
from tests.flow.gates import Gate
from tests.support import wait_until

Told = dict[str, tuple[int, list[Any], int]]
AS_DECLARED: dict[str, dict[str, Any]] = {
    "Limit": {"num_replicas": 2, "user_config": {"limit": 10}},
    "Sizes": {"max_batch_size": 2, "batch_wait_timeout_s": 30.0},
    "held": {"max_ongoing_requests": 1, "max_queued_requests": None, "request_timeout_s": 60.0},
    "threads": {"num_threads": 1},
}


@contextlib.asynccontextmanager
async def tuning(serve: Serve) -> AsyncIterator[Served]:
    """On Ray the app stays from test to test: each begins with what was declared."""
    async with serve(apps.tuned) as served:
        for backend, options in AS_DECLARED.items():
            await served.client.update(backend, **options)
        yield served


async def told(served: Served, num_replicas: int = 2) -> Told:
    """Of each replica of Limit: its process, all that it was given, and its limit."""
    found: Told = {}
    for _ in range(1_000):
        replica, pid, given, limit = await served.handle("Limit").told.call()
        found[replica] = pid, given, limit
        if len(found) == num_replicas:
            return found
    raise AssertionError(f"only {sorted(found)} answered")


def more_given(before: Told, after: Told, *configs: Any) -> bool:
    """Whether the same processes were given these, and nothing else, in between."""
    return {id: (pid, given) for id, (pid, given, _) in after.items()} == {
        id: (pid, [*given, *configs]) for id, (pid, given, _) in before.items()
    }


async def test_user_config_reaches_each_replica_once_at_each_change(serve: Serve) -> None:
    async with tuning(serve) as tuned:
        update = tuned.client.update
        begun = await told(tuned)
        assert all(given[0] == {"limit": 10} for _, given, _ in begun.values()), "on construction"
        await update("Limit", user_config={"limit": 20})
        two = await told(tuned)
        assert more_given(begun, two, {"limit": 20})
        assert [limit for _, _, limit in two.values()] == [20, 20]
        assert (await tuned.http.get("/limit/15")).json() is True

        await update("Limit", user_config={"limit": 20})
        await update("Limit", max_queued_requests=500)
        await update("held", max_ongoing_requests=2)
        assert await told(tuned) == two, "nothing of it was a change of it"

        await update("Limit", num_replicas=3)
        three = await told(tuned, 3)
        (new,) = three.keys() - two.keys()
        assert three[new][1:] == ([{"limit": 20}], 20), "a later replica starts with it"
        assert {id: three[id] for id in two} == two

        config = await tuned.client.get_config("Limit")
        assert (config.num_replicas, config.user_config) == (3, {"limit": 20})
        assert config.max_queued_requests == 500
        await update("Limit", user_config={})
        assert more_given(three, await told(tuned, 3), {}), "nothing in it is a configuration, too"


async def test_what_reconfigure_raises_comes_back_and_the_old_one_stays(serve: Serve) -> None:
    async with tuning(serve) as tuned:
        before = await told(tuned)
        with pytest.raises(apps.OwnError) as caught:
            await tuned.client.update("Limit", user_config={"limit": -3}, num_replicas=3)
        assert (caught.value.args, caught.value.code) == (("a limit of -3", 7), 7)
        after = await told(tuned)
        tried = [id for id in after if after[id] != before[id]]
        assert len(tried) <= 1, "the others were not asked"
        assert more_given(
            {id: before[id] for id in tried}, {id: after[id] for id in tried}, {"limit": -3}, {"limit": 10}
        )
        assert [limit for _, _, limit in after.values()] == [10, 10]
        assert (await tuned.client.status())["num_replicas"]["Limit"] == 2
        await tuned.client.update("Limit", user_config={"limit": 30})
        assert [limit for _, _, limit in (await told(tuned)).values()] == [30, 30]


async def test_sizes_and_waits_of_batches(serve: Serve) -> None:
    async with tuning(serve) as tuned:
        sizes = tuned.handle("Sizes")
        assert await asyncio.gather(*(sizes.call(n) for n in range(2))) == [2, 2]
        waiting = [asyncio.ensure_future(sizes.call(1))]
        await tuned.client.update("Sizes", max_batch_size=3)
        waiting += [asyncio.ensure_future(sizes.call(n)) for n in range(2)]
        assert await asyncio.gather(*waiting) == [3, 3, 3], "what waited goes by the new size"
        waiting = [asyncio.ensure_future(sizes.call(1))]
        await asyncio.sleep(0.02)
        assert not waiting[0].done()
        await tuned.client.update("Sizes", batch_wait_timeout_s=0.0)
        assert await waiting[0] == 1
        assert await sizes.call(1) == 1


async def test_requests_at_once(serve: Serve, gate: Gate) -> None:
    async with tuning(serve) as tuned:
        calls = [asyncio.ensure_future(tuned.handle("held").call(str(gate.folder))) for _ in range(5)]
        await wait_until(lambda: gate.notes.count("in") == 1, 10.0, "1 run at once")
        await tuned.client.update("held", max_ongoing_requests=3)
        await wait_until(lambda: gate.notes.count("in") == 3, 10.0, "3 run at once")
        await tuned.client.update("held", max_ongoing_requests=4, max_queued_requests=0)
        await wait_until(lambda: gate.notes.count("in") == 4, 10.0, "4 run at once")
        gate.open()
        assert await asyncio.gather(*calls) == ["done"] * 5


async def test_the_time_for_an_answer(serve: Serve, gate: Gate) -> None:
    async with tuning(serve) as tuned:
        await tuned.client.update("held", request_timeout_s=0.1)
        reply = await tuned.http.get("/held", params={"folder": str(gate.folder)})
        problem(reply, 504, "maybe")


async def test_what_needs_new_replicas_leaves_the_others_alone(serve: Serve) -> None:
    async with tuning(serve) as tuned:
        limits, other = await told(tuned), await tuned.handle("untouched").call()
        replica, thread = await tuned.handle("threads").call()
        failures: list[BaseException] = []
        stop = asyncio.Event()

        async def ask_on() -> None:
            while not stop.is_set():
                try:
                    await tuned.handle("threads").call(0.001)
                except Exception as error:
                    failures.append(error)

        asking = [asyncio.ensure_future(ask_on()) for _ in range(4)]
        await tuned.client.update("threads", num_threads=3)
        stop.set()
        await asyncio.gather(*asking)
        assert failures == []
        assert (await tuned.handle("threads").call())[0] != replica
        assert await told(tuned) == limits
        assert await tuned.handle("untouched").call() == other
        status = await tuned.client.status()
        assert (status["state"], status["num_replicas"]["threads"]) == ("RUNNING", 1)


@pytest.mark.parametrize(
    ("backend", "options", "error", "text"),
    [
        ("Limits", {"num_replicas": 2}, KeyError, "no backend 'Limits': did you mean 'Limit'"),
        ("Limit", {"num_replica": 2}, TypeError, "no option 'num_replica': did you mean 'num_replicas'"),
        ("Limit", {"num_replicas": 0}, ValueError, "num_replicas must be ≥ 1, got 0"),
        ("Limit", {"batch_wait_timeout_s": 1.0}, ValueError, "batch_wait_timeout_s needs max_batch_size"),
        ("Sizes", {"max_batch_size": 500, "max_ongoing_requests": 4}, ValueError, "≥ max_batch_size"),
        ("Limit", {"user_config": None}, ValueError, "user_config=None says nothing"),
        ("untouched", {"max_batch_size": 4}, ValueError, "'untouched': its code is written for single"),
        ("held", {"user_config": {}}, TypeError, "'held' takes no user_config: .*reconfigure"),
        ("Limit", {"user_config": lambda: 1}, Exception, "the user_config of backend 'Limit'"),
        ("Limit", {"deploy_timeout_s": 0}, ValueError, "deploy_timeout_s must be > 0"),
        ("Limit", {"ray_actor_options": {"num_cpus": -1}}, ValueError, "num_cpus"),
    ],
)
async def test_wrong_changes_change_nothing(
    serve: Serve, backend: str, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    async with tuning(serve) as tuned:
        before = await told(tuned)
        with pytest.raises(error, match=text):
            await tuned.client.update(backend, **options)
        assert await told(tuned) == before

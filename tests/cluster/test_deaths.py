"""Replicas that die: who notices, who is answered, and what comes in their place."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2
import pytest

import serveit
from serveit import Handle
from serveit.client import Client
from serveit.exceptions import ReplicaDied, ServeitError
from tests.cluster import apps
from tests.cluster.instance import Instance
from tests.flow.gates import Gate
from tests.support import wait_until

pytestmark = pytest.mark.cluster

NEW_S = 10.0


@pytest.fixture(scope="module")
def deployed(instance: Instance) -> str:
    return asyncio.run(instance.deployed(apps.mortals))


async def ready(client: Client, backend: str) -> dict[str, int]:
    """The processes of its replicas that are ready, by id."""
    replicas = (await client.status())["backends"][backend]
    return {id: told["pid"] for id, told in replicas.items() if told["state"] == "ready"}


async def have_one_waiting(client: Client, backend: str) -> bool:
    replicas = (await client.status())["backends"][backend].values()
    return all(told.get("waiting") == 1 for told in replicas)


async def eventually(predicate: Callable[[], Awaitable[bool]], what: str) -> None:
    async with asyncio.timeout(NEW_S):
        while not await predicate():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_a_killed_replica_is_replaced_and_requests_go_on(deployed: str, gate: Gate) -> None:
    async with (
        serveit.connect(address=None, app=deployed) as client,
        httpx2.AsyncClient(base_url=f"{client.url}/{deployed}", timeout=20) as http,
    ):
        before = await ready(client, "Pair")
        assert len(before) == 2
        pair = client.get_handle("Pair")
        waiting = [asyncio.ensure_future(pair.wait.call(str(gate.folder))) for _ in range(8)]
        await wait_until(lambda: len(gate.notes) == 4, 5, "both run what they may")
        await eventually(lambda: have_one_waiting(client, "Pair"), "each has said that one waits there")
        victim = next(iter(before.values()))
        os.kill(victim, signal.SIGKILL)
        ran_there = gate.notes[:4].count(f"in {victim}")
        done, _ = await asyncio.wait(waiting, timeout=2, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(0.05)
        lost = [call for call in waiting if call.done()]
        assert len(lost) == ran_there == 2
        assert all(isinstance(call.exception(), ReplicaDied) for call in lost)
        gate.open()
        kept = await asyncio.gather(*(call for call in waiting if call not in lost))
        assert len(kept) == 6 and victim not in kept, "what only waited there was answered elsewhere"
        for _ in range(20):
            called, got = await asyncio.gather(pair.call(), http.get("/pair"))
            assert called.startswith("Pair#") and got.status_code == 200
        await eventually(lambda: _are(client, "Pair", 2), "there are two again")
        after = await ready(client, "Pair")
        assert victim not in after.values() and set(before.values()) - {victim} < set(after.values())
        seen = {await pair.call() for _ in range(40)}
        assert seen == set(after)


async def _are(client: Client, backend: str, count: int) -> bool:
    return len(await ready(client, backend)) == count


@pytest.mark.parametrize("how", ["SystemExit", "os._exit", "segmentation fault"])
async def test_code_that_ends_its_process(deployed: str, how: str) -> None:
    async with serveit.connect(address=None, app=deployed) as client:
        single = client.get_handle("Single")
        process = await single.process.call()
        with pytest.raises((ServeitError, SystemExit)) as caught:
            await asyncio.wait_for(asyncio.shield(_raised(single.die.call(how))), 5)
        if how != "SystemExit":
            assert isinstance(caught.value, ReplicaDied) and caught.value.executed == "maybe"
        await eventually(lambda: _is_another(single, process), "another process answers")


async def _is_another(single: Handle[..., Any], process: int) -> bool:
    another = await single.options(timeout_s=NEW_S).process.call()
    return bool(another != process)


async def _raised(call: Awaitable[object]) -> None:
    """A SystemExit must not end the test's loop."""
    try:
        await call
    except SystemExit as error:
        raise ServeitError(f"exited with {error.code}") from None


async def test_remote_to_who_dies(deployed: str) -> None:
    async with serveit.connect(address=None, app=deployed) as client:
        single = client.get_handle("Single")
        ref = await single.die.remote("os._exit")
        with pytest.raises(Exception, match="died|dead|unavailable|lost"):
            await asyncio.wait_for(ref, 10)
        assert (await single.options(timeout_s=NEW_S).call()).startswith("Single#")

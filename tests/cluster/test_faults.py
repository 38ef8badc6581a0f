"""What faults leave standing: the rows of a fault-tolerance list that no other file here shows."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import httpx2
import pytest
import ray

import serveit
from serveit import App
from serveit.client import Client
from serveit.control.orders import PROXY_NAMES
from serveit.exceptions import Draining, ReplicaDied
from tests.cluster.instance import KEEPER, Instance
from tests.cluster.versions import SETTLED_S, deployed, eventually, processes, split
from tests.flow.gates import Gate
from tests.support import wait_until

pytestmark = pytest.mark.cluster


def slow(gate: Path, drain_s: float = 30.0) -> App:
    app, folder = App(), str(gate)

    @app.backend(max_ongoing_requests=1, graceful_shutdown_timeout_s=drain_s)
    async def one(number: int) -> int:
        gate = Gate(folder)
        gate.note("in")
        await gate.passed()
        return number

    return app


async def test_ten_that_wait_all_end_when_the_app_is_deleted(instance: Instance, gate: Gate) -> None:
    async with serveit.connect(address=None, app=KEEPER) as keeper:
        await keeper.deploy(slow(gate.folder), name="slow")
    async with serveit.connect(address=None, app="slow") as client:
        one = client.get_handle("one")
        calls = [asyncio.ensure_future(one.call(number)) for number in range(10)]
        await wait_until(lambda: gate.notes, 5, "one runs")
        ending = asyncio.ensure_future(client.delete())
        await eventually(lambda: _state_is(client, "DELETING"), SETTLED_S, "it is being deleted")
        gate.open()
        assert await asyncio.gather(*calls) == list(range(10))
        await ending


async def test_what_takes_longer_than_a_drain_is_cut_off(instance: Instance, gate: Gate) -> None:
    app = slow(gate.folder, drain_s=0.5)
    async with deployed(app, "slow") as client:
        call = asyncio.ensure_future(client.get_handle("one").call(1))
        await wait_until(lambda: gate.notes, 5, "it runs")
    with pytest.raises((Draining, ReplicaDied)) as caught:
        await asyncio.wait_for(call, 5)
    assert caught.value.executed != "no"
    assert gate.notes == ["in"]


async def _state_is(client: Client, state: str) -> bool:
    return bool((await client.status())["state"] == state)


def fragile(gate: Path) -> App:
    """Its constructors wait while there is a file "closed" and the gate is not open."""
    app, folder = App(), str(gate)

    @app.backend(num_replicas=2)
    class Fragile:
        def __init__(self) -> None:
            if (Path(folder) / "closed").exists():
                Gate(folder).note("constructs")
                Gate(folder).passed_by_thread()

        def __call__(self) -> int:
            return os.getpid()

    return app


async def test_while_a_replacement_hangs_in_its_constructor_the_other_answers(
    instance: Instance, gate: Gate
) -> None:
    async with deployed(fragile(gate.folder), "fragile") as client:
        handle = client.get_handle("Fragile")
        killed, left = await processes(client, "Fragile")
        (gate.folder / "closed").touch()
        os.kill(killed, signal.SIGKILL)
        await wait_until(lambda: gate.notes, SETTLED_S, "another is being constructed")
        assert {await handle.call() for _ in range(20)} == {left}
        gate.open()

        async def are_two() -> bool:
            return len(await processes(client, "Fragile")) == 2

        await eventually(are_two, SETTLED_S, "there are two again")


async def test_a_proxy_that_is_killed_comes_back_with_what_changed_meanwhile(
    instance: Instance, tmp_path: Path
) -> None:
    async with deployed(split(tmp_path / "log"), "split") as client:
        url = f"{client.url}/split/ask"

        async def version() -> str:
            async with httpx2.AsyncClient(timeout=5) as http:
                try:
                    got = await http.get(url, params={"id": "x"})
                except httpx2.TransportError:  # a reset, or nobody listens: never a hang
                    return ""
            if got.status_code == 503:  # it listens, and has not been told of any route yet
                assert got.headers["x-serveit-executed"] == "no"
                return ""
            assert got.status_code == 200, got.text
            return str(got.json()["version"])

        assert await version() == "one"
        os.kill(await asyncio.to_thread(proxy_process), signal.SIGKILL)
        await client.set_traffic("/ask", {"two": 1.0})

        async def has_changed() -> bool:
            return await version() == "two"

        await eventually(has_changed, SETTLED_S, "the next one answers by the new traffic")
        assert await client.get_handle("one").call("y"), "handles need no proxy"


def proxy_process() -> int:
    """The pid of the only HTTP server, as Ray has it."""
    (pid,) = (
        int(told["Pid"])
        for told in ray._private.state.actors().values()
        if told["Name"].startswith(PROXY_NAMES) and told["State"] == "ALIVE"
    )
    return pid

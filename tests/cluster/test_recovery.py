"""The controller's death: nobody who asks notices, and what was acknowledged is or comes into force."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from serveit.client import Client
from serveit.cluster.contact import CONTROL_S
from serveit.cluster.instance import open_instance
from serveit.exceptions import NotServing
from tests.cluster.instance import Instance
from tests.cluster.versions import (
    SETTLED_S,
    controller_process,
    deployed,
    eventually,
    kill_controller,
    load,
    processes,
    split,
    standing,
    versioned,
)
from tests.ledger import Ledger
from tests.stage import scaled_to

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(150)]

NUM_KILLS = 10
SOME = 30
"""Requests that tell what is there now."""
BACK_S = 5.0
"""What the controller gets to be back with all that it knew."""
CHANGE_S = 10.0
"""What a change gets that is asked for while the controller is away."""
MOMENTS_S = 0.3
"""After a change was asked for: the controller is killed within so long."""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture(autouse=True)
async def the_controller_is_back(instance: Instance) -> AsyncIterator[None]:
    """The next test begins with one."""
    yield
    await eventually(lambda: asyncio.to_thread(controller_process), SETTLED_S, "there is a controller")


async def kill() -> int:
    return await asyncio.to_thread(kill_controller)


async def is_another(killed: int) -> bool:
    """Whether the controller is not the process that was killed."""
    return await asyncio.to_thread(controller_process) not in (0, killed)


async def recovered(client: Client, killed: int) -> None:
    """Wait until there is another controller, and an app is what it is to be."""
    await eventually(lambda: is_another(killed), SETTLED_S, "there is another controller")
    await eventually(lambda: runs(client), SETTLED_S, "all that is to be is there")


async def runs(client: Client) -> bool:
    """Whether an app is what it is to be, and all of it is ready."""
    status = await client.status()
    replicas = [told for backend in status["backends"].values() for told in backend.values()]
    return status["state"] == "RUNNING" and {told["state"] for told in replicas} == {"ready"}


async def test_ten_deaths_under_load(instance: Instance, log: Path) -> None:
    async with deployed(versioned("v1", log, num_replicas=2), "deaths") as client:
        before, pids = await standing(client), await processes(client)
        assert len(pids) == 2
        took_s = []
        async with load(client, "deaths", log) as ledger:
            for _ in range(NUM_KILLS):
                killed = await kill()

                async def is_back(killed: int = killed) -> bool:
                    return await is_another(killed) and await standing(client) == before

                took_s.append(await eventually(is_back, BACK_S, "another controller has the same state"))
                await ledger.more(SOME)
        report = ledger.report().check()
        assert report.versions == {"v1": report.sent} and set(report.pids) == pids == await processes(client)
        assert await client.get_handle("Ask").call("by-handle"), "handles go on as well"
    assert max(took_s) < BACK_S


# -- changes right after a death -------------------------------------------------------------------


async def scaled(client: Client, log: Path) -> None:
    await client.update("one", num_replicas=2)
    assert len(await processes(client, "one")) == 2


async def rerouted(client: Client, log: Path) -> None:
    await client.set_traffic("/ask", {"two": 1.0})


async def redeployed(client: Client, log: Path) -> None:
    await client.deploy(versioned("v2", log), name="changed", prefix="/changed")


Change = Callable[[Client, Path], Awaitable[None]]


@pytest.mark.parametrize(("change", "then"), [(scaled, "one"), (rerouted, "two"), (redeployed, "v2")])
async def test_a_change_right_after_a_death(instance: Instance, log: Path, change: Change, then: str) -> None:
    async with deployed(split(log), "changed") as client, load(client, "changed", log) as ledger:
        await ledger.more(SOME)
        await kill()
        await asyncio.wait_for(change(client, log), CHANGE_S)
        mark = ledger.mark
        await ledger.more(SOME)
        assert ledger.versions(since=mark) == {then}
        mark = ledger.mark
        await recovered(client, await kill())
        await ledger.more(SOME)
        assert ledger.versions(since=mark) == {then}, "the change outlives the next death"
        if change is scaled:
            assert len(await processes(client, "one")) == 2
    ledger.report().check()


# -- deaths in the middle of a change --------------------------------------------------------------


async def test_applied_or_not_but_never_half(instance: Instance, log: Path) -> None:
    """The controller dies at any moment between a change and its acknowledgement."""
    chance = random.Random(4)
    now: tuple[str, int] = ("v0", 1)
    async with deployed(versioned("v0", log), "halves") as client, load(client, "halves", log, 100) as ledger:
        for number in range(1, NUM_KILLS + 1):
            change, wanted = next_change(client, log, number, now)
            asking = asyncio.ensure_future(change)
            await asyncio.sleep(chance.uniform(0, MOMENTS_S))
            killed = await kill()
            applied = await answered(asking)
            await recovered(client, killed)
            found = await what_is_there(client, ledger)
            may_be = {"yes": [wanted], "maybe": [now, wanted], "no": [now]}[applied]
            assert found in may_be, f"round {number}: the caller was told {applied!r}"
            now = found
    ledger.report().check()


def next_change(
    client: Client, log: Path, number: int, now: tuple[str, int]
) -> tuple[Awaitable[None], tuple[str, int]]:
    """A deploy or an update, in turns; with the version and number of replicas that it makes."""
    version, count = now
    if number % 2:
        app = versioned(f"v{number}", log, num_replicas=3 - count)
        return client.deploy(app, name="halves", prefix="/halves"), (f"v{number}", 3 - count)
    return client.update("Ask", num_replicas=3 - count), (version, 3 - count)


async def answered(asking: asyncio.Future[Any]) -> str:
    """Whether a change was made, as its caller was told: yes where it returned."""
    try:
        await asyncio.wait_for(asking, SETTLED_S)
    except NotServing as error:
        return error.executed
    return "yes"


async def what_is_there(client: Client, ledger: Ledger) -> tuple[str, int]:
    """The version that answers, which has to be one, and how many replicas there are."""
    mark = ledger.mark
    await ledger.more(SOME)
    found = ledger.versions(since=mark)
    assert len(found) == 1, f"mixed: {found}"
    return found.pop(), len(await processes(client))


async def test_a_death_during_a_rolling_update(instance: Instance, log: Path) -> None:
    async with deployed(versioned("v1", log, num_replicas=2), "rolled") as client:
        async with load(client, "rolled", log) as ledger:
            app = versioned("v2", log, num_replicas=2, starts_s=0.5)
            asking = asyncio.ensure_future(client.deploy(app, name="rolled", prefix="/rolled"))
            await eventually(lambda: starts(client), SETTLED_S, "the new version starts")
            killed = await kill()
            with contextlib.suppress(NotServing):
                await asyncio.wait_for(asking, SETTLED_S)
            await recovered(client, killed)
            assert await what_is_there(client, ledger) == ("v2", 2)
        assert set(ledger.report().check().versions) == {"v1", "v2"}


async def starts(client: Client) -> bool:
    replicas = (await client.status())["backends"]["Ask"].values()
    return "starting" in {told["state"] for told in replicas}


# -- one that says nothing -------------------------------------------------------------------------


async def test_a_frozen_controller_is_not_waited_for(instance: Instance, log: Path) -> None:
    """Requests go on, changes say that nobody answers, and what was asked for comes when it thaws."""
    async with deployed(versioned("v1", log), "frozen") as client, load(client, "frozen", log, 50) as ledger:
        pid = await asyncio.to_thread(controller_process)
        async with open_instance(None) as running:
            os.kill(pid, signal.SIGSTOP)
            try:
                with pytest.raises(NotServing, match="has not answered for 5 s") as raised:
                    await asyncio.wait_for(running.app("frozen").update("Ask", scaled_to(2)), 2.5 * CONTROL_S)
                assert raised.value.executed == "maybe"
            finally:
                os.kill(pid, signal.SIGCONT)
        await eventually(lambda: has_two(client), SETTLED_S, "what was asked for is made")
        assert await asyncio.to_thread(controller_process) == pid
    ledger.report().check()


async def has_two(client: Client) -> bool:
    try:
        return len(await processes(client)) == 2
    except NotServing:
        return False

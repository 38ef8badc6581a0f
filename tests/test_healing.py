"""Replicas of a LocalRuntime that are not well: what the controller does on Ray happens here, too."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serveit import App, testing
from serveit.exceptions import Draining, NoReplica, NotServing
from serveit.testing import LocalClient
from tests.support import wait_until

PERIOD_S = 5.0
WARD: dict[str, Any] = {}
"""What the instances of these tests share: which are ill, and what keeps requests."""


@pytest.fixture(autouse=True)
async def ward() -> None:
    WARD.clear()
    WARD.update(made=0, ill=set(), hangs=set(), gate=asyncio.Event(), fails=False)


def hospital(**options: Any) -> App:
    app = App()

    @app.backend(health_check_period_s=PERIOD_S, health_check_timeout_s=8, **options)
    class Patient:
        def __init__(self) -> None:
            if WARD["fails"]:
                raise OSError("no model")
            WARD["made"] += 1
            self.number: int = WARD["made"]

        async def check_health(self) -> None:
            if self.number in WARD["hangs"]:
                await asyncio.Event().wait()
            if self.number in WARD["ill"]:
                raise OSError("out of order")

        async def __call__(self) -> int:
            return self.number

        async def wait(self) -> int:
            await WARD["gate"].wait()
            return self.number

    return app


async def replicas(client: LocalClient) -> dict[str, Any]:
    status = await client.status()
    told: dict[str, Any] = status["backends"]["Patient"]
    return told


async def pass_checks(client: LocalClient, count: int = 3) -> None:
    for _ in range(count):
        await client.clock.advance(PERIOD_S)


async def test_another_takes_its_place_while_it_ends_what_it_runs(caplog: pytest.LogCaptureFixture) -> None:
    async with testing.local(hospital()) as client:
        patient = client.get_handle("Patient")
        running = asyncio.ensure_future(patient.wait.call())
        await client.clock.settle()
        WARD["ill"].add(1)
        await pass_checks(client)
        told = await replicas(client)
        assert told["Patient#1"]["state"] == "stopping" and "out of order" in told["Patient#1"]["illness"]
        assert told["Patient#2"]["state"] == "ready"
        assert await patient.call() == 2
        assert "replica Patient#1 is unhealthy: check_health() raised OSError" in caplog.text
        WARD["gate"].set()
        assert await running == 1
        await client.clock.settle()
        assert list(await replicas(client)) == ["Patient#2"]


async def test_one_whose_check_hangs_is_cut_off() -> None:
    async with testing.local(hospital(num_replicas=2)) as client:
        patient = client.get_handle("Patient")
        running = [asyncio.ensure_future(patient.wait.call()) for _ in range(2)]
        await client.clock.settle()
        WARD["hangs"].add(1)
        await client.clock.advance(PERIOD_S + 8)
        with pytest.raises(Draining):
            await asyncio.gather(*running)
        WARD["gate"].set()
        await asyncio.gather(*running, return_exceptions=True)
        assert sorted(await replicas(client)) == ["Patient#2", "Patient#3"]


async def test_what_waits_for_the_next_one_is_answered() -> None:
    async with testing.local(hospital()) as client:
        patient = client.get_handle("Patient")
        WARD["ill"].add(1)
        WARD["fails"] = True
        await pass_checks(client)
        await client.clock.advance(0.2)
        call = asyncio.ensure_future(patient.call())
        await client.clock.settle()
        assert not call.done()
        WARD["fails"] = False
        await client.clock.advance(1)
        await wait_until(call.done, 5, "there is another")
        assert await call == 2


async def test_given_up_and_tried_anew(caplog: pytest.LogCaptureFixture) -> None:
    async with testing.local(hospital()) as client:
        WARD["ill"].add(1)
        WARD["fails"] = True
        await pass_checks(client)
        await client.clock.advance(30)
        why = "5 replicas of backend 'Patient' died within 60 s, the last: "
        why += "another cannot start: OSError: no model"
        status = await client.status()
        told = {name: status[name] for name in ("state", "failed", "message")}
        assert told == {"state": "FAILED", "failed": {"Patient": why}, "message": why}
        assert f"{why}: given up" in caplog.text
        with pytest.raises(NoReplica, match="was given up"):
            await client.get_handle("Patient").call()
        WARD["fails"] = False
        await client.update("Patient", num_replicas=1)
        status = await client.status()
        assert (status["state"], status["failed"]) == ("RUNNING", {})
        assert await client.get_handle("Patient").call() == 2


async def test_the_end_of_the_app_is_waited_for_by_nobody_else() -> None:
    async with testing.local(hospital()) as client:
        WARD["ill"].add(1)
        WARD["fails"] = True
        await pass_checks(client)
    with pytest.raises(NotServing):
        await client.get_handle("Patient").call()


async def test_two_at_once() -> None:
    async with testing.local(hospital(num_replicas=3)) as client:
        WARD["ill"] |= {1, 3}
        await pass_checks(client)
        await client.clock.settle()
        assert sorted(await replicas(client)) == ["Patient#2", "Patient#4", "Patient#5"]


async def test_other_options_hold_from_the_next_check_on() -> None:
    async with testing.local(hospital()) as client:
        WARD["ill"].add(1)
        await client.update("Patient", health_check_period_s=1.0)
        await client.clock.advance(PERIOD_S)
        assert list(await replicas(client)) == ["Patient#1"], "the first check was due by the old ones"
        await client.clock.advance(2)
        assert list(await replicas(client)) == ["Patient#2"]


def moody(**options: Any) -> App:
    app = App()

    @app.backend(**options)
    class Moody:
        def __init__(self) -> None:
            if WARD["fails"]:
                raise OSError("no model")
            self.mood = "none"

        async def reconfigure(self, user_config: str) -> None:
            self.mood = user_config
            if user_config == "bad":
                raise ValueError("bad mood")

        async def __call__(self) -> str:
            return self.mood

    return app


async def test_one_that_cannot_go_back_is_replaced() -> None:
    async with testing.local(moody()) as client:
        for _ in range(6):
            with pytest.raises(ValueError, match="bad mood"):
                await client.update("Moody", user_config="bad")
            await client.clock.settle()
            assert await client.get_handle("Moody").call() == "none"
        await client.update("Moody", num_replicas=2)
        status = await client.status()
        assert (len(status["backends"]["Moody"]), status["failed"]) == (2, {})


async def test_what_a_new_replica_raises_is_told_though_another_cannot_go_back() -> None:
    async with testing.local(moody()) as client:
        WARD["fails"] = True
        with pytest.raises(OSError, match="no model"):
            await client.update("Moody", user_config="good", num_replicas=2)
        WARD["fails"] = False
        await client.clock.settle()
        await client.clock.advance(1.0)
        assert await client.get_handle("Moody").call() == "none"
        await client.update("Moody", user_config="good")
        assert await client.get_handle("Moody").call() == "good"

"""Replicas that are not well, and requests that may run twice: on real processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from serveit import App
from serveit.client import Client
from serveit.exceptions import ReplicaDied
from tests.cluster.instance import Instance
from tests.cluster.versions import SETTLED_S, deployed, eventually, load, processes, versioned
from tests.flow.gates import Gate
from tests.support import wait_until

pytestmark = pytest.mark.cluster

NUM_KILLS = 2
FAILED = {"502, executed: maybe"}


def hospital() -> App:
    """An app with one replica that is looked after often, and falls ill in several ways."""
    app = App()

    @app.backend(health_check_period_s=0.2, health_check_timeout_s=1.0)
    class Patient:
        def __init__(self) -> None:
            self.is_ill = False

        def check_health(self) -> None:
            if self.is_ill:
                raise OSError("out of order")

        async def __call__(self) -> int:
            return os.getpid()

        async def fall_ill(self, folder: str) -> int:
            self.is_ill = True
            gate = Gate(folder)
            gate.note("in")
            await gate.passed()
            return os.getpid()

        async def block(self) -> None:
            time.sleep(60)  # noqa: ASYNC251

    return app


@contextlib.asynccontextmanager
async def patient() -> AsyncIterator[Client]:
    async with deployed(hospital(), "hospital") as client:
        yield client


async def test_what_a_failing_check_leads_to(instance: Instance, gate: Gate) -> None:
    async with patient() as client:
        backend = client.get_handle("Patient")
        ill = await backend.call()
        running = asyncio.ensure_future(backend.fall_ill.call(str(gate.folder)))
        await wait_until(lambda: gate.notes, 5, "it runs")

        async def has_another() -> bool:
            told = (await client.status())["backends"]["Patient"].values()
            return sorted(replica["state"] for replica in told) == ["ready", "unhealthy"]

        await eventually(has_another, SETTLED_S, "another is ready beside it")
        (told,) = [r for r in (await client.status())["backends"]["Patient"].values() if r["pid"] == ill]
        assert told["illness"] == "check_health() raised OSError: out of order (3 times in a row)"
        assert ill not in {await backend.call() for _ in range(10)}
        assert not running.done()
        gate.open()
        assert await running == ill, "it may end what it runs"
        await eventually(lambda: is_gone(client, ill), SETTLED_S, "it is gone")


@pytest.mark.parametrize("how", ["blocked", "stopped"])
async def test_one_that_hangs_is_killed_and_replaced(instance: Instance, how: str) -> None:
    async with patient() as client:
        backend = client.get_handle("Patient")
        hanging = await backend.call()
        if how == "blocked":
            running = asyncio.ensure_future(backend.block.call())
        else:
            os.kill(hanging, signal.SIGSTOP)
            running = asyncio.ensure_future(backend.call())
        with pytest.raises(ReplicaDied) as caught:
            await asyncio.wait_for(running, SETTLED_S)
        assert caught.value.executed == "maybe"
        assert await backend.options(timeout_s=SETTLED_S).call() != hanging
        await eventually(lambda: is_gone(client, hanging), SETTLED_S, "its process is gone")


async def is_gone(client: Client, pid: int) -> bool:
    """Whether neither the app nor the machine has it any more."""
    told = (await client.status())["backends"]["Patient"].values()
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return False
    return pid not in {replica.get("pid") for replica in told}


@pytest.mark.parametrize("idempotent", [True, False])
async def test_replicas_are_killed_under_load(instance: Instance, tmp_path: Path, idempotent: bool) -> None:
    log = tmp_path / "log"
    app = versioned("v1", log, num_replicas=2, work_s=0.05, idempotent=idempotent)
    async with deployed(app, "killed") as client:

        async def are_two() -> bool:
            return len(await processes(client)) == 2

        async with load(client, "killed", log) as ledger:
            await ledger.more(20)
            for _ in range(NUM_KILLS):
                os.kill(min(await processes(client)), signal.SIGKILL)
                await ledger.more(20)
                await eventually(are_two, SETTLED_S, "there are two again")
        report = ledger.report()
    if idempotent:
        assert report.num_failed == 0, report
        assert set(report.broken) <= {f"{len(report.started_twice)} started twice"}, report
        assert report.started_twice, "what ran when it was killed ran again"
    else:
        report.check(max_failed=report.sent // 10)
        assert set(report.failed) == FAILED, "only what ran"


def fated() -> App:
    """An app whose replicas die of a request when they first meet one with its folder."""
    app = App()

    @app.route("/size", methods=["POST"])
    @app.backend(num_replicas=2, idempotent=True)
    class Fated:
        async def __call__(self, body: bytes, folder: str) -> int:
            die_once(folder)
            return len(body)

        async def items(self, folder: str, before: int) -> AsyncIterator[int]:
            for number in range(3):
                if number == before:
                    if before:
                        await Gate(folder).passed()
                    die_once(folder)
                yield number

    return app


def die_once(folder: str) -> None:
    gate = Gate(folder)
    gate.note("in")
    if len(gate.notes) == 1:
        os._exit(1)


async def test_what_is_sent_again_and_what_is_not(instance: Instance, tmp_path: Path) -> None:
    def gate(name: str) -> Gate:
        (tmp_path / name).mkdir()
        return Gate(tmp_path / name)

    async with deployed(fated(), "fated") as client:
        by_http, early, late, task = map(gate, ("http", "early", "late", "task"))
        body = bytes(1_000_000)
        async with httpx2.AsyncClient(timeout=SETTLED_S) as http:
            params = {"folder": str(by_http.folder)}
            got = await http.post(f"{client.url}/fated/size", params=params, content=body)
        assert (got.status_code, got.json(), by_http.notes) == (200, len(body), ["in", "in"])

        handle = client.get_handle("Fated")
        assert [n async for n in handle.items.stream(str(early.folder), 0)] == [0, 1, 2]
        assert early.notes == ["in", "in"]

        seen = []
        with pytest.raises(ReplicaDied):
            async for number in handle.items.stream(str(late.folder), 2):
                seen.append(number)
                late.open()
        assert seen == [0, 1] and late.notes == ["in"], "its answer had begun"

        ref = await handle.remote(b"", str(task.folder))
        with pytest.raises(Exception, match="died|dead|unavailable|lost"):
            await asyncio.wait_for(ref, SETTLED_S)
        assert task.notes == ["in"], "an ObjectRef is one replica's"

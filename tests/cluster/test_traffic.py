"""Traffic where processes die: what becomes of a shadow's is nobody's concern."""

from __future__ import annotations

import os
import signal
from typing import Any

import httpx2
import pytest

import serveit
from serveit.client import Client
from tests.cluster.instance import Instance
from tests.flow import apps
from tests.flow.gates import Gate
from tests.support import wait_until

pytestmark = pytest.mark.cluster


async def shadow_of(client: Client) -> dict[str, Any]:
    replicas = (await client.status())["backends"]["bad_shadow"].values()
    return next((told for told in replicas if told["state"] == "ready"), {})


async def test_a_shadow_that_hangs_or_dies_is_nobodys_concern(instance: Instance, gate: Gate) -> None:
    name, folder = await instance.deployed(apps.traffic), str(gate.folder)
    async with (
        serveit.connect(address=None, app=name) as client,
        httpx2.AsyncClient(base_url=f"{client.url}/{name}", timeout=20) as http,
    ):
        guarded = client.get_handle("guarded")

        async def ask(times: int) -> None:
            for _ in range(times):
                assert (await http.get("/guarded", params={"text": folder})).text == "narrow"
                assert await guarded.call(folder) == "narrow"

        pid = (await shadow_of(client))["pid"]
        await ask(2)
        await wait_until(lambda: gate.notes == ["in", "in"], 5, "copies are on it")
        os.kill(pid, signal.SIGSTOP)
        await ask(20)
        os.kill(pid, signal.SIGKILL)
        await ask(50)
        gate.open()
        while (await shadow_of(client)).get("pid") in (None, pid):
            await ask(1)
        noted = len(gate.notes)
        await ask(1)
        await wait_until(lambda: len(gate.notes) > noted, 5, "its successor gets copies")

"""What the launcher asks Ray for."""

from __future__ import annotations

import asyncio
import threading

import pytest

from serveit.cluster import launching
from serveit.cluster.launching import RayLauncher
from serveit.cluster.rooms import Room
from serveit.control.orders import ReplicaOrder


async def test_all_that_wait_for_a_place_share_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def rooms() -> list[Room]:
        looks.append(threading.get_ident())
        return [Room({}, {"CPU": 2.0}, {"CPU": 0.5})]

    monkeypatch.setattr(launching, "rooms", rooms)
    launcher = RayLauncher()
    orders = [
        ReplicaOrder(f"b#{n}", "app", "b", b"", "", b"", False, actor_options={"num_cpus": n + 1})
        for n in range(50)
    ]
    lacks = await asyncio.gather(*map(launcher.lacking, orders))
    assert lacks[0] == "needs 1 CPU, 0.5 free"
    assert lacks[49] == "needs 50 CPU, 0.5 free (no node has more than 2)"
    assert len(looks) == 1 and looks[0] != threading.get_ident()
    monkeypatch.setattr(launching, "SHARED_S", 0.0)
    assert await launcher.lacking(orders[0]) == lacks[0]
    assert len(looks) == 2, "later it is looked again"

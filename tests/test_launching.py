"""What the launcher asks Ray for."""

from __future__ import annotations

import asyncio
import sys
import threading
from typing import Any

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


def test_ray_is_asked_for_no_more_calls_at_once_than_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    class Kind:
        def options(self, **options: Any) -> Kind:
            asked.append(options)
            return self

        def remote(self) -> None: ...

    monkeypatch.setattr(launching, "remote_class", lambda kind: Kind())
    monkeypatch.setattr(launching, "RayProcess", lambda *args: args)
    for max_ongoing in (1, 2_000, sys.maxsize):
        order = ReplicaOrder("b#1", "app", "b", b"", "", b"", False, max_ongoing=max_ongoing)
        RayLauncher().replica(order)
    assert [options["max_concurrency"] for options in asked] == [1_000, 4_000, 2**31 - 1]

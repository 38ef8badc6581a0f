"""Metrics of replicas that die."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

import serveit
from tests.cluster import apps
from tests.cluster.instance import Instance
from tests.cluster.test_deaths import eventually, ready
from tests.scrapes import Scrape, scraped

pytestmark = pytest.mark.cluster


async def test_a_death_is_counted_and_the_dead_disappears(instance: Instance) -> None:
    name = await instance.deployed(apps.mortals)
    async with serveit.connect(address=None, app=name) as client:

        async def scrape() -> Scrape:
            return await scraped(instance.url, app=name)

        async def have_come(number: int) -> bool:
            starts = (await scrape()).since(before, "serveit_replica_starts_total", "backend")
            return starts.get(("Pair",)) == number

        old, before = await ready(client, "Pair"), await scrape()
        victim, pid = next(iter(old.items()))
        assert ("Pair", victim) in before.values("serveit_replica_up", "backend", "replica")
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: have_come(1), "another has come in its place")
        after = await scrape()
        assert after.since(before, "serveit_replica_deaths_total", "backend")[("Pair",)] == 1
        up = after.values("serveit_replica_up", "backend", "replica")
        new = await ready(client, "Pair")
        assert {replica for backend, replica in up if backend == "Pair"} == set(new)
        assert victim not in new
        await asyncio.gather(*(client.get_handle("Pair").process.call() for _ in range(4)))
        calls = (await scrape()).since(after, "serveit_replica_requests_total", "backend")
        assert calls[("Pair",)] == 4

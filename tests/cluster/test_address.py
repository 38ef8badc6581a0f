"""A real cluster is found where it runs, and lets those in who have its token."""

from __future__ import annotations

import asyncio

import pytest

from serveit.cluster import address
from serveit.cluster.address import find_cluster
from tests.cluster.instance import Instance

pytestmark = pytest.mark.cluster


async def test_a_cluster_that_runs_here(instance: Instance) -> None:
    _, running = await asyncio.to_thread(address._found_here)
    assert instance.address in running
    assert await asyncio.to_thread(find_cluster, instance.address) == instance.address


async def test_what_is_no_cluster(instance: Instance) -> None:
    place = instance.url.removeprefix("http://")
    with pytest.raises(ConnectionError, match=f"no Ray cluster at '{place}': .*; `ray start --head`"):
        await asyncio.to_thread(find_cluster, place)

"""The process that speaks HTTP: it unpickles nothing, whatever comes in or back."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import httpx2
import msgspec
import pytest
import ray.cloudpickle

from serveit import HTTPOptions
from serveit.cluster.contact import find_controller
from serveit.cluster.hosts import ProxyHost
from serveit.control.orders import ProxyOrder, Started
from tests.cluster import apps
from tests.cluster.instance import Instance

pytestmark = pytest.mark.cluster


@pytest.fixture
def unpickled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What is unpickled in this process, whoever does it."""
    seen: list[Any] = []

    def loads(octets: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(bytes(octets)[:80])
        raise AssertionError("something was unpickled")

    for module in (pickle, ray.cloudpickle):
        monkeypatch.setattr(module, "loads", loads)
        monkeypatch.setattr(module, "load", loads)
    yield seen


async def test_a_proxy_unpickles_nothing(instance: Instance, unpickled: list[Any]) -> None:
    name = await instance.deployed(apps.mortals)
    options = msgspec.json.encode(HTTPOptions(port=0))
    host = ProxyHost(ProxyOrder("proxy-under-test", options, b"", ()), find_controller())
    outcome = await host.start()
    assert isinstance(outcome, Started)
    try:
        async with httpx2.AsyncClient(base_url=f"{outcome.address}/{name}", timeout=20) as http:
            answered = await http.get("/pair")
            raised = await http.get("/raise")
            missing = await http.get("/nowhere")
    finally:
        await host.aclose(5)
    assert (answered.status_code, raised.status_code, missing.status_code) == (200, 500, 404)
    assert unpickled == []


async def test_the_hook_sees_what_is_unpickled(unpickled: list[Any]) -> None:
    with pytest.raises(AssertionError, match="something was unpickled"):
        pickle.loads(pickle.dumps(1))
    assert len(unpickled) == 1

"""`serveit.context()` in each kind of user code."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

import serveit
from serveit import App
from serveit.exceptions import NotServing
from tests.flow.conftest import Served
from tests.flow.models import models

FIELDS = {"x-request-id": "mine", "x-request-timeout-ms": "20000"}


@pytest.fixture
def app() -> App:
    return models


async def asked(served: Served, path: str) -> Any:
    """The context that code over HTTP saw; of a stream, its items'."""
    method, body = ("POST", '"word"') if path == "/witness" else ("GET", None)
    reply = await served.http.request(
        method, path, headers={**FIELDS, "content-type": "application/json"}, content=body
    )
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-request-id"] == "mine"
    return [json.loads(line) for line in reply.text.splitlines()]


@pytest.mark.parametrize("path", ["/call", "/plain", "/items", "/plain_items", "/witness"])
async def test_over_http(served: Served, path: str) -> None:
    found = await asked(served, path)
    assert len(found) == (2 if "items" in path else 1)
    for here in found:
        backend = "Gathering" if path == "/witness" else "Witness"
        assert (here["app"], here["backend"]) == (served.app_name, backend)
        assert here["replica"].startswith(f"{backend}#")
        assert here["request_id"] == "mine", "the x-request-id"
        assert here["deadline"] is not None


async def test_through_handles(served: Served) -> None:
    witness = served.handle("Witness").options(timeout_s=20)
    streams = [[item async for item in way.stream()] for way in (witness.items, witness.plain_items)]
    found = [await witness.call(), await witness.plain.call(), await witness.in_a_task.call()]
    found += [item for items in streams for item in items]
    for here in found:
        assert (here["app"], here["backend"]) == (served.app_name, "Witness")
        assert here["request_id"] and here["deadline"] is not None
    assert found[1]["thread"].startswith("serveit-Witness"), "of a `def`"
    assert len({here["request_id"] for here in found}) == 5, "both items of a stream have the same"
    assert (await served.handle("Witness").call())["deadline"] is None


async def test_in_a_batch_it_is_the_first_items(served: Served) -> None:
    batch = served.handle("Gathering").witness
    found = await asyncio.gather(*(batch.options(timeout_s=20).call(word) for word in "abcd"))
    assert [here["words"] for here in found] == [["a", "b", "c", "d"]] * 4
    assert len({here["request_id"] for here in found}) == 1 and found[0]["request_id"]
    assert found[0]["deadline"] is not None
    some = [batch.options(timeout_s=20).call(word) for word in "abc"]
    found = await asyncio.gather(*some, batch.call("d"))
    assert found[0]["deadline"] is None, "the batch runs for the one that has none"


async def test_while_an_object_starts(served: Served) -> None:
    lived = await served.handle("Witness").lived.call()
    assert list(lived) == ["__init__", "setup", "reconfigure", "check_health"]
    here = await served.handle("Witness").call()
    for seen in lived.values():
        assert seen == {**here, "request_id": "", "deadline": None}


async def test_a_nested_call_has_its_own_and_the_time_that_is_left(served: Served) -> None:
    inner = await served.handle("Witness").options(timeout_s=20).nested.call()
    assert inner["backend"] == "Gathering" and inner["words"] == ["nested"]
    assert inner["deadline"] is not None
    assert (await served.handle("Witness").nested.call())["deadline"] is None


async def test_outside_there_is_none(served: Served) -> None:
    with pytest.raises(NotServing, match=r"serveit.context\(\) is for code that runs in a replica"):
        serveit.context()

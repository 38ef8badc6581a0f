"""docs/failures.md: its blocks run, its figures are the code's, and what its blocks show is so."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import serveit
from serveit import BackendConfig, testing
from serveit.calling.retries import PER_REQUEST, PER_S
from serveit.control.processes import BACKOFF_S, MAX_BACKOFF_S
from serveit.control.replicas import DEATHS, WITHIN_S
from serveit.running.health import MAX_FAILURES
from serveit.wire.heart import HEARTBEAT_S

PAGE = (Path(__file__).parent.parent / "docs" / "failures.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its blocks, one after the other, as a module."""
    module = ModuleType("app_of_failures")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile("\n\n".join(BLOCKS), "docs/failures.md", "exec"), vars(module))
    return module


async def test_what_an_error_says(page: Any) -> None:
    async with testing.local(page.app) as client:
        assert await page.pay(3) == "charged 3"
        assert (await client.http.get("/predict/4")).json() == 8
    assert await page.pay(3) == "not charged: try again"


async def test_a_model_that_breaks_is_replaced(page: Any) -> None:
    async with testing.local(page.app) as client:
        (model,) = client.runtime._replicas.ready("Model")
        model.replica.instance._object.is_broken = True

        async def ready() -> list[str]:
            replicas = (await client.status())["backends"]["Model"]
            return [id for id, replica in replicas.items() if replica["state"] == "ready"]

        async with asyncio.timeout(10):
            while await ready() != ["Model#2"]:
                await client.clock.advance(1)
        assert await client.get_handle("Model").call(1) == 2


def test_figures_are_the_codes() -> None:
    words = {3: "three", 5: "Five"}
    for text in (
        f"raises **{words[MAX_FAILURES]} times in a row**",
        f"**{words[DEATHS]} deaths within {WITHIN_S:g} s**",
        f"after {BACKOFF_S:g} s, then {2 * BACKOFF_S:g} s, {4 * BACKOFF_S:g} s, up to {MAX_BACKOFF_S:g} s",
        f"at most {PER_REQUEST:.0%} of the\nrequests plus {PER_S:g} a second".replace("20%", "20 %"),
        f"three missed heartbeats ({3 * HEARTBEAT_S:g} s)",
    ):
        assert text in PAGE, text


def test_options_are_there_with_their_defaults() -> None:
    table = PAGE[PAGE.index("## The options") :]
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", table, re.MULTILINE)
    defaults = {field.name: repr(field.default) for field in dataclasses.fields(BackendConfig)}
    assert rows and all(defaults[name] == default for name, default in rows)
    named = set(re.findall(r"`(\w+_s|idempotent|num_replicas|max_surge)`", PAGE)) - {"timeout_s"}
    assert named <= {name for name, _ in rows}, "each option has its row"


def test_errors_are_there_and_say_that() -> None:
    rows = re.findall(r"^\| `(no|maybe|yes)` \| (.*?) \|", PAGE, re.MULTILINE)
    assert [executed for executed, _ in rows] == ["no", "maybe", "yes"]
    for executed, errors in rows:
        for name in re.findall(r"`(\w+)`", errors):
            assert getattr(serveit, name).default_executed == executed

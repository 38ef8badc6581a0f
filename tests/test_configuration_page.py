"""docs/configuration.md: its program prints what it shows, and its table is true."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from serveit import BackendConfig
from serveit.control.orders import BackendChange
from serveit.control.spec import BackendSpec

PAGE = (Path(__file__).parent.parent / "docs" / "configuration.md").read_text(encoding="utf-8")
OTHERS: dict[str, tuple[dict[str, Any], Any]] = {
    "num_replicas": ({}, 2),
    "max_batch_size": ({"max_batch_size": 8}, 4),
    "batch_wait_timeout_s": ({"max_batch_size": 8}, 0.5),
    "max_concurrent_batches": ({"max_batch_size": 8}, 2),
    "batch_methods": ({"max_batch_size": 8}, ("score",)),
    "user_config": ({}, {"threshold": 1}),
    "ray_actor_options": ({}, {"num_gpus": 1}),
    "idempotent": ({}, True),
}
"""What else an option must have beside it, and another value of it."""


def rows() -> dict[str, str]:
    """Each option, and how it is said to change."""
    table = re.findall(r"^\| (`.*?) \| (.*) \|$", PAGE, re.MULTILINE)
    return {option: how for options, how in table for option in re.findall(r"`(\w+)`", options)}


def test_every_option_has_its_row() -> None:
    assert rows().keys() == {field.name for field in dataclasses.fields(BackendConfig)}


@pytest.mark.parametrize("option", [field.name for field in dataclasses.fields(BackendConfig)])
def test_replicas_are_replaced_where_the_table_says_so(option: str) -> None:
    beside, other = OTHERS.get(option, ({}, 7))
    config = BackendConfig(**beside)
    assert config.needs_new_replicas(config.merge(**{option: other})) is (rows()[option] == "by new replicas")


@pytest.mark.parametrize(
    ("before", "option", "other", "text"),
    [
        ({}, "max_batch_size", 1, "written for single requests, no max_batch_size"),
        ({"max_batch_size": 1}, "max_batch_size", None, "written for lists of items, max_batch_size"),
        ({"max_batch_size": 1}, "batch_methods", ["score"], r"written for batch_methods=\('__call__',\)"),
    ],
)
def test_what_is_the_codes_own(before: dict[str, Any], option: str, other: Any, text: str) -> None:
    assert "the code" in rows()[option]
    spec = BackendSpec("b", 1, BackendConfig(**before))
    with pytest.raises(ValueError, match=f"backend 'b': its code is {text}: that changes with a deploy"):
        spec.changed(BackendChange({option: other}))


def test_the_program_prints_what_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program, shown = re.findall(r"^```(?:python|text)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    module = ModuleType("configured_app")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    program = program.replace("serve(app)", "serve(app, local=True, http={'location': None})")
    exec(compile(program, "docs/configuration.md", "exec"), vars(module))
    asyncio.run(module.main())
    assert capsys.readouterr().out == shown

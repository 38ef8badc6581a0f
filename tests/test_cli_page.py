"""docs/cli.md: its commands are there, with their options, and its messages are those that are said."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from serveit import App
from serveit.command import cli
from serveit.command.reporting import routes_lines, routes_of
from serveit.control.spec import app_spec

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line) for line in re.findall(r"^\$ serveit (.*)$", PAGE, re.MULTILINE)]
APP = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[0]


def page_s_app() -> App:
    module: dict[str, Any] = {"__name__": "app_of_page"}
    exec(compile(APP, "docs/cli.md", "exec"), module)
    app: App = module["app"]
    return app


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_can_be_typed(words: list[str]) -> None:
    name, *arguments = words
    cli.main.commands[name].make_context(name, arguments).close()


def test_every_command_has_its_place() -> None:
    assert re.findall(r"^## (\w+)$", PAGE, re.MULTILINE) == [*cli.main.commands]
    assert {name for name, *_ in COMMANDS} == {*cli.main.commands}


def test_routes_are_as_shown() -> None:
    specs = [
        app_spec(page_s_app(), name=name, prefix=prefix, code=b"")
        for name, prefix in (("default", ""), ("beta", "/beta"))
    ]
    assert "\n".join(routes_lines(routes_of(specs))) in PAGE

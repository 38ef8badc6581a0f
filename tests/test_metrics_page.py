"""docs/metrics.md: what it shows is what is exposed, and its table has all of it and nothing else."""

from __future__ import annotations

import asyncio
import re
import shlex
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from serveit import HTTPOptions
from serveit.command import cli
from serveit.config import Location
from serveit.testing import TestClient
from serveit.web.exposition import ANSWER_S
from serveit.web.views import METRICS
from tests.test_exposition import Exposed

PAGE = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def rows() -> list[tuple[str, str, set[str]]]:
    """Name, kind and labels of the table's metrics."""
    found = re.findall(r"^\| `(serveit_\w+)` \| (\w+) \| ([\w, ]+) \|", PAGE, re.MULTILINE)
    return [(name, kind, set(labels.split(", "))) for name, kind, labels in found]


async def everything() -> str:
    """A page with all that there is: each refusal, each batch."""
    exposed = Exposed()
    await exposed.rig.update("m#1")
    exposed.meters.unmatched.in_flight += 1
    exposed.meters.unmatched.end("GET", 404, 0.0)
    return (await exposed.page("m#1"))[1]


def test_the_table_has_all_that_is_exposed() -> None:
    exposed: dict[str, tuple[str, set[str]]] = {}
    for family in parse(asyncio.run(everything())):
        if family.name.startswith("process_"):
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels}
        exposed[name] = family.type, labels - {"le"}
    assert {name: (kind, labels) for name, kind, labels in rows()} == exposed
    assert len(rows()) == len(exposed)


def test_the_commands_print_what_is_shown() -> None:
    module: dict[str, Any] = {"__name__": "hello"}
    exec(compile(blocks("python")[0], "docs/metrics.md", "exec"), module)
    (console,) = blocks("console")
    commands = re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", console, re.MULTILINE)
    run, *curls = [(shlex.split(command.partition("|")[0]), command, shown) for command, shown in commands]
    assert run[0] == ["serveit", "run", "hello:app"]
    cli.main.commands["run"].make_context("run", run[0][2:]).close()
    with TestClient(module["app"]) as client:
        for words, command, shown in curls:
            url = urlsplit(words[-1])
            reply = client.get(f"{url.path}?{url.query}")
            if " | grep -E " in command:
                wanted = shlex.split(command.partition("|")[2])[-1]
                lines = [line for line in reply.text.splitlines() if re.search(wanted, line)]
                assert "\n".join(lines) + "\n" == shown
                assert shown
            else:
                assert shown == ""


def test_prometheus_is_told_where_they_are() -> None:
    (config,) = blocks("yaml")
    assert re.findall(r"metrics_path: (.*)", config) == [METRICS]
    ports = {target.rpartition(":")[2] for target in re.findall(r'"(.+?)"', config)}
    assert ports == {str(HTTPOptions().port)}


def test_queries_ask_for_what_there_is() -> None:
    names = {name: kind for name, kind, _ in rows()}
    queries = "\n".join((*blocks("promql"), *re.findall(r"`([^`\n]*serveit_[^`\n]*[\]=][^`\n]*)`", PAGE)))
    asked = re.findall(r"serveit_\w+", queries)
    assert len(blocks("promql")) == 3 and len(asked) >= 7
    for name in asked:
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        assert name in names or names[base] == "histogram"
    for labels in re.findall(r"by \(([^)]*)\)", queries):
        assert {label.strip() for label in labels.split(",")} <= {"app", "route", "backend", "le"}


@pytest.mark.parametrize("location", get_args(Location))
def test_every_location_has_its_row(location: str) -> None:
    assert re.search(rf"^\| on Ray, location `{location}` \|", PAGE, re.MULTILINE)


def test_what_the_page_says_of_itself() -> None:
    assert f"within {ANSWER_S:g} s" in PAGE
    assert HTTPOptions().host in PAGE

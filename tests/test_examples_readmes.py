"""canary, shadow, batching and reconfigure print what their READMEs show, in one process and on Ray."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from serveit import App
from serveit.command import cli
from serveit.importer import import_target
from serveit.testing import TestClient
from tests.test_examples import EXAMPLES, NEEDS_SKLEARN
from tests.test_readme import curl, shown_requests

NAMES = ["canary", "shadow", "batching", "reconfigure"]
ARRIVAL_S = 5.0
"""What it may take until an answer is as shown: copies arrive when they arrive."""


class Example(NamedTuple):
    """One folder: its README, and its two modules under the names that they have for who runs them."""

    name: str
    readme: str
    app: ModuleType
    client: ModuleType

    def console(self) -> str:
        return "".join(re.findall(r"^```console\n(.*?)^```$", self.readme, re.MULTILINE | re.DOTALL))

    def commands(self) -> list[str]:
        return re.findall(r"^\$ (.+)$", self.console(), re.MULTILINE)

    def shown_output(self) -> str:
        """What the client prints, by the README; figures that differ from run to run are left out."""
        found = re.search(r"^\$ .*/client\.py\n((?:(?!\$ ).*\n)+)", self.console(), re.MULTILINE)
        assert found is not None
        return without_rates(found[1])


def without_rates(output: str) -> str:
    return re.sub(r" +[\d,]+/s", " N/s", output)


def without_pid(answer: str) -> str:
    return re.sub(r'"pid":\d+', '"pid":N', answer)


@pytest.fixture(params=NAMES)
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Example:
    pytest.importorskip("sklearn", reason=NEEDS_SKLEARN)
    folder: Path = EXAMPLES / request.param
    monkeypatch.syspath_prepend(folder)
    modules = {}
    for name in ("app", "client"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        modules[name] = importlib.import_module(name)
        monkeypatch.setitem(sys.modules, name, modules[name])
    readme = (folder / "README.md").read_text(encoding="utf-8")
    return Example(request.param, readme, modules["app"], modules["client"])


def test_commands_name_what_is_there(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    named = [shlex.split(command) for command in example.commands()]
    for words in named:
        if words[0].endswith("/serveit"):
            command = cli.main.commands[words[1]]
            command.make_context(words[1], words[2:]).close()
    paths = {word for words in named for word in words if word.startswith("examples/")}
    assert paths == {f"examples/{example.name}/{name}.py" for name in ("app", "client")}
    monkeypatch.chdir(EXAMPLES.parent)
    assert isinstance(import_target(f"examples/{example.name}/app.py", App), App)
    assert Path(f"examples/{example.name}/client.py").is_file()


def test_http_answers_are_those_shown(example: Example) -> None:
    requests = shown_requests(example.console())
    assert requests
    with TestClient(example.app.app) as client:
        for command, shown in requests:
            deadline = time.monotonic() + ARRIVAL_S
            while (answer := without_pid(curl(client, command))) != without_pid(shown).rstrip():
                assert time.monotonic() < deadline, f"{command}\n{answer}"


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.cluster)], scope="session")
def local(request: pytest.FixtureRequest) -> bool:
    """Whether it runs in this process; else on the Ray of this session."""
    if request.param == "ray":
        request.getfixturevalue("instance")
    return bool(request.param == "local")


async def test_the_client_prints_what_is_shown(
    local: bool, example: Example, capsys: pytest.CaptureFixture[str]
) -> None:
    await example.client.main(local=local)
    shown = example.shown_output()
    if local:  # all replicas share this process
        shown = shown.replace("processes that answered: 2", "processes that answered: 1")
    assert without_rates(capsys.readouterr().out) == shown

"""docs/traffic.md: its commands do what is shown, and so do its programs."""

from __future__ import annotations

import asyncio
import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from urllib.request import Request, urlopen

import pytest
from click.testing import CliRunner

import serveit
from serveit.command import cli
from tests.cluster.instance import Instance
from tests.fake_instance import FakeInstance

PAGE = (Path(__file__).parent.parent / "docs" / "traffic.md").read_text(encoding="utf-8")
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
APP, PROGRAM, LINE = (text for language, text in BLOCKS if language == "python")
(PRINTED,) = (text for language, text in BLOCKS if language == "text")
COMMANDS = [
    (command, output)
    for language, text in BLOCKS
    if language == "console"
    for command, output in re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE)
]


@pytest.fixture
def app_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The page's `app.py`, in the working directory."""
    (tmp_path / "app.py").write_text(APP, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "app", raising=False)
    yield importlib.import_module("app")
    sys.modules.pop("app", None)


@pytest.fixture
def instance_of_page(monkeypatch: pytest.MonkeyPatch) -> FakeInstance:
    fake = FakeInstance()
    monkeypatch.setattr("serveit.cluster.instance.open_instance", fake.open)
    monkeypatch.setenv("RAY_LOG_TO_DRIVER", "0")
    return fake


def test_the_commands_print_what_is_shown(app_module: ModuleType, instance_of_page: FakeInstance) -> None:
    names = set()
    for command, output in COMMANDS:
        program, *words = shlex.split(command)
        if program == "serveit":
            names.add(words[0])
            result = CliRunner().invoke(cli.main, words)
            assert (result.exit_code, result.stdout) == (0, output), command
    assert names == {"deploy", "scale", "traffic"}


@pytest.mark.parametrize("said", re.findall(r"^\| `((?:endpoint|app) .*?)` \|", PAGE, re.MULTILINE))
def test_the_messages_are_said(app_module: ModuleType, instance_of_page: FakeInstance, said: str) -> None:
    instance_of_page.add("default", app_module.app)
    wrong = (["/predict", "v1=0.9"], ["/predict", "v1=0.9", "v3=0.1"], ["/predct", "v1=1"])
    results = [CliRunner().invoke(cli.main, ["traffic", *words]) for words in wrong]
    assert f"Error: {said}\n" in [result.stderr for result in results]


async def test_shard_keys_and_the_handle_s_line(app_module: ModuleType) -> None:
    async with serveit.serve(app_module.app, local=True, http={"port": 0}) as client:
        await client.set_traffic("/predict", {"v1": 0.5, "v2": 0.5})
        asked = [(shlex.split(command), output) for command, output in COMMANDS if "curl" in command]
        assert len(asked) == 2
        for (_, _, field, url), output in asked:
            name, _, key = field.partition(": ")
            handle = client.get_handle("/predict").options(shard_key=key)
            assert await handle.call("hi") == json.loads(output)
            request = Request(url.replace("localhost:8000", str(client.url)), headers={name: key})
            assert await ask(request) == output.rstrip("\n")
        namespace = {"client": client}
        exec("async def line():\n    " + LINE + "    return answer", namespace)
        assert await namespace["line"]() == json.loads(asked[0][1])  # type: ignore[operator]


async def ask(request: Request) -> str:
    def read() -> str:
        with urlopen(request, timeout=5) as reply:
            text: str = reply.read().decode()
            return text

    return await asyncio.to_thread(read)


@pytest.mark.cluster
def test_the_program_prints_what_is_shown(app_module: ModuleType, instance: Instance, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    with serveit.serve(app_module.app) as client:
        ended = subprocess.run(
            [sys.executable, "program.py"],
            cwd=tmp_path,
            env={**instance.environment, "RAY_ADDRESS": instance.address},
            capture_output=True,
            text=True,
            timeout=50,
        )
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout == PRINTED
        assert {client.get_handle("/predict").call("a")["version"] for _ in range(5)} == {"v2"}

"""README.md: every block of Python in it runs and does what is shown below it, and its tables are true."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

import serveit
from serveit.testing import TestClient
from tests.cluster.instance import Instance

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

UNLISTED = {"ServeitError", "Rejected", "NeedsRay", "ItemErrors", "ImportFailed", "ProtocolError"}
"""Bases, and what is no outcome of a request."""


class Block(NamedTuple):
    """A fenced block: its language and text."""

    language: str
    text: str


BLOCKS = [Block(*found) for found in re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)]
PYTHON = [index for index, block in enumerate(BLOCKS) if block.language == "python"]
APPS = [index for index in PYTHON if "app = App()" in BLOCKS[index].text]
PROGRAMS = [index for index in PYTHON if index not in APPS]
"""Programs beside an app, the last one above them; on Ray."""


def run_block(text: str, name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The block as a module of that name."""
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(text, f"README.md ({name})", "exec"), vars(module))
    return module


def shown_requests(console: str) -> list[tuple[str, str]]:
    """The curl commands of a console block, each with the output below it."""
    found = re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", console, re.MULTILINE)
    return [(command, output) for command, output in found if command.startswith("curl ")]


def curl(client: TestClient, command: str) -> str:
    """What `curl` would print, asked of the test client."""
    words = iter(shlex.split(command)[1:])
    method, headers, body, url = "GET", {}, None, ""
    for word in words:
        if word == "-H":
            name, _, value = next(words).partition(": ")
            headers[name] = value
        elif word == "-d":
            method, body = "POST", next(words)
        elif word != "-N":
            assert word.startswith("localhost:8000/"), f"{word!r} in {command!r}"
            url = word.removeprefix("localhost:8000")
    return client.request(method, url, headers=headers, content=body).text


@pytest.mark.parametrize("index", APPS, ids=lambda index: f"block {index}")
def test_blocks_do_what_is_shown(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    block, following = [*BLOCKS, Block("", "")][index : index + 2]
    module = run_block(block.text, "app_of_readme", monkeypatch)
    tests = [test for name, test in vars(module).items() if name.startswith("test_")]
    for test in tests:
        asyncio.run(test()) if inspect.iscoroutinefunction(test) else test()
    if not tests:
        assert following.language == "console", "nothing shows what the block does"
        with TestClient(module.app) as client:
            requests = shown_requests(following.text)
            assert requests
            for command, output in requests:
                assert curl(client, command).rstrip("\n") == output.rstrip("\n"), command


@pytest.mark.cluster
@pytest.mark.parametrize("index", PROGRAMS, ids=lambda index: f"block {index}")
def test_programs_print_what_is_shown(
    index: int, instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = BLOCKS[max(other for other in APPS if other < index)]
    program, printed = BLOCKS[index : index + 2]
    assert printed.language == "text", "nothing shows what the program prints"
    (tmp_path / "app.py").write_text(app.text, encoding="utf-8")
    (tmp_path / "program.py").write_text(program.text, encoding="utf-8")
    if "serveit.connect()" not in program.text:
        assert output_of("program.py", tmp_path, instance.environment) == printed.text
        return
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "app", raising=False)
    monkeypatch.setitem(sys.modules, "app", importlib.import_module("app"))
    with serveit.serve(sys.modules["app"].app):
        environment = {**instance.environment, "RAY_ADDRESS": instance.address}
        assert output_of("program.py", tmp_path, environment) == printed.text


def output_of(program: str, folder: Path, environment: dict[str, str]) -> str:
    """What a program of its own prints."""
    command = [sys.executable, program]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=50)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_first_block_is_the_hello_example() -> None:
    assert BLOCKS[0].text == (ROOT / "examples/hello/app.py").read_text(encoding="utf-8")


def test_commands_name_files_that_are_there() -> None:
    commands = [line[2:] for block in BLOCKS for line in block.text.splitlines() if line.startswith("$ ")]
    paths = [word for command in commands for word in shlex.split(command) if re.match(r"[.\w]+/", word)]
    own = [path for path in paths if not path.startswith((".venv/", "localhost"))]
    assert {"scripts/install", ".ci/run", "examples/digits/app.py", "examples/hello/app.py"} <= {*own}
    assert all((ROOT / path).is_file() for path in own), own


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if "://" not in target and not (ROOT / target).exists()] == []


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading or sentence, without its two head lines."""
    table = README[README.index(heading) :]
    lines = table[table.index("\n|") + 1 :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split(" | ")] for line in lines]


@pytest.mark.parametrize(
    ("heading", "record"),
    [("Of a backend,", serveit.BackendConfig), ("Of the HTTP server,", serveit.HTTPOptions)],
    ids=["BackendConfig", "HTTPOptions"],
)
def test_tables_of_options_are_complete(heading: str, record: Any) -> None:
    documented = [tuple(row[:2]) for row in rows(heading)]
    assert documented == [(field.name, repr(field.default)) for field in dataclasses.fields(record)]


def test_pages_of_another_site_are_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    (made,) = re.findall(r"^`(cors = .+)`, and", README, re.MULTILINE)
    (http,) = re.findall(r"^`serveit\.run\(app, http=(.+)\)`\.$", README, re.MULTILINE)
    imports = (
        "from starlette.middleware import Middleware\nfrom starlette.middleware.cors import CORSMiddleware\n"
    )
    module = run_block(imports + BLOCKS[0].text + made, "app", monkeypatch)
    with TestClient(module.app, http=ast.literal_eval(http)) as client:
        answer = client.get("/hello/Ada", headers={"origin": "https://example.org"})
    assert answer.headers["access-control-allow-origin"] == "https://example.org"


def test_table_of_errors_is_true_and_complete() -> None:
    documented = {name: (int(status), executed) for name, status, executed, _ in rows("## Errors")}
    public = {name: getattr(serveit, name) for name in serveit.__all__}
    errors = {
        name: (error.status, error.default_executed)
        for name, error in public.items()
        if inspect.isclass(error) and issubclass(error, serveit.ServeitError) and name not in UNLISTED
    }
    assert documented == errors

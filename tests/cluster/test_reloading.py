"""`serveit run --reload` on Ray: saved code answers, and no request fails. One Ray for all tests here."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.instance import Instance
from tests.commands import Command, fetch, serveit
from tests.saving import APP, Asking, save, until

pytestmark = pytest.mark.cluster

NEW_S = 10.0
"""What new code gets to answer; benchmarks/reload.py says what it takes."""
GONE_S = 10.0
PAUSE_S = 0.02
STARTING = "^main.py changed: starting the new code"
KEPT = "^the new code does not start: the old one goes on serving"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reloading")
    save(folder, "def (:")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home-of-reloading")


@pytest.fixture(scope="module")
def command(folder: Path, home: Path) -> Iterator[Command]:
    """A command of which no code has started yet, on a Ray of its own."""
    with pytest.MonkeyPatch.context() as environment:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            environment.delenv(name)
        environment.setenv("HOME", str(home))
        with serveit("run", "main:app", "--port", "0", "--reload", folder=folder) as started:
            yield started


@pytest.fixture(scope="module")
def url(folder: Path, command: Command) -> str:
    """Where "one" answers, after code that did not start."""
    command.wait_for("SyntaxError")
    command.wait_for("^the app does not start: saving a file tries again")
    save(folder, "one")
    command.wait_for(STARTING)
    url = command.url()
    assert fetch(url) == "one"
    return url


def test_the_new_code_answers_and_no_request_fails(folder: Path, command: Command, url: str) -> None:
    with Asking(url, PAUSE_S) as client:
        # Of one size, and saved at the same time: nothing but their text tells them apart.
        for version in ("two", "six", "ten"):
            save(folder, version)
            until(lambda version=version: client.answers[-1:] == [version], f"{version} to answer", NEW_S)
            command.wait_for(STARTING)
            assert command.url() == url
    # For a moment both may answer; there is nothing else, and no error.
    assert set(client.answers) == {"one", "two", "six", "ten"}


def test_code_that_cannot_be_imported_keeps_the_old(folder: Path, command: Command, url: str) -> None:
    before = fetch(url)
    with Asking(url, PAUSE_S) as client:
        save(folder, "import nowhere_at_all")
        command.wait_for("ModuleNotFoundError: No module named 'nowhere_at_all'")
        command.wait_for("Error: main:app cannot be imported")
        command.wait_for(KEPT)
        assert fetch(url) == before
        save(folder, "repaired")
        until(lambda: client.answers[-1:] == ["repaired"], "the repaired code to answer", NEW_S)
    assert set(client.answers) == {before, "repaired"}


FAILING = """
@app.route("/model")
class Model:
    def __init__(self) -> None:
        raise RuntimeError("no such model")

    async def __call__(self) -> None: ...
"""


def test_code_whose_constructor_raises_keeps_the_old(folder: Path, command: Command, url: str) -> None:
    before = fetch(url)
    with Asking(url, PAUSE_S) as client:
        save(folder, APP.format(version="failing") + FAILING)
        command.wait_for(r'main.py", line \d+, in __init__')
        command.wait_for("^RuntimeError: no such model")
        command.wait_for(KEPT)
        save(folder, "better")
        until(lambda: client.answers[-1:] == ["better"], "the better code to answer", NEW_S)
    assert set(client.answers) == {before, "better"}


def test_saving_again_at_once(folder: Path, command: Command, url: str) -> None:
    before = fetch(url)
    with Asking(url, PAUSE_S) as client:
        for version in ("three", "four", "five"):
            save(folder, version)
            command.wait_for(STARTING)
        until(lambda: client.answers[-1:] == ["five"], "the last to answer", NEW_S)
        until(lambda: set(client.answers[-20:]) == {"five"}, "nothing else to answer", NEW_S)
    assert set(client.answers) <= {before, "three", "four", "five"}


def test_ctrl_c_leaves_nothing(command: Command, home: Path, url: str) -> None:
    assert len(processes_of(home)) > 3
    assert command.stop(signal.SIGINT) == 0
    asked = time.monotonic()
    until(lambda: not processes_of(home), "all processes to end", GONE_S - (time.monotonic() - asked))
    with pytest.raises(OSError):
        fetch(url)


def test_in_a_cluster_the_app_ends_with_the_parent_that_is_killed(
    instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", instance.environment["HOME"])
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    save(tmp_path, "joined")
    arguments = ("run", "main:app", "--port", "0", "--reload", "--address", instance.address)
    with serveit(*arguments, folder=tmp_path) as command:
        assert command.url() == instance.url and fetch(instance.url) == "joined"
        save(tmp_path, "again")
        until(lambda: fetch(instance.url) == "again", "the new code to answer", NEW_S)
        command.process.kill()
        until(lambda: "again" not in fetch(instance.url), "the app to end", GONE_S)


def processes_of(home: Path) -> list[str]:
    """What runs with this home: the command, its Ray's processes, and the replicas."""
    mark, found = f"HOME={home}\0".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_one = mark in (process / "environ").read_bytes() + b"\0"
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it has ended, or is somebody else's
            continue
        if is_one and state != "Z":
            found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found

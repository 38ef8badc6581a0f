"""`--reload`: the new code answers once it is saved, and nobody is turned away meanwhile."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from serveit import HTTPOptions
from serveit.command import reload
from serveit.web.proxy import bind
from tests.commands import Command, fetch, serveit
from tests.saving import APP, Asking, save, until

STARTING = "starting the new code"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path, "one")
    return tmp_path


@pytest.fixture
def command(folder: Path) -> Iterator[Command]:
    with serveit("run", "main:app", "--local", "--port", "0", "--reload", folder=folder) as started:
        yield started


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_new_code_answers_and_nobody_is_refused(folder: Path, command: Command) -> None:
    url = command.url()
    with Asking(url) as client:
        for version in ("two", "three"):
            save(folder, version)
            command.wait_for(rf"^main\.py changed: {STARTING}")
            assert command.url() == url
            until(lambda version=version: client.answers[-1:] == [version], f"{version} to answer")
    order = list(dict.fromkeys(client.answers))
    assert set(order) == {"one", "two", "three"}, order  # and nothing else: no error
    assert command.stop() == 0


def test_code_that_does_not_start_keeps_the_old(folder: Path, command: Command) -> None:
    url = command.url()
    save(folder, "def (:")
    command.wait_for("SyntaxError")
    command.wait_for("^the new code does not start: the old one goes on serving")
    assert fetch(url) == "one"
    save(folder, "two")
    command.wait_for(STARTING)
    command.url()
    until(lambda: fetch(url) == "two", "the corrected code to answer")
    assert command.stop(signal.SIGTERM) == 0


def test_code_that_never_started_is_awaited(folder: Path) -> None:
    save(folder, "def (:")
    with serveit("run", "main.py", "--local", "--port", "0", "--reload", folder=folder) as command:
        command.wait_for("Error: main.py cannot be imported")
        save(folder, "two")
        command.wait_for(STARTING)
        assert fetch(command.url()) == "two"
        assert command.stop() == 0


def test_an_idle_one_ends_promptly(command: Command) -> None:
    pid = int(fetch(f"{command.url()}/pid"))
    asked = time.monotonic()
    assert command.stop() == 0
    assert time.monotonic() - asked <= 1.0
    assert not is_alive(pid)


def test_a_process_that_dies_is_said(folder: Path, command: Command) -> None:
    url = command.url()
    with pytest.raises(OSError):
        fetch(f"{url}/die")
    command.wait_for(r"the app's process has ended \(exit code 7\): saving a file starts it again")
    save(folder, "two")
    command.url()
    assert fetch(url) == "two"
    assert command.stop() == 0


def test_the_child_ends_with_its_parent(command: Command) -> None:
    pid = int(fetch(f"{command.url()}/pid"))
    command.process.kill()
    until(lambda: not is_alive(pid), "the child to end")


def test_a_stop_while_the_new_code_starts(folder: Path, command: Command) -> None:
    command.url()
    save(folder, "print('importing', flush=True)\nimport time; time.sleep(60)")
    command.wait_for("^importing$")
    asked = time.monotonic()
    assert command.stop() == 0
    assert time.monotonic() - asked < 5


SLOW = """
@app.route("/slow")
@app.backend(graceful_shutdown_timeout_s=100)
async def slow() -> str:
    import asyncio
    from pathlib import Path
    print("slow", flush=True)
    while not Path("go").exists():
        await asyncio.sleep(0.01)
    return "done"
"""


def ask_slowly(command: Command, url: str) -> Future[str]:
    """Ask for what takes until there is a file "go", in a thread; it runs by now."""
    answer: Future[str] = Future()
    threading.Thread(target=lambda: answer.set_result(fetch(f"{url}/slow"))).start()
    command.wait_for("^slow$")
    return answer


def test_ctrl_c_in_a_terminal_lets_requests_end(folder: Path) -> None:
    save(folder, APP.format(version="one") + SLOW)
    with serveit("run", "main:app", "--local", "--port", "0", "--reload", folder=folder) as command:
        url = command.url()
        pid = int(fetch(f"{url}/pid"))
        assert os.getpgid(pid) != command.process.pid  # or it would get two signals, which end it at once
        answer = ask_slowly(command, url)
        os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does
        command.wait_for("stopping once 1 running request has ended")
        assert is_alive(pid)
        (folder / "go").touch()
        assert answer.result(10) == "done"
        assert command.end(5) == 0
        assert not is_alive(pid)


def test_new_code_is_followed_while_the_old_finishes(folder: Path) -> None:
    save(folder, APP.format(version="one") + SLOW)
    with serveit("run", "main:app", "--local", "--port", "0", "--reload", folder=folder) as command:
        url = command.url()
        answer = ask_slowly(command, url)
        for version in ("two", "three"):
            save(folder, version)
            command.wait_for(STARTING)
            command.url()
            until(lambda version=version: fetch(url) == version, f"{version} to answer")
        (folder / "go").touch()
        assert answer.result(10) == "done"
        assert command.stop() == 0


def test_new_code_that_hangs_gives_way_to_newer(folder: Path, command: Command) -> None:
    url = command.url()
    save(folder, "print('importing', flush=True)\nimport time; time.sleep(600)")
    command.wait_for("^importing$")
    assert fetch(url) == "one"
    save(folder, "two")
    command.wait_for(STARTING)
    command.url()
    until(lambda: fetch(url) == "two", "the newer code to answer")
    assert command.stop() == 0


def test_the_second_signal_ends_at_once(folder: Path) -> None:
    save(folder, APP.format(version="one") + "\n@app.route('/slow')\nasync def slow() -> None:\n"
         "    import asyncio\n    print('slow', flush=True)\n    await asyncio.sleep(60)\n")  # fmt: skip
    with serveit("run", "main:app", "--local", "--port", "0", "--reload", folder=folder) as command:
        url = command.url()
        pid = int(fetch(f"{url}/pid"))
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n")
            command.wait_for("^slow$")
            command.process.send_signal(signal.SIGINT)
            time.sleep(0.05)  # two that are pending at once are one
            command.process.send_signal(signal.SIGINT)
            assert command.end(5) == 130
            until(lambda: not is_alive(pid), "the child to end", 5)


def test_without_http(folder: Path) -> None:
    arguments = ("run", "main", "--local", "--http-location", "NoServer", "--reload")
    with serveit(*arguments, folder=folder) as command:
        command.wait_for("^serving without HTTP")
        assert command.stop() == 0


# -- in this process -------------------------------------------------------------------------


def test_an_address_in_use() -> None:
    with bind(HTTPOptions(port=0)) as taken:
        taken.listen()
        with pytest.raises(click.ClickException, match="something listens there already"):
            reload.supervise("main:app", HTTPOptions(port=taken.getsockname()[1]), [])


@dataclass
class Started:
    """A process in place of a child's, and the end of the pipe on which it tells that it answers."""

    child: reload.Child
    process: subprocess.Popen[bytes]
    writer: int

    def tell(self, octets: bytes) -> None:
        os.write(self.writer, octets)


@pytest.fixture
def deaf() -> Iterator[Started]:
    """One that does not end when it is asked to."""
    reader, writer = os.pipe()
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, process_group=0
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        child = reload.Child(process, reader)
        try:
            yield Started(child, process, writer)
        finally:
            process.kill()
            child.close()
            os.close(writer)


def test_a_child_that_does_not_end_is_killed(deaf: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "STARTING_S", 0.05)
    assert deaf.child.left_s == math.inf
    deaf.child.stop()
    assert 0 < deaf.child.left_s <= 0.05
    deaf.child.wait()
    assert deaf.process.returncode == -signal.SIGKILL
    deaf.child.kill()  # nothing is left to be killed


def test_a_child_has_as_long_as_its_requests_have(deaf: Started) -> None:
    assert not deaf.child.look()
    deaf.child.stop()
    assert deaf.child.left_s <= reload.STARTING_S
    deaf.tell(b"3600.000000")  # it had begun to answer just then
    assert 3600 < deaf.child.left_s <= 3600 + reload.MARGIN_S
    assert deaf.child.look()


def test_late_children_are_killed_and_nobody_waits_for_the_others(
    deaf: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    with reload.Stop() as stop:
        supervisor = reload.Supervisor("nothing:app", [], None, stop)
        stop.children.append(deaf.child)
        deaf.child.stop()
        supervisor._look()
        assert stop.children == [deaf.child]
        monkeypatch.setattr(reload, "STARTING_S", 0.0)
        monkeypatch.setattr(deaf.child, "close", lambda: None)

        def is_gone() -> bool:
            supervisor._look()
            return not stop.children

        until(is_gone, "its end")
        assert deaf.process.returncode == -signal.SIGKILL
        supervisor.close()


def test_the_second_signal_kills_the_children(deaf: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[int] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    with reload.Stop() as stop:
        stop.children.append(deaf.child)
        signal.raise_signal(signal.SIGINT)
        assert deaf.process.poll() is None
        signal.raise_signal(signal.SIGINT)
        assert deaf.process.wait(5) == -signal.SIGKILL
    assert ends == [130]


def test_stopped_before_it_watches(tmp_path: Path) -> None:
    with reload.Stop() as stop:
        signal.raise_signal(signal.SIGTERM)
        supervisor = reload.Supervisor("nothing:app", [], None, stop)
        supervisor.follow([tmp_path])  # no child is started
        supervisor.close()


def test_the_stop_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[int] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with reload.Stop() as stop:
        assert not stop.is_set()
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        signal.raise_signal(signal.SIGINT)
        assert ends == [130]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers

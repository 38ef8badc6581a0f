from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serveit.cluster import reaper
from serveit.cluster.reaper import GRACE_S, VARIABLE, Reaper
from tests.support import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what these look at is in /proc")

GONE_S = 5.0
SLEEP = ("sleep", "60")

DRIVER = """
    import os, signal, subprocess, sys, time
    from serveit.cluster.reaper import VARIABLE, Reaper

    reaper = Reaper()
    reaper.start()
    os.environ[VARIABLE] = reaper.marker
    marked = [
        subprocess.Popen(["sleep", "60"]),
        subprocess.Popen(["sleep", "60"], start_new_session=True, stdout=subprocess.DEVNULL),
    ]
    del os.environ[VARIABLE]
    unmarked = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
    reaper.remove(sys.argv[1])
    forked = os.fork() if {forks} else 0
    if {forks} and not forked:
        os.close(1)
        time.sleep(60)
    print(reaper._watcher.pid, unmarked.pid, forked, *(process.pid for process in marked), flush=True)
    {then}
"""


class Fleet:
    """Processes of a test's own, killed in its end."""

    def __init__(self) -> None:
        self.pids: list[int] = []
        self._stack = contextlib.ExitStack()

    def start(self, *command: str, marker: str | None = None) -> subprocess.Popen[bytes]:
        environment = {**os.environ, VARIABLE: marker} if marker is not None else None
        process = subprocess.Popen(command, env=environment)
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process

    def close(self) -> None:
        self._stack.close()
        for pid in self.pids:
            if lives(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    fleet = Fleet()
    try:
        yield fleet
    finally:
        fleet.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of an instance's sockets."""
    folder = tmp_path / "sockets"
    folder.mkdir()
    os.mknod(folder / "1.sock", stat.S_IFSOCK | 0o600)  # as one that died has left it
    return folder


@pytest.fixture
def watcher() -> Iterator[Reaper]:
    reaper = Reaper()
    reaper.start()
    try:
        yield reaper
    finally:
        reaper.close()


def pid_of(reaper: Reaper) -> int:
    assert reaper._watcher is not None
    return reaper._watcher.pid


def lives(pid: int) -> bool:
    """Whether it runs: who has ended, and is waited for by nobody, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class TestDriver:
    @pytest.mark.parametrize(
        ("then", "forks"),
        [
            ("time.sleep(60)", False),  # killed
            ("os._exit(3)", False),
            ("os.kill(os.getpid(), signal.SIGABRT)", False),
            ("time.sleep(60)", True),  # whose child holds the pipe, and is not killed
        ],
    )
    def test_that_says_no_farewell(self, then: str, forks: bool, folder: Path, fleet: Fleet) -> None:
        script = textwrap.dedent(DRIVER).format(then=then, forks=forks)
        with subprocess.Popen(
            [sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, start_new_session=True
        ) as driver:
            assert driver.stdout is not None
            watching, unmarked, forked, *marked = map(int, driver.stdout.readline().split())
            fleet.pids += [watching, unmarked, *marked, *([forked] if forks else [])]
            if "sleep" in then:
                driver.kill()
            assert driver.stdout.read() == b""  # its end: the watcher does not hold it
        asyncio.run(wait_until(lambda: not lives(watching), GONE_S, "the watcher has ended"))
        assert not any(lives(pid) for pid in marked)
        assert lives(unmarked) and lives(forked) == forks
        assert not folder.exists()

    def test_that_says_farewell(self, watcher: Reaper, folder: Path, fleet: Fleet) -> None:
        watcher.remove(str(folder))
        stays = fleet.start(*SLEEP, marker=watcher.marker)
        pid, begun = pid_of(watcher), time.monotonic()
        watcher.close()
        assert stays.wait(GONE_S) == -signal.SIGKILL
        assert time.monotonic() - begun > GRACE_S
        assert not lives(pid)
        assert not folder.exists()
        watcher.close()

    def test_that_leaves_nothing_does_not_wait(self, watcher: Reaper) -> None:
        begun = time.monotonic()
        watcher.close()
        assert time.monotonic() - begun < GRACE_S

    def test_that_stays(self, watcher: Reaper, fleet: Fleet) -> None:
        marked = fleet.start(*SLEEP, marker=watcher.marker)
        with pytest.raises(subprocess.TimeoutExpired):
            marked.wait(0.2)


class TestWatcher:
    async def test_is_for_itself(self, watcher: Reaper) -> None:
        pid = pid_of(watcher)
        assert os.getsid(pid) == pid
        open_files = {name: os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")}
        assert open_files.pop("0").startswith("pipe:")
        assert set(open_files.values()) == {"/dev/null"}
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        await wait_until(lambda: ignores(pid) >= {signal.SIGINT, signal.SIGTERM}, GONE_S, "it is ready")

    async def test_of_a_driver_that_is_marked_is_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(VARIABLE, "others")
        watcher = Reaper()
        watcher.start()
        try:
            environment = Path(f"/proc/{pid_of(watcher)}/environ").read_bytes
            await wait_until(environment, GONE_S, "its program has begun")
            assert VARIABLE.encode() not in environment() and b"PATH=" in environment()
        finally:
            watcher.close()

    def test_that_was_killed_is_no_trouble(self, watcher: Reaper) -> None:
        assert watcher._watcher is not None
        watcher._watcher.kill()
        watcher._watcher.wait()
        watcher.remove("/nowhere")
        watcher.close()
        watcher.remove("/nowhere")

    def test_that_does_not_end_is_ended(self, watcher: Reaper, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reaper, "PATIENCE_S", 0.1)
        pid = pid_of(watcher)
        os.kill(pid, signal.SIGSTOP)
        watcher.close()
        assert not lives(pid)


class TestEnding:
    def test_who_has_the_marker(self, fleet: Fleet) -> None:
        marked = fleet.start(*SLEEP, marker="one")
        fleet.start(*SLEEP, marker="one2")
        fleet.start(*SLEEP)
        assert reaper.find(b"%s=one" % VARIABLE.encode()) == [marked.pid]
        reaper.end_all(b"%s=one" % VARIABLE.encode())
        assert marked.wait(GONE_S) == -signal.SIGKILL
        assert reaper.find(b"%s=one" % VARIABLE.encode()) == []

    def test_one_that_starts_others_meanwhile(self, fleet: Fleet) -> None:
        busy = fleet.start("sh", "-c", "while true; do sleep 60 & sleep 0.005; done", marker="busy")
        marker = b"%s=busy" % VARIABLE.encode()
        while len(reaper.find(marker)) < 5:
            assert busy.poll() is None
        reaper.end_all(marker)
        assert busy.wait(GONE_S) == -signal.SIGKILL
        assert reaper.find(marker) == []

    def test_whose_number_another_one_has_got(self, fleet: Fleet) -> None:
        other = fleet.start(*SLEEP)
        reaper.end(other.pid, b"%s=gone" % VARIABLE.encode())
        assert lives(other.pid)

    def test_where_there_is_no_pidfd(self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(os, "pidfd_open")
        marked, other = fleet.start(*SLEEP, marker="old"), fleet.start(*SLEEP)
        for pid in (marked.pid, other.pid):
            reaper.end(pid, b"%s=old" % VARIABLE.encode())
        assert marked.wait(GONE_S) == -signal.SIGKILL
        assert lives(other.pid)

    def test_takes_no_longer_than_it_may(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reaper, "find", lambda marker: [os.getpid()])  # as if it could not be ended
        begun = time.monotonic()
        reaper.wait_for_end(b"x=y", 0.1)
        reaper.end_all(b"x=y", 0.1)
        assert 0.2 <= time.monotonic() - begun < 1.0


def test_what_the_driver_says() -> None:
    reader, writer = os.pipe()
    try:
        os.write(writer, b"/one\n/two\nfarewell\n")
        assert reaper.listen(reader, os.getppid()) == [b"/one", b"/two", b"farewell"]
        os.write(writer, b"/one\n/tw")
        os.close(writer)
        assert reaper.listen(reader, os.getppid()) == [b"/one"]
    finally:
        os.close(reader)


@pytest.mark.parametrize("told", [[b"farewell"], [b""], [b"."], [b"", b"farewell"]])
def test_only_what_the_driver_names_is_removed(
    told: list[bytes], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(reaper, "listen", lambda *_: told)
    with open(os.devnull) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        reaper.main([f"{VARIABLE}=nobody", "1"])
    assert (folder / "1.sock").is_socket()


def test_only_sockets_are_removed(tmp_path: Path, folder: Path) -> None:
    (folder / "kept.txt").touch()
    for path in (tmp_path, folder, tmp_path / "missing", folder / "1.sock"):
        reaper.remove_sockets(os.fsencode(path))
    assert [path.name for path in folder.iterdir()] == ["kept.txt"]


def ignores(pid: int) -> set[int]:
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "SigIgn" in line]
    mask = int(line.split()[1], 16)
    return {number for number in range(1, 32) if mask >> (number - 1) & 1}

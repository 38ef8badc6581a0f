"""However `serveit run` ends, the Ray that it started ends with it, and leaves nothing."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from serveit.cluster.reaper import VARIABLE
from tests.commands import Command, fetch, serveit

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(sys.platform != "linux", reason="what these look at is in /proc"),
]

GONE_S = 10.0
"""What is promised for every end."""
AT_ONCE_S = 2.0
"""What is promised for the second Ctrl-C."""
START_S = 30.0

APP = """
import asyncio
import time
from pathlib import Path

from serveit import App

app = App()

@app.route("/slow")
async def slow() -> str:
    Path("slow-runs").touch()
    await asyncio.sleep(1.0)
    return "ended well"

@app.route("/endless")
def endless() -> str:
    Path("endless-runs").touch()
    time.sleep(60.0)
    return "never"
"""

CONSTRUCTOR = """
@app.route("/late")
class Late:
    def __init__(self):
        Path("constructs").touch()
        time.sleep(60.0)

    async def __call__(self) -> str:
        return "never"
"""


class Run:
    """`serveit run` in a home and a folder for temporary files of its own, and what belongs to it.

    Attributes:
        command: the driver. Ray's processes are of its session; the watcher is known by its environment.
        folder: the app's.
    """

    def __init__(self, command: Command, folder: Path, temporary: Path) -> None:
        self.command = command
        self.folder = folder
        self._temporary = temporary
        self._shared_memory = set(os.listdir("/dev/shm"))
        self._doors: set[str] = set()

    def processes(self) -> dict[int, str]:
        """Its living processes with their commands."""
        return {
            pid: Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
            if self._has(pid)
        }

    def runs(self, name: str) -> bool:
        """Whether a process of this name is among them."""
        return any(name in command for command in self.processes().values())

    def are_marked(self) -> bool:
        """Whether all that Ray has started can be told by its environment: no title is written over it."""
        watcher = [pid for pid, command in self.processes().items() if VARIABLE in command]
        started = self.processes().keys() - {self.command.process.pid, *watcher}
        environments = [Path(f"/proc/{pid}/environ").read_bytes() for pid in started]
        return all(VARIABLE.encode() in one and not one.startswith(b"\0") for one in environments)

    def look(self) -> None:
        """Remember where it listens."""
        self._doors = listening(self.processes())

    def request(self, path: str, pool: ThreadPoolExecutor) -> Future[str]:
        """Under way: the replica runs it."""
        answer = pool.submit(fetch, self.command.url() + path)
        self.until((self.folder / f"{path[1:]}-runs").exists, START_S)
        return answer

    def until(self, predicate: Callable[[], object], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not predicate():
            assert time.monotonic() < deadline, self.left()
            time.sleep(0.02)

    def left(self) -> str:
        """What is there of it, if anything is."""
        sockets = [str(path) for path in self._temporary.glob("serveit-*/*")]
        doors = [*(self._doors & listening())]
        memory = set(os.listdir("/dev/shm")) - self._shared_memory
        found = {
            "processes": self.processes(),
            "sockets": sockets,
            "listening": doors,
            "shared memory": memory,
        }
        return "".join(f"{what}: {those}\n" for what, those in found.items() if those)

    def ends(self, code: int, within_s: float = GONE_S) -> str:
        """Nothing of it is left soon, and its exit code is this one. Returns what it has said."""
        begun = time.monotonic()
        assert self.command.end() == code, self.command.text
        self.until(lambda: not self.left(), within_s)
        assert time.monotonic() - begun <= within_s
        return re.sub(r"^\d\d:\d\d:\d\d INFO +", "", self.command.text, flags=re.MULTILINE)

    def _has(self, pid: int) -> bool:
        with contextlib.suppress(OSError):
            state, _, _, session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
            if state not in "ZX":
                mine = f"TMPDIR={self._temporary}".encode()
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                return int(session) == self.command.process.pid or mine in environment
        return False


def listening(pids: Iterator[int] | dict[int, str] | None = None) -> set[str]:
    """The inodes of the listening sockets: these processes', or everybody's."""
    there = set()
    for table, state, column in (("tcp", "0A", 9), ("tcp6", "0A", 9), ("unix", "00010000", 6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if state in fields[3:4]:
                there.add(fields[column])
    if pids is None:
        return there
    held = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                held.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
    return there & held


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Run]]:
    """Start `serveit run` on an app's source."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    with contextlib.ExitStack() as stack:
        # Not tmp_path: the paths of sockets may not be long.
        temporary = stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp"))
        monkeypatch.setenv("TMPDIR", temporary)
        monkeypatch.setenv("HOME", str(tmp_path))

        def start(app: str) -> Run:
            (tmp_path / "app.py").write_text(app)
            command = stack.enter_context(serveit("run", "app:app", "--port", "0", folder=tmp_path))
            return Run(command, tmp_path, Path(temporary))

        yield start


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_ctrl_c_in_a_terminal(start: Callable[[str], Run], pool: ThreadPoolExecutor) -> None:
    """It goes to the whole group, and Ray serves on until what runs has ended."""
    run = start(APP)
    answer = run.request("/slow", pool)
    run.look()
    os.killpg(run.command.process.pid, signal.SIGINT)
    assert answer.result() == "ended well"
    last_words = run.ends(0).splitlines()[-1]
    assert (
        last_words == "serveit.client: stopping once 1 running request has ended; Ctrl-C again stops at once"
    )


def test_sigterm(start: Callable[[str], Run]) -> None:
    run = start(APP)
    run.command.url()
    run.look()
    run.command.process.send_signal(signal.SIGTERM)
    assert "stopped" not in run.ends(0)


def test_sigterm_to_the_whole_group(start: Callable[[str], Run]) -> None:
    """As `timeout` and service managers send it: Ray's own processes end at once, and nothing is waited for
    that they would have to answer."""
    run = start(APP)
    run.command.url()
    run.look()
    os.killpg(run.command.process.pid, signal.SIGTERM)
    run.ends(0)


def test_sigkill(start: Callable[[str], Run], pool: ThreadPoolExecutor) -> None:
    run = start(APP)
    answer = run.request("/endless", pool)
    run.look()
    assert run.runs("ray::") and run.runs("raylet") and len(run._doors) > 3
    run.until(run.are_marked, GONE_S)
    run.command.process.kill()
    run.ends(-signal.SIGKILL)
    assert answer.exception() is not None


def test_ctrl_c_twice(start: Callable[[str], Run], pool: ThreadPoolExecutor) -> None:
    run = start(APP)
    answer = run.request("/endless", pool)
    run.look()
    run.command.process.send_signal(signal.SIGINT)
    run.command.wait_for("1 running request")
    run.command.process.send_signal(signal.SIGINT)
    assert run.ends(130, AT_ONCE_S).splitlines()[-1] == "stopped at once, by a second signal"
    assert answer.exception() is not None


@pytest.mark.parametrize(
    ("number", "sign"),
    [(signal.SIGTERM, "raylet"), (signal.SIGINT, "ray::DashboardAgent")],
    ids=["early", "late"],
)
def test_while_ray_starts(number: int, sign: str, start: Callable[[str], Run]) -> None:
    run = start(APP)
    run.until(lambda: run.runs(sign), START_S)
    run.look()
    run.command.process.send_signal(number)
    assert run.ends(0).splitlines()[-1].startswith("stopped while the app was starting")


def test_while_a_constructor_runs(start: Callable[[str], Run]) -> None:
    run = start(APP + CONSTRUCTOR)
    run.until((run.folder / "constructs").exists, START_S)
    run.look()
    run.command.process.send_signal(signal.SIGINT)
    words = run.ends(0).splitlines()[-1]
    assert words == "stopped while the app was starting, without waiting for what had begun"

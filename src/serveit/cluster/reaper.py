"""Ends what an embedded Ray leaves, whatever ended its driver.

`session` starts this file as a program of its own, the watcher, before it starts Ray. It reads a pipe from
the driver. Where the pipe ends without a farewell (SIGKILL, `os._exit`, a crash) it ends every process that
this Ray has started, at once: Ray itself would leave workers for seconds and its agents for a minute. They
are known by a marker in their environment, which each process inherits from the one that starts it.

The standard library only, and little of it: the watcher is there for as long as its driver.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import stat
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Sequence

VARIABLE = "SERVEIT_EMBEDDED_RAY"
"""The marker's name in the environment."""

GRACE_S = 0.5
"""What processes get to end by themselves after Ray has been shut down."""
ENDING_S = 10.0
"""After so long it is given up: a process in the midst of a system call cannot be ended."""
PATIENCE_S = GRACE_S + ENDING_S + 5.0
"""What the driver waits for its watcher's end; it takes as long as that only when it is stopped itself."""
PAUSE_S = 0.02
"""Between looks: what was killed takes a moment, what was just starting shows by then."""
LOOK_S = 1.0
"""How often to look whether the driver is there: one that was forked from it may hold the pipe open."""
FAREWELL = b"farewell"
"""Said last. All else that is said is an absolute path."""


class Reaper:
    """The watcher of one embedded Ray, from its driver's side.

    Attributes:
        marker: the value of `VARIABLE` in the environment of all that is to end with this Ray.
    """

    def __init__(self) -> None:
        self.marker = os.urandom(8).hex()
        self._watcher: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the watcher; nothing is waited for."""
        import subprocess

        environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
        command = [sys.executable, "-I", "-S", __file__, f"{VARIABLE}={self.marker}", str(os.getpid())]
        # Of the driver it has the pipe only: who reads what the driver prints sees the end with the driver's.
        # In a session of its own Ctrl-C does not reach it.
        self._watcher = subprocess.Popen(
            command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd="/",
            start_new_session=True,
        )

    def remove(self, folder: str) -> None:
        """Have it remove this folder of sockets, too."""
        self._tell(os.fsencode(folder))

    def close(self) -> None:
        """Ray has been shut down: let the watcher see to what is left of it, and wait for its end."""
        import subprocess

        if self._watcher is None:
            return
        with self._watcher as watcher:
            self._tell(FAREWELL)
            try:
                watcher.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                watcher.kill()
        self._watcher = None

    def _tell(self, line: bytes) -> None:
        if self._watcher is not None and self._watcher.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # somebody killed it
                self._watcher.stdin.write(line + b"\n")


# -- the watcher ---------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> None:
    """Watch the driver at the other end of stdin.

    Args:
        arguments: the marker as NAME=value, and the driver's process id.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    marker = os.fsencode(arguments[0])
    told = listen(sys.stdin.fileno(), int(arguments[1]))
    if FAREWELL in told:
        wait_for_end(marker, GRACE_S)
    end_all(marker)
    for line in told:
        if line != FAREWELL:
            remove_sockets(line)


def listen(fd: int, driver: int) -> list[bytes]:
    """What the driver has said, when it has said farewell or is gone."""
    told = b""
    while True:
        ready, _, _ = select.select([fd], [], [], LOOK_S)
        if ready:
            octets = os.read(fd, 65_536)
            told += octets
            if not octets or FAREWELL in told.split(b"\n"):
                break
        elif os.getppid() != driver:
            break
    return told.split(b"\n")[:-1]


def wait_for_end(marker: bytes, timeout_s: float) -> None:
    """Give what has the marker some time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and find(marker):
        time.sleep(PAUSE_S)


def end_all(marker: bytes, timeout_s: float = ENDING_S) -> None:
    """End every process that has the marker, until two looks have found none: one that dies may just have
    started another."""
    deadline = time.monotonic() + timeout_s
    looks = 0
    while looks < 2 and time.monotonic() < deadline:
        found = find(marker)
        for pid in found:
            end(pid, marker)
        looks = 0 if found else looks + 1
        time.sleep(PAUSE_S)


def remove_sockets(folder: bytes) -> None:
    """Remove a folder of sockets, named in full. What is no socket stays, and the folder with it."""
    if not os.path.isabs(folder):
        return
    with contextlib.suppress(OSError):
        for path in (os.path.join(folder, name) for name in os.listdir(folder)):
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                os.unlink(path)
        os.rmdir(folder)


if sys.platform == "linux":

    def find(marker: bytes) -> list[int]:
        """Processes of this user that were started with the marker, and live."""
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and _has(int(name), marker)]

    def end(pid: int, marker: bytes) -> None:
        """Kill the process, not another one that has got its number meanwhile."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(OSError))  # it has ended
            try:
                handle = os.pidfd_open(pid)
            except (AttributeError, OSError):  # not with this Python, or not with this kernel
                if _has(pid, marker):
                    os.kill(pid, signal.SIGKILL)
                return
            stack.callback(os.close, handle)
            if _has(pid, marker):
                signal.pidfd_send_signal(handle, signal.SIGKILL)

    def _has(pid: int, marker: bytes) -> bool:
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                return marker in file.read().split(b"\0")
        except OSError:  # it has ended, or is somebody else's
            return False

else:
    # For macOS, and not tested there. Its ps shows the environment of one's own processes behind their
    # command, apart from those that the system protects.

    def find(marker: bytes) -> list[int]:
        """Processes of this user that were started with the marker."""
        return [int(line.split()[0]) for line in _ps("-x") if marker in line.split()[1:]]

    def end(pid: int, marker: bytes) -> None:
        """Kill the process, unless another one has got its number by now."""
        if any(marker in line.split() for line in _ps("-p", str(pid))):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _ps(*which: str) -> list[bytes]:
        import subprocess

        command = ["/bin/ps", "-E", "-ww", "-o", "pid=,command=", *which]
        return subprocess.run(command, capture_output=True, check=False).stdout.splitlines()


if __name__ == "__main__":
    main(sys.argv[1:])

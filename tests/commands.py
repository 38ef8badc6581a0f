"""For tests of the command: `serveit` as a process of its own, ended with the test."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

TIMEOUT_S = 30.0


def fetch(url: str) -> str:
    """The body; an answer's status is its own affair."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            body: bytes = answer.read()
    except urllib.error.HTTPError as error:
        with error:
            body = error.read()
    return body.decode()


class Talking:
    """A process of its own, with what it says so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, timeout_s: float = TIMEOUT_S) -> re.Match[str]:
        """The first line from here on that the pattern is found in."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                line = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                line = None
            assert line is not None, f"no line like {pattern!r} in\n{self.text}"
            self.lines.append(line)
            if found := re.search(pattern, line):
                return found


class Command(Talking):
    """A running command."""

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        preexec: Callable[[], None] | None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.started = time.monotonic()
        super().__init__(
            subprocess.Popen(
                [sys.executable, "-m", "serveit", *arguments],
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**(os.environ if environment is None else environment), "PYTHONDONTWRITEBYTECODE": "1"},
                start_new_session=True,
                preexec_fn=preexec,
            )
        )

    def url(self) -> str:
        """Where it serves, once it does."""
        return self.wait_for(r"^serving (http://\S+)")[1]

    def stop(self, number: int = signal.SIGINT) -> int:
        """Its exit code after a signal."""
        self.process.send_signal(number)
        return self.end()

    def end(self, timeout_s: float = TIMEOUT_S) -> int:
        """Its exit code, once it has ended by itself; all it said is in `lines`."""
        code = self.process.wait(timeout_s)
        while (line := self._queue.get(timeout=timeout_s)) is not None:
            self.lines.append(line)
        return code

    def close(self) -> None:
        # Its own session's group: itself and the children that it may have left.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextlib.contextmanager
def serveit(
    *arguments: str,
    folder: Path,
    preexec: Callable[[], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Command]:
    """`python -m serveit ...`, killed in the end if it still runs."""
    command = Command(arguments, folder, preexec, environment)
    try:
        yield command
    finally:
        command.close()

"""Drivers that are processes of their own: scripts, started in a folder, that say a line at a time."""

from __future__ import annotations

import contextlib
import queue
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

TIMEOUT_S = 30.0


class Driver:
    """A running script, with what it says so far."""

    def __init__(self, path: Path, arguments: tuple[str, ...], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(path), *arguments],
            cwd=path.parent,
            env={**environment, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    def says(self, word: str) -> str:
        """The rest of the first line from here on that begins with `word`."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            with contextlib.suppress(queue.Empty):
                line = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
                if line is not None:
                    self.lines.append(line)
                    if line.startswith(f"{word} "):
                        return line.removeprefix(f"{word} ")
                    continue
            raise AssertionError(f"no line {word!r} in\n" + "\n".join(self.lines))

    def go_on(self) -> None:
        """Give it a line to read."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended
            self.process.stdin.write("\n")
            self.process.stdin.flush()

    def end(self) -> int:
        """Its exit code, once it has ended by itself."""
        return self.process.wait(TIMEOUT_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


@contextlib.contextmanager
def driver(folder: Path, script: str, *arguments: str, environment: Mapping[str, str]) -> Iterator[Driver]:
    """Write a script into a folder and run it there. In the end it is let go on, to its own end."""
    path = folder / "driver.py"
    path.write_text(textwrap.dedent(script))
    running = Driver(path, arguments, environment)
    try:
        yield running
        if running.process.poll() is None:
            running.go_on()
            running.end()
    finally:
        running.close()

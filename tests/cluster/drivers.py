"""Drivers that are processes of their own: scripts, started in a folder, that say a line at a time."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.commands import TIMEOUT_S, Talking


class Driver(Talking):
    """A running script."""

    def __init__(self, path: Path, arguments: tuple[str, ...], environment: Mapping[str, str]) -> None:
        super().__init__(
            subprocess.Popen(
                [sys.executable, str(path), *arguments],
                cwd=path.parent,
                env={**environment, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )

    def says(self, word: str) -> str:
        """The rest of the first line from here on that begins with `word`."""
        return self.wait_for(f"^{re.escape(word)} (.*)")[1]

    def go_on(self, line: str = "") -> None:
        """Give it a line to read."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended
            self.process.stdin.write(f"{line}\n")
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

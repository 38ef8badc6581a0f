"""Where a test and user code meet, in whatever process that runs: a folder.

User code notes what happens to it, and waits for what the test lets happen.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

PAUSE_S = 0.002


class Gate:
    """A folder that both sides know."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def note(self, text: str) -> None:
        """Add a line, whole, whoever writes at the same time."""
        file = os.open(self.folder / "notes", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(file, f"{text}\n".encode())
        finally:
            os.close(file)

    @property
    def notes(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / "notes").read_text().splitlines()
        return []

    def open(self) -> None:
        """Let through who waits, and who comes."""
        (self.folder / "open").touch()

    @property
    def is_open(self) -> bool:
        return (self.folder / "open").exists()

    async def passed(self) -> None:
        """Wait until it is open."""
        while not self.is_open:  # noqa: ASYNC110
            await asyncio.sleep(PAUSE_S)

    def passed_by_thread(self) -> None:
        while not self.is_open:
            time.sleep(PAUSE_S)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Note who comes in, and how it leaves."""
        self.note("in")
        try:
            yield
        except BaseException as error:
            self.note(type(error).__name__)
            raise
        self.note("out")

    @property
    def peak(self) -> int:
        """How many were inside at most, at once."""
        inside = peak = 0
        for note in self.notes:
            inside += 1 if note == "in" else -1
            peak = max(peak, inside)
        return peak

"""For tests of `--reload`: an app that is saved again and again, and a client that asks it meanwhile."""

from __future__ import annotations

import os
import threading
import time
import urllib.request
from pathlib import Path

APP = """
import os
from serveit import App
app = App()

@app.route("/")
async def version() -> str:
    return "{version}"

@app.route("/pid")
async def pid() -> int:
    return os.getpid()

@app.route("/die")
async def die() -> None:
    os._exit(7)
"""
SAVED_AT = 1_700_000_000


def save(folder: Path, version: str) -> None:
    """As editors do: in one step. Always at the same time, and versions of one length are of one size:
    by these Python tells stale bytecode."""
    written = folder / "main.tmp"
    written.write_text(APP.format(version=version) if version.isalpha() else version)
    os.utime(written, (SAVED_AT, SAVED_AT))
    written.rename(folder / "main.py")


def until(predicate: object, what: str, timeout_s: float = 10) -> None:
    assert callable(predicate)
    deadline = time.monotonic() + timeout_s
    while not predicate():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)


class Asking:
    """A client that asks again and again, each time on a connection of its own."""

    def __init__(self, url: str, pause_s: float = 0.0) -> None:
        self.answers: list[str] = []
        self._pause_s = pause_s
        self._url = url
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._end.wait(self._pause_s):
            try:
                with urllib.request.urlopen(self._url, timeout=10) as answer:
                    self.answers.append(answer.read().decode())
            except OSError as error:
                self.answers.append(repr(error))

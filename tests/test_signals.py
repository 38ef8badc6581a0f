"""What needs a process of its own; `test_client.py` has the rest, seen from `serveit.run`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ENDS_S = 5.0

PROGRAM = """
import contextlib, os, pathlib, sys, time
from serveit.signals import StopSignals

with StopSignals(1.0):
    for fd in (1, 2):
        os.set_blocking(fd, False)
        with contextlib.suppress(BlockingIOError):
            while {is_full}:
                os.write(fd, b"x")
        os.set_blocking(fd, True)
    sys.stdout.write("last words")
    pathlib.Path(sys.argv[1]).touch()
    while True:
        time.sleep(1)
"""


@pytest.mark.parametrize(("times", "code"), [(1, 0), (2, 130)])
@pytest.mark.parametrize("is_full", [True, False], ids=["read by nobody", "read"])
def test_the_last_words_hold_nothing_up(times: int, code: int, is_full: bool, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(is_full=is_full), str(ready)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    ) as process:
        while not ready.exists():
            assert process.poll() is None
            time.sleep(0.01)
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)  # two at once would be one
        assert process.wait(ENDS_S) == code
        out, errors = process.communicate()
    if not is_full:
        assert errors.startswith("stopped")
        assert out == ("last words" if times == 1 else "")

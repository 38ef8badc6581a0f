"""A server for the time of a measurement: started, asked until it answers, ended with all that it started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.request import Request, urlopen

START_S, END_S = 45.0, 15.0
MARK = "BENCHMARK_SERVER"


class NotStarted(Exception):
    """The server ended, or did not give the right answer in time."""


@contextlib.contextmanager
def serving(
    command: Sequence[str], variables: Mapping[str, str], url: str, body: str, log: Path
) -> Iterator[float]:
    """Run a server; gives the seconds from its command to the first right answer.

    Args:
        command: what starts it.
        variables: its whole environment.
        url: where `body`, JSON, is POSTed to, and answered with an equal value.
        body: what is sent.
        log: takes what it prints.
    """
    mark = uuid.uuid4().hex
    with log.open("wb") as output:
        begun = time.monotonic()
        process = subprocess.Popen(
            command,
            env={**variables, MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            while not echoes(url, body):
                if process.poll() is not None:
                    raise NotStarted(f"it ended with status {process.returncode}")
                if time.monotonic() - begun > START_S:
                    raise NotStarted(f"no right answer within {START_S:.0f} s")
                time.sleep(0.02)
            yield time.monotonic() - begun
        finally:
            end(process, mark)


def echoes(url: str, body: str) -> bool:
    request = Request(url, body.encode(), {"content-type": "application/json"})
    with contextlib.suppress(OSError, ValueError), urlopen(request, timeout=5) as answer:
        return bool(json.loads(answer.read()) == json.loads(body))
    return False


def end(process: subprocess.Popen[bytes], mark: str) -> None:
    """Ask it to end, then end what is left of it: some leave workers or a load balancer behind."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    deadline = time.monotonic() + END_S
    while (left := marked(mark)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    if process.poll() is None:
        process.kill()
    process.wait()


def marked(mark: str) -> list[int]:
    """The processes that inherited the mark. Where there is no /proc nobody is found."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found

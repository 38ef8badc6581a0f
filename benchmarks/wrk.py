"""`wrk` asks a server on this machine: what the benchmarks over HTTP share."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ANSWER_S = 10
UNITS_MS = {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0}
POST = 'wrk.method = "POST"\nwrk.headers["content-type"] = "application/json"\nwrk.body = [==[%s]==]\n'


class Load(NamedTuple):
    """What one run of wrk saw: requests/s, and the median and 99th percentile of the latency."""

    per_second: float
    p50_ms: float
    p99_ms: float


class NotAnswered(Exception):
    """Not all requests were answered with a status of success; the text is wrk's."""


def wrk(url: str, connections: int, seconds: int, body: str | None = None) -> Load:
    """Ask for some seconds, again and again over each connection.

    Args:
        url: what is asked for.
        connections: how many there are, each with one request under way.
        seconds: for how long.
        body: JSON that is POSTed; None: a GET.

    Raises:
        NotAnswered: some answers failed, took more than 10 s, or did not come at all.
    """
    with posting(body) as script:
        measure = [f"-c{connections}", f"-d{seconds}s", f"--timeout={ANSWER_S}s", "--latency"]
        command = ["wrk", "-t1", *measure, *script, url]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 3 * ANSWER_S)
    output = finished.stdout
    rate = re.search(r"Requests/sec: +([\d.]+)", output)
    if rate is None or float(rate[1]) == 0 or "Non-2xx" in output or "Socket errors" in output:
        raise NotAnswered(output + finished.stderr)
    return Load(float(rate[1]), percentile(output, 50), percentile(output, 99))


@contextlib.contextmanager
def posting(body: str | None) -> Iterator[list[str]]:
    """wrk's arguments for a POST: it takes a method and a body from a script only."""
    if body is None:
        yield []
        return
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "post.lua"
        script.write_text(POST % body, encoding="utf-8")
        yield ["--script", str(script)]


def percentile(output: str, percent: int) -> float:
    found = re.search(rf"^ +{percent}% +([\d.]+)([a-z]+)$", output, re.MULTILINE)
    assert found is not None, output
    return float(found[1]) * UNITS_MS[found[2]]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port

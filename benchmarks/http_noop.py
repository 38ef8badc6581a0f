"""What does serveit cost over HTTP? A no-op handler on bare uvicorn + Starlette and on serveit, by `wrk`.

The servers have the same settings of uvicorn, and are asked in turns in one run: bare, serveit on Ray,
serveit in one process, bare, ... The ratio of the medians says more than the figures of either.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.request import urlopen

from report import Report, command_line, command_of
from wrk import NotAnswered, free_port, wrk

SERVERS = Path(__file__).parent / "servers"
BARE, ON_RAY, LOCAL = "uvicorn + Starlette", "serveit on Ray", "serveit --local"
CONNECTIONS = [64, 1]
START_S = 60.0

NOTES = (
    "Medians of all rounds; `wrk` runs on the same machine, with one thread. Latency is what `wrk` sees.",
    "The same handler (an `async def` that gives two letters as text/plain), the same body, the same "
    "settings of uvicorn: uvloop, httptools, no access log, no websockets. All servers stay up during the "
    "whole run; those that are not asked are idle.",
    "The bare server is one process. On Ray a request goes through two, a proxy and a replica, which share "
    "the machine's processors with `wrk`; `--local` does the same work in one.",
    "On top of the bare server serveit does what it does for every request, nothing is switched off: a "
    "request id (sent back as `x-request-id`), limits of header and body, a deadline of 60 s, a bounded "
    "queue, admission by the replica, cancelling when the client leaves, and encoding to and from wire "
    "frames.",
)


@dataclass(frozen=True)
class Measurement:
    """One run of wrk."""

    server: str
    connections: int
    per_second: float
    p50_ms: float
    p99_ms: float


def main() -> None:
    parser = command_line(__doc__, seconds=5, rounds=3)
    parser.add_argument("--connections", type=int, nargs="+", default=CONNECTIONS, help="(%(default)s)")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("http_noop.py: wrk, which sends the requests, is missing: apt-get install wrk")
    with contextlib.ExitStack() as stack:
        urls = {
            BARE: stack.enter_context(bare()),
            ON_RAY: stack.enter_context(serveit()),
            LOCAL: stack.enter_context(serveit("--local")),
        }
        check_same_answer(urls)
        for url in urls.values():
            wrk(url, 64, seconds=1)  # warm up
        measured = [
            Measurement(server, connections, *wrk(url, connections, options.seconds))
            for connections in options.connections
            for _ in range(options.rounds)
            for server, url in urls.items()
        ]
    rows = [row for connections in options.connections for row in summarise(measured, connections)]
    head = ["connections", "server", "requests/s", "p50 ms", "p99 ms"]
    command = command_of("http_noop.py", options)
    if options.connections != CONNECTIONS:
        command += " --connections " + " ".join(map(str, options.connections))
    title = "HTTP no-op: bare uvicorn + Starlette, serveit on Ray and in one process, in turns"
    report = Report(title, command, NOTES, head, rows, [asdict(one) for one in measured])
    report.publish("http_noop", options)


def summarise(measured: list[Measurement], connections: int) -> Iterator[list[str]]:
    """A row for each server, and one with the ratio of its medians to the bare server's."""
    medians = {}
    for server in (BARE, ON_RAY, LOCAL):
        own = [one for one in measured if (one.server, one.connections) == (server, connections)]
        figures = [(one.per_second, one.p50_ms, one.p99_ms) for one in own]
        medians[server] = [statistics.median(column) for column in zip(*figures, strict=True)]
        rate, p50, p99 = medians[server]
        yield [str(connections), server, f"{rate:,.0f}", f"{p50:.3f}", f"{p99:.3f}"]
    for server in (ON_RAY, LOCAL):
        ratios = [ours / bare for ours, bare in zip(medians[server], medians[BARE], strict=True)]
        yield [str(connections), f"**{server} / bare**", *(f"**{ratio:.2f}**" for ratio in ratios)]


# -- the servers -----------------------------------------------------------------------------------


@contextlib.contextmanager
def bare() -> Iterator[str]:
    port = free_port()
    with running([sys.executable, str(SERVERS / "noop_starlette.py"), str(port)], port) as url:
        yield url


@contextlib.contextmanager
def serveit(*options: str) -> Iterator[str]:
    port = free_port()
    target = str(SERVERS / "noop_serveit.py")
    command = [sys.executable, "-m", "serveit", "run", target, *options, "--port", str(port)]
    with running(command, port) as url:
        yield url


@contextlib.contextmanager
def running(command: list[str], port: int) -> Iterator[str]:
    """The server, from its first answer on."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_S
        while not answers(f"http://127.0.0.1:{port}/"):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"http_noop.py: this does not start: {' '.join(command)}")
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait()


def answers(url: str) -> bool:
    with contextlib.suppress(OSError), urlopen(url, timeout=1) as answer:
        return bool(answer.status == 200)
    return False


def check_same_answer(urls: dict[str, str]) -> None:
    seen = set()
    for url in urls.values():
        with urlopen(url, timeout=5) as answer:
            seen.add((answer.status, answer.headers["content-type"], answer.read()))
    if len(seen) != 1:
        sys.exit(f"http_noop.py: the servers do not answer the same: {seen}")


if __name__ == "__main__":
    try:
        main()
    except NotAnswered as failure:
        sys.exit(f"http_noop.py: not all requests were answered\n{failure}")

"""How fast is serveit beside others? A JSON echo on each, by `wrk`, at 64 connections and at one.

Each peer runs as fast as its documentation knows how to make it, in an environment of its own, which
`--install` makes. In each round one after the other is started, asked and ended, and nothing else runs
meanwhile; every other round goes backwards. The ratio to bare Starlette in the same round says more than
the figures.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from environments import install, installed, names, pinned, python
from processes import END_S, START_S, NotStarted, serving
from report import RESULTS, Report, command_line, command_of
from wrk import Load, NotAnswered, free_port, wrk

HERE = Path(__file__).parent
BODY = '{"x":[0,1,2,3,4,5,6,7]}'
CONNECTIONS = (64, 1)
LIMIT_S = 12 * 60.0

README = HERE.parent / "README.md"
RATIO_ROW, START_ROW = "JSON echo, of Starlette's rate¹", "command to first answer¹"
COLUMNS = (
    ("serveit on Ray", "serveit --local"),
    ("Ray Serve, defaults", "Ray Serve, HAProxy"),
    ("FastAPI",),
    ("LitServe",),
    ("BentoML",),
)

UVICORN = (
    *("-m", "uvicorn", "--app-dir", "{apps}", "--host", "127.0.0.1", "--port", "{port}"),
    *("--loop", "uvloop", "--http", "httptools", "--ws", "none", "--lifespan", "off"),
    *("--no-access-log", "--log-level", "warning", "--no-server-header", "--no-proxy-headers"),
)
SERVEIT = ("-m", "serveit", "run", "{apps}/serveit_app.py", "--port", "{port}")
HAPROXY = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",
    "RAY_USE_UVLOOP": "1",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    "RAY_SERVE_HAPROXY_TCP_NODELAY": "1",
    # Its files and its page of statistics, out of the way of others.
    "RAY_SERVE_HAPROXY_STATS_PORT": "{second_port}",
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "{folder}/haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "{folder}/admin.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "{folder}",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "{folder}/server-state",
}

NOTES = (
    "Medians of all rounds; the ratio is the median of each round's. `wrk` runs on the same machine, with "
    "one thread. Each server is alone while it is asked, after a second of warming up. *First answer* is "
    "from the command to the first right answer; bytecode is compiled in all environments.",
    f"All get `{BODY}`, parse it, and answer the same JSON, without access log. One process, worker or "
    "replica runs the handler, which waits for nothing. What is around it differs. Starlette, FastAPI, "
    "BentoML and `serveit --local` do everything in that process; Mosec and LitServe have an HTTP server in "
    "another one before it, as serveit on Ray and Ray Serve have a proxy. FastAPI, BentoML and serveit check "
    "the body against the function's types; the others only parse it.",
    "Ray Serve, *HAProxy*: HAProxy before HTTP servers in the replicas, and what makes those faster, by the "
    "environment variables in `peers.py`. *Defaults*: only `max_ongoing_requests` is raised.",
    "An echo shows what the way to the handler costs. Beside a model that takes 10 ms, most of it does not "
    "matter.",
)


@dataclass(frozen=True)
class Peer:
    """Somebody who can echo.

    Attributes:
        name: as it is shown.
        package: whose version is shown.
        command: after the Python that it runs with; `{apps}`, `{port}`, `{second_port}` and `{folder}` (a
            temporary one) are filled in, in `variables` as well.
        environment: of `environments.py`; None: the one that runs this.
        path: where it echoes.
        variables: of its environment.
    """

    name: str
    package: str
    command: Sequence[str]
    environment: str | None = None
    path: str = "/echo"
    variables: Mapping[str, str] = field(default_factory=dict)

    def version(self) -> str:
        return version(self.package) if self.environment is None else pinned(self.environment, self.package)


BARE = Peer("uvicorn + Starlette", "starlette", (*UVICORN, "starlette_app:app"))
PEERS = (
    BARE,
    Peer("serveit on Ray", "serveit", SERVEIT),
    Peer("serveit --local", "serveit", (*SERVEIT, "--local")),
    Peer("FastAPI", "fastapi", (*UVICORN, "fastapi_app:app"), "fastapi"),
    Peer(
        "Mosec",
        "mosec",
        (
            *("{apps}/mosec_app.py", "--address", "127.0.0.1", "--port", "{port}"),
            *("--timeout", "30000", "--capacity", "8192", "--log-level", "error"),
        ),
        "mosec",
        "/inference",
        {"TOKIO_WORKER_THREADS": "1"},
    ),
    Peer(
        "BentoML",
        "bentoml",
        (
            *("-m", "bentoml", "serve", "bentoml_app:Echo", "--working-dir", "{apps}"),
            *("--host", "127.0.0.1", "--port", "{port}"),
        ),
        "bentoml",
        variables={"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": "{folder}"},
    ),
    Peer("LitServe", "litserve", ("{apps}/litserve_app.py", "{port}"), "litserve", "/predict"),
    Peer("Ray Serve, HAProxy", "ray", ("{apps}/ray_serve_app.py", "{port}"), "ray_serve", variables=HAPROXY),
    Peer("Ray Serve, defaults", "ray", ("{apps}/ray_serve_app.py", "{port}"), "ray_serve"),
)


class NotMeasured(Exception):
    """Why there are no figures, in words that name no machine."""


@dataclass(frozen=True)
class Figures:
    """One peer in one round; `loads` by the number of connections."""

    peer: str
    round: int
    start_s: float
    loads: Mapping[int, Load]

    def record(self) -> dict[str, Any]:
        loads = {count: load._asdict() for count, load in self.loads.items()}
        return {"peer": self.peer, "round": self.round, "start_s": self.start_s, "loads": loads}


def main() -> None:
    parser = command_line_of_peers()
    options = parser.parse_args()
    if options.save and (options.quick or options.only):
        parser.error("--save keeps whole runs: without --quick and --only")
    if options.install:
        sys.exit(install_all(options.environments))
    if shutil.which("wrk") is None:
        sys.exit("peers.py: wrk, which sends the requests, is missing: apt-get install wrk")
    if options.quick:
        options.seconds = options.rounds = 1
    peers = [peer for peer in PEERS if not options.only or peer.name in options.only]
    command = command_of("peers.py", options) + "".join(f" --only '{name}'" for name in options.only)
    measured, failures = measure(peers, options)
    report = Report(
        "A JSON echo on serveit and on others, one after the other",
        command,
        [*(f"**{peer}**: {why}." for peer, why in failures.items()), *NOTES],
        ["server", "version", *(head for n in CONNECTIONS for head in heads(n)), "first answer s"],
        [row(peer, measured) for peer in peers],
        [one.record() for one in measured],
    )
    report.show(options)
    if options.save:
        (RESULTS / "peers.md").write_text(report.markdown(), encoding="utf-8")
        show_in_readme(measured)
        print("written to benchmarks/results/peers.md and README.md")


def command_line_of_peers() -> argparse.ArgumentParser:
    parser = command_line(__doc__, seconds=4, rounds=3)
    parser.add_argument("--install", action="store_true", help="only make the environments of the peers")
    parser.add_argument("--quick", action="store_true", help="one round of a second: to see that it works")
    parser.add_argument(
        "--only", action="append", default=[], choices=[peer.name for peer in PEERS], help="again for more"
    )
    folder = HERE / ".peers"
    parser.add_argument(
        "--environments", type=Path, default=folder, metavar="DIR", help="(benchmarks/.peers)"
    )
    return parser


def install_all(folder: Path) -> int:
    """Make every environment that can be made; the exit status says whether all were."""
    status = 0
    for name in names():
        print(f"{name} ...", flush=True)
        try:
            install(folder, name)
        except subprocess.CalledProcessError as failure:
            print(f"peers.py: {name} cannot be installed: {failure}", file=sys.stderr)
            status = 1
    return status


# -- the rounds ------------------------------------------------------------------------------------


def measure(peers: Sequence[Peer], options: argparse.Namespace) -> tuple[list[Figures], dict[str, str]]:
    """All rounds. Who fails once is not asked again, nor who would come too late; the reasons are kept."""
    latest = time.monotonic() + LIMIT_S - START_S - END_S - 60 - 2 * options.seconds
    measured: list[Figures] = []
    failures: dict[str, str] = {}
    for number in range(1, options.rounds + 1):
        for peer in peers[:: 1 if number % 2 else -1]:
            if peer.name in failures:
                continue
            try:
                if time.monotonic() > latest:
                    raise NotMeasured(f"no time left; all has to end within {LIMIT_S / 60:.0f} minutes")
                measured.append(figures(peer, number, options))
                print(f"round {number}: {peer.name}", file=sys.stderr)
            except NotMeasured as reason:
                failures[peer.name] = f"in round {number}, {reason}"
                print(f"round {number}: {peer.name}: {reason}", file=sys.stderr)
    return measured, failures


def figures(peer: Peer, number: int, options: argparse.Namespace) -> Figures:
    """Start it, ask it, end it."""
    interpreter = Path(sys.executable)
    if peer.environment is not None:
        if not installed(options.environments, peer.environment):
            raise NotMeasured("not installed: python benchmarks/peers.py --install")
        interpreter = python(options.environments, peer.environment)
    with tempfile.TemporaryDirectory(prefix="peer-") as folder:
        fill = filler(folder)
        command = [str(interpreter), *map(fill, peer.command)]
        variables = environment_of(peer, fill)
        url = fill("http://127.0.0.1:{port}") + peer.path
        log = Path(folder) / "log"
        try:
            with serving(command, variables, url, BODY, log) as start_s:
                wrk(url, CONNECTIONS[0], 1, BODY)  # warm up
                loads = {count: wrk(url, count, options.seconds, BODY) for count in CONNECTIONS}
                return Figures(peer.name, number, start_s, loads)
        except (NotStarted, NotAnswered, subprocess.TimeoutExpired) as failure:
            print(log.read_text(encoding="utf-8", errors="replace")[-4000:], failure, file=sys.stderr)
            started = "did not start" if isinstance(failure, NotStarted) else "did not answer all requests"
            raise NotMeasured(started) from failure


def filler(folder: str) -> Callable[[str], str]:
    known = {"apps": HERE / "peers", "folder": folder, "port": free_port(), "second_port": free_port()}
    return lambda text: text.format_map(known)


def environment_of(peer: Peer, fill: Callable[[str], str]) -> dict[str, str]:
    """Ours, but bytecode is kept, and a peer sees nothing of this project."""
    dropped = {"PYTHONDONTWRITEBYTECODE"} | ({"PYTHONPATH"} if peer.environment is not None else set())
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {name: fill(value) for name, value in peer.variables.items()}


# -- the table -------------------------------------------------------------------------------------


def heads(connections: int) -> Iterator[str]:
    yield f"{connections} connection{'s' if connections > 1 else ''}: requests/s"
    yield from ("of Starlette", "p50 ms", "p99 ms")


def row(peer: Peer, measured: Sequence[Figures]) -> list[str]:
    """The medians of a peer; dashes where there is nothing."""
    own = {one.round: one for one in measured if one.peer == peer.name}
    if not own:
        return [peer.name, peer.version(), *["–"] * (4 * len(CONNECTIONS) + 1)]
    bare = {one.round: one for one in measured if one.peer == BARE.name}
    cells = [peer.name, peer.version()]
    for count in CONNECTIONS:
        rate, p50, p99 = map(statistics.median, zip(*(one.loads[count] for one in own.values()), strict=True))
        both = own.keys() & bare.keys()
        ratios = [own[n].loads[count].per_second / bare[n].loads[count].per_second for n in both]
        ratio = f"{statistics.median(ratios):.2f}" if ratios else "–"
        cells += [f"{rate:,.0f}", ratio, f"{p50:.3f}", f"{p99:.3f}"]
    return [*cells, f"{statistics.median(one.start_s for one in own.values()):.1f}"]


def show_in_readme(measured: Sequence[Figures]) -> None:
    """Two rows of the project's own table: the ratio at 64 connections, and the start."""
    cells = {peer.name: row(peer, measured) for peer in PEERS}
    columns = [[cells[name] for name in column] for column in COLUMNS]
    ratios = [", ".join(one[3] for one in column) for column in columns]
    starts = [", ".join(f"{one[-1]} s" for one in column) for column in columns]
    text = README.read_text(encoding="utf-8")
    for head, shown in ((RATIO_ROW, ratios), (START_ROW, starts)):
        line = " | ".join([f"| {head}", *shown]) + " |"
        text, found = re.subn(rf"^\| {re.escape(head)} \|.*$", line, text, flags=re.MULTILINE)
        if found != 1:
            sys.exit(f"peers.py: README.md has {found} rows that begin with {head!r}, not one")
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""How long does it take to start? From the command, and from Ray's own start, to the first answer.

`serveit run examples/hello/app.py` on an embedded Ray, and with `--local`, in turns, again and again.
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.request import urlopen

from report import Report, command_line, command_of

APP = Path(__file__).parents[1] / "examples" / "hello" / "app.py"
ON_RAY, LOCAL = "serveit run", "serveit run --local"
NOTES = (
    "Medians of all rounds, in seconds. *Ray* is from the command to the return of `ray.init`, which serveit "
    "logs; "
    "*then* is from there to the first answer over HTTP: the controller, a proxy and a replica have started "
    "by then, each a process of its own.",
    "Bytecode is compiled (`scripts/install` sees to that).",
)


@dataclass(frozen=True)
class Start:
    """One start, in seconds since the command."""

    how: str
    ray_s: float | None
    answer_s: float


def main() -> None:
    options = command_line(__doc__, seconds=1, rounds=5).parse_args()
    measured = [start(how) for _ in range(options.rounds) for how in (ON_RAY, LOCAL)]
    head = ["how", "first answer s", "Ray s", "then s"]
    report = Report(
        "From the command to the first answer",
        command_of("startup.py", options),
        NOTES,
        head,
        list(summarise(measured)),
        [asdict(one) for one in measured],
    )
    report.publish("startup", options)


def summarise(measured: list[Start]) -> Iterator[list[str]]:
    for how in (ON_RAY, LOCAL):
        own = [one for one in measured if one.how == how]
        answer = statistics.median(one.answer_s for one in own)
        on_ray = [(one.ray_s, one.answer_s - one.ray_s) for one in own if one.ray_s is not None]
        parts = [f"{statistics.median(column):.2f}" for column in zip(*on_ray, strict=True)]
        yield [how, f"{answer:.2f}", *(parts or ["", ""])]


def start(how: str) -> Start:
    """Start it, ask it once, stop it."""
    command = [sys.executable, "-m", *how.split(), str(APP), "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    begun = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    assert process.stdout is not None
    ray_s = None
    try:
        for line in process.stdout:
            if "Ray is up" in line:
                ray_s = time.monotonic() - begun
            if found := re.match(r"serving (\S+)", line):
                with urlopen(f"{found[1]}/hello/Ada", timeout=5) as answer:
                    assert answer.read() == b"Hello, Ada!"
                return Start(how, ray_s, time.monotonic() - begun)
        sys.exit(f"startup.py: this does not start: {' '.join(command)}")
    finally:
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        process.wait()


if __name__ == "__main__":
    main()

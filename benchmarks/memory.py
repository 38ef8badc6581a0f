"""What does a replica cost in memory? PSS of a replica's process and of a bare Ray actor's, side by side."""

from __future__ import annotations

import asyncio
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from report import Report, command_line, command_of

import serveit

app = serveit.App()
NUM_EACH = 3
NUM_CALLS, IN_FLIGHT = 1000, 10
BARE, REPLICA = "bare Ray actor", "replica"
NOTES = (
    "PSS from smaps_rollup, where shared pages count in proportion. The median of several processes each; "
    "every one has answered 1,000 calls, 10 at a time. The actor is a class with one `async def` method; the "
    "replica's backend is an `async def` function.",
)


@app.backend(num_replicas=NUM_EACH)
async def echo(x: int) -> int:
    return x


def main() -> None:
    options = command_line(__doc__, seconds=1, rounds=1).parse_args()
    measured = asyncio.run(measure())
    report = Report(
        "Memory of a replica's process",
        command_of("memory.py", options),
        NOTES,
        ["process", "PSS MB"],
        list(summarise(measured)),
        measured,
    )
    report.publish("memory", options)


def summarise(measured: dict[str, list[float]]) -> Iterator[list[str]]:
    medians = {what: statistics.median(sizes) for what, sizes in measured.items()}
    for what, size in medians.items():
        yield [what, f"{size:.1f}"]
    yield ["**difference**", f"**{medians[REPLICA] - medians[BARE]:.1f}**"]


async def measure() -> dict[str, list[float]]:
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    async with serveit.serve(app, http={"location": None}, log_level="warning") as client:

        @ray.remote(num_cpus=0)
        class Bare:
            async def pid(self, x: int) -> int:
                return os.getpid()

        actors: list[Any] = [Bare.remote() for _ in range(NUM_EACH)]
        handle = client.get_handle("echo")
        pids = [await actor.pid.remote(0) for actor in actors]
        for _ in range(NUM_CALLS // IN_FLIGHT):
            await asyncio.gather(*(actor.pid.remote(0) for actor in actors for _ in range(IN_FLIGHT)))
        _ = [x async for x in handle.map(range(NUM_CALLS * NUM_EACH), max_in_flight=IN_FLIGHT * NUM_EACH)]
        replicas = (await client.status())["backends"]["echo"].values()
        return {
            BARE: [pss_mb(pid) for pid in pids],
            REPLICA: [pss_mb(replica["pid"]) for replica in replicas],
        }


def pss_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


if __name__ == "__main__":
    main()

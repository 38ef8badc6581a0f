"""What do calls between processes cost? serveit's handles and plain Ray actor calls, in turns.

`await handle.call(x)` goes over serveit's own channel; `await (await handle.remote(x))` is an actor task with
a slot reserved for it; the plain actor has the same function as its method.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import ray
import uvloop
from handle_call import keep_busy
from report import Report, command_line, command_of

import serveit

app = serveit.App()
IN_FLIGHT = (1, 100)
PLAIN, CALL, REMOTE = "plain actor call", "handle.call", "handle.remote, awaited"

NOTES = (
    "Medians of all rounds. The caller (uvloop) and what it calls are processes on one machine; the function "
    "is an `async def` that returns its argument, an int. At 100 in flight 100 tasks each make one call "
    "after the other. The plain actor is `@ray.remote(max_concurrency=1000)` with the same function as a "
    "method.",
    "Each way is measured in turns within a round, in one run.",
)


@app.backend()
async def echo(x: int) -> int:
    return x


@dataclass(frozen=True)
class Measurement:
    """One way, so many calls in flight, for so many seconds."""

    way: str
    in_flight: int
    per_second: float
    p50_ms: float
    p99_ms: float


def main() -> None:
    options = command_line(__doc__, seconds=2, rounds=9).parse_args()
    measured = uvloop.run(measure(options.seconds, options.rounds))
    head = ["in flight", "way", "calls/s", "p50 ms", "p99 ms"]
    rows = [row for in_flight in IN_FLIGHT for row in summarise(measured, in_flight)]
    command = command_of("ray_calls.py", options)
    title = "Calls between processes: handles and plain Ray actor calls, in turns"
    report = Report(title, command, NOTES, head, rows, [asdict(one) for one in measured])
    report.publish("ray_calls", options)


def summarise(measured: list[Measurement], in_flight: int) -> Iterator[list[str]]:
    """A row for each way, and how many plain actor calls it is worth: the median of each round's ratio."""
    rates: dict[str, list[float]] = {}
    for way in (PLAIN, CALL, REMOTE):
        own = [one for one in measured if (one.way, one.in_flight) == (way, in_flight)]
        rates[way] = [one.per_second for one in own]
        figures = zip(*((one.per_second, one.p50_ms, one.p99_ms) for one in own), strict=True)
        rate, p50, p99 = (statistics.median(column) for column in figures)
        yield [str(in_flight), way, f"{rate:,.0f}", f"{p50:.3f}", f"{p99:.3f}"]
    for way in (CALL, REMOTE):
        ratio = statistics.median(ours / plain for ours, plain in zip(rates[way], rates[PLAIN], strict=True))
        yield [str(in_flight), f"**{way} / plain**", f"**{ratio:.2f}**", "", ""]


async def measure(seconds: float, rounds: int) -> list[Measurement]:
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # Ray's workers start twice as fast with bytecode
    async with serveit.serve(app, http={"location": None}, log_level="warning") as client:
        ways = make_ways(client.get_handle("echo"))
        for way in ways.values():
            await keep_busy(way, 100, 0.5)  # warm up
        return [
            Measurement(name, in_flight, *await keep_busy(way, in_flight, seconds))
            for _ in range(rounds)
            for in_flight in IN_FLIGHT
            for name, way in ways.items()
        ]


def make_ways(handle: Any) -> dict[str, Callable[[], Awaitable[Any]]]:
    @ray.remote(max_concurrency=1000, num_cpus=0)
    class Plain:
        async def echo(self, x: int) -> int:
            return x

    actor: Any = Plain.remote()

    async def plain() -> Any:
        return await actor.echo.remote(7)

    async def remote() -> Any:
        return await (await handle.remote(7))

    return {PLAIN: plain, CALL: lambda: handle.call(7), REMOTE: remote}


if __name__ == "__main__":
    main()

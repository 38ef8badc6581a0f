"""What does a call through a handle cost? `await handle.call(x)` at 1 and at 100 in flight, in one process.

Arguments and results are pickled and travel as wire frames over the in-memory link, as they do between
processes; there is no socket in it. `ray_calls.py` measures calls between processes.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import uvloop
from report import Report, command_line, command_of

import serveit

app = serveit.App()
IN_FLIGHT = (1, 100)

NOTES = (
    "Medians of all rounds. Caller and replica share one process and its event loop (uvloop); the backend is "
    "an `async def` that returns its argument, an int. At 100 in flight 100 tasks each make one call after "
    "the other.",
)


@app.backend()
async def echo(x: int) -> int:
    return x


@dataclass(frozen=True)
class Measurement:
    """So many calls in flight, for so many seconds."""

    in_flight: int
    per_second: float
    p50_ms: float
    p99_ms: float


def main() -> None:
    options = command_line(__doc__, seconds=3, rounds=3).parse_args()
    measured = uvloop.run(measure(options.seconds, options.rounds))
    head = ["in flight", "calls/s", "p50 ms", "p99 ms"]
    rows = list(summarise(measured))
    command = command_of("handle_call.py", options)
    title = "await handle.call(x), in one process"
    report = Report(title, command, NOTES, head, rows, [asdict(one) for one in measured])
    report.publish("handle_call", options)


def summarise(measured: list[Measurement]) -> Iterator[list[str]]:
    for in_flight in IN_FLIGHT:
        own = [(one.per_second, one.p50_ms, one.p99_ms) for one in measured if one.in_flight == in_flight]
        rate, p50, p99 = (statistics.median(column) for column in zip(*own, strict=True))
        yield [str(in_flight), f"{rate:,.0f}", f"{p50:.3f}", f"{p99:.3f}"]


async def measure(seconds: float, rounds: int) -> list[Measurement]:
    async with serveit.serve(app, local=True, http={"location": None}) as client:
        handle = client.get_handle("echo")
        call = partial(handle.call, 7)
        await keep_busy(call, 100, 0.2)  # warm up
        return [
            Measurement(in_flight, *await keep_busy(call, in_flight, seconds))
            for _ in range(rounds)
            for in_flight in IN_FLIGHT
        ]


async def keep_busy(
    call: Callable[[], Awaitable[Any]], in_flight: int, seconds: float
) -> tuple[float, float, float]:
    """So many calls in flight all the time: calls/s, and the latency's median and 99th percentile in ms."""
    took_s: list[float] = []
    now = time.perf_counter
    begun = now()
    end = begun + seconds

    async def caller() -> None:
        sent = now()
        while sent < end:
            await call()
            answered = now()
            took_s.append(answered - sent)
            sent = answered

    await asyncio.gather(*(caller() for _ in range(in_flight)))
    elapsed_s = now() - begun
    cuts = statistics.quantiles(took_s, n=100)
    return len(took_s) / elapsed_s, cuts[49] * 1000, cuts[98] * 1000


if __name__ == "__main__":
    main()

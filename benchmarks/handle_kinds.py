"""Are async handles faster than blocking ones? 2,000 pipelined no-op calls each, on Ray, in turns.

The original's manual says that the async handle has a performance advantage. This measures it in that way:
the async program awaits its calls together, the blocking one keeps as many under way as such a program can.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import ray
import uvloop
from report import Report, command_line, command_of

import serveit

app = serveit.App()
NUM_CALLS = 2_000
NUM_THREADS = 32
CALL, MAP, REMOTE = "call", "map", "remote"
ASYNC, BLOCKING = "async", "blocking"

FUNCTIONS = {"async_noop": "async def", "noop": "def"}

NOTES = (
    f"Medians of all rounds; the ratio is the median of each round's. {NUM_CALLS:,} calls a round, way and "
    "kind of handle; caller (uvloop) and the one replica are processes on one machine; the functions return "
    "None.",
    f"**call**: all {NUM_CALLS:,} awaited together; blocking, from {NUM_THREADS} threads. **map**: one "
    "iterator with 64 in flight, either way. **remote**: all are submitted, then all their ObjectRefs awaited; "
    "blocking, one `handle.remote` after the other, then one `ray.get` of all. Both kinds take turns, and "
    "turns in who begins.",
)


@app.backend
async def async_noop(x: int) -> None:
    return None


@app.backend
def noop(x: int) -> None:
    return None


@dataclass(frozen=True)
class Measurement:
    """One kind of handle on one kind of function: a round of calls."""

    function: str
    way: str
    kind: str
    per_second: float


def main() -> None:
    options = command_line(__doc__, seconds=1, rounds=9).parse_args()
    measured = uvloop.run(measure(options.seconds, options.rounds))
    head = ["function", "way", "async calls/s", "blocking calls/s", "async / blocking"]
    command = command_of("handle_kinds.py", options)
    title = f"Async and blocking handles: {NUM_CALLS:,} pipelined calls, in turns"
    rows = list(summarise(measured))
    report = Report(title, command, NOTES, head, rows, [asdict(one) for one in measured])
    report.publish("handle_kinds", options)


def summarise(measured: list[Measurement]) -> Iterator[list[str]]:
    """A row for each function and way."""
    for function, way in dict.fromkeys((one.function, one.way) for one in measured):
        rates = {
            kind: [
                one.per_second
                for one in measured
                if (one.function, one.way, one.kind) == (function, way, kind)
            ]
            for kind in (ASYNC, BLOCKING)
        }
        ratio = statistics.median(a / b for a, b in zip(rates[ASYNC], rates[BLOCKING], strict=True))
        medians = [f"{statistics.median(rates[kind]):,.0f}" for kind in (ASYNC, BLOCKING)]
        yield [f"`{function}`", way, *medians, f"**{ratio:.2f}**"]


async def measure(warm_up_s: float, rounds: int) -> list[Measurement]:
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # Ray's workers start twice as fast with bytecode
    measured: list[Measurement] = []
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        async with serveit.serve(app, http={"location": None}, log_level="warning") as client:
            turns = [
                (function, way, kinds)
                for function in FUNCTIONS
                for way, kinds in make_ways(client, function, threads).items()
            ]
            for _, _, kinds in turns:
                for run in kinds.values():
                    await warm(run, warm_up_s)
            for number in range(rounds):
                order = (ASYNC, BLOCKING) if number % 2 else (BLOCKING, ASYNC)
                measured += [
                    Measurement(FUNCTIONS[function], way, kind, await rate(kinds[kind]))
                    for function, way, kinds in turns
                    for kind in order
                ]
    return measured


async def warm(run: Callable[[], Awaitable[Any]], seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        await run()


async def rate(run: Callable[[], Awaitable[Any]]) -> float:
    """Calls a second."""
    begun = time.perf_counter()
    await run()
    return NUM_CALLS / (time.perf_counter() - begun)


def make_ways(
    client: serveit.Client, function: str, threads: ThreadPoolExecutor
) -> dict[str, dict[str, Callable[[], Awaitable[Any]]]]:
    """By way and kind, what makes all the calls of one round."""
    handle, blocking = client.get_handle(function), client.get_handle(function, sync=True)
    numbers = range(NUM_CALLS)

    async def call() -> None:
        await asyncio.gather(*(handle.call(number) for number in numbers))

    def blocking_call() -> None:
        for _ in threads.map(blocking.call, numbers):
            pass

    async def mapped() -> None:
        async for _ in handle.map(numbers):
            pass

    def blocking_map() -> None:
        for _ in blocking.map(numbers):
            pass

    async def remote() -> None:
        await asyncio.gather(*(await asyncio.gather(*(handle.remote(number) for number in numbers))))

    def blocking_remote() -> None:
        ray.get([blocking.remote(number) for number in numbers])

    return {
        CALL: {ASYNC: call, BLOCKING: lambda: asyncio.to_thread(blocking_call)},
        MAP: {ASYNC: mapped, BLOCKING: lambda: asyncio.to_thread(blocking_map)},
        REMOTE: {ASYNC: remote, BLOCKING: lambda: asyncio.to_thread(blocking_remote)},
    }


if __name__ == "__main__":
    main()

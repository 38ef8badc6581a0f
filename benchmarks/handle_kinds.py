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
from functools import partial
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

Run = Callable[[int], Awaitable[Any]]
"""Makes so many calls."""
FUNCTIONS = {"async_noop": "async def", "noop": "def"}

NOTES = (
    f"Medians of all rounds; the ratio is the median of each round's. {NUM_CALLS:,} calls a round, way and "
    "kind of handle. Caller (uvloop) and the one replica are processes on one machine; the functions do "
    "nothing. The replica takes 100 at once of either function, so that the handles are compared: a `def` "
    "takes one by default, and its slot's way to and fro would be all there is to `remote`. Both kinds take "
    "turns, and turns in who begins.",
    f"**call**: all {NUM_CALLS:,} awaited together; blocking, from {NUM_THREADS} threads.",
    "**map**: one iterator with 64 in flight, either way.",
    "**remote**: all are submitted, then all their ObjectRefs awaited; blocking, one `handle.remote` after "
    "the other, then one `ray.get` of all.",
)


@app.backend
async def async_noop(x: int) -> None:
    return None


@app.backend(max_ongoing_requests=100)
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
    parser = command_line(__doc__, seconds=1, rounds=9)
    parser.add_argument("--calls", type=int, default=NUM_CALLS, help="calls a round (%(default)s)")
    options = parser.parse_args()
    if options.save and options.calls != NUM_CALLS:
        parser.error(f"what is kept are rounds of {NUM_CALLS:,} calls: --save without --calls")
    measured = uvloop.run(measure(options.calls, options.rounds))
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


async def measure(num_calls: int, rounds: int) -> list[Measurement]:
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
                    await run(num_calls // 4)  # warm up
            for number in range(rounds):
                order = (ASYNC, BLOCKING) if number % 2 else (BLOCKING, ASYNC)
                measured += [
                    Measurement(FUNCTIONS[function], way, kind, await rate(kinds[kind], num_calls))
                    for function, way, kinds in turns
                    for kind in order
                ]
    return measured


async def rate(run: Run, num_calls: int) -> float:
    """Calls a second."""
    begun = time.perf_counter()
    await run(num_calls)
    return num_calls / (time.perf_counter() - begun)


def make_ways(
    client: serveit.Client, function: str, threads: ThreadPoolExecutor
) -> dict[str, dict[str, Run]]:
    """By way and kind, what makes all the calls of one round."""
    handle, blocking = client.get_handle(function), client.get_handle(function, sync=True)

    async def call(count: int) -> None:
        await asyncio.gather(*(handle.call(number) for number in range(count)))

    def blocking_call(count: int) -> None:
        for _ in threads.map(blocking.call, range(count)):
            pass

    async def mapped(count: int) -> None:
        async for _ in handle.map(range(count)):
            pass

    def blocking_map(count: int) -> None:
        for _ in blocking.map(range(count)):
            pass

    async def remote(count: int) -> None:
        await asyncio.gather(*(await asyncio.gather(*(handle.remote(number) for number in range(count)))))

    def blocking_remote(count: int) -> None:
        ray.get([blocking.remote(number) for number in range(count)])

    return {
        CALL: {ASYNC: call, BLOCKING: partial(asyncio.to_thread, blocking_call)},
        MAP: {ASYNC: mapped, BLOCKING: partial(asyncio.to_thread, blocking_map)},
        REMOTE: {ASYNC: remote, BLOCKING: partial(asyncio.to_thread, blocking_remote)},
    }


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""What fails while apps are updated and processes are killed? A table of runs under load, on an embedded Ray.

The tests' ledger asks at a fixed rate, whatever the answers do, and holds what was answered against what
the handlers have noted. The same as `tests/cluster`, for longer; `--quick` is as short as that.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from report import Report as Table  # noqa: E402

from serveit.exceptions import ServeitError  # noqa: E402
from tests.cluster.instance import open_instance  # noqa: E402
from tests.cluster.versions import (  # noqa: E402
    controller_process,
    deployed,
    eventually,
    kill_controller,
    load,
    processes,
    standing,
    versioned,
)

if TYPE_CHECKING:
    from serveit import App
    from serveit.client import Client
    from tests.account import Entry, Report
    from tests.ledger import Ledger

KINDS = ("updates", "controller", "replicas")
TARGET = ROOT / "benchmarks" / "results" / "chaos.md"
HEAD = (
    "what",
    "requests",
    "failed",
    "unanswered",
    "twice",
    "mixed up",
    "p50 ms",
    "p99 ms",
    "longest gap s",
    "back within s",
    "verdict",
)
NOTES = (
    "Requests are sent at a fixed rate, open loop: none waits for another's answer, and latency counts from "
    "when a request was due. *Unanswered*: neither an answer nor a broken connection. *Twice*: answered or "
    "started more than once. *Mixed up*: with another request's answer, an answer without a handler's note, "
    'or "not executed" of one that was. *Longest gap*: without a good answer. *Back within*: the longest of '
    "the deploys, or from a kill until the state was the same again.",
    "Updates: 0 may fail, and once a deploy has returned, only the new version may answer. Controller kills: "
    "0 may fail; the same replicas, as processes, and the same status within 5 s. Replica kills (one of two, "
    "while each runs requests of 20 ms): what it ran may fail, said to have been executed maybe, within "
    "0.5 s; both there again within 5 s. After four kills another version is deployed: a fifth death of a "
    "backend within a minute is taken for the code's own fault.",
    "The client, Ray and all processes of the instance share the machine: latencies are no benchmark.",
)

BACK_S = 5.0
FAILING_S = 0.5
"""After a kill, what the dead process ran may fail for so long."""
WORK_S = 0.02
MAX_DEATHS = 4
"""Of a version's backend: the fifth within a minute gives it up."""
SOME = 30
"""Requests that tell what is there now."""
GRACE_S = 60.0


Event = Callable[["Client", "Ledger", int], Awaitable[float]]
"""Something that happens, for the so-manieth time; gives the seconds until all was well again."""


class Broken(Exception):
    """What had to hold does not."""


@dataclass(frozen=True)
class Run:
    """What is asked for.

    Attributes:
        num: updates, or kills.
        num_requests: the least.
        rate: requests a second.
    """

    num: int
    num_requests: int
    rate: float

    @property
    def pause(self) -> int:
        """Requests between two events."""
        return max(SOME, self.num_requests // self.num)


@dataclass(frozen=True)
class Row:
    """What a run came to."""

    what: str
    report: Report
    back_s: float
    wrong: str

    def cells(self) -> list[str]:
        report = self.report
        twice = {*report.answered_twice, *report.started_twice}
        mixed_up = {*report.mismatched, *report.never_started, *report.belied}
        counts = (report.sent, report.num_failed, len(report.unanswered), len(twice), len(mixed_up))
        figures = (report.p50_ms, report.p99_ms, report.longest_gap_s, self.back_s)
        return [
            self.what,
            *(f"{count:,}" for count in counts),
            *(f"{figure:.2f}" for figure in figures),
            f"**{self.wrong}**" if self.wrong else "held",
        ]


def main() -> None:
    options = parse_options()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory() as home, open_instance(Path(home)):
        rows = asyncio.run(run_all(options, Path(home)))
    table = make_table(rows, options)
    print(table)
    if options.save:
        TARGET.write_text(table, encoding="utf-8")
        print(f"written to {TARGET.relative_to(ROOT)}")
    sys.exit(any(row.wrong for row in rows))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="two of everything instead of 20")
    parser.add_argument("--rate", type=float, default=500.0, help="requests a second (%(default)s)")
    parser.add_argument(
        "--only", nargs="+", choices=KINDS, default=[*KINDS], metavar="KIND", help=", ".join(KINDS)
    )
    parser.add_argument("--save", action="store_true", help=f"keep the table as {TARGET.relative_to(ROOT)}")
    return parser.parse_args()


def plan(options: argparse.Namespace, home: Path) -> Iterator[Awaitable[Row]]:
    """The runs, one after the other."""
    num = 2 if options.quick else 20
    updates = Run(num, 200 if options.quick else 35_000, options.rate)
    kills = Run(num, 200 if options.quick else 10_000, options.rate)
    if "updates" in options.only:
        for num_replicas in (1, 2) if options.quick else (1, 2, 4):
            yield rolling_updates(home, updates, num_replicas)
    if "controller" in options.only:
        yield controller_kills(home, kills)
    if "replicas" in options.only:
        yield replica_kills(home, kills)


async def run_all(options: argparse.Namespace, home: Path) -> list[Row]:
    rows = []
    for run in plan(options, home):
        rows.append(row := await run)
        print(f"{row.what}: {row.wrong or 'held'}", file=sys.stderr, flush=True)
    return rows


def make_table(rows: Sequence[Row], options: argparse.Namespace) -> str:
    command = "python scripts/chaos.py"
    if options.quick:
        command += " --quick"
    if options.rate != 500:
        command += f" --rate {options.rate:g}"
    if options.only != [*KINDS]:
        command += f" --only {' '.join(options.only)}"
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    when = f"Run on {date.today().isoformat()}, with {memory_gib:.0f} GiB of memory."
    cells = [row.cells() for row in rows]
    return Table("Chaos: updates and deaths under load", command, (when, *NOTES), HEAD, cells, ()).markdown()


# -- the runs --------------------------------------------------------------------------------------


async def rolling_updates(home: Path, run: Run, num_replicas: int) -> Row:
    name = f"updates-{num_replicas}"

    def version(number: int) -> App:
        return versioned(f"v{number}", home / name, num_replicas=num_replicas)

    async def update(client: Client, ledger: Ledger, number: int) -> float:
        begun = time.monotonic()
        await client.deploy(version(number), name=name, prefix=f"/{name}")
        took_s = time.monotonic() - begun
        mark = ledger.mark
        await ledger.more(SOME)
        if (found := ledger.versions(since=mark)) != {f"v{number}"}:
            raise Broken(f"{found} answer after v{number} was deployed")
        return took_s

    what = f"{run.num} rolling updates, num_replicas={num_replicas}"
    return judge(what, *await under_load(version(0), name, home / name, run, update))


async def controller_kills(home: Path, run: Run) -> Row:
    name = "controller-kills"

    async def kill(client: Client, ledger: Ledger, number: int) -> float:
        before = await standing(client)
        killed = await asyncio.to_thread(kill_controller)

        async def is_back() -> bool:
            other = await asyncio.to_thread(controller_process)
            return other not in (0, killed) and await standing(client) == before

        return await back(is_back, "the same state after the controller's death")

    app = versioned("v0", home / name, num_replicas=2)
    what = f"{run.num} controller kills, num_replicas=2"
    return judge(what, *await under_load(app, name, home / name, run, kill))


async def replica_kills(home: Path, run: Run) -> Row:
    name, kills, chance = "replica-kills", list[float](), random.Random(4)

    def version(number: int) -> App:
        return versioned(f"v{number}", home / name, num_replicas=2, work_s=WORK_S)

    async def kill(client: Client, ledger: Ledger, number: int) -> float:
        if number % MAX_DEATHS == 0:
            await client.deploy(version(number), name=name, prefix=f"/{name}")
        victim = chance.choice(sorted(await processes(client)))
        kills.append(asyncio.get_running_loop().time())
        os.kill(victim, signal.SIGKILL)

        async def are_two() -> bool:
            found = await processes(client)
            return victim not in found and len(found) == 2

        return await back(are_two, "two replicas after one's death")

    ledger, back_s, wrong = await under_load(version(0), name, home / name, run, kill)
    what = f"{run.num} replica kills, num_replicas=2"
    wrong = wrong or unexpected(ledger.entries, kills)
    return judge(what, ledger, back_s, wrong, may_fail=True)


async def under_load(app: App, name: str, log: Path, run: Run, event: Event) -> tuple[Ledger, float, str]:
    """Let the events happen, with requests before, between and after them.

    Returns:
        The ledger, the longest that an event has taken, and what was wrong.
    """
    took_s, wrong = [0.0], ""
    async with deployed(app, name) as client, load(client, name, log, run.rate) as ledger:
        try:
            for number in range(1, run.num + 1):
                await ledger.more(run.pause, GRACE_S + run.pause / run.rate)
                took_s.append(await event(client, ledger, number))
            await ledger.more(run.pause, GRACE_S + run.pause / run.rate)
        except (AssertionError, Broken, ServeitError) as error:
            wrong = str(error)
    return ledger, max(took_s), wrong


async def back(predicate: Callable[[], Awaitable[object]], what: str) -> float:
    try:
        return await eventually(predicate, BACK_S, what)
    except AssertionError as error:
        raise Broken(str(error)) from None


def unexpected(entries: Sequence[Entry], kills: Sequence[float]) -> str:
    """What failed though nothing was killed just before, or says something else than that it may have run."""
    for entry in entries:
        if entry.done is None or not entry.outcome:
            continue
        if entry.executed != "maybe":
            return f"{entry.id}: {entry.outcome}"
        if not any(0 <= entry.done - kill <= FAILING_S for kill in kills):
            return f"{entry.id} failed without a kill in the last {FAILING_S} s"
    return ""


def judge(what: str, ledger: Ledger, back_s: float, wrong: str, *, may_fail: bool = False) -> Row:
    report = ledger.report()
    if not may_fail and report.num_failed:
        wrong = wrong or f"{report.num_failed} failed: {', '.join(report.failed)}"
    return Row(what, report, back_s, wrong or ", ".join(report.broken))


if __name__ == "__main__":
    main()

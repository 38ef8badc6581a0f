"""What the ledger's account is made of: what a handler notes and answers, what became of each request,
and the report that holds the one against the other."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import msgspec

MAX_EXAMPLES = 5

# -- in the replica --------------------------------------------------------------------------------


class Echo(msgspec.Struct, frozen=True):
    """What a handler answers: whom it answers, and who it is."""

    id: str
    pid: int
    version: str


async def recorded(log: str, id: str, version: str, work_s: float = 0.0) -> Echo:
    """All that a handler has to do: `return await recorded(log, id, version)`.

    Args:
        log: a file that start and end are noted in; lines are whole, whoever writes at the same time.
        id: of the request, from its query.
        version: of the app.
        work_s: what the request takes.
    """
    note(log, f"start {id} {os.getpid()} {version}")
    if work_s:
        await asyncio.sleep(work_s)
    note(log, f"end {id}")
    return Echo(id, os.getpid(), version)


def note(log: str | Path, line: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, f"{line}\n".encode())
    finally:
        os.close(file)


# -- the account -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Entry:
    """A request and what became of it.

    Attributes:
        id: in its query.
        due: when it was to be sent, on the loop's clock; latency counts from here.
        done: when its outcome was known; None for not yet.
        status: of its answer; None without one.
        body: of its answer.
        executed: what the answer's `x-serveit-executed` says.
        echo: what the handler answered; None unless it did.
        error: why there is no readable answer.
    """

    id: str
    due: float
    done: float | None = None
    status: int | None = None
    body: bytes = b""
    executed: str = ""
    echo: Echo | None = None
    error: str = ""

    @property
    def is_ok(self) -> bool:
        return self.echo is not None and self.echo.id == self.id

    @property
    def outcome(self) -> str:
        """In a few words, the same for the same kind of failure."""
        said = f", executed: {self.executed}" if self.executed else ""
        return f"{self.status}{said}" if self.status not in (None, 200) else self.error


@dataclass(frozen=True)
class Report:
    """What a run came to; lists hold ids.

    Attributes:
        sent: requests.
        ok: answered with 200, by a handler, with their own id.
        failed: how many, by status or exception.
        examples: of each kind of failure, the first ones: id and answer.
        unanswered: their connection stands, and nothing came.
        answered_twice: more than one answer bore the id.
        started_twice: a handler has begun with it more than once.
        mismatched: answered with another's id.
        never_started: answered, though no handler has noted a start.
        belied: started, though the answer says that it was not executed.
        versions: of the ok answers, by the version that gave them.
        pids: of the ok answers, by process.
        p50_ms, p99_ms, max_ms: of the ok answers, from when they were due; nan without any.
        longest_gap_s: without an ok answer while requests were sent.
    """

    sent: int
    ok: int
    failed: Mapping[str, int]
    examples: Mapping[str, Sequence[str]]
    unanswered: Sequence[str]
    answered_twice: Sequence[str]
    started_twice: Sequence[str]
    mismatched: Sequence[str]
    never_started: Sequence[str]
    belied: Sequence[str]
    versions: Mapping[str, int]
    pids: Mapping[int, int]
    p50_ms: float
    p99_ms: float
    max_ms: float
    longest_gap_s: float

    def __str__(self) -> str:
        return "\n".join(f"{field.name:>15}: {_text(getattr(self, field.name))}" for field in fields(self))

    @property
    def num_failed(self) -> int:
        return sum(self.failed.values())

    @property
    def broken(self) -> list[str]:
        """The promises that hold whatever happens, as far as they did not."""
        names = ("unanswered", "answered_twice", "started_twice", "mismatched", "never_started", "belied")
        return [f"{len(ids)} {name.replace('_', ' ')}" for name in names if (ids := getattr(self, name))]

    def check(self, *, max_failed: int = 0, max_gap_s: float = math.inf) -> Report:
        """Itself, if each request had one definite answer, its own, and ran at most once.

        Args:
            max_failed: requests that may have failed.
            max_gap_s: the longest time without an ok answer.

        Raises:
            AssertionError: it is not so; the text is the whole report, with what is wrong first.
        """
        wrong = self.broken
        if self.num_failed > max_failed:
            wrong.append(f"{self.num_failed} failed (at most {max_failed} may)")
        if self.longest_gap_s > max_gap_s:
            wrong.append(f"{self.longest_gap_s:.2f} s without an ok answer (at most {max_gap_s:g})")
        if not self.ok:
            wrong.append("not one was answered")
        assert not wrong, f"{'; '.join(wrong)}\n{self}"
        return self


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, Mapping):
        return "; ".join(f"{_text(part)} × {key}" for key, part in value.items()) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        more = ", ..." if len(value) > MAX_EXAMPLES else ""
        return f"{len(value)} [{', '.join(value[:MAX_EXAMPLES])}{more}]" if value else "0"
    return str(value)


def make_report(entries: Sequence[Entry], echoes: Counter[str], log: Path | None) -> Report:
    """Hold what was sent against what came.

    Args:
        entries: the requests.
        echoes: how many answers bore each id, asked for or not.
        log: what the handlers have noted; None if they note nothing.
    """
    good = [entry for entry in entries if entry.is_ok]
    bad = [entry for entry in entries if entry.done is not None and entry.outcome]
    starts = _starts(log) if log is not None else Counter(entry.id for entry in good)
    examples: dict[str, list[str]] = {}
    for entry in bad:
        if len(kept := examples.setdefault(entry.outcome, [])) < MAX_EXAMPLES:
            kept.append(f"{entry.id} {entry.body[:200].decode(errors='replace')}".strip())
    latencies = sorted(1000 * (entry.done - entry.due) for entry in good if entry.done is not None)
    return Report(
        sent=len(entries),
        ok=len(good),
        failed=dict(Counter(entry.outcome for entry in bad)),
        examples=examples,
        unanswered=[entry.id for entry in entries if entry.done is None],
        answered_twice=[entry.id for entry in entries if echoes[entry.id] > 1],
        started_twice=[entry.id for entry in entries if starts[entry.id] > 1],
        mismatched=[entry.id for entry in entries if entry.echo is not None and not entry.is_ok],
        never_started=[entry.id for entry in good if not starts[entry.id]],
        belied=[entry.id for entry in entries if entry.executed == "no" and starts[entry.id]],
        versions=dict(Counter(entry.echo.version for entry in good if entry.echo is not None)),
        pids=dict(Counter(entry.echo.pid for entry in good if entry.echo is not None)),
        p50_ms=_percentile(latencies, 50),
        p99_ms=_percentile(latencies, 99),
        max_ms=_percentile(latencies, 100),
        longest_gap_s=_longest_gap_s(entries),
    )


def _starts(log: Path) -> Counter[str]:
    lines = log.read_text().splitlines() if log.exists() else []
    return Counter(line.split()[1] for line in lines if line.startswith("start "))


def _percentile(ordered: Sequence[float], percent: int) -> float:
    """The nearest rank's."""
    return ordered[math.ceil(len(ordered) * percent / 100) - 1] if ordered else math.nan


def _longest_gap_s(entries: Sequence[Entry]) -> float:
    if not entries:
        return 0.0
    first, last = entries[0].due, entries[-1].due
    answered = (min(entry.done, last) for entry in entries if entry.is_ok and entry.done is not None)
    moments = [first, *sorted(answered), last]
    return max(later - earlier for earlier, later in itertools.pairwise(moments))

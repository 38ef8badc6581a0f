"""Versions of apps and their replicas, as the controller sees them: what they are, what happened to them."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from typing import TYPE_CHECKING, Any

from serveit.control.checkpoint import VersionRecord
from serveit.control.orders import Health
from serveit.control.plan import Wanted
from serveit.control.processes import backoff_s

if TYPE_CHECKING:
    from collections.abc import Iterable

    from serveit.control.orders import Started
    from serveit.control.processes import Process
    from serveit.control.spec import AppSpec

DEATHS, WITHIN_S = 5, 60.0
"""So many deaths of a backend's replicas in so long, and it is given up."""


class Version:
    """One version of an app's code and options, and how its backends fare.

    All mutable state: `spec` (scaling and traffic change it), `proven` (each of its backends has had a
    ready replica), `silent` (processes in a row that vanished while they started), `given_up` (why, by
    backend), `_deaths` (when, by backend) and `_not_before` (when its next replica may start).
    """

    def __init__(self, number: int, spec: AppSpec) -> None:
        self.number = number
        self.spec = spec
        self.proven = False
        self.silent = 0
        self.given_up: dict[str, str] = {}
        self._deaths: dict[str, deque[float]] = {}
        self._not_before: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"<Version {self.number} of {self.spec.name}>"

    @property
    def wanted(self) -> Wanted:
        not_before = {**self._not_before, **dict.fromkeys(self.given_up, math.inf)}
        return Wanted(self.number, self.spec, self.proven, not_before)

    def origin(self, backend: str) -> int:
        """The version that a backend's replicas are made of; see `Wanted.origin`."""
        return self.wanted.origin(backend)

    def runs(self, replica: Replica) -> bool:
        """Whether a replica is one of this version's: made of it, or of one that it goes on with."""
        return self.spec.find(replica.backend) is not None and self.origin(replica.backend) == replica.origin

    def shared_with(self, other: Version) -> list[str]:
        """The backends of which both run the same replicas."""
        return [b.name for b in self.spec.backends if self.wanted.shares(b.name, other.wanted)]

    def follow(self, other: Version) -> None:
        """Come after a version, with what is known of the backends that it goes on with."""
        shared = self.shared_with(other)
        self.given_up |= {name: why for name, why in other.given_up.items() if name in shared}
        self._deaths |= {name: when for name, when in other._deaths.items() if name in shared}
        self._not_before |= {name: when for name, when in other._not_before.items() if name in shared}

    def died(self, backend: str, now: float, how: str) -> None:
        """A replica did; puts the next start off, or gives the backend up.

        What dies at the same time was on one node that was lost, which is no reason to give up: so it
        takes more deaths than the backend has replicas.
        """
        num_replicas = max(1, self.spec.backend(backend).num_replicas)
        deaths = self._deaths.setdefault(backend, deque())
        deaths.append(now)
        while now - deaths[0] > WITHIN_S:
            deaths.popleft()
        self._not_before[backend] = now + backoff_s(-(-len(deaths) // num_replicas))
        if len(deaths) >= max(DEATHS, num_replicas + 1):
            self.given_up[backend] = (
                f"{len(deaths)} replicas of backend {backend!r} died within {WITHIN_S:g} s, the last: {how}"
            )

    def forgive(self, backend: str) -> None:
        """Try it as if nothing had happened."""
        for record in (self.given_up, self._deaths, self._not_before):
            record.pop(backend, None)

    @property
    def record(self) -> VersionRecord:
        """As it is kept for the next controller, which forgives deaths."""
        return VersionRecord(self.number, self.spec, self.proven, dict(self.given_up))

    @classmethod
    def of(cls, record: VersionRecord) -> Version:
        version = cls(record.number, record.spec)
        version.proven = record.proven
        version.given_up = dict(record.given_up)
        return version


class Replica:
    """One replica; `adopted` if a controller before this one has started it. `origin` is the version that it
    is made of: a later one may go on with it.

    All mutable state: `version` (the one that it runs in), `settings` (what it is configured by; empty where
    that is not certain), `taking_in` (what it is being given; None for nothing), `process` (None before it is
    launched), `address` (None before it is ready), `pid`, `waiting` (what it waits for, where that is not the
    start of the user's code), `started` (it may have been ready, if it is no more), `health` (as last heard),
    `answered` (set when its process has said what became of its start), `ending` (the task that ends it; None
    before).
    """

    def __init__(self, id: str, backend: str, version: Version, *, adopted: bool = False) -> None:
        self.id = id
        self.backend = backend
        self.version = version
        self.origin = version.origin(backend)
        self.adopted = adopted
        self.settings = b""
        self.taking_in: bytes | None = None
        self.process: Process | None = None
        self.address: str | None = None
        self.pid: int | None = None
        self.waiting = ""
        self.started = False
        self.health = Health()
        self.answered = asyncio.Event()
        self.ending: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Replica {self.id} v{self.version.number} {self.stage}>"

    @property
    def stage(self) -> str:
        if self.ending is not None:
            return "unhealthy" if self.health.illness else "stopping"
        return "starting" if self.address is None else "ready"

    @property
    def is_ready(self) -> bool:
        return self.ending is None and self.address is not None

    def become(self, outcome: Started) -> None:
        """It is ready."""
        self.address, self.pid, self.started = outcome.address, outcome.pid, True
        self.settings = outcome.settings

    async def stop(self, *, to_deadlines: bool) -> None:
        """Let its process end what it runs, and end it; see `Process.stop`."""
        assert self.process is not None, "only what was launched has started"
        await self.process.stop(self.version.spec.backend(self.backend).drain_s, to_deadlines=to_deadlines)

    async def idle(self) -> None:
        """Wait until it runs nothing, at most the time of a drain."""
        if self.process is not None and self.is_ready:
            await self.process.idle(self.version.spec.backend(self.backend).drain_s)

    async def status(self) -> dict[str, Any]:
        """What it is doing, as plain data."""
        told: dict[str, Any] = {"state": self.stage, "version": self.version.number}
        if self.pid is not None:
            told["pid"] = self.pid
        if self.waiting:
            told["waiting_for"] = self.waiting
        if self.health.illness:
            told["illness"] = self.health.illness
        if self.process is not None and self.is_ready:
            told |= await self.process.status()
        return told


async def answered(replicas: Iterable[Replica]) -> None:
    """Wait until all of these have said what became of their starts."""
    for replica in replicas:
        await replica.answered.wait()

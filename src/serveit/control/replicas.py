"""Apps and replicas as the controller sees them: records of what they are and what happened to them."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

import msgspec

from serveit.control.orders import Deployed, DeployFailed
from serveit.control.plan import ReplicaState, Wanted, is_complete
from serveit.control.processes import backoff_s
from serveit.control.snapshot import ReplicaInfo

if TYPE_CHECKING:
    from serveit.control.processes import Process
    from serveit.control.snapshot import AppInfo
    from serveit.control.spec import AppSpec

DEATHS, WITHIN_S = 5, 60.0
"""So many deaths of a backend's replicas in so long, and it is given up."""
TICK_S = 0.001


class Version:
    """One version of an app's code and options, and how its backends fare.

    All mutable state: `spec` (scaling and traffic change it), `silent` (processes in a row that vanished
    while they started), `given_up` (why, by backend), `_deaths` (when, by backend) and `_not_before`
    (when its next replica may start).
    """

    def __init__(self, number: int, spec: AppSpec) -> None:
        self.number = number
        self.spec = spec
        self.silent = 0
        self.given_up: dict[str, str] = {}
        self._deaths: dict[str, deque[float]] = {}
        self._not_before: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"<Version {self.number} of {self.spec.name}>"

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.number, self.spec)

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

    def put_off(self, backend: str, now: float) -> float:
        """Seconds until the next replica may start, 0 for now. Timers may come a little early."""
        wait_s = self._not_before.get(backend, now) - now
        return wait_s if wait_s > TICK_S else 0.0

    def forgive(self, backend: str) -> None:
        """Try it as if nothing had happened."""
        for record in (self.given_up, self._deaths, self._not_before):
            record.pop(backend, None)


class Replica:
    """One replica. All mutable state: `process` (None before it is launched), `address` (None before it
    is ready), `ending` (the task that ends it; None before)."""

    def __init__(self, id: str, backend: str, version: Version) -> None:
        self.id = id
        self.backend = backend
        self.version = version
        self.process: Process | None = None
        self.address: str | None = None
        self.ending: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Replica {self.id} v{self.version.number} {self.stage}>"

    @property
    def stage(self) -> str:
        if self.ending is not None:
            return "stopping"
        return "starting" if self.address is None else "ready"

    async def stop(self) -> None:
        """Let its process end what it runs, and end it."""
        assert self.process is not None, "only what was launched has an address"
        await self.process.stop(self.version.spec.backend(self.backend).drain_s)

    async def idle(self) -> None:
        """Wait until it runs nothing, at most the time of a drain."""
        if self.process is not None and self.stage == "ready":
            await self.process.idle(self.version.spec.backend(self.backend).drain_s)

    @property
    def state(self) -> ReplicaState:
        return ReplicaState(self.id, self.backend, self.version.number, self.address is not None)


class RunningApp:
    """One app: what it is to be, what serves now, and its replicas.

    All mutable state: `target` (the version that it is to be), `live` (the one that callers know; None
    before the first one is up), `replicas` (by id), `outcome` (what becomes of the last change), `before`
    (for how many replicas a backend had before that change), `leaving` (it has been deleted: what runs may
    end, and still finds what it calls).
    """

    def __init__(self, target: Version) -> None:
        self.target = target
        self.live: Version | None = None
        self.replicas: dict[str, Replica] = {}
        self.outcome: asyncio.Future[Deployed | DeployFailed] = asyncio.get_running_loop().create_future()
        self.before: dict[str, int] = {}
        self.leaving = False

    def __repr__(self) -> str:
        return (
            f"<RunningApp {self.name} target={self.target} live={self.live} {list(self.replicas.values())}>"
        )

    @property
    def name(self) -> str:
        return self.target.spec.name

    @property
    def versions(self) -> list[Version]:
        """Those that have, or are to have, replicas and routes."""
        return list(dict.fromkeys(version for version in (self.target, self.live) if version is not None))

    @property
    def drain_s(self) -> float:
        """The longest that one of its replicas may take to end what it runs."""
        return max((b.drain_s for version in self.versions for b in version.spec.backends), default=0.0)

    def is_of(self, owner: str | None) -> bool:
        """Whether it is this owner's; None is everybody."""
        return owner in (None, self.target.spec.owner)

    @property
    def changing(self) -> bool:
        return not self.outcome.done()

    @property
    def complete(self) -> bool:
        """Whether the target is up. What was given up after it had come up is not waited for."""
        excused = self.target.given_up if self.target is self.live else ()
        return is_complete(self.target.wanted, self.states(), excused)

    def hangs_on(self, replica: Replica) -> bool:
        """Whether a change is under way that comes to nothing without this replica."""
        if not self.changing or replica.version is not self.target:
            return False
        return self.target is not self.live or replica.backend in self.before

    async def idle(self) -> None:
        """Wait until none of its replicas runs anything, at most the time of their drains."""
        await asyncio.gather(*(replica.idle() for replica in self.replicas.values()))

    def states(self) -> list[ReplicaState]:
        return [replica.state for replica in self.replicas.values() if replica.ending is None]

    def begin(self, target: Version | None = None) -> None:
        """A change: what becomes of it is not known from now on.

        Args:
            target: the version that it is to be; None for a change within the one that it is.
        """
        if target is not None:
            self.settle(DeployFailed("another deploy of the app came in between"))
            self.target = target
        if not self.changing:
            self.outcome = asyncio.get_running_loop().create_future()
            self.before = {}

    def scale(self, backend: str, num_replicas: int) -> None:
        """Part of a change."""
        spec = self.target.spec
        self.target.spec = spec.scaled(backend, num_replicas)
        self.target.forgive(backend)
        self.before.setdefault(backend, spec.backend(backend).num_replicas)

    def go_back(self) -> bool:
        """To what it was before the change; whether there is anything to go back to."""
        if self.live is None:
            return False
        if self.target is self.live:
            for backend, num_replicas in self.before.items():
                self.live.spec = self.live.spec.scaled(backend, num_replicas)
        self.target = self.live
        return True

    def settle(self, outcome: Deployed | DeployFailed) -> None:
        if self.changing:
            self.outcome.set_result(outcome)

    def published(self) -> AppInfo | None:
        """What callers are told of it; None while nothing of it serves."""
        if self.live is None:
            return None
        ready: dict[str, list[ReplicaInfo]] = {}
        for replica in self.replicas.values():
            if replica.version is self.live and replica.ending is None and replica.address is not None:
                ready.setdefault(replica.backend, []).append(ReplicaInfo(replica.id, replica.address))
        info = self.live.spec.published(ready)
        return msgspec.structs.replace(info, routes=()) if self.leaving else info

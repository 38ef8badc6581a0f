"""Apps as the controller sees them: what each is to be, what serves, what callers are told of it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import msgspec

from serveit.control.checkpoint import AppRecord
from serveit.control.orders import Deployed, DeployFailed, Deploying
from serveit.control.plan import ReplicaState, is_complete, is_proven
from serveit.control.snapshot import ReplicaInfo
from serveit.control.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Mapping

    from serveit.control.orders import BackendChange
    from serveit.control.replicas import Replica, Version
    from serveit.control.snapshot import AppInfo
    from serveit.control.spec import BackendSpec
    from serveit.types import Timer


class RunningApp:
    """One app: what it is to be, what serves now, and its replicas.

    All mutable state: `target` (the version that it is to be), `live` (the one whose routes callers know;
    None before the first one is up), `replicas` (by id), `outcome` (what becomes of the last change),
    `failed` (why the last one has), `before` (backends as they were before that change), `feared` (settings
    that a replica died of while it took them in),
    `moved` (set, and replaced, whenever something of this may have changed), `timer` (to look again),
    `leaving` (it has been deleted: what runs may end, and still finds what it calls), `tally`.
    """

    def __init__(self, target: Version) -> None:
        self.target = target
        self.live: Version | None = None
        self.replicas: dict[str, Replica] = {}
        self.outcome: asyncio.Future[Deployed | DeployFailed] = asyncio.get_running_loop().create_future()
        self.failed = ""
        self.before: dict[str, BackendSpec] = {}
        self.feared: set[bytes] = set()
        self.moved = asyncio.Event()
        self.timer: Timer | None = None
        self.leaving = False
        self.tally = Tally()

    def __repr__(self) -> str:
        return (
            f"<RunningApp {self.name} target={self.target} live={self.live} {list(self.replicas.values())}>"
        )

    @property
    def name(self) -> str:
        return self.target.spec.name

    @property
    def versions(self) -> list[Version]:
        """Those that have, or are to have, routes and replicas."""
        running = (replica.version for replica in self.replicas.values())
        known = (self.target, self.live, *running)
        return list(dict.fromkeys(version for version in known if version is not None))

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
        if not is_complete(self.target.wanted, self.states(), self._excused):
            return False
        return self._is_configured

    @property
    def _excused(self) -> list[str]:
        """Backends that were given up, and are not what the change is about."""
        if self.live is None:
            return []
        shared = self.target.shared_with(self.live)
        return [name for name in self.live.given_up if name in shared]

    def hangs_on(self, replica: Replica) -> bool:
        """Whether a change is under way that comes to nothing without this replica."""
        if not self.changing or not self.target.runs(replica):
            return False
        is_new = self.live is None or not self.live.runs(replica)
        return is_new or replica.backend in self.before or self._asks_more_of(replica.backend)

    def _asks_more_of(self, backend: str) -> bool:
        """Whether the target goes on with a backend's replicas, but not as they are."""
        if self.live is None or self.live is self.target or backend not in self.target.shared_with(self.live):
            return False
        wanted = self.target.spec.backend(backend)
        return self.live.spec.backend(backend) != msgspec.structs.replace(
            wanted, since=self.live.spec.backend(backend).since
        )

    @property
    def is_ending_some(self) -> bool:
        """Whether one of its replicas will make room soon."""
        return any(replica.ending is not None for replica in self.replicas.values())

    async def idle(self) -> None:
        """Wait until none of its replicas runs anything, at most the time of their drains."""
        await asyncio.gather(*(replica.idle() for replica in self.replicas.values()))

    def states(self) -> list[ReplicaState]:
        return [
            ReplicaState(
                id=replica.id,
                backend=replica.backend,
                version=replica.version.number,
                ready=replica.is_ready,
                serves=self.serves(replica),
                stopping=replica.ending is not None,
                since=replica.origin if replica.origin != replica.version.number else 0,
            )
            for replica in self.replicas.values()
        ]

    def serves(self, replica: Replica) -> bool:
        """Whether callers are sent to it: it is of the version whose routes they know, or can stand in for
        one that is."""
        if self.live is None or not replica.is_ready:
            return False
        if self.live.runs(replica) or self._outlives(replica):
            return True
        live = self.live.spec
        return any(
            version.proven and version.runs(replica) and version.spec.stands_in_for(live, replica.backend)
            for version in (self.target, replica.version)
        )

    def _outlives(self, replica: Replica) -> bool:
        """Whether its backend is only in versions before the live one, whose running requests may call it."""
        return (
            self.live is not None
            and replica.version.number < self.live.number
            and self.live.spec.find(replica.backend) is None
        )

    # -- changes -----------------------------------------------------------------------------

    def begin(self, target: Version | None = None, *, joins: bool = False) -> None:
        """A change: what becomes of it is not known from now on.

        Args:
            target: the version that it is to be; None for a change within the one that it is.
            joins: whether that one has in it what is under way: then the same becomes of both.
        """
        if target is not None:
            if self.changing:
                self._take_back()
            if not joins:
                self.settle(DeployFailed("another deploy of the app came in between"))
            self.target, self.before = target, {}
        if not self.changing:
            self.outcome = asyncio.get_running_loop().create_future()
            self.before = {}
            self.feared.clear()
        self.failed = ""

    def update(self, backend: str, wanted: BackendChange) -> None:
        """A change of one backend that its replicas can take in, or part of the one that is under way."""
        before = self.target.spec
        changed = before.changed(backend, wanted)
        self.begin()
        self.target.spec = changed
        for version in self.versions:
            if version.origin(backend) == self.target.origin(backend):  # its replicas are of both
                version.forgive(backend)
        self.before.setdefault(backend, before.backend(backend))

    def spec_of(self, replica: Replica) -> BackendSpec:
        """What one of its replicas is to be."""
        versions = (self.target, self.live, replica.version)
        version = next(v for v in versions if v is not None and v.runs(replica))
        return version.spec.backend(replica.backend)

    def settings_of(self, replica: Replica) -> bytes:
        """What one of its replicas is to be configured by."""
        return self.spec_of(replica).settings

    @property
    def _is_configured(self) -> bool:
        """Whether the target's replicas have taken in what they are to be configured by."""
        own = (r for r in self.replicas.values() if r.is_ready and self.target.runs(r))
        return all(replica.settings == self.settings_of(replica) for replica in own)

    async def configured(self) -> None:
        """Wait until they have."""
        while not self._is_configured:
            await self.moved.wait()

    def fear(self, replica: Replica) -> None:
        """It has died, or hangs: maybe of what it was just being given."""
        if replica.taking_in is not None:
            self.feared.add(replica.taking_in)

    def to_configure(self) -> list[Replica]:
        """Replicas that are to be given other settings now: one of a backend's first; the others, when it
        has taken them in. Where that has killed it, when the one in its place has come up with them."""
        found = []
        for name in {replica.backend for replica in self.replicas.values()}:
            pool = [r for r in self.replicas.values() if r.backend == name]
            ready = [r for r in pool if r.is_ready]
            waiting = [r for r in ready if r.taking_in is None and r.settings != self.settings_of(r)]
            taken_in = {replica.settings for replica in ready}
            begun = {replica.taking_in for replica in pool}
            if any(replica.stage == "starting" for replica in pool):
                begun |= self.feared
            for replica in waiting:
                settings = self.settings_of(replica)
                if settings in taken_in or settings not in begun:
                    found.append(replica)
                    begun.add(settings)
        return found

    def reroute(
        self, endpoint: str, weights: Mapping[str, float] | None, shadows: Mapping[str, float]
    ) -> None:
        """What callers are told changes at once; a version that is on its way has it, too."""
        for version in {self.target, self.live or self.target}:
            with contextlib.suppress(KeyError, ValueError):  # it may not have them
                version.spec = version.spec.rerouted(endpoint, weights, shadows)

    def advance(self) -> bool:
        """Take in what its replicas have come to; whether the target is up."""
        states = self.states()
        target = self.target
        target.proven = target.proven or is_proven(target.wanted, states, self._excused)
        if complete := self.complete:
            if self.live is not None and self.live is not target:
                target.follow(self.live)
            self.live = target
            target.silent = 0
            self._settle_in(target)
        return complete

    def _settle_in(self, version: Version) -> None:
        """What a version goes on with runs in it from here on: its deaths count there."""
        for replica in self.replicas.values():
            if version.runs(replica):
                replica.version = version

    def go_back(self) -> bool:
        """To what it was before the change; whether there is anything to go back to."""
        if self.live is None:
            return False
        for backend in self.live.spec.backends:
            if backend.name in self.before or self._asks_more_of(backend.name):
                self.live.forgive(backend.name)  # its replicas may have died of what they were to be
        self._take_back()
        self.target = self.live
        self._settle_in(self.live)
        return True

    def _take_back(self) -> None:
        """What serves is to be as it was before the change that is under way."""
        if self.live is not None and self.target is self.live:
            for backend in self.before.values():
                self.live.spec = self.live.spec.with_backend(backend)

    def settle(self, outcome: Deployed | DeployFailed) -> None:
        if self.changing:
            self.outcome.set_result(outcome)
            self.failed = outcome.text if isinstance(outcome, DeployFailed) else ""
        self.move()

    def move(self) -> None:
        """Tell whoever waits for news of it."""
        moved, self.moved = self.moved, asyncio.Event()
        moved.set()

    def look_again(self, timer: Timer) -> None:
        """One timer is enough: each look finds the next time."""
        if self.timer is not None:
            self.timer.cancel()
        self.timer = timer

    # -- what others are told ----------------------------------------------------------------

    def published(self) -> AppInfo | None:
        """What callers are told of it; None while nothing of it serves."""
        if self.live is None:
            return None
        serving: dict[str, list[ReplicaInfo]] = {}
        for replica in self.replicas.values():
            if self.serves(replica):
                assert replica.address is not None, "only what is ready serves"
                serving.setdefault(replica.backend, []).append(ReplicaInfo(replica.id, replica.address))
        info = self.live.spec.published(serving)
        outliving = {r.backend: r.version for r in self.replicas.values() if r.is_ready and self._outlives(r)}
        more = (version.spec.backend(name).published(serving[name]) for name, version in outliving.items())
        given_up = self.live.given_up
        known = (
            msgspec.structs.replace(backend, given_up=given_up.get(backend.name, ""))
            for backend in info.backends
        )
        info = msgspec.structs.replace(info, backends=(*known, *more))
        return self.tally.told(msgspec.structs.replace(info, routes=()) if self.leaving else info)

    @property
    def progress(self) -> Deploying:
        """How far the target is."""
        own = [replica for replica in self.replicas.values() if self.target.runs(replica)]
        backends = {}
        for backend in self.target.spec.backends:
            ready = sum(replica.is_ready for replica in own if replica.backend == backend.name)
            backends[backend.name] = (ready, backend.num_replicas)
        return Deploying(backends, tuple(replica.waiting for replica in own if replica.waiting))

    async def status(self) -> dict[str, Any]:
        """What it is and does, as plain data."""
        replicas = list(self.replicas.values())
        told = await asyncio.gather(*(replica.status() for replica in replicas))
        backends: dict[str, dict[str, Any]] = {backend.name: {} for backend in self.target.spec.backends}
        for replica, status in zip(replicas, told, strict=True):
            backends.setdefault(replica.backend, {})[replica.id] = status
        failed = {name: why for version in self.versions for name, why in version.given_up.items()}
        state, message = self._state(failed)
        return {
            "state": state,
            "message": message,
            "version": self.target.number,
            "num_replicas": {b.name: b.num_replicas for b in self.target.spec.backends},
            "backends": backends,
            "failed": failed,
        }

    def _state(self, failed: Mapping[str, str]) -> tuple[str, str]:
        if self.leaving:
            return "DELETING", ""
        if self.changing:
            return "DEPLOYING", "; ".join(self.progress.waiting)
        message = self.failed or "; ".join(failed.values())
        return ("FAILED", message) if message else ("RUNNING", "")

    # -- keeping -----------------------------------------------------------------------------

    @property
    def record(self) -> AppRecord:
        """As it is kept for the next controller."""
        return AppRecord(
            versions=tuple(version.record for version in self.versions),
            target=self.target.number,
            live=self.live.number if self.live is not None else None,
            before=dict(self.before),
            changing=self.changing,
            failed=self.failed,
            leaving=self.leaving,
        )

    @classmethod
    def of(cls, record: AppRecord, versions: Mapping[int, Version]) -> RunningApp:
        """The app again, still without its replicas.

        Args:
            record: of it.
            versions: of the record's, by number.
        """
        app = cls(versions[record.target])
        app.live = versions[record.live] if record.live is not None else None
        app.before = dict(record.before)
        if not record.changing:
            app.settle(DeployFailed(record.failed) if record.failed else Deployed((0, 0)))
        app.leaving = record.leaving
        return app


def no_app(why: str) -> dict[str, Any]:
    """The status of an app whose first version did not come up, and of which nothing is left."""
    told = {"state": "FAILED", "message": why, "version": 0}
    return {**told, "num_replicas": {}, "backends": {}, "failed": {}}

"""From what is to be and what is, to what has to be done. Pure: tested without processes.

An update takes turns, backend by backend: start `max_surge` replicas of the new version, and when they
are ready stop as many of the old. Two things come first: each backend of the new version has to show
one ready replica (then it is *proven*), and until then the old version is held at its strength, its dead
replaced; so a version that does not come up changes nothing. And replicas of the new version can only
stand in for the old one's where they know all the routes that callers still use; where they do not, the
whole of the new version is started beside the old.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from serveit.control.spec import AppSpec, BackendSpec

TICK_S = 0.001
"""Timers may come a little early."""


class Wanted(NamedTuple):
    """A version of an app: its number, what it consists of, how it fares."""

    version: int
    """Of the app's code and options; scaling and traffic do not make another."""
    spec: AppSpec
    proven: bool = False
    """Whether each of its backends has had a ready replica."""
    not_before: Mapping[str, float] = {}
    """By backend, when its next replica may start; `inf` for one that was given up."""

    def origin(self, backend: str) -> int:
        """The version that a backend's replicas are made of: itself, or one before that it goes on with."""
        found = self.spec.find(backend)
        return found.since or self.version if found is not None else self.version

    def shares(self, backend: str, other: Wanted) -> bool:
        """Whether both versions run the same replicas of a backend."""
        has_it = self.spec.find(backend) is not None and other.spec.find(backend) is not None
        return has_it and self.origin(backend) == other.origin(backend)


class ReplicaState(NamedTuple):
    """A replica, from its start to the end of its process."""

    id: str
    backend: str
    version: int
    """Of the app's code and options that it runs."""
    ready: bool
    serves: bool = False
    """Whether callers of the app are sent to it."""
    stopping: bool = False
    """It ends what it runs, and needs its room still."""
    since: int = 0
    """The version that its backend was made of, where it runs in a later one."""

    @property
    def origin(self) -> int:
        """The version that it is made of; see `Wanted.origin`."""
        return self.since or self.version


class Start(NamedTuple):
    """Start one more replica of a backend."""

    backend: str
    version: int


class Stop(NamedTuple):
    """Let a replica end what it runs, and end it."""

    replica: str


class Wait(NamedTuple):
    """Look again at this time: then something may start that died too often to start now."""

    until: float


Action = Start | Stop | Wait


def plan(
    target: Wanted, serving: Wanted | None, replicas: Sequence[ReplicaState], now: float = 0.0
) -> list[Action]:
    """What brings an app's replicas to what is wanted, as far as that can be done now.

    Args:
        target: as the app is to be.
        serving: the version whose routes callers know; None before the first one is up.
        replicas: of the app.
        now: by the clock of `Wanted.not_before`.
    """
    if serving is not None and serving.version == target.version:
        serving = None
    pools: dict[str, list[ReplicaState]] = {}
    for wanted in (serving, target):
        if wanted is not None:
            pools.update({backend.name: [] for backend in wanted.spec.backends})
    strays: list[Action] = []
    # A backend that is no more serves what still runs in its version.
    calling = {replica.version for replica in replicas if replica.backend in pools} - {target.version}
    for replica in replicas:
        if replica.backend in pools:
            pools[replica.backend].append(replica)
        elif not replica.stopping and not (replica.serves and replica.version in calling):
            strays.append(Stop(replica.id))
    actions = [action for name, pool in pools.items() for action in _plan_pool(name, pool, target, serving)]
    return [*_in_time(actions, (target, serving), now), *strays]


def is_complete(wanted: Wanted, replicas: Iterable[ReplicaState], excused: Collection[str] = ()) -> bool:
    """Whether every backend of a version has its replicas, ready.

    Args:
        wanted: the version.
        replicas: of the app.
        excused: backends that need not be at full strength.
    """
    ready = _num_ready(wanted, replicas)
    return all(ready.get(b.name, 0) >= b.num_replicas for b in wanted.spec.backends if b.name not in excused)


def is_proven(wanted: Wanted, replicas: Iterable[ReplicaState], excused: Collection[str] = ()) -> bool:
    """Whether every backend of a version that is to have replicas has a ready one; but for those excused."""
    ready = _num_ready(wanted, replicas)
    return all(b.name in ready for b in wanted.spec.backends if b.num_replicas and b.name not in excused)


def _num_ready(wanted: Wanted, replicas: Iterable[ReplicaState]) -> dict[str, int]:
    ready: dict[str, int] = {}
    for replica in replicas:
        if replica.ready and not replica.stopping and replica.origin == wanted.origin(replica.backend):
            ready[replica.backend] = ready.get(replica.backend, 0) + 1
    return ready


def _plan_pool(
    name: str, replicas: Sequence[ReplicaState], target: Wanted, serving: Wanted | None
) -> list[Action]:
    """One backend's replicas, of whichever version."""
    new = target.spec.find(name)
    old = serving.spec.find(name) if serving is not None else None
    if serving is None or old is None:
        assert new is not None, "one of the two has it"
        return _take_turns(_Pool(name, replicas, target), new, new.num_replicas)
    if new is not None and target.shares(name, serving):
        return _take_turns(_Pool(name, replicas, serving), new, new.num_replicas)
    if new is None:
        staying = _Pool(name, replicas, serving)
        room = old.num_replicas - staying.size(has_surge=old.max_surge > 0)
        return _hold(staying, old.num_replicas, room)
    fits, origin = target.spec.stands_in_for(serving.spec, name), target.origin(name)
    # What it goes on with may have taken turns already, in the version before.
    has_begun = any(replica.serves and replica.origin == origin for replica in replicas)
    if fits and (target.proven or has_begun):
        return _take_turns(_Pool(name, replicas, target), new, old.num_replicas)
    coming = _Pool(name, (r for r in replicas if r.origin == origin), target)
    staying = _Pool(name, (r for r in replicas if r.origin != origin), serving)
    return _come_up_beside(coming, new, staying, old, fits=fits)


class _Pool:
    """A backend's replicas as one version sees them: its own, those that serve in their place, the rest."""

    def __init__(self, name: str, replicas: Iterable[ReplicaState], wanted: Wanted) -> None:
        self.name = name
        self.version = wanted.version
        origin = wanted.origin(name)
        self.own: list[ReplicaState] = []
        self.stand_ins: list[ReplicaState] = []
        self.rest: list[ReplicaState] = []
        self.num_stopping = 0
        for replica in replicas:
            if replica.stopping:
                self.num_stopping += 1
            elif replica.origin == origin:
                self.own.append(replica)
            elif replica.serves:
                self.stand_ins.append(replica)
            else:
                self.rest.append(replica)

    @property
    def num_ready(self) -> int:
        """Of its own."""
        return sum(replica.ready for replica in self.own)

    def size(self, *, has_surge: bool) -> int:
        """The room it takes. What is being stopped counts where there is no room for a surge."""
        going = 0 if has_surge else self.num_stopping + len(self.rest)
        return len(self.own) + len(self.stand_ins) + going

    def change(self, starts: int, stops: Iterable[ReplicaState]) -> list[Action]:
        """So many starts, these stops; and what nobody needs goes."""
        going = (*stops, *self.rest)
        starting = [Start(self.name, self.version)] * max(0, starts)
        return [*starting, *(Stop(replica.id) for replica in going)]


def _take_turns(pool: _Pool, new: BackendSpec, num_before: int) -> list[Action]:
    """To `new`, from `num_before` replicas that may serve in its place: so many serve until all of the new
    version is up."""
    wanted, surge = new.num_replicas, new.max_surge
    surplus = _surplus(pool.own, wanted)
    least = num_before - (surge == 0)
    spare = max(0, pool.num_ready + len(pool.stand_ins) - least)
    serving = [*pool.stand_ins, *(replica for replica in surplus if replica.ready)][:spare]
    room = max(wanted, num_before) + surge - pool.size(has_surge=surge > 0)
    if surge > 0:
        room += len(serving)
    starts = min(wanted - len(pool.own), room)
    return pool.change(starts, [*serving, *(replica for replica in surplus if not replica.ready)])


def _hold(pool: _Pool, number: int, room: int) -> list[Action]:
    """At its strength; what serves in the place of its own is as good."""
    here = [*pool.own, *pool.stand_ins]
    return pool.change(min(number - len(here), room), _surplus(here, number))


def _come_up_beside(
    coming: _Pool, new: BackendSpec, staying: _Pool, old: BackendSpec, *, fits: bool
) -> list[Action]:
    """While what comes may not serve yet. Without room for a surge one of the old goes first; and where
    the new ones cannot stand in for the old, with each of them another."""
    wanted, before, has_surge = new.num_replicas, old.num_replicas, new.max_surge > 0
    held, most = before, max(wanted, before) + new.max_surge
    if not has_surge:
        held = max(0, min(before, most - min(wanted, 1 if fits else coming.num_ready + 1)))
    elif not fits:
        most = wanted + before
    room = most - coming.size(has_surge=has_surge)
    taken = staying.size(has_surge=has_surge)
    holding = _hold(staying, held, room - taken)
    taken += sum(isinstance(action, Start) for action in holding)
    room -= held if has_surge else max(held, taken)
    starts = min(wanted - len(coming.own), room)
    return [*holding, *coming.change(starts, _surplus(coming.own, wanted))]


def _surplus(replicas: Sequence[ReplicaState], wanted: int) -> Sequence[ReplicaState]:
    """Those to go: first what is not ready yet, then the youngest."""
    going = max(0, len(replicas) - wanted)
    starting = [replica for replica in replicas if not replica.ready]
    running = [replica for replica in replicas if replica.ready]
    return [*reversed(starting), *reversed(running)][:going]


def _in_time(actions: Iterable[Action], versions: Iterable[Wanted | None], now: float) -> list[Action]:
    """Without the starts that have to wait, or never come; instead of them, when to look again."""
    not_before = {wanted.version: wanted.not_before for wanted in versions if wanted is not None}
    kept: list[Action] = []
    waits: set[float] = set()
    for action in actions:
        if isinstance(action, Start):
            earliest = not_before[action.version].get(action.backend, now)
            if earliest - now > TICK_S:
                waits.add(earliest)
                continue
        kept.append(action)
    soonest = min(waits, default=math.inf)
    return kept if math.isinf(soonest) else [*kept, Wait(soonest)]

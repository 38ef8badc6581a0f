"""From what is to be and what is, to what has to be done. Pure: tested without processes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from serveit.control.spec import AppSpec


class Wanted(NamedTuple):
    """A version of an app: its number, and what it consists of."""

    version: int
    """Of the app's code and options; scaling and traffic do not make another."""
    spec: AppSpec


class ReplicaState(NamedTuple):
    """A replica that runs or is being started; those that are being stopped count no more."""

    id: str
    backend: str
    version: int
    """Of the app's code and options that it runs."""
    ready: bool


class Start(NamedTuple):
    """Start one more replica of a backend."""

    backend: str
    version: int


class Stop(NamedTuple):
    """Let a replica end what it runs, and end it."""

    replica: str


Action = Start | Stop


def plan(target: Wanted, serving: Wanted | None, replicas: Sequence[ReplicaState]) -> list[Action]:
    """What brings an app's replicas to what is wanted, as far as that can be done now.

    New versions start first: until every backend of the new one is at full strength the old one is
    held at its own, its dead replaced, so that a version that does not come up changes nothing.
    Versions that are neither go at once.

    Args:
        target: as the app is to be.
        serving: the version that callers know; None before the first one is up.
        replicas: of the app, ready or starting.
    """
    kept = [target]
    if serving is not None and serving.version != target.version and not is_complete(target, replicas):
        kept.insert(0, serving)
    actions: list[Action] = []
    needed = set()
    for version, spec in kept:
        for backend in spec.backends:
            needed.add((version, backend.name))
            own = [r for r in replicas if r.version == version and r.backend == backend.name]
            actions += [Start(backend.name, version)] * (backend.num_replicas - len(own))
            actions += [Stop(replica.id) for replica in _surplus(own, backend.num_replicas)]
    actions += [Stop(r.id) for r in replicas if (r.version, r.backend) not in needed]
    return actions


def is_complete(wanted: Wanted, replicas: Iterable[ReplicaState], excused: Collection[str] = ()) -> bool:
    """Whether every backend of a version has its replicas, ready.

    Args:
        wanted: the version.
        replicas: of the app.
        excused: backends that need not be at full strength.
    """
    version, spec = wanted
    ready: dict[str, int] = {}
    for replica in replicas:
        if replica.ready and replica.version == version:
            ready[replica.backend] = ready.get(replica.backend, 0) + 1
    return all(ready.get(b.name, 0) >= b.num_replicas for b in spec.backends if b.name not in excused)


def _surplus(own: Sequence[ReplicaState], wanted: int) -> Sequence[ReplicaState]:
    """Those to go: first what is not ready yet, then the youngest."""
    going = max(0, len(own) - wanted)
    starting = [replica for replica in own if not replica.ready]
    running = [replica for replica in own if replica.ready]
    return [*reversed(starting), *reversed(running)][:going]

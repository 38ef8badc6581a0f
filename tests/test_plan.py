from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serveit.control.plan import Action, ReplicaState, Start, Stop, Wanted, is_complete, plan
from serveit.control.snapshot import BackendInfo
from serveit.control.spec import AppSpec, BackendSpec

NAMES = ("a", "b", "c")


def wanted(version: int = 1, **backends: int) -> Wanted:
    specs = tuple(
        BackendSpec(BackendInfo(name, (), 1), num_replicas=number, drain_s=1.0)
        for name, number in backends.items()
    )
    return Wanted(version, AppSpec("app", specs, (), (), b""))


def replicas(*texts: str) -> list[ReplicaState]:
    """ "a1" is a ready replica of backend a at version 1, "a1?" one that starts."""
    return [
        ReplicaState(f"{number}:{text}", text[0], int(text[1]), not text.endswith("?"))
        for number, text in enumerate(texts)
    ]


def shown(actions: list[Action]) -> list[str]:
    return [f"+{a.backend}{a.version}" if isinstance(a, Start) else f"-{a.replica}" for a in actions]


class TestPlan:
    @pytest.mark.parametrize(
        ("there", "actions"),
        [
            ([], ["+a1", "+a1"]),
            (["a1?"], ["+a1"]),
            (["a1", "a1?"], []),
            (["a1", "a1", "a1"], ["-2:a1"]),
            (["a1", "a1?", "a1", "a1?"], ["-3:a1?", "-1:a1?"]),
            (["a1", "a1", "b1"], ["-2:b1"]),
            (["a1", "a1", "a0"], ["-2:a0"]),
        ],
        ids=["none", "one starts", "enough", "one too many", "starting ones go first", "gone", "superseded"],
    )
    def test_one_version(self, there: list[str], actions: list[str]) -> None:
        assert shown(plan(wanted(1, a=2), wanted(1, a=2), replicas(*there))) == actions
        assert shown(plan(wanted(1, a=2), None, replicas(*there))) == actions

    @pytest.mark.parametrize(
        ("there", "actions"),
        [
            (["a1", "a1"], ["+a2", "+b2"]),
            (["a1"], ["+a1", "+a2", "+b2"]),
            (["a1", "a1", "a1", "a2", "b2?"], ["-2:a1"]),
            (["a1", "a1", "a2", "b2"], ["-0:a1", "-1:a1"]),
            (["a1", "a2", "b2", "b2"], ["-3:b2", "-0:a1"]),
            (["a1", "a1", "a0", "a2?", "b2"], ["-2:a0"]),
        ],
        ids=["start", "the old is held", "both have one too many", "the old go", "at once", "a third"],
    )
    def test_an_update(self, there: list[str], actions: list[str]) -> None:
        assert shown(plan(wanted(2, a=1, b=1), wanted(1, a=2), replicas(*there))) == actions


class TestComplete:
    @pytest.mark.parametrize(
        ("there", "complete"),
        [
            (["a1", "b1"], True),
            (["a1", "b1", "b1", "c0?"], True),
            (["a1", "b1?"], False),
            (["a1", "b0"], False),
            (["a1"], False),
        ],
    )
    def test_every_backend_is_ready(self, there: list[str], complete: bool) -> None:
        assert is_complete(wanted(1, a=1, b=1), replicas(*there)) is complete

    def test_some_may_be_excused(self) -> None:
        assert is_complete(wanted(1, a=1, b=1), replicas("a1"), {"b"})
        assert not is_complete(wanted(1, a=1, b=1), replicas("a1"), {"a"})


counts = st.dictionaries(st.sampled_from(NAMES), st.integers(0, 4), max_size=3)
states = st.lists(
    st.builds(
        lambda backend, version, ready: (backend, version, ready),
        st.sampled_from(NAMES),
        st.integers(0, 2),
        st.booleans(),
    ),
    max_size=14,
)


class World:
    """Replicas that come up and go as they are told to; which ones and when is drawn."""

    def __init__(self, there: list[tuple[str, int, bool]]) -> None:
        self.replicas = {
            f"r{number}": ReplicaState(f"r{number}", *state) for number, state in enumerate(there)
        }
        self.count = len(there)

    @property
    def states(self) -> list[ReplicaState]:
        return list(self.replicas.values())

    def ready(self, version: int, backend: str) -> int:
        return sum(r.ready and r.version == version and r.backend == backend for r in self.states)

    def carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Stop):
                del self.replicas[action.replica]
            else:
                self.count += 1
                id = f"r{self.count}"
                self.replicas[id] = ReplicaState(id, action.backend, action.version, False)

    def come_up(self, replica: ReplicaState) -> None:
        self.replicas[replica.id] = replica._replace(ready=True)


@given(st.data(), states, counts, st.none() | counts)
def test_ends_as_wanted_and_never_serves_with_less(
    data: st.DataObject,
    there: list[tuple[str, int, bool]],
    new: dict[str, int],
    old: dict[str, int] | None,
) -> None:
    """From any state: start and stop what is planned, let what starts come up in any order."""
    target = wanted(2, **new)
    serving = wanted(1, **old) if old is not None else None
    world = World(there)
    while True:
        before = {name: world.ready(1, name) for name in NAMES}
        updating = serving is not None and serving.version != 2 and not is_complete(target, world.states)
        actions = plan(target, serving, world.states)
        stops = [action.replica for action in actions if isinstance(action, Stop)]
        assert len(stops) == len(set(stops)), "nothing is stopped twice"
        world.carry_out(actions)
        for version, spec in (target, *([serving] if updating and serving else [])):
            for backend in spec.backends:
                own = [r for r in world.states if (r.version, r.backend) == (version, backend.name)]
                assert len(own) == backend.num_replicas, "nothing is started twice, nothing is missing"
        if updating and old is not None:
            for name, number in old.items():
                assert world.ready(1, name) >= min(before[name], number), "the old one serves on"
        else:
            serving = target
        if is_complete(target, world.states):
            serving = target
        starting = [replica for replica in world.states if not replica.ready]
        if not starting:
            break
        for replica in data.draw(st.lists(st.sampled_from(starting), min_size=1, unique=True)):
            world.come_up(replica)
    world.carry_out(plan(target, serving, world.states))
    assert is_complete(target, world.states)
    assert plan(target, target, world.states) == []
    assert {r.version for r in world.states} <= {2}
    assert all(world.ready(2, name) == number for name, number in new.items())


def test_the_records_are_plain() -> None:
    assert msgspec.to_builtins(Start("a", 1)) == ("a", 1)
    assert Wanted(1, wanted(1).spec).version == 1

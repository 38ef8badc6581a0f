from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serveit.config import BackendConfig
from serveit.control.plan import (
    TICK_S,
    Action,
    ReplicaState,
    Start,
    Stop,
    Wait,
    Wanted,
    is_complete,
    is_proven,
    plan,
)
from serveit.control.snapshot import EndpointInfo, RouteInfo
from serveit.control.spec import AppSpec, BackendSpec

NAMES = ("a", "b", "c")


def wanted(
    version: int = 1,
    *,
    surge: int = 1,
    proven: bool = False,
    not_before: Mapping[str, float] | None = None,
    more: Iterable[str] = (),
    **backends: int,
) -> Wanted:
    """A version with so many replicas of each backend, each at a route of its own.

    Args:
        version: its number.
        surge: of all backends.
        proven: whether each backend has had a ready replica.
        not_before: when replicas may start.
        more: backends with a second route.
        backends: how many replicas of each.
    """
    specs = tuple(
        BackendSpec(name, number, BackendConfig(graceful_shutdown_timeout_s=1.0, max_surge=surge))
        for name, number in backends.items()
    )
    leads = {f"/{name}": name for name in backends} | {f"/more/{name}": name for name in more}
    endpoints = tuple(EndpointInfo(pattern, ((name, 1.0),)) for pattern, name in leads.items())
    routes = tuple(RouteInfo(pattern, pattern, ("GET",), pattern) for pattern in leads)
    return Wanted(version, AppSpec("app", specs, endpoints, routes, b""), proven, not_before or {})


def replicas(*texts: str) -> list[ReplicaState]:
    """ "a1" is a replica of backend a at version 1 that serves, "a1." one that is ready and does not, "a1?"
    one that starts, "a1!" one that is stopping."""
    return [
        ReplicaState(
            f"{number}:{text}",
            text[0],
            int(text[1]),
            ready=text[2:] in ("", "."),
            serves=text[2:] == "",
            stopping=text[2:] == "!",
        )
        for number, text in enumerate(texts)
    ]


def shown(actions: list[Action]) -> str:
    """ "+a1" is a start, "-0" the stop of the first replica."""
    texts = []
    for action in actions:
        match action:
            case Start(backend, version):
                texts.append(f"+{backend}{version}")
            case Stop(replica):
                texts.append(f"-{replica.partition(':')[0]}")
            case Wait(until):
                texts.append(f"@{until:g}")
    return " ".join(texts)


class TestOneVersion:
    @pytest.mark.parametrize(
        ("there", "actions"),
        [
            ("", "+a1 +a1"),
            ("a1?", "+a1"),
            ("a1! a1!", "+a1 +a1"),
            ("a1 a1?", ""),
            ("a1 a1 a1", "-2"),
            ("a1 a1? a1 a1?", "-3 -1"),
            ("a1 a1 a1 a1!", "-2"),
            ("a1 a1 b1", "-2"),
            ("a1 a1 b1!", ""),
            ("a1 a1 a0.", "-2"),
            ("a1 a1 a0", "-2"),
            ("a1 a0 a0", "+a1 -1"),
            ("a1? a0 a0", ""),
        ],
        ids=[
            "none",
            "one starts",
            "what ends is no use",
            "enough",
            "one too many",
            "starting ones go first",
            "one goes already",
            "a backend that is gone",
            "and goes already",
            "of another version",
            "which serves",
            "and is needed",
            "until another one is there",
        ],
    )
    def test_with_a_surge(self, there: str, actions: str) -> None:
        for serving in (wanted(1, a=2), None):
            assert shown(plan(wanted(1, a=2), serving, replicas(*there.split()))) == actions

    @pytest.mark.parametrize(
        ("there", "actions"),
        [
            ("a1! a1!", ""),
            ("a1 a1!", ""),
            ("a1!", "+a1"),
            ("a1 a0.", "-1"),
            ("a1 a0", "-1"),
            ("a1 a1 a0", "-2"),
        ],
        ids=["no room", "for one more", "room", "taken", "by one that serves", "enough"],
    )
    def test_in_place(self, there: str, actions: str) -> None:
        target = wanted(1, surge=0, a=2)
        assert shown(plan(target, target, replicas(*there.split()))) == actions


class TestTurns:
    @pytest.mark.parametrize(
        ("there", "actions"),
        [
            ("a1 a1 a1", "+a2"),
            ("a1 a1 a1 a2?", ""),
            ("a1 a1 a1?", "+a2"),
            ("a1 a1", "+a1 +a2"),
            ("a1 a1 a1! a2.", "+a1"),
            ("a1 a1 a1 a1 a2.", "-3"),
            ("a1 a1 a1 a0.", "-3 +a2"),
            ("a1 a1 a0", "+a2"),
            ("a1 a1 a1 a2? a2? a2? a2?", "-6"),
        ],
        ids=[
            "one more",
            "it is waited for",
            "replacements may start",
            "the dead are replaced",
            "those that end too",
            "one too many",
            "what is of no use goes",
            "one that stands in is as good",
            "too many of the new",
        ],
    )
    def test_nothing_is_proven(self, there: str, actions: str) -> None:
        assert shown(plan(wanted(2, a=3), wanted(1, a=3), replicas(*there.split()))) == actions

    @pytest.mark.parametrize(
        ("there", "actions"),
        [
            ("a1 a1 a1 a2", "+a2 -0"),
            ("a1! a1 a1 a2 a2?", ""),
            ("a1! a1 a1 a2 a2", "+a2 -1"),
            ("a1! a1! a1! a2 a2 a2", ""),
            ("a1 a1? a1 a2", "+a2 -1"),
            ("a1 a2 a2?", "+a2"),
            ("a1 a1 a1", "+a2"),
            ("a2 a2", "+a2"),
            ("a1 a1 a1 a0 a2?", "-0"),
        ],
        ids=[
            "the first",
            "the next comes up",
            "the next goes",
            "the last",
            "no more replacements",
            "new ones in the place of the dead",
            "the new one has died",
            "all old ones have",
            "a third stands in",
        ],
    )
    def test_in_turns_of_one(self, there: str, actions: str) -> None:
        target = wanted(2, proven=True, a=3)
        assert shown(plan(target, wanted(1, a=3), replicas(*there.split()))) == actions

    def test_in_turns_of_two(self) -> None:
        old = wanted(1, a=3)
        assert shown(plan(wanted(2, surge=2, a=3), old, replicas(*["a1"] * 3))) == "+a2 +a2"
        target = wanted(2, surge=2, proven=True, a=3)
        assert shown(plan(target, old, replicas("a1", "a1", "a1", "a2", "a2?"))) == "+a2 -0"
        assert shown(plan(target, old, replicas("a1", "a1", "a1", "a2", "a2"))) == "+a2 -0 -1"

    def test_to_more(self) -> None:
        assert shown(plan(wanted(2, a=4), wanted(1, a=2), replicas("a1", "a1"))) == "+a2 +a2 +a2"
        target = wanted(2, proven=True, a=4)
        assert shown(plan(target, wanted(1, a=2), replicas("a1", "a1", "a2", "a2?", "a2?"))) == "+a2 -0"

    def test_to_fewer_as_many_serve_until_all_of_it_is_up(self) -> None:
        old, new = wanted(1, a=3, b=1), wanted(2, proven=True, a=1, b=1)
        assert shown(plan(new, old, replicas("a1", "a1", "a1", "a2", "b1", "b2?"))) == "-0"
        assert shown(plan(new, old, replicas("a1", "a1", "a2", "b1", "b2?"))) == ""
        assert shown(plan(new, new, replicas("a1", "a1", "a2", "b2"))) == "-0 -1"

    def test_scaled_down_on_the_way(self) -> None:
        old, new = wanted(1, a=3, b=1), wanted(2, proven=True, a=1, b=1)
        assert shown(plan(new, old, replicas("a2", "a2", "a2", "b1", "b2?"))) == ""
        assert shown(plan(new, new, replicas("a2", "a2", "a2", "b2"))) == "-2 -1"

    def test_from_none(self) -> None:
        assert shown(plan(wanted(2, proven=True, a=2), wanted(1, a=0), [])) == "+a2 +a2"

    def test_back(self) -> None:
        """What was deployed has failed: what serves is the target again."""
        target = wanted(1, proven=True, a=3)
        assert shown(plan(target, target, replicas("a1", "a2", "a2", "a2?"))) == "+a1 -3"
        assert shown(plan(target, target, replicas("a1", "a1", "a2", "a2"))) == "+a1 -2"


class TestInPlace:
    @pytest.mark.parametrize(
        ("there", "actions"),
        [
            ("a1 a1 a1", "-2"),
            ("a1 a1 a1!", ""),
            ("a1 a1", "+a2"),
            ("a1 a1 a2?", ""),
            ("a1 a1 a2.", ""),
            ("a1 a2?", "+a1"),
            ("a1 a1! a2?", ""),
            ("a1! a1!", "+a1"),
            ("a1 a1! a0.", "-2"),
        ],
        ids=[
            "one goes",
            "it is waited for",
            "one comes",
            "is waited for",
            "until all are proven",
            "the dead are replaced",
            "in their room",
            "before anything else",
            "what is of no use takes room",
        ],
    )
    def test_nothing_is_proven(self, there: str, actions: str) -> None:
        assert shown(plan(wanted(2, surge=0, a=3), wanted(1, a=3), replicas(*there.split()))) == actions

    @pytest.mark.parametrize(
        ("there", "actions"),
        [
            ("a1 a1 a2", "-0"),
            ("a1! a1 a2", ""),
            ("a1 a2", "+a2"),
            ("a1 a2 a2?", ""),
            ("a1 a2 a2", "-0"),
            ("a2 a2", "+a2"),
        ],
    )
    def test_in_turns(self, there: str, actions: str) -> None:
        target = wanted(2, surge=0, proven=True, a=3)
        assert shown(plan(target, wanted(1, a=3), replicas(*there.split()))) == actions

    def test_of_one_it_is_away_for_a_while(self) -> None:
        target = wanted(2, surge=0, a=1)
        assert shown(plan(target, wanted(1, a=1), replicas("a1"))) == "-0"
        assert shown(plan(target, wanted(1, a=1), replicas("a1!"))) == ""
        assert shown(plan(target, wanted(1, a=1), [])) == "+a2"

    def test_where_there_is_room_nothing_goes_first(self) -> None:
        assert shown(plan(wanted(2, surge=0, a=3), wanted(1, a=2), replicas("a1", "a1"))) == "+a2"
        assert shown(plan(wanted(2, surge=0, a=0), wanted(1, a=2), replicas("a1", "a1"))) == ""


class TestThatDoesNotFit:
    """The new version lacks a route that callers still use: its replicas cannot stand in."""

    def test_all_of_it_comes_up_beside(self) -> None:
        old = wanted(1, a=2, b=2, more="a")
        target = wanted(2, proven=True, a=2, b=2)
        there = ["a1", "a1", "b1", "b1"]
        assert shown(plan(target, old, replicas(*there))) == "+a2 +a2 +b2"
        assert shown(plan(target, old, replicas(*there, "a2.", "a2?", "b2"))) == "+b2 -2"
        assert shown(plan(target, old, replicas("a1", "a1", "b2", "b2", "a2.", "a2."))) == ""
        assert shown(plan(target, target, replicas("a1.", "a1.", "b2", "b2", "a2", "a2"))) == "-0 -1"

    @pytest.mark.parametrize(
        ("there", "actions"),
        [
            ("a1 a1 a1", "-2"),
            ("a1 a1 a2?", ""),
            ("a1 a1 a2.", "-1"),
            ("a1 a2.", "+a2"),
            ("a1 a2. a2.", "-0"),
            ("a2. a2.", "+a2"),
        ],
    )
    def test_in_place_one_goes_for_each_that_comes(self, there: str, actions: str) -> None:
        old, target = wanted(1, a=3, more="a"), wanted(2, surge=0, proven=True, a=3)
        assert shown(plan(target, old, replicas(*there.split()))) == actions

    def test_in_place_no_more_go_than_have_to(self) -> None:
        old, target = wanted(1, a=3, more="a"), wanted(2, surge=0, a=1)
        assert shown(plan(target, old, replicas("a1", "a1", "a1"))) == "-2"
        assert shown(plan(target, old, replicas("a1", "a1", "a2."))) == ""


class TestOtherBackends:
    def test_one_more_is_started_whole(self) -> None:
        old, target = wanted(1, a=1), wanted(2, a=1, b=3)
        assert shown(plan(target, old, replicas("a1"))) == "+a2 +b2 +b2 +b2"

    @pytest.mark.parametrize("surge", [0, 1])
    def test_one_that_is_left_out_is_held_to_the_end(self, surge: int) -> None:
        old, target = wanted(1, surge=surge, a=1, b=2), wanted(2, proven=True, a=1)
        assert shown(plan(target, old, replicas("a1", "a2?", "b1"))) == "+b1"
        assert shown(plan(target, old, replicas("a1", "a2?", "b1", "b1", "b1"))) == "-4"
        ends = plan(target, old, replicas("a1", "a2?", "b1", "b1!"))
        assert shown(ends) == ("+b1" if surge else ""), "only where there is room"
        assert shown(plan(target, target, replicas("a2", "b1", "b1."))) == "-1 -2"

    def test_one_that_is_to_have_no_replicas_is_proven(self) -> None:
        assert is_proven(wanted(1, a=1, b=0), replicas("a1"))
        assert is_complete(wanted(1, a=1, b=0), replicas("a1"))


class TestThirdDeploy:
    def test_what_stands_in_goes_on_doing_so(self) -> None:
        """Version 2 had replaced one of version 1 when 3 was deployed."""
        old, target = wanted(1, a=3), wanted(3, a=3)
        assert shown(plan(target, old, replicas("a1", "a1", "a2", "a2?"))) == "-3 +a3"
        assert shown(plan(target, old, replicas("a1", "a1", "a2", "a3?"))) == ""
        target = target._replace(proven=True)
        assert shown(plan(target, old, replicas("a1", "a1", "a2", "a3"))) == "+a3 -0"

    def test_what_is_one_too_many_goes_at_once(self) -> None:
        old, target = wanted(1, a=2), wanted(3, a=2)
        assert shown(plan(target, old, replicas("a1", "a2", "a2"))) == "-2 +a3"

    def test_before_anything_served(self) -> None:
        assert shown(plan(wanted(2, a=2), None, replicas("a1?", "a1."))) == "+a2 +a2 -0 -1"


class TestTime:
    def test_a_start_waits_for_its_time(self) -> None:
        target = wanted(1, not_before={"a": 7.0, "b": 5.0}, a=1, b=1, c=1)
        assert shown(plan(target, None, [], now=4.0)) == "+c1 @5"
        assert shown(plan(target, None, replicas("c1?"), now=5.0)) == "+b1 @7"
        assert shown(plan(target, None, replicas("c1?", "b1?"), now=7.0 - TICK_S / 2)) == "+a1"
        assert shown(plan(target, None, replicas("a1", "b1", "c1"), now=4.0)) == ""

    def test_what_was_given_up_never_starts(self) -> None:
        target = wanted(1, not_before={"a": math.inf, "b": 9.0}, a=1, b=1)
        assert shown(plan(target, None, [], now=4.0)) == "@9"
        assert shown(plan(target, None, replicas("b1"), now=4.0)) == ""

    def test_by_version(self) -> None:
        old = wanted(1, not_before={"a": math.inf}, a=1)
        assert shown(plan(wanted(2, a=1), old, [], now=4.0)) == "+a2"
        target = wanted(2, not_before={"a": 5.0}, a=1)
        assert shown(plan(target, wanted(1, a=1), [], now=4.0)) == "+a1 @5"


class TestComplete:
    @pytest.mark.parametrize(
        ("there", "complete", "proven"),
        [
            ("a1 a1 b1", True, True),
            ("a1 a1 b1 b1 c0?", True, True),
            ("a1 a1. b1", True, True),
            ("a1 b1", False, True),
            ("a1 a1 b1?", False, False),
            ("a1 a1 b0", False, False),
            ("a1 a1", False, False),
        ],
    )
    def test_every_backend_is_ready(self, there: str, complete: bool, proven: bool) -> None:
        assert is_complete(wanted(1, a=2, b=1), replicas(*there.split())) is complete
        assert is_proven(wanted(1, a=2, b=1), replicas(*there.split())) is proven

    def test_what_ends_does_not_count(self) -> None:
        ending = ReplicaState("x", "a", 1, ready=True, stopping=True)
        assert not is_complete(wanted(1, a=1), [ending])
        assert not is_proven(wanted(1, a=1), [ending])

    def test_some_may_be_excused(self) -> None:
        assert is_complete(wanted(1, a=1, b=1), replicas("a1"), {"b"})
        assert not is_complete(wanted(1, a=1, b=1), replicas("a1"), {"a"})


# -- whatever happens --------------------------------------------------------------------------


class World:
    """An app as the controller has it, and the processes: they come up, die, and take their time to stop.

    What is promised, to be kept by each step: of each backend that callers know, so many go on serving as
    the version that they know has replicas (`_promised`), as far as so many did. With `max_surge=0` it is
    one less while another version's replicas are there or are to come; and where those cannot stand in for
    the old ones, one less for each that is ready, for there is no room for both.
    """

    def __init__(self, target: Wanted, live: Wanted | None, there: Iterable[tuple[str, int, str]]) -> None:
        self.target = target
        self.live = live
        self.versions = {v.version: v for v in (live, target) if v is not None}
        self.count = 0
        self._replicas: dict[str, ReplicaState] = {}
        for backend, version, state in there:
            self._add(backend, version, ready=state == "ready", stopping=state == "stopping")

    def _add(self, backend: str, version: int, *, ready: bool = False, stopping: bool = False) -> None:
        self.count += 1
        id = f"r{self.count}"
        origin = self.versions[version].origin(backend) if version in self.versions else version
        since = 0 if origin == version else origin
        self._replicas[id] = ReplicaState(id, backend, version, ready=ready, stopping=stopping, since=since)

    def serves(self, replica: ReplicaState) -> bool:
        version = self.versions.get(replica.version)
        if self.live is None or version is None or not replica.ready or replica.stopping:
            return False
        known = self.live.spec.find(replica.backend) is not None
        if known and replica.origin == self.live.origin(replica.backend):
            return True
        return any(
            of.proven
            and of.spec.find(replica.backend) is not None
            and of.origin(replica.backend) == replica.origin
            and of.spec.stands_in_for(self.live.spec, replica.backend)
            for of in (self.target, version)
        )

    @property
    def states(self) -> list[ReplicaState]:
        return [replica._replace(serves=self.serves(replica)) for replica in self._replicas.values()]

    def _serving(self) -> dict[str, int]:
        served = [replica.backend for replica in self.states if replica.serves]
        return {name: served.count(name) for name in NAMES}

    # -- what happens to it ------------------------------------------------------------------

    def come_up(self, id: str) -> None:
        self._replicas[id] = self._replicas[id]._replace(ready=True)

    def vanish(self, id: str) -> None:
        """It dies, or its stop is through."""
        del self._replicas[id]

    def starting(self) -> list[str]:
        return [r.id for r in self._replicas.values() if not r.ready and not r.stopping]

    def stopping(self) -> list[str]:
        return [r.id for r in self._replicas.values() if r.stopping]

    def retarget(self, target: Wanted) -> None:
        self.versions[target.version] = self.target = target

    def respecify(self, spec: AppSpec) -> None:
        """Scaled: not another version."""
        is_live = self.live is self.target
        self.retarget(self.target._replace(spec=spec))
        if is_live:
            self.live = self.target

    def go_back(self) -> None:
        """The target has failed."""
        if self.live is not None:
            self.target = self.live

    def recover(self) -> None:
        """Another controller: it finds what runs, and may not have heard that the target is proven."""
        if self.live is not self.target:
            self.retarget(self.target._replace(proven=False))

    # -- what is done ------------------------------------------------------------------------

    def step(self) -> list[Action]:
        """What the controller does whenever something happened."""
        if is_proven(self.target, self.states) and not self.target.proven:
            is_live = self.live is self.target
            self.retarget(self.target._replace(proven=True))
            self.live = self.target if is_live else self.live
        if is_complete(self.target, self.states):
            self.live = self.target
        actions = plan(self.target, self.live, self.states)
        before, promised = self._serving(), self._promised()
        self._carry_out(actions)
        after = self._serving()
        for name, number in promised.items():
            assert after[name] >= min(before[name], number), (name, shown(actions))
        for name in {action.backend for action in actions if isinstance(action, Start)}:
            self._check_room(name)
        return actions

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Stop):
                assert not self._replicas[action.replica].stopping, "it is stopped already"
                self._replicas[action.replica] = self._replicas[action.replica]._replace(stopping=True)
            else:
                assert isinstance(action, Start), "nothing has to wait"
                self._add(action.backend, action.version)
                version = self.versions[action.version]
                if self.target.shares(action.backend, version):
                    version = self.target
                wanted = version.spec.backend(action.backend).num_replicas
                assert self._num_own(action.backend, version) <= wanted, "it is there already"

    def _num_own(self, name: str, version: Wanted, *, ready: bool = False) -> int:
        """Of one version, without those that are going."""
        own = [
            r for r in self.states if (r.backend, r.origin, r.stopping) == (name, version.origin(name), False)
        ]
        return sum(r.ready for r in own) if ready else len(own)

    def _promised(self) -> dict[str, int]:
        if self.live is None:
            return {}
        return {backend.name: max(0, self._promised_of(backend)) for backend in self.live.spec.backends}

    def _promised_of(self, known: BackendSpec) -> int:
        assert self.live is not None, "there is something to promise"
        new = self.target.spec.find(known.name)
        name, number = known.name, known.num_replicas
        is_shared = new is not None and self.target.shares(name, self.live)
        if is_shared and new is not None:
            number = min(number, new.num_replicas)
        others = any(r.backend == name and r.origin != self.live.origin(name) for r in self.states)
        is_update = self.target is not self.live and not is_shared
        if new is None or new.max_surge > 0 or not (is_update or others):
            return number
        less = 1
        if is_update and not self.target.spec.stands_in_for(self.live.spec, name):
            less += self._num_own(name, self.target, ready=True)
        return number - less

    def _check_room(self, name: str) -> None:
        """Something was started: then there are not too many. With `max_surge=0` what ends counts."""
        new, old = self.target.spec.find(name), self.live.spec.find(name) if self.live is not None else None
        specs = [spec for spec in (new, old) if spec is not None]
        has_surge = specs[0].max_surge > 0
        most = max(spec.num_replicas for spec in specs) + (new.max_surge if new is not None else 0)
        if has_surge and self.live is not None and not self.target.spec.stands_in_for(self.live.spec, name):
            most = sum(spec.num_replicas for spec in specs)
        there = [r for r in self.states if r.backend == name and not (has_surge and r.stopping)]
        assert len(there) <= most, there


class Version(NamedTuple):
    """What a version is drawn from."""

    backends: dict[str, Any]
    surge: int
    more: frozenset[str]

    def wanted(self, number: int, *, proven: bool = False) -> Wanted:
        more = self.more & self.backends.keys()
        return wanted(number, surge=self.surge, proven=proven, more=more, **self.backends)


versions = st.builds(
    Version,
    st.dictionaries(st.sampled_from(NAMES), st.integers(0, 4), max_size=3),
    st.integers(0, 2),
    st.frozensets(st.sampled_from(NAMES)),
)
states = st.tuples(
    st.sampled_from(NAMES), st.integers(0, 2), st.sampled_from(["starting", "ready", "ready", "stopping"])
)
events = st.one_of(
    st.tuples(
        st.sampled_from(["come up", "come up", "die", "gone", "go back", "recover"]), st.integers(0, 9)
    ),
    st.tuples(st.just("deploy"), versions),
    st.tuples(st.just("update"), st.sampled_from(NAMES)),
    st.tuples(st.just("scale"), st.tuples(st.sampled_from(NAMES), st.integers(0, 4))),
)


def happen(world: World, event: str, detail: object) -> None:
    match event, detail:
        case "deploy", Version() as version:
            world.retarget(version.wanted(max(world.versions) + 1))
        case "scale", (str(name), int(number)):
            if world.target.spec.find(name) is not None:
                backend = msgspec.structs.replace(world.target.spec.backend(name), num_replicas=number)
                world.respecify(world.target.spec.with_backend(backend))
        case "update", str(name):
            if world.target.spec.find(name) is not None:
                spec = world.target.spec.as_next(world.target.version, name)
                world.retarget(Wanted(max(world.versions) + 1, spec))
        case "go back", _:
            world.go_back()
        case "recover", _:
            world.recover()
        case _, int(number):
            some = {"come up": world.starting, "gone": world.stopping}.get(event)
            ids = some() if some is not None else [replica.id for replica in world.states]
            if ids:
                (world.come_up if event == "come up" else world.vanish)(ids[number % len(ids)])


@given(
    new=versions,
    proven=st.booleans(),
    old=st.none() | versions,
    there=st.lists(states, max_size=12),
    happens=st.lists(events, max_size=20),
    data=st.data(),
)
def test_from_anywhere_it_ends_as_wanted_and_keeps_what_was_promised(
    new: Version,
    proven: bool,
    old: Version | None,
    there: list[tuple[str, int, str]],
    happens: list[tuple[str, object]],
    data: st.DataObject,
) -> None:
    world = World(new.wanted(2, proven=proven), old.wanted(1, proven=True) if old else None, there)
    world.step()
    for event, detail in happens:
        happen(world, event, detail)
        world.step()
        assert not any(isinstance(action, Stop) for action in world.step()), "at once, or not yet"
    _let_it_end(world, data)
    assert world.live == world.target
    assert [r for r in world.states if not r.serves] == []
    for name in NAMES:
        backend = world.target.spec.find(name)
        expected = backend.num_replicas if backend is not None else 0
        assert world._num_own(name, world.target) == expected
    assert len(world.states) == sum(backend.num_replicas for backend in world.target.spec.backends)


def _let_it_end(world: World, data: st.DataObject) -> None:
    """What starts comes up, what stops is gone, in any order."""
    for _ in range(200):
        world.step()
        pending = [*world.starting(), *world.stopping()]
        if not pending:
            return
        for id in data.draw(st.lists(st.sampled_from(pending), min_size=1, unique=True)):
            (world.come_up if id in world.starting() else world.vanish)(id)
    raise AssertionError(f"it does not come to an end: {world.states}")


def test_the_records_are_plain() -> None:
    assert msgspec.to_builtins(Start("a", 1)) == ("a", 1)
    assert Wanted(1, wanted(1).spec).version == 1

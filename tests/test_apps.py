"""An app without a controller: what serves, what a change makes of it, its record."""

from __future__ import annotations

import asyncio

import pytest

from serveit.control.apps import RunningApp
from serveit.control.orders import Deployed, DeployFailed, Deploying, Started
from serveit.control.plan import ReplicaState
from serveit.control.replicas import DEATHS, WITHIN_S, Replica, Version
from serveit.control.snapshot import ReplicaInfo
from tests.stage import scaled_to, spec

UP = Deployed((1, 1))


def add(app: RunningApp, version: Version, number: int, *, ready: bool = True, backend: str = "b") -> Replica:
    replica = app.replicas[f"{backend}#{number}"] = Replica(f"{backend}#{number}", backend, version)
    if ready:
        found = version.spec.find(backend)
        replica.become(Started(number, f"at {number}", found.settings if found is not None else b""))
    return replica


def app_of(version: Version, *, live: bool = True) -> RunningApp:
    app = RunningApp(version)
    if live:
        version.proven = True
        app.live = version
        app.settle(UP)
    return app


class TestServes:
    async def test_nothing_before_the_first_version_is_up(self) -> None:
        app = app_of(Version(1, spec(b=2)), live=False)
        replica = add(app, app.target, 1)
        assert not app.serves(replica)
        assert app.published() is None
        assert not app.advance()
        assert app.target.proven
        add(app, app.target, 2)
        assert app.advance()
        assert app.serves(replica)

    async def test_another_version_where_it_is_proven_and_fits(self) -> None:
        app = app_of(Version(1, spec(b=2)))
        for new, fits in (
            (spec(b=2, more=("/new",)), True),
            (spec(b=2, prefix="/v2"), True),
            (spec(c=1), False),
        ):
            version = Version(2, new)
            app.begin(version)
            replica = add(app, version, 3)
            assert not app.serves(replica), "it is not proven"
            version.proven = True
            assert app.serves(replica) is fits

    async def test_nothing_that_starts_or_ends(self) -> None:
        app = app_of(Version(1, spec(b=2)))
        assert not app.serves(add(app, app.target, 1, ready=False))
        ending = add(app, app.target, 2)
        assert app.serves(ending)
        ending.ending = asyncio.ensure_future(asyncio.sleep(0))
        assert not app.serves(ending)
        await ending.ending
        assert app.states() == [
            ReplicaState("b#1", "b", 1, ready=False),
            ReplicaState("b#2", "b", 1, ready=False, stopping=True),
        ]
        assert repr(app) == (
            "<RunningApp app target=<Version 1 of app> live=<Version 1 of app> "
            "[<Replica b#1 v1 starting>, <Replica b#2 v1 stopping>]>"
        )

    async def test_is_what_is_published(self) -> None:
        app = app_of(Version(1, spec(b=1, c=1)))
        add(app, app.target, 1)
        add(app, app.target, 2, ready=False, backend="c")
        info = app.published()
        assert info is not None
        assert [backend.replicas for backend in info.backends] == [(ReplicaInfo("b#1", "at 1"),), ()]
        app.leaving = True
        leaving = app.published()
        assert leaving is not None
        assert (leaving.routes, leaving.backends) == ((), info.backends)


class TestChanges:
    async def test_one_settles_once(self) -> None:
        app = app_of(Version(1, spec()), live=False)
        first = app.outcome
        app.settle(DeployFailed("no"))
        app.settle(UP)
        assert first.result() == DeployFailed("no")
        assert app.failed == "no"
        app.begin()
        assert (app.outcome is first, app.failed, app.changing) == (False, "", True)
        app.begin()
        app.settle(UP)
        assert app.failed == ""

    async def test_a_deploy_in_between_fails_the_one_before(self) -> None:
        app = app_of(Version(1, spec()), live=False)
        first = app.outcome
        app.begin(Version(2, spec()))
        assert first.result() == DeployFailed("another deploy of the app came in between")
        assert (app.failed, app.changing, app.target.number) == ("", True, 2)

    async def test_back_from_another_version(self) -> None:
        app = app_of(Version(1, spec(b=1)))
        app.begin(Version(2, spec(b=2)))
        assert app.go_back()
        assert app.target is app.live

    async def test_back_from_other_numbers(self) -> None:
        app = app_of(Version(1, spec(b=1, c=1)))
        app.update("b", scaled_to(3))
        app.update("b", scaled_to(5))
        app.update("c", scaled_to(2))
        assert app.before == {name: spec(b=1, c=1).backend(name) for name in "bc"}
        assert app.target.spec == spec(b=5, c=2)
        assert app.go_back()
        assert app.target.spec == spec(b=1, c=1)

    async def test_back_to_nothing(self) -> None:
        assert not app_of(Version(1, spec()), live=False).go_back()

    async def test_what_cannot_be_updated_is_no_change(self) -> None:
        app = app_of(Version(1, spec(b=1)))
        with pytest.raises(KeyError):
            app.update("c", scaled_to(1))
        with pytest.raises(ValueError, match="num_replicas must be ≥ 1"):
            app.update("b", scaled_to(-1))
        assert not app.changing

    async def test_what_one_hangs_on(self) -> None:
        app = app_of(Version(1, spec(b=1, c=1)))
        b, c = add(app, app.target, 1), add(app, app.target, 2, backend="c")
        assert not app.hangs_on(b), "nothing changes"
        app.update("b", scaled_to(2))
        assert app.hangs_on(b)
        assert not app.hangs_on(c), "it is not its backend"
        app.settle(UP)
        version = Version(2, spec(b=1))
        app.begin(version)
        assert not app.hangs_on(b), "it is of the old version"
        assert app.hangs_on(add(app, version, 3, ready=False))

    async def test_what_was_given_up_after_it_was_up_is_not_waited_for(self) -> None:
        app = app_of(Version(1, spec(b=1, c=1)))
        add(app, app.target, 1)
        assert not app.complete
        app.target.given_up["c"] = "c died"
        assert app.complete
        version = Version(2, spec(b=1, c=1))
        version.given_up["c"] = "c died"
        app.begin(version)
        add(app, version, 2)
        assert not app.complete, "it never was"

    async def test_progress_is_the_targets(self) -> None:
        app = app_of(Version(1, spec(b=2)))
        add(app, app.target, 1)
        app.begin(Version(2, spec(b=2, c=1)))
        add(app, app.target, 2)
        add(app, app.target, 3, ready=False).waiting = "replica b#3 needs 1 GPU, 0 free"
        assert app.progress == Deploying({"b": (1, 2), "c": (0, 1)}, ("replica b#3 needs 1 GPU, 0 free",))


class TestStatus:
    async def test_says_how_it_is(self) -> None:
        app = app_of(Version(1, spec(b=1)), live=False)
        assert (await app.status())["state"] == "DEPLOYING"
        app.settle(DeployFailed("no"))
        status = await app.status()
        assert (status["state"], status["message"]) == ("FAILED", "no")
        app.begin()
        app.settle(UP)
        add(app, app.target, 1)
        assert await app.status() == {
            "state": "RUNNING",
            "message": "",
            "version": 1,
            "num_replicas": {"b": 1},
            "backends": {"b": {"b#1": {"state": "ready", "version": 1, "pid": 1}}},
            "failed": {},
        }
        app.target.given_up["b"] = "b died"
        status = await app.status()
        assert (status["state"], status["message"], status["failed"]) == ("FAILED", "b died", {"b": "b died"})
        app.leaving = True
        assert (await app.status())["state"] == "DELETING"


class TestRecord:
    async def test_of_an_app_that_changes(self) -> None:
        app = app_of(Version(1, spec(b=1)))
        app.begin(Version(2, spec(b=1)))
        app.update("b", scaled_to(4))
        app.target.given_up["b"] = "b died"
        add(app, Version(7, spec(b=1)), 1)
        record = app.record
        assert {version.number for version in record.versions} == {1, 2, 7}
        versions = {version.number: Version.of(version) for version in record.versions}
        again = RunningApp.of(record, versions)
        assert (again.target.number, again.live and again.live.number, again.changing) == (2, 1, True)
        assert again.before == {"b": spec(b=1).backend("b")}
        assert again.target.given_up == {"b": "b died"}
        add(again, versions[7], 1)
        assert again.record == record

    @pytest.mark.parametrize("outcome", [UP, DeployFailed("no")])
    async def test_of_one_that_does_not(self, outcome: Deployed | DeployFailed) -> None:
        app = app_of(Version(1, spec(b=1)), live=False)
        app.target.proven = True
        app.settle(outcome)
        again = RunningApp.of(app.record, {1: Version.of(app.record.versions[0])})
        assert again.record == app.record
        assert not again.changing
        assert again.failed == app.failed
        assert again.target.proven and again.live is None


class TestVersion:
    def test_each_death_puts_the_next_start_off(self) -> None:
        version = Version(1, spec(b=1, c=9))
        pauses = []
        for number in range(DEATHS - 1):
            version.died("b", 10.0 * number, "SIGKILL")
            pauses.append(version.wanted.not_before["b"] - 10.0 * number)
        assert pauses == [0.0, 0.5, 1.0, 2.0]
        assert not version.given_up
        version.died("b", 40.0, "SIGKILL")
        assert version.wanted.not_before["b"] == float("inf")
        assert version.given_up == {
            "b": f"{DEATHS} replicas of backend 'b' died within {WITHIN_S:g} s, the last: SIGKILL"
        }
        version.forgive("b")
        assert (version.given_up, version.wanted.not_before) == ({}, {})

    def test_deaths_are_forgotten_in_time(self) -> None:
        version = Version(1, spec(b=1))
        for number in range(3 * DEATHS):
            version.died("b", 16.0 * number, "SIGKILL")
        assert not version.given_up

    def test_many_at_once_were_on_one_node(self) -> None:
        version = Version(1, spec(b=9))
        for _ in range(9):
            version.died("b", 1.0, "node lost")
        assert not version.given_up
        assert version.wanted.not_before == {"b": 1.0}
        version.died("b", 1.0, "node lost")
        assert "b" in version.given_up

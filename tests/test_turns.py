from __future__ import annotations

import pytest

from serveit.control.orders import Deployed, DeployFailed, Deploying
from tests.stage import (
    PID,
    Stage,
    spec,
    staged,
    uncounted,
    version_of,
)


@pytest.fixture
def stage() -> Stage:
    return Stage()


@staged
class TestTurns:
    async def test_one_comes_then_one_goes(self, stage: Stage) -> None:
        member = stage.member()
        await stage.deploy(spec(b=2))
        old = stage.launcher.of("b")
        stage.launcher.eager = False
        deployed = await stage.deploying(spec(b=2))
        await stage.clock.settle()
        assert stage.running == ["b#1", "b#2", "b#3"], "one more than there are to be"
        member.hears.clear()
        stage.launcher.of("b#3")[0].ready()
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#2", "b#3"]}, "of both versions"
        assert [process.drains for process in old] == [[], []], "the member may still send to it"
        assert stage.running == ["b#1", "b#2", "b#3", "b#4"]
        member.hears.set()
        await stage.clock.settle()
        assert [process.drains for process in old] == [[30.0], []]
        assert not deployed.done()

        stage.launcher.of("b#4")[0].ready()
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#3", "b#4"]}
        assert [process.drains for process in old] == [[30.0], [30.0]]
        assert isinstance(deployed.result(), Deployed)
        assert stage.running == ["b#3", "b#4"]
        assert all(len(s.apps[0].backends[0].replicas) == 2 for s in member.snapshots if s.apps)

    async def test_nothing_of_it_serves_until_it_is_proven(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1, c=1))
        before = stage.controller.snapshot
        stage.launcher.eager = False
        deployed = await stage.deploying(spec(b=1, c=1))
        await stage.clock.settle()
        stage.launcher.of("b#3")[0].ready()
        await stage.clock.settle()
        assert uncounted(stage.controller.snapshot) == uncounted(before)
        stage.launcher.of("c#4")[0].ready()
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#3"], "app.c": ["c#4"]}
        assert isinstance(deployed.result(), Deployed)

    async def test_more_at_once(self, stage: Stage) -> None:
        await stage.deploy(spec(b=4, surge=2))
        stage.launcher.eager = False
        await stage.controller.deploy(spec(b=4, surge=2))
        await stage.clock.settle()
        assert len(stage.running) == 6
        for process in stage.launcher.of("b")[4:]:
            process.ready()
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#3", "b#4", "b#5", "b#6"]}
        assert stage.running[2:] == ["b#5", "b#6", "b#7", "b#8"]

    async def test_in_place_each_goes_first(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2, surge=0))
        stage.launcher.of("b")[1].may_stop.clear()
        stage.launcher.eager = False
        deployed = await stage.deploying(spec(b=2, surge=0))
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#1"]}
        assert stage.running == ["b#1", "b#2"], "it takes its room until it is gone"
        stage.launcher.of("b#2")[0].may_stop.set()
        await stage.clock.settle()
        assert stage.running == ["b#1", "b#3"]
        stage.launcher.of("b#3")[0].ready()
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#3"]}
        assert stage.running == ["b#3", "b#4"]
        stage.launcher.of("b#4")[0].ready()
        await stage.clock.settle()
        assert isinstance(deployed.result(), Deployed)

    async def test_without_a_route_that_was_there_all_of_it_comes_first(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2, more=("/old",)))
        stage.launcher.eager = False
        deployed = await stage.deploying(spec(b=2))
        await stage.clock.settle()
        assert stage.running == ["b#1", "b#2", "b#3", "b#4"]
        stage.launcher.of("b#3")[0].ready()
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#1", "b#2"]}, "b#3 does not know /old"
        stage.launcher.of("b#4")[0].ready()
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#3", "b#4"]}
        assert [route.pattern for route in stage.controller.snapshot.apps[0].routes] == ["/b"]
        assert isinstance(deployed.result(), Deployed)
        assert stage.running == ["b#3", "b#4"]

    async def test_new_routes_are_told_when_all_of_it_is_up(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2))
        stage.launcher.eager = False
        await stage.controller.deploy(spec(b=2, more=("/new",)))
        await stage.clock.settle()
        stage.launcher.of("b#3")[0].ready()
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#2", "b#3"]}
        assert len(stage.controller.snapshot.apps[0].routes) == 1, "b#2 does not know it"
        stage.launcher.of("b#4")[0].ready()
        await stage.clock.settle()
        assert len(stage.controller.snapshot.apps[0].routes) == 2
        assert stage.serving == {"app.b": ["b#3", "b#4"]}

    async def test_progress_is_told(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2))
        stage.launcher.eager = False
        version = await stage.controller.deploy(spec(b=2))
        seen = await stage.result(stage.controller.outcomes.progressed("app", version, None))
        assert seen == Deploying({"b": (0, 2)})
        for ready in (1, 2):
            told = stage.begin(stage.controller.outcomes.progressed("app", version, seen))
            await stage.clock.settle()
            assert not told.done()
            stage.launcher.of("b")[-1].ready()
            await stage.clock.settle()
            seen = told.result()
            assert seen == Deploying({"b": (1, 2)}) if ready == 1 else isinstance(seen, Deployed)
        assert await stage.result(stage.controller.outcomes.progressed("app", version, None)) == seen


@staged
class TestThatFail:
    async def test_leave_the_old_one_whole(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2))
        before = stage.controller.snapshot
        stage.launcher.eager = False
        deployed = await stage.deploying(spec(b=2, c=1))
        await stage.clock.settle()
        stage.launcher.of("b")[2].ready()
        stage.launcher.of("c")[0].fail(ValueError("no"))
        await stage.clock.settle()
        assert "ValueError: no" in deployed.result().text
        assert uncounted(stage.controller.snapshot) == uncounted(before)
        assert [process.order.id for process in stage.launcher.of("")] == ["b#1", "b#2"]
        assert [process.drains for process in stage.launcher.of("")] == [[], []]
        assert stage.controller.describe("app") == spec(b=2)
        status = await stage.status()
        assert (status["state"], status["version"]) == ("FAILED", 1)
        assert status["message"] == "replica c#4 cannot start: ValueError: no"

    async def test_halfway_go_back_in_turns(self, stage: Stage) -> None:
        await stage.deploy(spec(b=3))
        stage.launcher.eager = False
        deployed = await stage.deploying(spec(b=3))
        await stage.clock.settle()
        stage.launcher.of("b#4")[0].ready()
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#2", "b#3", "b#4"]}
        stage.launcher.of("b#5")[0].fail(ValueError("the second one"))
        await stage.clock.settle()
        assert "ValueError: the second one" in deployed.result().text
        assert stage.serving == {"app.b": ["b#2", "b#3", "b#4"]}, "it stands in until another is there"
        assert stage.running == ["b#2", "b#3", "b#4", "b#6"]
        assert version_of(stage.launcher.of("b#6")[0]) == 1
        stage.launcher.of("b#6")[0].ready()
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#2", "b#3", "b#6"]}
        assert stage.running == ["b#2", "b#3", "b#6"]

    async def test_by_deaths_before_all_are_up(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        stage.launcher.eager = False
        deployed = await stage.deploying(spec(b=1, c=1))
        for _ in range(5):
            await stage.clock.advance(3.0)
            stage.launcher.of("b")[-1].ready()
            await stage.clock.settle()
            stage.launcher.of("b")[-1].die("segfault")
        await stage.clock.settle()
        assert "5 replicas of backend 'b' died within 60 s" in deployed.result().text
        assert stage.serving == {"app.b": ["b#1"]}


@staged
class TestMeanwhile:
    async def test_the_dead_of_the_old_version_are_replaced(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        stage.launcher.eager = False
        await stage.controller.deploy(spec(b=1))
        await stage.clock.settle()
        stage.launcher.of("b")[0].die()
        await stage.clock.settle()
        assert stage.serving == {"app.b": []}
        new, replacement = stage.launcher.of("b")
        replacement.ready()
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#3"]}
        new.ready()
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#2"]}
        assert replacement.drains == [30.0]

    async def test_a_backend_that_is_left_out_drains_as_long_as_it_said(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1, c=1))
        gone = stage.launcher.of("c")[0]
        await stage.deploy(spec(b=1))
        assert gone.drains == [30.0]

    async def test_a_deploy_in_between_takes_over(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        stage.launcher.eager = False
        second = await stage.deploying(spec(b=1))
        await stage.clock.settle()
        third = await stage.deploying(spec(b=1))
        await stage.clock.settle()
        assert second.result() == DeployFailed("another deploy of the app came in between")
        assert [process.order.id for process in stage.launcher.of("b")] == ["b#1", "b#3"], "b#2 is of no use"
        stage.launcher.of("b#3")[0].ready()
        await stage.clock.settle()
        assert isinstance(third.result(), Deployed)
        assert stage.serving == {"app.b": ["b#3"]}

    async def test_a_deploy_right_behind_ends_what_the_first_has_begun(self, stage: Stage) -> None:
        await stage.controller.deploy(spec(b=1))
        await stage.deploy(spec(b=1))
        assert stage.running == ["b#2"]
        assert stage.serving == {"app.b": ["b#2"]}

    async def test_a_slow_stop_holds_nothing_up(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2))
        old = stage.launcher.of("b")
        for process in old:
            process.may_stop.clear()
        assert isinstance(await stage.deploy(spec(b=2)), Deployed)
        assert stage.running == ["b#1", "b#2", "b#3", "b#4"]
        status = await stage.status()
        assert status["state"] == "RUNNING"
        assert status["backends"]["b"] == {
            "b#1": {"state": "stopping", "version": 1, "pid": PID},
            "b#2": {"state": "stopping", "version": 1, "pid": PID},
            "b#3": {"state": "ready", "version": 2, "pid": PID, "running": 3},
            "b#4": {"state": "ready", "version": 2, "pid": PID, "running": 3},
        }
        assert isinstance(await stage.deploy(spec(b=2)), Deployed)
        assert [process.drains for process in old] == [[30.0], [30.0]], "each is stopped once"

"""Live changes of a backend's options, as the controller makes them."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from serveit.config import BackendConfig
from serveit.control.orders import (
    BackendChange,
    Deployed,
    DeployFailed,
    Deploying,
    Health,
    ReplicaOrder,
    Settings,
)
from serveit.control.snapshot import Snapshot
from tests.stage import FakeProcess, Stage, actor_name, scaled_to, spec, staged


@pytest.fixture
def stage() -> Stage:
    return Stage()


def change(user_config: str | None = None, **options: Any) -> BackendChange:
    return BackendChange(options, None if user_config is None else user_config.encode())


def user_config(process: FakeProcess) -> str | None:
    """What a replica has."""
    octets = msgspec.msgpack.decode(process.settings, type=Settings).user_config
    return None if octets is None else octets.decode()


def told(snapshot: Snapshot, backend: str = "b") -> Any:
    return next(b for b in snapshot.apps[0].backends if b.name == backend)


async def updating(stage: Stage, wanted: BackendChange, backend: str = "b") -> asyncio.Task[Any]:
    await stage.controller.update("app", backend, wanted)
    settled = stage.begin(stage.controller.settled("app"))
    await stage.clock.settle()
    return settled


@staged
class TestInPlace:
    async def test_all_replicas_take_it_in_and_stay(self, stage: Stage) -> None:
        await stage.deploy(spec(b=3, c=1))
        settled = await updating(stage, change("new", request_timeout_s=5.0, max_ongoing_requests=9))
        assert isinstance(settled.result(), Deployed)
        assert stage.running == ["b#1", "b#2", "b#3", "c#4"]
        assert [user_config(process) for process in stage.launcher.of("b")] == ["new"] * 3
        assert [len(process.configured) for process in stage.launcher.of("c")] == [0]
        info = told(stage.controller.snapshot)
        assert (info.request_timeout_s, info.max_ongoing_requests) == (5.0, 9)
        assert (await stage.status())["version"] == 1

    async def test_the_first_before_the_others(self, stage: Stage) -> None:
        await stage.deploy(spec(b=3))
        one, two, three = stage.launcher.of("b")
        for process in (one, two, three):
            process.may_configure.clear()
        settled = await updating(stage, change("new"))
        assert [len(process.configured) for process in (one, two, three)] == [1, 0, 0]
        one.may_configure.set()
        await stage.clock.settle()
        assert [len(process.configured) for process in (one, two, three)] == [1, 1, 1]
        assert not settled.done()
        two.may_configure.set()
        three.may_configure.set()
        await stage.clock.settle()
        assert isinstance(settled.result(), Deployed)
        assert [len(process.configured) for process in (one, two, three)] == [1, 1, 1], "once each"

    async def test_one_that_takes_long_is_told_of(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2))
        one, _ = stage.launcher.of("b")
        one.may_configure.clear()
        settled = await updating(stage, change("new"))
        moved = stage.begin(stage.controller.outcomes.moved("app", Deploying({"b": (2, 2)})))
        await stage.clock.settle()
        assert not moved.done()
        await stage.clock.advance(3)
        text = "replica b#1 takes in its configuration; waiting for 1 s"
        assert moved.result().waiting == (text,)
        assert (await stage.status())["message"] == text.replace("1 s", "3 s")
        one.may_configure.set()
        await stage.clock.settle()
        assert isinstance(settled.result(), Deployed)
        assert (await stage.status())["message"] == ""
        assert await stage.controller.outcomes.moved("app", None) is None, "no change is under way"

    async def test_later_replicas_start_with_it(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        await updating(stage, change("new"))
        settled = await updating(stage, scaled_to(2))
        assert isinstance(settled.result(), Deployed)
        two = stage.launcher.of("b#2")[0]
        assert (user_config(two), two.configured) == ("new", [])
        two.die()
        await stage.clock.advance(1.0)
        assert [user_config(process) for process in stage.launcher.of("b")] == ["new", "new"]

    async def test_one_that_is_starting_takes_it_in_when_it_is_ready(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        stage.launcher.eager = False
        scaled = await updating(stage, scaled_to(2))
        await updating(stage, change("new"))
        two = stage.launcher.of("b#2")[0]
        assert user_config(two) is None and not scaled.done()
        two.ready()
        await stage.clock.settle()
        assert user_config(two) == "new"
        assert isinstance(scaled.result(), Deployed)

    async def test_what_no_replica_needs_to_know(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        settled = await updating(stage, change(max_surge=0))
        assert isinstance(settled.result(), Deployed)
        assert stage.launcher.of("b")[0].configured == []
        assert stage.controller.describe("app").backend("b").max_surge == 0

    async def test_a_second_change_overtakes_the_first(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2))
        one, two = stage.launcher.of("b")
        one.may_configure.clear()
        await updating(stage, change("new"))
        settled = await updating(stage, change("newer"))
        one.may_configure.set()
        await stage.clock.settle()
        assert isinstance(settled.result(), Deployed)
        assert [user_config(process) for process in (one, two)] == ["newer", "newer"]

    async def test_one_that_dies_meanwhile_is_replaced(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2))
        one, two = stage.launcher.of("b")
        one.may_configure.clear()
        settled = await updating(stage, change("new"))
        one.die()
        one.may_configure.set()
        await stage.clock.advance(1.0)
        assert isinstance(settled.result(), Deployed)
        assert stage.running == ["b#2", "b#3"]
        assert [user_config(process) for process in stage.launcher.of("b")] == ["new", "new"]


@staged
class TestRefused:
    async def test_by_the_first_none_else_is_asked(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2))
        one, two = stage.launcher.of("b")
        one.refuses = ValueError("no such threshold")
        settled = await updating(stage, change("bad", request_timeout_s=5.0))
        outcome = settled.result()
        assert isinstance(outcome, DeployFailed)
        assert (
            "replica b#1 cannot take in its new configuration: ValueError: no such threshold" in outcome.text
        )
        assert outcome.cause is not None
        assert two.configured == []
        assert told(stage.controller.snapshot).request_timeout_s == 60.0
        assert stage.controller.describe("app") == spec(b=2)
        status = await stage.status()
        assert status["state"] == "FAILED" and "no such threshold" in status["message"]

    async def test_it_goes_back(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2))
        await updating(stage, change("old"))
        one, two = stage.launcher.of("b")
        two.refuses = ValueError("no")
        settled = await updating(stage, change("bad"))
        assert isinstance(settled.result(), DeployFailed)
        two.refuses = None
        await stage.clock.settle()
        assert [user_config(process) for process in stage.launcher.of("b#1")] == ["old"]
        assert all(user_config(process) == "old" for process in stage.launcher.of("b"))

    async def test_one_that_cannot_go_back_is_replaced(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        one = stage.launcher.of("b")[0]
        one.refuses = ValueError("no")
        settled = await updating(stage, change("bad"))
        assert isinstance(settled.result(), DeployFailed)
        assert stage.running == ["b#2"]
        assert stage.serving == {"app.b": ["b#2"]}
        assert user_config(stage.launcher.of("b")[0]) is None

    @pytest.mark.parametrize("hangs", [False, True])
    async def test_by_the_death_of_the_first_none_else_is_asked(self, stage: Stage, *, hangs: bool) -> None:
        await stage.deploy(spec(b=2))
        one, two = stage.launcher.of("b")
        one.may_configure.clear()
        settled = await updating(stage, change("deadly"))
        stage.launcher.eager = False
        if hangs:
            one.condition = Health("blocked", hangs=True)
        else:
            one.die()
        await stage.clock.advance(6.0)
        for _ in range(6):
            assert two.configured == [] and not settled.done()
            assert stage.serving == {"app.b": ["b#2"]}
            stage.launcher.of("b")[-1].die()
            await stage.clock.settle()
        one.may_configure.set()
        assert isinstance(settled.result(), DeployFailed)
        stage.launcher.of("b")[-1].ready()
        await stage.clock.settle()
        assert [user_config(process) for process in stage.launcher.of("b")] == [None, None]

    async def test_by_one_that_is_being_ended_anyway(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2))
        one, two = stage.launcher.of("b")
        two.may_stop.clear()
        two.may_configure.clear()
        await updating(stage, change("new"))
        settled = await updating(stage, scaled_to(1))
        two.refuses = ValueError("closed")
        two.may_configure.set()
        await stage.clock.settle()
        assert isinstance(settled.result(), Deployed)
        assert user_config(one) == "new"
        two.may_stop.set()
        await stage.clock.settle()
        assert stage.running == ["b#1"]

    async def test_a_new_replica_that_does_not_come_up_takes_it_back(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        stage.launcher.eager = False
        settled = await updating(stage, change("bad", num_replicas=2))
        two = stage.launcher.of("b#2")[0]
        two.fail(ValueError("bad threshold"))
        await stage.clock.settle()
        assert isinstance(settled.result(), DeployFailed)
        assert user_config(stage.launcher.of("b")[0]) is None
        assert stage.controller.describe("app") == spec(b=1)

    async def test_wrong_options_change_nothing(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        for wanted, error, text in (
            (change(num_replica=2), TypeError, "no option 'num_replica': did you mean 'num_replicas'"),
            (change(max_ongoing_requests=0), ValueError, "max_ongoing_requests must be ≥ 1"),
            (change(batch_wait_timeout_s=1.0), ValueError, "batch_wait_timeout_s needs max_batch_size"),
        ):
            with pytest.raises(error, match=text):
                await stage.controller.update("app", "b", wanted)
        assert stage.controller.describe("app") == spec(b=1)
        assert (await stage.status())["state"] == "RUNNING"


@staged
class TestByNewReplicas:
    async def test_only_its_backend_is_made_anew(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2, c=2))
        settled = await updating(stage, change(num_threads=4))
        assert isinstance(settled.result(), Deployed)
        assert stage.serving == {"app.b": ["b#5", "b#6"], "app.c": ["c#3", "c#4"]}
        assert sorted(stage.running) == ["b#5", "b#6", "c#3", "c#4"]
        order = stage.launcher.of("b#5")[0].order
        assert isinstance(order, ReplicaOrder)
        assert msgspec.msgpack.decode(order.settings, type=Settings).config.num_threads == 4
        assert (await stage.status())["version"] == 2

    async def test_turn_by_turn(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2, c=1))
        stage.launcher.eager = False
        settled = await updating(stage, change(ray_actor_options={"num_gpus": 1}))
        assert stage.running == ["b#1", "b#2", "c#3", "b#4"]
        assert stage.serving == {"app.b": ["b#1", "b#2"], "app.c": ["c#3"]}
        stage.launcher.of("b#4")[0].ready()
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#2", "b#4"], "app.c": ["c#3"]}
        stage.launcher.of("b#5")[0].ready()
        await stage.clock.settle()
        assert isinstance(settled.result(), Deployed)
        assert stage.serving == {"app.b": ["b#4", "b#5"], "app.c": ["c#3"]}

    async def test_one_that_does_not_come_up_changes_nothing(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1, c=1))
        stage.launcher.eager = False
        settled = await updating(stage, change(num_threads=4))
        stage.launcher.of("b#3")[0].fail(MemoryError("GPU"))
        await stage.clock.settle()
        assert "MemoryError: GPU" in settled.result().text
        assert stage.serving == {"app.b": ["b#1"], "app.c": ["c#2"]}
        assert stage.running == ["b#1", "c#2"]
        assert stage.controller.describe("app") == spec(b=1, c=1)

    async def test_others_that_die_meanwhile_come_back(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1, c=1))
        stage.launcher.eager = False
        settled = await updating(stage, change(num_threads=4))
        stage.launcher.of("c")[0].die()
        await stage.clock.advance(1.0)
        (again,) = stage.launcher.of("c")
        again.fail(ValueError("not now"))
        await stage.clock.advance(5.0)
        assert not settled.done(), "that is not the change's"
        stage.launcher.of("c")[0].ready()
        stage.launcher.of("b#3")[0].ready()
        await stage.clock.settle()
        assert isinstance(settled.result(), Deployed)
        assert [process.order.id for process in stage.launcher.of("")] == ["b#3", "c#5"]

    async def test_the_others_count_their_deaths_on(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1, c=1))
        for _ in range(3):
            stage.launcher.of("c")[0].die()
            await stage.clock.advance(5.0)
        await updating(stage, change(num_threads=4))
        for _ in range(2):
            stage.launcher.of("c")[0].die()
            await stage.clock.advance(9.0)
        assert "5 replicas of backend 'c' died" in (await stage.status())["message"]

    async def test_one_that_was_given_up_is_not_waited_for(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1, c=1))
        for _ in range(5):
            stage.launcher.of("c")[0].die()
            await stage.clock.advance(9.0)
        settled = await updating(stage, change(num_threads=4))
        assert isinstance(settled.result(), Deployed)
        assert "'c'" in (await stage.status())["message"]
        assert told(stage.controller.snapshot, "c").given_up

    async def test_again_and_again(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1, c=1))
        for number, backend in enumerate("bcbb", 2):
            settled = await updating(stage, change(num_threads=number), backend)
            assert isinstance(settled.result(), Deployed)
        assert stage.serving == {"app.b": ["b#6"], "app.c": ["c#4"]}
        deployed = await stage.deploy(spec(b=1, c=1))
        assert isinstance(deployed, Deployed)
        assert stage.serving == {"app.b": ["b#7"], "app.c": ["c#8"]}

    async def test_asked_for_twice_it_is_one_change(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        await stage.controller.update("app", "b", change(num_threads=4))
        settled = await updating(stage, change(num_threads=4))
        assert isinstance(settled.result(), Deployed)
        assert stage.serving == {"app.b": ["b#2"]}


@staged
class TestTogether:
    """Changes of several backends at once, of which one takes new replicas."""

    async def test_come_into_force_together(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2, c=1, d=1))
        one = stage.launcher.of("b")[0]
        one.may_configure.clear()
        in_place = await updating(stage, change("new", num_replicas=3))
        anew = await updating(stage, change(num_threads=2), "c")
        another = await updating(stage, change(num_threads=2), "d")
        assert not (in_place.done() or anew.done() or another.done())
        one.may_configure.set()
        await stage.clock.settle()
        assert [type(task.result()) for task in (in_place, anew, another)] == [Deployed] * 3
        assert [user_config(process) for process in stage.launcher.of("b")] == ["new"] * 3
        assert len(stage.serving["app.b"]) == 3 and (await stage.status())["state"] == "RUNNING"

    @pytest.mark.parametrize("dies", [False, True])
    async def test_one_that_is_refused_leaves_nothing_of_it(self, stage: Stage, *, dies: bool) -> None:
        await stage.deploy(spec(b=2, c=1))
        one, two = stage.launcher.of("b")
        one.refuses = ValueError("no such threshold")
        one.may_configure.clear()
        await updating(stage, change("bad"))
        stage.launcher.eager = False
        await updating(stage, change(num_threads=2), "c")
        if dies:
            await stage.follow()
        one.may_configure.set()
        stage.launcher.eager = True
        outcome = await stage.result(stage.controller.settled("app"))
        assert isinstance(outcome, DeployFailed) and "no such threshold" in outcome.text
        await stage.clock.advance(1.0)
        assert stage.controller.describe("app") == spec(b=2, c=1)
        assert [user_config(process) for process in stage.launcher.of("b")] == [None, None]
        assert two.alive and len(stage.serving["app.b"]) == 2

    async def test_one_that_kills_leaves_nothing_of_it(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1, c=1))
        stage.launcher.eager = False
        settled = await updating(stage, change(num_threads=2), "c")
        one = stage.launcher.of("b")[0]
        one.may_configure.clear()
        await updating(stage, change("deadly"))
        one.die()
        one.may_configure.set()
        for _ in range(3):
            await stage.clock.settle()
            again = stage.launcher.of("b")[0]
            assert user_config(again) == "deadly", "it is started with that, and dies of it"
            again.die()
        await stage.clock.settle()
        assert isinstance(settled.result(), DeployFailed)
        stage.launcher.of("b")[0].ready()
        await stage.clock.settle()
        assert len(stage.serving["app.b"]) == 1 and not (await stage.status())["failed"]

    async def test_what_was_given_up_meanwhile_is_tried_as_it_was_before(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        stage.launcher.eager = False
        settled = await updating(stage, change(num_replicas=2))
        for _ in range(5):
            stage.launcher.of("b")[0].die()
            await stage.clock.advance(9.0)
            if not settled.done():
                stage.launcher.of("b")[0].ready()
                await stage.clock.settle()
        assert "5 replicas of backend 'b' died" in settled.result().text
        stage.launcher.of("b")[0].ready()
        await stage.clock.settle()
        assert len(stage.serving["app.b"]) == 1 and not (await stage.status())["failed"]

    async def test_a_deploy_that_overtakes_one_and_fails(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        one = stage.launcher.of("b")[0]
        one.may_configure.clear()
        update = await updating(stage, change("new"))
        stage.launcher.eager = False
        deploy = await stage.deploying(spec(b=1))
        one.may_configure.set()
        await stage.clock.settle()
        assert "in between" in update.result().text
        assert user_config(one) is None, "what was said to have failed is taken back"
        stage.launcher.of("b#2")[0].fail(ValueError("no"))
        await stage.clock.settle()
        assert isinstance(deploy.result(), DeployFailed)
        assert stage.controller.describe("app") == spec(b=1)
        assert stage.kept.checkpoint.apps["app"].spec == spec(b=1)

    async def test_one_that_was_given_up_is_tried_anew(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1, c=1))
        for _ in range(5):
            stage.launcher.of("c")[0].die()
            await stage.clock.advance(9.0)
        assert stage.serving["app.c"] == []
        stage.launcher.eager = False
        await updating(stage, change(num_threads=2))
        stage.launcher.eager = True
        await updating(stage, scaled_to(2), "c")
        given_up = [version.given_up for version in stage.kept.checkpoint.apps["app"].versions]
        assert given_up == [{}, {}]
        for process in stage.launcher.of(""):
            process.ready()
        await stage.clock.settle()
        assert len(stage.serving["app.c"]) == 2
        assert (await stage.status())["state"] == "RUNNING"


@staged
class TestAfterTheController:
    async def test_a_replica_says_what_it_has(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2))
        await updating(stage, change("new"))
        await stage.follow()
        assert stage.serving == {"app.b": ["b#1", "b#2"]}
        assert [len(process.configured) for process in stage.launcher.of("b")] == [1, 1]

    async def test_the_next_one_goes_on_with_it(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2))
        for process in stage.launcher.of("b"):
            process.may_configure.clear()
        await updating(stage, change("new"))
        await stage.crash()
        for process in stage.launcher.of("b"):
            process.may_configure.set()
        await stage.recover()
        await stage.clock.settle()
        assert [user_config(process) for process in stage.launcher.of("b")] == ["new", "new"]
        assert isinstance(await stage.result(stage.controller.settled("app")), Deployed)

    async def test_what_runs_on_is_adopted(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1, c=1))
        await updating(stage, change(num_threads=4))
        await updating(stage, change(num_threads=2), "c")
        await updating(stage, change(num_threads=3))
        await stage.follow()
        assert stage.running == ["c#4", "b#5"]
        assert stage.serving == {"app.b": ["b#5"], "app.c": ["c#4"]}
        assert [actor_name(process).version for process in stage.launcher.of("c")] == [3]

    async def test_in_the_middle(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2, c=1))
        stage.launcher.eager = False
        await updating(stage, change(num_threads=4))
        stage.launcher.of("b#4")[0].ready()
        await stage.clock.settle()
        stage.launcher.eager = True
        await stage.crash()
        for process in stage.launcher.of("b"):
            process.ready()
        await stage.recover()
        await stage.clock.settle()
        assert isinstance(await stage.result(stage.controller.settled("app")), Deployed)
        assert stage.serving == {"app.b": ["b#4", "b#5"], "app.c": ["c#3"]}


def test_a_default_follows_what_it_goes_by() -> None:
    config = BackendConfig(max_batch_size=2)
    assert config.ongoing_limit(is_async=True) == 4
    assert config.merge(max_batch_size=20).ongoing_limit(is_async=True) == 40

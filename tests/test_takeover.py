"""A controller is gone from one moment to the next: the one that follows goes on from what was kept."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from serveit.control.adoption import ADOPT_S, STRAY_DRAIN_S
from serveit.control.orders import ActorName, Deployed, DeployFailed, Place, ReplicaOrder
from serveit.control.owners import RETURN_S
from serveit.control.reconciler import MAX_SILENT_DEATHS
from serveit.exceptions import NotServing
from tests.stage import LONG_S, PID, Stage, scaled_to, spec, staged, uncounted, version_of
from tests.test_controller import proxy_order


@pytest.fixture
def stage() -> Stage:
    return Stage()


@staged
class TestChanges:
    """Each is kept before it is made."""

    async def test_that_cannot_be_kept_are_not_made(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1, c=1))
        kept, before = stage.kept.checkpoint, stage.controller.snapshot
        stage.store.error = OSError("the GCS does not answer")
        for change in (
            stage.controller.deploy(spec(b=2)),
            stage.controller.deploy(spec("other", d=1)),
            stage.controller.update("app", "b", scaled_to(5)),
            stage.controller.reroute("app", "/b", {"c": 1.0}, {}),
            stage.controller.delete("app"),
        ):
            with pytest.raises(OSError, match="does not answer"):
                await stage.result(change)
        assert stage.controller.specs == {"app": spec(b=1, c=1)}
        assert stage.running == ["b#1", "c#2"]
        assert stage.controller.snapshot == before
        stage.store.error = None
        await stage.clock.advance(10.0)
        assert stage.kept.checkpoint == kept
        await stage.deploy(spec(b=2))
        assert stage.kept.checkpoint.version == 2, "no number was lost"

    async def test_nothing_is_started_before_it_is_kept(self, stage: Stage) -> None:
        stage.store.may_save.clear()
        deploying = stage.begin(stage.deploy(spec(b=1)))
        await stage.clock.settle()
        assert stage.launcher.made == []
        assert stage.controller.specs == {}
        stage.store.may_save.set()
        await deploying
        assert stage.running == ["b#1"]

    async def test_what_became_of_them_is_told_when_that_is_kept(self, stage: Stage) -> None:
        version = await stage.controller.deploy(spec(b=1))
        deployed = stage.begin(stage.controller.outcomes.deployed("app", version))
        await asyncio.sleep(0)
        stage.store.may_save.clear()
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#1"]}
        assert not deployed.done()
        stage.store.may_save.set()
        await stage.clock.settle()
        assert isinstance(deployed.result(), Deployed)
        assert stage.kept.checkpoint.apps["app"].live == version

    async def test_a_scale_that_is_in_force_is_kept_as_that(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        await stage.controller.update("app", "b", scaled_to(3))
        assert isinstance(await stage.result(stage.controller.settled("app")), Deployed)
        record = stage.kept.checkpoint.apps["app"]
        assert (record.changing, record.spec) == (False, spec(b=3))
        await stage.follow()
        stage.launcher.eager = False
        stage.launcher.of("b#2")[0].die()
        await stage.clock.settle()
        stage.launcher.made[-1].fail(ValueError("no"))
        await stage.clock.settle()
        assert stage.controller.describe("app") == spec(b=3), "what was acknowledged is not taken back"

    async def test_what_is_kept_is_what_is_then_made(self, stage: Stage) -> None:
        """The record of a change that is about to be made, and of the app that it was made of."""
        stage.launcher.eager = False
        kept: list[Any] = []

        async def check() -> None:
            before = stage.kept.checkpoint
            stage.controller._checkpoints.mark()
            await stage.controller._checkpoints.kept()
            after = stage.kept.checkpoint
            assert after.version == before.version
            for record in (before.apps["app"], after.apps["app"]):
                numbers = {version.number: version for version in record.versions}
                kept.append((numbers, msgspec.structs.replace(record, versions=())))
            assert kept.pop() == kept.pop()

        await stage.controller.deploy(spec(b=1, c=1))
        await check()
        for process in stage.launcher.made:
            process.ready()
        await stage.clock.settle()
        await stage.controller.update("app", "b", scaled_to(3))
        await check()
        await stage.controller.update("app", "c", scaled_to(2))
        await check()
        await stage.controller.reroute("app", "/b", {"c": 1.0}, {"b": 0.5})
        await check()
        await stage.controller.deploy(spec(b=2))
        await check()
        await stage.controller.update("app", "b", scaled_to(4))
        await check()

    async def test_a_shutdown_while_one_is_kept_comes_first(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        stage.store.may_save.clear()
        deploying = stage.begin(stage.controller.deploy(spec("late", c=1)))
        await stage.clock.settle()
        shutdown = stage.begin(stage.controller.shutdown())
        await stage.clock.settle()
        stage.store.may_save.set()
        await stage.clock.settle()
        assert shutdown.done()
        with pytest.raises(NotServing, match="shutting down"):
            deploying.result()
        assert stage.controller.is_empty

    async def test_an_app_that_fails_while_its_scale_is_kept(self, stage: Stage) -> None:
        stage.launcher.eager = False
        await stage.controller.deploy(spec(b=1))
        await stage.clock.settle()
        stage.store.may_save.clear()
        scaling = stage.begin(stage.controller.update("app", "b", scaled_to(2)))
        await stage.clock.settle()
        stage.launcher.made[0].fail(ValueError("no"))
        await stage.clock.settle()
        stage.store.may_save.set()
        await stage.clock.settle()
        with pytest.raises(KeyError, match="no app 'app'"):
            scaling.result()
        assert stage.controller.is_empty
        assert stage.kept.checkpoint.apps == {}

    async def test_an_app_that_fails_while_its_next_deploy_is_kept(self, stage: Stage) -> None:
        stage.launcher.eager = False
        await stage.controller.deploy(spec(b=1))
        await stage.clock.settle()
        stage.store.may_save.clear()
        deploying = stage.begin(stage.controller.deploy(spec(b=1)))
        await stage.clock.settle()
        stage.launcher.made[0].fail(ValueError("no"))
        await stage.clock.settle()
        stage.launcher.eager = True
        stage.store.may_save.set()
        await stage.clock.settle()
        assert isinstance(
            await stage.result(stage.controller.outcomes.deployed("app", deploying.result())), Deployed
        )
        assert stage.serving == {"app.b": ["b#2"]}

    async def test_a_target_that_fails_while_its_own_backend_is_scaled(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        stage.launcher.eager = False
        await stage.controller.deploy(spec(b=1, c=1))
        await stage.clock.settle()
        stage.store.may_save.clear()
        scaling = stage.begin(stage.controller.update("app", "c", scaled_to(2)))
        await stage.clock.settle()
        stage.launcher.of("c")[0].fail(ValueError("no"))
        await stage.clock.settle()
        stage.store.may_save.set()
        await stage.clock.settle()
        with pytest.raises(KeyError, match="no backend 'c'"):
            scaling.result()
        assert (await stage.status())["state"] == "FAILED"
        assert stage.kept.checkpoint.apps["app"].spec == spec(b=1)

    async def test_an_app_that_fails_while_its_delete_is_kept(self, stage: Stage) -> None:
        stage.launcher.eager = False
        await stage.controller.deploy(spec(b=1))
        await stage.clock.settle()
        stage.store.may_save.clear()
        deleting = stage.begin(stage.controller.delete("app"))
        await stage.clock.settle()
        stage.launcher.made[0].fail(ValueError("no"))
        await stage.clock.settle()
        stage.store.may_save.set()
        await stage.clock.settle()
        assert deleting.done()
        assert stage.controller.is_empty
        assert (stage.kept.checkpoint.apps, stage.kept.checkpoint.leaving) == ({}, ())


@staged
class TestTheInstance:
    async def test_is_the_same(self, stage: Stage) -> None:
        version = await stage.controller.deploy(spec(b=2, c=1))
        await stage.clock.settle()
        before, secret = stage.controller.snapshot, stage.controller.secret
        await stage.follow()
        assert stage.controller.secret == secret
        assert uncounted(stage.controller.snapshot) == uncounted(before)
        assert stage.controller.snapshot.version > before.version
        assert stage.controller.snapshot.version[0] > before.version[0]
        assert [backend.num_started for app in before.apps for backend in app.backends] == [2, 1]
        counts = [b.num_started for app in stage.controller.snapshot.apps for b in app.backends]
        assert counts == [0, 0], "each controller counts from 0"
        assert [uncounted(s) for s in stage.witness.snapshots] == [uncounted(before)], (
            "nothing was told before it was known"
        )
        assert stage.running == ["b#1", "b#2", "c#3"]
        assert len(stage.launcher.made) == 3
        assert [process.starts for process in stage.launcher.made] == [2, 2, 2], "each was asked again"
        status = await stage.status()
        assert (status["state"], status["version"]) == ("RUNNING", version)
        assert status["backends"]["b"]["b#1"]["pid"] == PID
        deployed = await stage.result(stage.controller.outcomes.deployed("app", version))
        assert deployed == Deployed(stage.controller.snapshot.version), "whoever asks again may rely on that"

    async def test_goes_on_counting(self, stage: Stage) -> None:
        first = await stage.controller.deploy(spec(b=2))
        await stage.clock.settle()
        await stage.follow()
        await stage.deploy(spec(b=2))
        assert [process.order.id for process in stage.launcher.made] == ["b#1", "b#2", "b#3", "b#4"]
        assert version_of(stage.launcher.made[-1]) == first + 1
        order = stage.launcher.made[-1].order
        assert isinstance(order, ReplicaOrder)
        assert order.secret == stage.controller.secret

    async def test_gives_no_number_twice_though_the_last_has_died(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        stage.launcher.made[0].die()
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#2"]}
        await stage.crash()
        stage.launcher.made[1].die()
        await stage.recover()
        assert stage.serving == {"app.b": ["b#3"]}, "callers know another b#2"

    async def test_again_and_again(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2))
        epochs = []
        for _ in range(5):
            await stage.follow()
            epochs.append(stage.controller.snapshot.version[0])
            assert stage.serving == {"app.b": ["b#1", "b#2"]}
        assert epochs == sorted(set(epochs))
        assert len(stage.launcher.made) == 2

    async def test_keeps_its_traffic_and_numbers(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1, c=1))
        await stage.controller.update("app", "b", scaled_to(2))
        await stage.controller.reroute("app", "/b", {"b": 0.5, "c": 0.5}, {})
        await stage.clock.settle()
        before = stage.controller.snapshot
        await stage.follow()
        assert uncounted(stage.controller.snapshot) == uncounted(before)
        assert stage.controller.describe("app").backend("b").num_replicas == 2

    async def test_that_another_serveit_has_left_is_refused(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        await stage.crash()
        kept = stage.kept.octets
        stage.kept.octets = msgspec.msgpack.encode({"format": 99})
        with pytest.raises(ValueError, match="format 99.*serveit shutdown"):
            await stage.recover()
        assert stage.running == ["b#1"], "nothing of it is touched"
        stage.kept.octets = kept
        await stage.follow()

    async def test_that_was_ended_by_force_leaves_nothing(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        stage.launcher.make_stray("proxy-x-0123-1")
        await stage.crash()
        stage.kept.octets = None
        await stage.recover()
        assert stage.running == []
        assert stage.launcher.made[0].killed == 1
        assert stage.controller.snapshot.apps == ()
        assert stage.controller.is_empty

    async def test_that_was_ending_ends(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2))
        stage.launcher.made[0].may_stop.clear()
        stage.begin(stage.controller.shutdown())
        await stage.clock.settle()
        assert stage.kept.checkpoint.ending
        await stage.crash()
        stage.launcher.made[0].may_stop.set()
        await stage.recover()
        with pytest.raises(NotServing, match="shutting down"):
            await stage.controller.deploy(spec(b=1))
        assert stage.running == []
        assert len(stage.launcher.made) == 2, "nothing was started for that"
        assert stage.kept.octets is None
        assert stage.controller.is_empty

    async def test_that_was_ending_starts_nothing_for_that(self, stage: Stage) -> None:
        order = proxy_order()
        await stage.result(stage.controller.proxies.open(order.options, order))
        await stage.deploy(spec(b=2))
        proxy, dies, drains = stage.launcher.made
        proxy.may_stop.clear()
        stage.begin(stage.controller.shutdown())
        await stage.clock.settle()
        await stage.crash()
        dies.die()
        beginning = await stage.begin_recovery()
        assert beginning.done()
        assert stage.running == [proxy.order.id, drains.order.id], "it drains its server first"
        proxy.may_stop.set()
        await stage.clock.settle()
        assert stage.running == []
        assert len(stage.launcher.made) == 3
        assert stage.controller.is_empty

    async def test_keeps_its_http_servers(self, stage: Stage) -> None:
        order = proxy_order()
        started = await stage.result(stage.controller.proxies.open(order.options, order))
        await stage.deploy(spec(b=1))
        await stage.follow()
        assert stage.controller.proxies.url == started.address
        assert await stage.result(stage.controller.proxies.open(order.options, order)) == started
        assert len(stage.launcher.of("proxy")) == 1
        overview = await stage.result(stage.controller.overview())
        assert overview["url"] == started.address
        assert overview["epoch"] == stage.controller.snapshot.version[0]
        assert [server["state"] for server in overview["proxies"].values()] == ["ready"]
        assert overview["apps"]["app"]["state"] == "RUNNING"

    async def test_waits_for_its_http_servers_before_it_stops_what_they_know(self, stage: Stage) -> None:
        order = proxy_order()
        await stage.result(stage.controller.proxies.open(order.options, order))
        await stage.deploy(spec(b=1))
        await stage.follow()
        await stage.deploying(spec(b=1))
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#2"]}
        assert stage.running == [stage.launcher.made[0].order.id, "b#1", "b#2"], "it has not heard of b#2"
        stage.member(stage.launcher.of("proxy")[0].name)
        await stage.clock.settle()
        assert stage.running[1:] == ["b#2"]


@staged
class TestReplicas:
    async def test_that_died_meanwhile_are_replaced(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2))
        await stage.crash()
        stage.launcher.made[0].die()
        await stage.recover()
        assert stage.serving == {"app.b": ["b#2", "b#3"]}

    async def test_that_die_as_they_are_looked_for_are_replaced(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2))
        await stage.crash()
        stage.launcher.made[0].may_answer.clear()
        beginning = await stage.begin_recovery()
        stage.launcher.made[0].die()
        stage.launcher.made[0].may_answer.set()
        await stage.clock.settle()
        assert beginning.done()
        assert stage.serving == {"app.b": ["b#2", "b#3"]}

    async def test_that_do_not_answer_are_told_of_when_they_do(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2))
        slow = stage.launcher.made[1]
        await stage.crash()
        slow.may_answer.clear()
        beginning = await stage.begin_recovery()
        await stage.clock.advance(ADOPT_S - 0.1)
        assert stage.controller.snapshot.apps == (), "it is not known yet"
        assert not beginning.done()
        await stage.clock.advance(0.2)
        assert beginning.done()
        assert stage.serving == {"app.b": ["b#1"]}
        assert len(stage.launcher.made) == 2, "it is there, though it is silent"
        slow.may_answer.set()
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#1", "b#2"]}

    async def test_that_were_starting_go_on(self, stage: Stage) -> None:
        stage.launcher.eager = False
        version = await stage.controller.deploy(spec(b=2))
        await stage.clock.settle()
        stage.launcher.made[0].ready()
        await stage.clock.settle()
        await stage.follow()
        assert stage.serving == {}
        stage.launcher.made[1].ready()
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#1", "b#2"]}
        assert isinstance(await stage.result(stage.controller.outcomes.deployed("app", version)), Deployed)
        assert len(stage.launcher.made) == 2

    async def test_that_cannot_start_fail_the_deploy(self, stage: Stage) -> None:
        stage.launcher.eager = False
        version = await stage.controller.deploy(spec(b=1))
        await stage.clock.settle()
        await stage.crash()
        stage.launcher.made[0].fail(ValueError("no"))
        await stage.recover()
        failed = await stage.result(stage.controller.outcomes.deployed("app", version))
        assert isinstance(failed, DeployFailed)
        assert stage.controller.is_empty

    async def test_that_vanish_again_and_again_fail_it_too(self, stage: Stage) -> None:
        await stage.deploy(spec(b=MAX_SILENT_DEATHS))
        stage.launcher.eager = False
        version = await stage.controller.deploy(spec(b=MAX_SILENT_DEATHS, more=("/new",), surge=3))
        await stage.clock.settle()
        await stage.crash()
        for process in stage.launcher.made[MAX_SILENT_DEATHS:]:
            process.may_answer.clear()
            process.place()
        beginning = await stage.begin_recovery()
        for process in stage.launcher.made[MAX_SILENT_DEATHS:]:
            process.die("OOM")
            process.may_answer.set()
        for _ in range(MAX_SILENT_DEATHS - 1):
            await stage.clock.settle()
            for process in stage.launcher.of("b")[MAX_SILENT_DEATHS:]:
                process.die("OOM")
        await stage.clock.settle()
        assert beginning.done()
        failed = await stage.result(stage.controller.outcomes.deployed("app", version))
        assert f"OOM ({MAX_SILENT_DEATHS**2} times)" in failed.text
        assert len(stage.serving["app.b"]) == MAX_SILENT_DEATHS, "what served serves"

    async def test_that_are_leaving_go(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2))
        going = stage.launcher.made[1]
        going.may_stop.clear()
        await stage.controller.update("app", "b", scaled_to(1))
        await stage.clock.settle()
        assert going.drains == [30.0]
        await stage.follow()
        assert stage.serving == {"app.b": ["b#1"]}
        assert going.drains == [30.0, 30.0], "told again, it goes on"
        assert (await stage.status())["backends"]["b"]["b#2"]["state"] == "stopping"
        going.may_stop.set()
        await stage.clock.settle()
        assert stage.running == ["b#1"]
        assert len(stage.launcher.made) == 2

    async def test_that_were_about_to_leave_leave(self, stage: Stage) -> None:
        stage.member().hears.clear()
        await stage.deploying(spec(b=2))
        await stage.clock.advance(10.0)
        stage.member("deaf").hears.clear()
        await stage.clock.settle()
        await stage.controller.update("app", "b", scaled_to(1))
        await stage.clock.settle()
        assert stage.launcher.made[1].drains == []
        await stage.follow()
        assert stage.serving == {"app.b": ["b#1"]}
        assert stage.running == ["b#1"]

    async def test_that_nobody_knows_may_end_what_they_run(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        token = stage.kept.checkpoint.token
        names = {
            "of an unknown version": ActorName("app", "b#8", 77, token),
            "of an unknown app": ActorName("gone", "b#9", 1, token),
            "of a backend that it has not": ActorName("app", "z#10", 1, token),
            "of another instance": ActorName("app", "b#11", 1, "other"),
        }
        await stage.crash()
        strays = {what: stage.launcher.make_stray(str(name)) for what, name in names.items()}
        stage.launcher.make_stray("somebody")
        await stage.recover()
        assert {what: stray.drains for what, stray in strays.items()} == {
            what: [STRAY_DRAIN_S] for what in names
        }
        assert stage.serving == {"app.b": ["b#1"]}
        assert stage.running == ["b#1", "somebody"], "what is no replica is none of its business"
        await stage.controller.update("app", "b", scaled_to(2))
        await stage.clock.settle()
        assert stage.running == ["b#1", "somebody", "b#12"], "no name is used twice"
        stage.launcher.of("somebody")[0].die()

    async def test_of_a_backend_that_was_given_up_are_not_tried_anew(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        for _ in range(5):
            stage.launcher.of("b")[0].die("segfault")
            await stage.clock.advance(5.0)
        assert (await stage.status())["state"] == "FAILED"
        await stage.follow()
        status = await stage.status()
        assert status["state"] == "FAILED"
        assert "5 replicas of backend 'b' died" in status["message"]
        assert stage.running == []
        await stage.controller.update("app", "b", scaled_to(1))
        await stage.follow()
        assert stage.serving == {"app.b": [stage.running[0]]}, "it was to be tried anew"


@staged
class TestUpdates:
    async def test_go_on(self, stage: Stage) -> None:
        await stage.deploy(spec(b=3))
        stage.launcher.eager = False
        version = await stage.controller.deploy(spec(b=3))
        await stage.clock.settle()
        while len(stage.launcher.made) < 6 or not stage.launcher.made[-1].outcome.done():
            await stage.follow()
            assert len(stage.serving["app.b"]) == 3
            stage.launcher.made[-1].ready()
            await stage.clock.settle()
            assert all(len(s.apps[0].backends[0].replicas) == 3 for s in stage.witness.snapshots)
        await stage.follow()
        assert stage.serving == {"app.b": ["b#4", "b#5", "b#6"]}
        assert stage.running == ["b#4", "b#5", "b#6"]
        assert len(stage.launcher.made) == 6
        assert isinstance(await stage.result(stage.controller.outcomes.deployed("app", version)), Deployed)
        assert [process.killed for process in stage.launcher.made] == [0] * 6

    async def test_that_have_failed_have(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        stage.launcher.eager = False
        version = await stage.controller.deploy(spec(b=1))
        await stage.clock.settle()
        stage.launcher.made[1].fail(ValueError("no such file"))
        await stage.clock.settle()
        await stage.follow()
        status = await stage.status()
        text = "replica b#2 cannot start: ValueError: no such file"
        assert (status["state"], status["message"], status["version"]) == ("FAILED", text, 1)
        failed = await stage.result(stage.controller.outcomes.deployed("app", version))
        assert failed == DeployFailed(text)
        assert stage.serving == {"app.b": ["b#1"]}
        assert len(stage.launcher.made) == 2

    async def test_on_their_way_back_go_back(self, stage: Stage) -> None:
        await stage.deploy(spec(b=3))
        stage.launcher.eager = False
        await stage.controller.deploy(spec(b=3))
        await stage.clock.settle()
        stage.launcher.made[3].ready()
        await stage.clock.settle()
        stage.launcher.made[4].fail(ValueError("no"))
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#2", "b#3", "b#4"]}
        await stage.follow()
        assert stage.serving == {"app.b": ["b#2", "b#3", "b#4"]}
        stage.launcher.made[-1].ready()
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#2", "b#3", "b#6"]}
        assert len(stage.launcher.made) == 6

    async def test_asked_for_again_are_the_same(self, stage: Stage) -> None:
        version = await stage.controller.deploy(spec(b=1, id="x"))
        assert {await stage.controller.deploy(spec(b=1, id="x")) for _ in range(10)} == {version}
        await stage.follow()
        assert await stage.controller.deploy(spec(b=1, id="x")) == version
        assert stage.running == ["b#1"]
        assert await stage.controller.deploy(spec(b=1, id="y")) == version + 1
        assert await stage.controller.deploy(spec(b=1)) == version + 2, "without an id each is another"
        assert await stage.controller.deploy(spec(b=1)) == version + 3

    async def test_scales_that_fail_go_back_to_what_was(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        stage.launcher.eager = False
        await stage.controller.update("app", "b", scaled_to(3))
        await stage.clock.settle()
        await stage.follow()
        settled = stage.begin(stage.controller.settled("app"))
        await stage.clock.settle()
        assert not settled.done()
        stage.launcher.made[1].fail(MemoryError("GPU"))
        await stage.clock.settle()
        assert isinstance(settled.result(), DeployFailed)
        assert stage.controller.describe("app") == spec(b=1)
        assert stage.running == ["b#1"]


@staged
class TestDeletes:
    async def test_go_on(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2))
        busy = stage.launcher.made[0]
        busy.is_idle.clear()
        stage.begin(stage.controller.delete("app"))
        await stage.clock.settle()
        await stage.follow()
        assert stage.serving == {"app.b": ["b#1", "b#2"]}, "what runs may find what it calls"
        assert stage.controller.snapshot.apps[0].routes == ()
        assert stage.controller.specs == {}
        assert (await stage.status())["state"] == "DELETING"
        assert not stage.controller.is_empty
        again = stage.begin(stage.controller.delete("app"))
        await stage.clock.settle()
        assert not again.done()
        busy.is_idle.set()
        await stage.clock.settle()
        assert again.done()
        assert stage.running == []
        assert stage.controller.is_empty
        assert stage.kept.checkpoint.leaving == ()

    async def test_go_on_though_nobody_asks_again(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        stage.launcher.made[0].is_idle.clear()
        stage.begin(stage.controller.delete("app"))
        await stage.clock.settle()
        await stage.crash()
        await stage.recover()
        kept = stage.kept.checkpoint
        waiting = stage.begin(stage.controller.await_owners(kept))
        await stage.clock.advance(RETURN_S + 1.0)
        assert not waiting.done(), "nobody else looks whether the instance is empty"
        stage.launcher.made[0].is_idle.set()
        await stage.clock.settle()
        assert waiting.done()
        assert stage.controller.is_empty

    async def test_with_another_of_the_name(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        old = stage.launcher.made[0]
        old.is_idle.clear()
        stage.begin(stage.controller.delete("app"))
        await stage.clock.settle()
        await stage.deploy(spec(b=1))
        await stage.follow()
        assert stage.serving == {"app.b": ["b#2"]}
        assert stage.running == ["b#1", "b#2"]
        old.is_idle.set()
        await stage.clock.settle()
        assert stage.running == ["b#2"]
        assert (await stage.status())["state"] == "RUNNING"


@staged
class TestOwners:
    async def test_that_come_back_keep_their_apps(self, stage: Stage) -> None:
        for owner, backend in (("back", "b"), ("gone", "c")):
            stage.controller.owners.joined(owner)
            counts: dict[str, Any] = {backend: 1}
            await stage.deploy(spec(owner, owner=owner, **counts))
        await stage.deploy(spec("stays", d=1))
        await stage.follow()
        await stage.clock.advance(RETURN_S - 0.5)
        stage.controller.owners.joined("back")
        assert set(stage.serving) == {"back.b", "gone.c", "stays.d"}
        await stage.clock.advance(1.0)
        assert set(stage.serving) == {"back.b", "stays.d"}
        assert not stage.launcher.of("c")
        stage.controller.owners.left("back")

    async def test_are_all_given_the_same_time(self, stage: Stage) -> None:
        for owner, backend in (("one", "b"), ("two", "c")):
            stage.controller.owners.joined(owner)
            counts: dict[str, Any] = {backend: 1}
            await stage.deploy(spec(owner, owner=owner, **counts))
        for process in stage.launcher.made:
            process.is_idle.clear()
        await stage.follow()
        await stage.clock.advance(RETURN_S + 0.1)
        assert [len(process.idles) for process in stage.launcher.made] == [1, 1]
        assert stage.controller.specs == {}

    async def test_are_gone_even_if_that_cannot_be_kept_at_once(
        self, stage: Stage, caplog: pytest.LogCaptureFixture
    ) -> None:
        stage.controller.owners.joined("driver")
        await stage.deploy(spec(owner="driver", b=1))
        stage.store.error = OSError("the GCS does not answer")
        lost = stage.begin(stage.owner_lost("driver", 0.0))
        await stage.clock.advance(3.0)
        assert stage.running == ["b#1"]
        assert "app 'app' cannot be deleted now: the GCS does not answer" in caplog.text
        stage.store.error = None
        await stage.clock.advance(LONG_S)
        assert lost.done()
        assert stage.controller.is_empty


def test_a_place_has_the_name_of_its_actor() -> None:
    assert Place("n", "u", actor="app/b#1.1@t0").actor == str(ActorName("app", "b#1", 1, "t0"))

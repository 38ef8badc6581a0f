from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serveit.control.orders import Deployed, DeployFailed, Deploying, ReplicaOrder, StartFailed
from serveit.control.outcomes import MAX_OUTCOMES
from serveit.control.processes import NoPlace
from serveit.control.reconciler import MAX_SILENT_DEATHS
from serveit.control.snapshot import EndpointInfo
from tests.stage import (
    LONG_S,
    Stage,
    scaled_to,
    spec,
    staged,
)


@pytest.fixture
def stage() -> Stage:
    return Stage()


@staged
class TestFirstDeploy:
    async def test_all_replicas_are_started_and_published_together(self, stage: Stage) -> None:
        stage.launcher.eager = False
        deployed = await stage.deploying(spec(b=2, c=1))
        await stage.clock.settle()
        one, two, three = stage.launcher.made
        assert [process.order.id for process in (one, two, three)] == ["b#1", "b#2", "c#3"]
        token = stage.kept.checkpoint.token
        assert one.order == ReplicaOrder(
            "b#1",
            "app",
            "b",
            b"code",
            "/x",
            stage.controller.secret,
            False,
            actor=f"app/b#1.1@{token}",
            settings=spec(b=2).backend("b").settings,
            max_ongoing=7,
        )

        one.ready()
        three.ready()
        await stage.clock.settle()
        assert stage.serving == {}, "a part of an app does not serve"
        assert not deployed.done()

        two.ready()
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#1", "b#2"], "app.c": ["c#3"]}
        assert deployed.result() == Deployed(stage.controller.snapshot.version)
        assert [process.starts for process in stage.launcher.made] == [1, 1, 1]

    async def test_in_between_others_are_answered(self, stage: Stage) -> None:
        """Hundreds take seconds; what is deleted meanwhile is not started first."""
        stage.launcher.eager = False
        deployed = await stage.deploying(spec(b=30))
        before = len(stage.launcher.made)
        while len(stage.launcher.made) < 20:
            await asyncio.sleep(0)
            assert len(stage.launcher.made) - before <= 1, "one at a time"
            before = len(stage.launcher.made)
        await stage.result(stage.controller.delete("app"))
        assert len(stage.launcher.made) < 30
        assert deployed.result() == DeployFailed("the app was deleted")
        assert not stage.launcher.of("")

    async def test_it_is_deployed_once_those_who_watch_know(self, stage: Stage) -> None:
        member = stage.member()
        await stage.clock.settle()
        member.hears.clear()
        deployed = await stage.deploying(spec())
        await stage.clock.settle()
        assert not deployed.done()
        member.hears.set()
        await stage.clock.settle()
        assert isinstance(deployed.result(), Deployed)
        assert member.replicas == {"app.b": ["b#1"]}

    async def test_what_raises_fails_it_and_nothing_of_it_stays(self, stage: Stage) -> None:
        stage.launcher.eager = False
        deployed = await stage.deploying(spec(b=2, c=1))
        await stage.clock.settle()
        one, two, three = stage.launcher.made
        one.ready()
        await stage.clock.settle()
        two.fail(ValueError("no such file"))
        await stage.clock.settle()

        failed = deployed.result()
        assert isinstance(failed, DeployFailed)
        assert failed.text == "replica b#2 cannot start: ValueError: no such file"
        assert failed.cause == two.outcome.result()
        assert not stage.launcher.of("")
        assert one.drains == [30.0], "it had started: its object may be closed"
        assert three.killed == 1
        assert stage.controller.is_empty
        assert stage.controller.snapshot.apps == ()

    async def test_whoever_asks_late_hears_why_it_failed(self, stage: Stage) -> None:
        stage.launcher.eager = False
        version = await stage.controller.deploy(spec())
        await stage.clock.settle()
        stage.launcher.made[0].fail(OSError("disk"))
        await stage.clock.settle()
        failed = await stage.result(stage.controller.outcomes.deployed("app", version))
        assert "OSError: disk" in failed.text

    async def test_outcomes_are_kept_for_some_time_only(self, stage: Stage) -> None:
        first = await stage.controller.deploy(spec())
        for _ in range(MAX_OUTCOMES + 1):
            await stage.controller.deploy(spec())
        await stage.controller.deploy(spec())
        failed = await stage.result(stage.controller.outcomes.deployed("app", first))
        assert failed == DeployFailed("app 'app' was changed or deleted meanwhile")

    async def test_what_dies_in_silence_is_tried_again(self, stage: Stage) -> None:
        stage.launcher.eager = False
        deployed = await stage.deploying(spec())
        for _ in range(MAX_SILENT_DEATHS - 1):
            await stage.clock.settle()
            stage.launcher.made[-1].die("OOM")
        await stage.clock.settle()
        stage.launcher.made[-1].ready()
        await stage.clock.settle()
        assert isinstance(deployed.result(), Deployed)
        assert stage.serving == {"app.b": [f"b#{MAX_SILENT_DEATHS}"]}

    async def test_but_not_for_ever(self, stage: Stage) -> None:
        stage.launcher.eager = False
        deployed = await stage.deploying(spec())
        for _ in range(MAX_SILENT_DEATHS):
            await stage.clock.settle()
            stage.launcher.made[-1].die("OOM")
        await stage.clock.settle()
        assert deployed.result().text == "replica b#3 died while it started: OOM (3 times)"
        assert len(stage.launcher.made) == MAX_SILENT_DEATHS

    async def test_a_launcher_that_raises_fails_it(self, stage: Stage) -> None:
        stage.launcher.refuses = ValueError("the name is taken")
        failed = await stage.deploy(spec())
        assert failed == DeployFailed("replica b#1 cannot start: ValueError: the name is taken")
        assert stage.controller.is_empty

    async def test_one_that_raises_as_another_gets_ready(self, stage: Stage) -> None:
        stage.launcher.eager = False
        deployed = await stage.deploying(spec(b=2))
        await stage.clock.settle()
        ready, raises = stage.launcher.made
        raises.fail(ValueError("no"))
        ready.ready()
        await stage.clock.settle()
        assert "ValueError: no" in deployed.result().text
        assert stage.running == []
        assert stage.controller.snapshot.apps == ()

    async def test_one_that_raises_as_another_is_started(self, stage: Stage) -> None:
        stage.launcher.eager = False
        deployed = await stage.deploying(spec(b=2))
        await stage.clock.settle()
        dies, raises = stage.launcher.made
        dies.die("OOM")
        raises.fail(ValueError("no"))
        await stage.clock.settle()
        assert "ValueError: no" in deployed.result().text
        assert len(stage.launcher.made) == 2, "there is no use for a third any more"
        assert stage.controller.is_empty

    async def test_a_failure_without_words_is_told_by_its_place(self, stage: Stage) -> None:
        stage.launcher.eager = False
        version = await stage.controller.deploy(spec())
        await stage.clock.settle()
        stage.launcher.made[0].place()
        stage.launcher.made[0].outcome.set_result(StartFailed(b"", where="somewhere"))
        failed = await stage.result(stage.controller.outcomes.deployed("app", version))
        assert failed.text == "replica b#1 cannot start: somewhere"


@staged
class TestPlaces:
    async def test_a_process_that_gets_no_place_fails_the_deploy(self, stage: Stage) -> None:
        stage.launcher.eager = False
        deployed = await stage.deploying(spec(b=2))
        await stage.clock.settle()
        stage.launcher.made[0].ready()
        await stage.clock.advance(59.0)
        assert not deployed.done()
        await stage.clock.advance(1.5)
        assert deployed.result().text == (
            "replica b#2 has waited 60 s for its process to exist: it has not been started by Ray; give the "
            "cluster more, ask for less, or wait longer (deploy_timeout_s, --deploy-timeout)"
        )
        assert not stage.launcher.of("")

    async def test_one_that_can_never_have_a_place_fails_the_deploy_at_once(self, stage: Stage) -> None:
        stage.launcher.eager = False
        deployed = await stage.deploying(spec(b=1))
        await stage.clock.settle()
        stage.launcher.made[0].here.set_exception(
            NoPlace("its runtime_env cannot be set up: no such package")
        )
        await stage.clock.settle()
        assert deployed.result().text == (
            "replica b#1 cannot start: its runtime_env cannot be set up: no such package"
        )
        assert not stage.launcher.of("") and stage.controller.is_empty

    async def test_it_is_said_meanwhile_what_the_cluster_lacks(self, stage: Stage) -> None:
        stage.launcher.eager = False
        stage.launcher.lacks = "needs 4 CPU, 2 free"
        version = await stage.controller.deploy(spec(b=1))
        seen = await stage.result(stage.controller.outcomes.progressed("app", version, None))
        assert seen == Deploying({"b": (0, 1)})
        told = stage.begin(stage.controller.outcomes.progressed("app", version, seen))
        await stage.clock.advance(3.0)
        waiting = "replica b#1 needs 4 CPU, 2 free; waiting for 1 s"
        assert told.result() == Deploying({"b": (0, 1)}, (waiting,))
        status = await stage.status()
        waiting = "replica b#1 needs 4 CPU, 2 free; waiting for 3 s"
        assert (status["state"], status["message"]) == ("DEPLOYING", waiting)
        assert status["backends"]["b"]["b#1"] == {
            "state": "starting",
            "version": 1,
            "waiting_for": waiting,
        }
        stage.launcher.made[0].place()
        await stage.clock.settle()
        assert (await stage.status())["message"] == "", "it has what it needs"

    async def test_an_update_without_room_names_the_way_out(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        stage.launcher.eager = False
        stage.launcher.lacks = "needs 1 GPU, 0 free"
        deployed = await stage.deploying(spec(b=1))
        await stage.clock.advance(61.0)
        assert deployed.result().text == (
            "replica b#2 has waited 60 s for its process to exist: it needs 1 GPU, 0 free; give the cluster "
            "more, ask for less, update in place with max_surge=0, or wait longer (deploy_timeout_s, "
            "--deploy-timeout)"
        )
        assert stage.serving == {"app.b": ["b#1"]}

    async def test_one_that_waits_for_the_room_of_another_that_drains_may_wait(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2))
        old = stage.launcher.made[0]
        old.may_stop.clear()
        stage.launcher.eager = False
        deployed = await stage.deploying(spec(b=2))
        await stage.clock.settle()
        stage.launcher.made[2].ready()
        await stage.clock.settle()
        assert old.drains == [30.0] and len(stage.launcher.made) == 4
        await stage.clock.advance(100.0)
        assert not deployed.done(), "a drain takes what it takes"
        old.may_stop.set()
        await stage.clock.settle()
        stage.launcher.made[3].ready()
        await stage.clock.settle()
        assert isinstance(deployed.result(), Deployed)

    async def test_a_constructor_may_take_longer(self, stage: Stage) -> None:
        stage.launcher.eager = False
        deployed = await stage.deploying(spec())
        await stage.clock.settle()
        stage.launcher.made[0].place()
        await stage.clock.advance(LONG_S)
        assert not deployed.done()
        stage.launcher.made[0].ready()
        await stage.clock.settle()
        assert isinstance(deployed.result(), Deployed)

    async def test_a_replacement_may_wait(self, stage: Stage) -> None:
        await stage.deploy(spec())
        stage.launcher.eager = False
        stage.launcher.made[0].die()
        await stage.clock.advance(200.0)
        assert stage.serving == {"app.b": []}
        stage.launcher.made[1].ready()
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#2"]}


@staged
class TestScale:
    async def test_up(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        stage.launcher.eager = False
        await stage.controller.update("app", "b", scaled_to(3))
        settled = stage.begin(stage.controller.settled("app"))
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#1"]}
        assert not settled.done()
        stage.launcher.made[1].ready()
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#1", "b#2"]}
        stage.launcher.made[2].ready()
        await stage.clock.settle()
        assert isinstance(settled.result(), Deployed)
        assert stage.controller.describe("app").backend("b").num_replicas == 3

    async def test_down_is_told_first(self, stage: Stage) -> None:
        member = stage.member()
        await stage.deploy(spec(b=3))
        member.hears.clear()
        await stage.controller.update("app", "b", scaled_to(1))
        settled = stage.begin(stage.controller.settled("app"))
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#1"]}, "the youngest go"
        assert len(stage.launcher.of("b")) == 3
        assert not settled.done()
        member.hears.set()
        await stage.clock.settle()
        assert isinstance(settled.result(), Deployed)
        assert len(stage.launcher.of("b")) == 1

    async def test_twice_at_once_stops_each_once(self, stage: Stage) -> None:
        await stage.deploy(spec(b=3))
        await stage.controller.update("app", "b", scaled_to(2))
        await stage.controller.update("app", "b", scaled_to(1))
        await stage.clock.settle()
        assert [process.drains for process in stage.launcher.made] == [[], [30.0], [30.0]]

    async def test_one_that_fails_leaves_the_number_that_was(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        stage.launcher.eager = False
        await stage.controller.update("app", "b", scaled_to(3))
        settled = stage.begin(stage.controller.settled("app"))
        await stage.clock.settle()
        stage.launcher.made[1].ready()
        stage.launcher.made[2].fail(MemoryError("GPU"))
        await stage.clock.settle()
        assert "MemoryError: GPU" in settled.result().text
        assert stage.controller.describe("app") == spec(b=1)
        assert stage.serving == {"app.b": ["b#1"]}
        assert len(stage.launcher.of("b")) == 1

    async def test_during_a_deploy_is_part_of_it(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        stage.launcher.eager = False
        deployed = await stage.deploying(spec(b=1))
        await stage.clock.settle()
        await stage.controller.update("app", "b", scaled_to(2))
        settled = stage.begin(stage.controller.settled("app"))
        await stage.clock.settle()
        assert [process.order.id for process in stage.launcher.of("b")] == ["b#1", "b#2", "b#3"]
        stage.launcher.made[1].ready()
        await stage.clock.settle()
        assert not deployed.done()
        stage.launcher.made[2].ready()
        await stage.clock.settle()
        assert isinstance(deployed.result(), Deployed)
        assert settled.result() == deployed.result()
        assert stage.serving == {"app.b": ["b#2", "b#3"]}

    async def test_fails_with_the_deploy(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        stage.launcher.eager = False
        await stage.controller.deploy(spec(b=1))
        await stage.controller.update("app", "b", scaled_to(2))
        settled = stage.begin(stage.controller.settled("app"))
        await stage.clock.settle()
        stage.launcher.made[1].fail(ValueError("no"))
        await stage.clock.settle()
        assert isinstance(settled.result(), DeployFailed)
        assert stage.controller.describe("app") == spec(b=1)

    async def test_what_is_unknown(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        with pytest.raises(KeyError, match="no backend 'bb': did you mean 'b'"):
            await stage.controller.update("app", "bb", scaled_to(2))
        with pytest.raises(ValueError, match="num_replicas must be ≥ 1, got -1"):
            await stage.controller.update("app", "b", scaled_to(-1))
        with pytest.raises(KeyError, match="no app 'other'; running: app"):
            await stage.controller.update("other", "b", scaled_to(1))
        assert isinstance(await stage.result(stage.controller.settled("app")), Deployed)

    async def test_another_backend_that_is_lost_does_not_matter(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1, c=1))
        stage.launcher.eager = False
        await stage.controller.update("app", "b", scaled_to(2))
        settled = stage.begin(stage.controller.settled("app"))
        await stage.clock.settle()
        stage.launcher.of("c")[0].die()
        for _ in range(4):
            await stage.clock.advance(5.0)
            stage.launcher.of("c")[0].fail(ValueError("no"))
            await stage.clock.settle()
        assert not settled.done(), "b#3 is not there yet"
        stage.launcher.of("b")[-1].ready()
        await stage.clock.settle()
        assert isinstance(settled.result(), Deployed)


@staged
class TestTraffic:
    async def test_is_published(self, stage: Stage) -> None:
        member = stage.member()
        await stage.deploy(spec(b=1, c=1))
        await stage.controller.reroute("app", "/b", {"b": 0.5, "c": 0.5}, {"c": 0.1})
        await stage.result(stage.controller.publisher.acknowledged(stage.controller.snapshot.version))
        endpoint = member.snapshots[-1].apps[0].endpoints[0]
        assert endpoint == EndpointInfo("/b", (("b", 0.5), ("c", 0.5)), (("c", 0.1),))

    async def test_leads_nowhere_else(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        before = stage.controller.snapshot
        with pytest.raises(ValueError, match="unknown backend 'c'"):
            await stage.controller.reroute("app", "/b", {"c": 1.0}, {})
        with pytest.raises(KeyError, match="no endpoint '/c'"):
            await stage.controller.reroute("app", "/c", {"b": 1.0}, {})
        assert stage.controller.snapshot == before

    async def test_of_a_version_that_is_coming_up_comes_with_it(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1, c=1))
        stage.launcher.eager = False
        await stage.controller.deploy(spec(b=1, c=1))
        await stage.controller.reroute("app", "/b", {"c": 1.0}, {})
        await stage.clock.settle()
        for process in stage.launcher.made[2:]:
            process.ready()
        await stage.clock.settle()
        assert stage.controller.snapshot.apps[0].endpoints[0].weights == (("c", 1.0),)

    async def test_to_a_backend_that_is_only_coming_up_waits_for_it(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        stage.launcher.eager = False
        await stage.controller.deploy(spec(b=1, c=1))
        await stage.controller.reroute("app", "/b", {"c": 1.0}, {})
        await stage.clock.settle()
        assert stage.controller.snapshot.apps[0].endpoints[0].weights == (("b", 1.0),)
        for process in stage.launcher.made[1:]:
            process.ready()
        await stage.clock.settle()
        assert stage.controller.snapshot.apps[0].endpoints[0].weights == (("c", 1.0),)


@staged
class TestDeaths:
    async def test_of_one_that_was_ready(self, stage: Stage) -> None:
        member = stage.member()
        await stage.deploy(spec(b=2))
        stage.launcher.eager = False
        stage.launcher.made[0].die()
        await stage.clock.settle()
        assert member.replicas == {"app.b": ["b#2"]}
        stage.launcher.made[2].ready()
        await stage.clock.settle()
        assert member.replicas == {"app.b": ["b#2", "b#3"]}

    async def test_in_a_row_are_given_up_after_longer_and_longer_pauses(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1, c=1))
        for pause_s in (0.0, 0.5, 1.0, 2.0):
            made = len(stage.launcher.made)
            stage.launcher.of("b")[0].die("segfault")
            await stage.clock.settle()
            if pause_s:
                await stage.clock.advance(pause_s - 0.1)
                assert len(stage.launcher.made) == made, pause_s
                await stage.clock.advance(0.1)
            assert len(stage.launcher.made) == made + 1, pause_s
        stage.launcher.of("b")[0].die("segfault")
        await stage.clock.advance(LONG_S)
        assert stage.serving == {"app.b": [], "app.c": ["c#2"]}
        status = await stage.result(stage.controller.status("app"))
        assert status["failed"] == {
            "b": "5 replicas of backend 'b' died within 60 s, the last: replica b#6 died: segfault"
        }

        assert isinstance(await stage.deploy(spec(b=1, c=1)), Deployed)
        assert (await stage.result(stage.controller.status("app")))["failed"] == {}
        assert len(stage.serving["app.b"]) == 1

    async def test_scaling_tries_a_backend_anew(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        for _ in range(5):
            stage.launcher.of("b")[0].die()
            await stage.clock.advance(5.0)
        assert stage.serving == {"app.b": []}
        await stage.controller.update("app", "b", scaled_to(1))
        assert isinstance(await stage.result(stage.controller.settled("app")), Deployed)
        assert len(stage.serving["app.b"]) == 1

    async def test_now_and_then_are_no_reason(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        for _ in range(12):
            stage.launcher.of("b")[0].die()
            await stage.clock.advance(16.0)
        assert len(stage.serving["app.b"]) == 1

    async def test_of_a_whole_node_are_no_reason(self, stage: Stage) -> None:
        await stage.deploy(spec(b=12))
        for process in stage.launcher.of("b"):
            process.die("node lost")
        await stage.clock.settle()
        assert len(stage.serving["app.b"]) == 12

    async def test_replacements_that_do_not_start_count(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2))
        stage.launcher.eager = False
        stage.launcher.made[0].die()
        for fails in (True, False, True, False):
            await stage.clock.advance(5.0)
            starting = stage.launcher.of("b")[1]
            if fails:
                starting.fail(OSError("no model"))
            else:
                starting.die("OOM")
        await stage.clock.advance(LONG_S)
        assert stage.serving == {"app.b": ["b#2"]}, "the other one serves"
        failed = (await stage.result(stage.controller.status("app")))["failed"]
        assert "died while it started: OOM" in failed["b"]

    async def test_while_it_is_stopped_are_its_end(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2))
        going = stage.launcher.made[1]
        going.may_stop.clear()
        await stage.controller.update("app", "b", scaled_to(1))
        await stage.clock.settle()
        assert list((await stage.status())["backends"]["b"]) == ["b#1", "b#2"]
        going.die()
        await stage.clock.settle()
        assert len(stage.launcher.made) == 2
        assert list((await stage.status())["backends"]["b"]) == ["b#1"]


steps = st.lists(
    st.tuples(
        st.sampled_from(
            ["deploy", "scale", "delete", "ready", "ready", "fail", "die", "wait", "settle", "crash"]
        ),
        st.integers(0, 5),
        st.sampled_from("bc"),
    ),
    max_size=25,
)


@given(steps)
def test_whatever_happens_it_ends_as_wanted(sequence: list[tuple[str, int, str]]) -> None:
    asyncio.run(_ends_as_wanted(sequence))


async def _ends_as_wanted(sequence: list[tuple[str, int, str]]) -> None:
    stage = Stage()
    await stage.open()
    stage.launcher.eager = False
    outcomes: list[asyncio.Task[Any]] = []
    for step, number, backend in sequence:
        if step in ("ready", "fail", "die"):
            _befall(stage, step, number)
        elif step == "wait":
            await stage.clock.advance(float(number))
        elif step == "settle":
            await stage.clock.settle()
        elif step == "crash":
            outcomes.clear()
            await stage.follow()
        else:
            outcomes += await _order(stage, step, number, backend)
        started = {process.order.id for process in stage.launcher.made if process.outcome.done()}
        assert started.issuperset(id for ids in stage.serving.values() for id in ids)
    stage.launcher.eager = True
    for process in stage.launcher.of(""):
        process.ready()
    await stage.clock.advance(50.0)
    assert all(outcome.done() for outcome in outcomes), "nobody waits for ever"
    running = sorted(process.order.id for process in stage.launcher.of(""))
    assert running == sorted(id for ids in stage.serving.values() for id in ids), "what runs serves"
    if not stage.controller.is_empty:
        failed = (await stage.result(stage.controller.status("app")))["failed"]
        for wanted in stage.controller.describe("app").backends:
            assert len(stage.serving[f"app.{wanted.name}"]) == wanted.num_replicas or wanted.name in failed
    await stage.aclose()


def _befall(stage: Stage, step: str, number: int) -> None:
    """What happens to one of the processes."""
    living = stage.launcher.of("")
    if not living:
        return
    process = living[number % len(living)]
    if step == "die":
        process.die()
    elif step == "ready":
        process.ready()
    elif not process.outcome.done():
        process.fail(ValueError("no"))


async def _order(stage: Stage, step: str, number: int, backend: str) -> list[asyncio.Task[Any]]:
    """What a driver asks for, and waits for."""
    if step == "deploy":
        wanted = spec(b=number % 3, c=1) if number > 3 else spec(b=number % 3)
        version = await stage.controller.deploy(wanted)
        return [stage.begin(stage.controller.outcomes.deployed("app", version))]
    if step == "delete":
        return [stage.begin(stage.controller.delete("app"))]
    try:
        await stage.controller.update("app", backend, scaled_to(max(1, number)))
    except KeyError:  # no app, or no such backend in its version
        return []
    return [stage.begin(stage.controller.settled("app"))]

"""Things that happen at the same time, or one right after the other, to a controller and its apps."""

from __future__ import annotations

import msgspec
import pytest

from serveit.control.checkpoint import MAX_ATTEMPTS
from serveit.control.orders import Deployed, DeployFailed
from serveit.control.outcomes import MAX_OUTCOMES
from serveit.control.owners import RETURN_S
from serveit.control.processes import Node
from serveit.control.proxies import OTHERS_S
from serveit.control.reconciler import MAX_SILENT_DEATHS
from serveit.control.spec import check_app_name
from tests.stage import Stage, scaled_to, spec, staged
from tests.test_controller import proxy_order


@pytest.fixture
def stage() -> Stage:
    return Stage()


@staged
class TestOutcomes:
    async def test_of_many_deploys_at_once(self, stage: Stage) -> None:
        stage.launcher.eager = False
        specs = [spec(f"app{number}", prefix=f"/{number}", b=1) for number in range(MAX_OUTCOMES + 5)]
        waiting = [await stage.deploying(each) for each in specs]
        await stage.clock.settle()
        for process in stage.launcher.made:
            process.ready()
        await stage.clock.settle()
        assert all(isinstance(outcome.result(), Deployed) for outcome in waiting)

    async def test_of_many_apps_that_a_controller_takes_over(self, stage: Stage) -> None:
        for number in range(MAX_OUTCOMES + 5):
            await stage.deploy(spec(f"app{number}", prefix=f"/{number}", b=1))
        versions = {name: app.target for name, app in stage.kept.checkpoint.apps.items()}
        await stage.follow()
        for name, version in versions.items():
            outcome = await stage.result(stage.controller.outcomes.deployed(name, version))
            assert isinstance(outcome, Deployed), name

    async def test_of_an_app_of_which_nothing_is_left(self, stage: Stage) -> None:
        stage.launcher.eager = False
        await stage.controller.deploy(spec(b=1))
        await stage.clock.settle()
        stage.launcher.made[-1].fail(ValueError("no model"))
        await stage.clock.settle()
        status = await stage.status()
        assert status["state"] == "FAILED" and "ValueError: no model" in status["message"]
        assert (await stage.result(stage.controller.overview()))["apps"] == {}
        assert stage.controller.is_empty
        stage.launcher.eager = True
        await stage.deploy(spec(b=1))
        assert (await stage.status())["state"] == "RUNNING"


@staged
class TestBusyReplicas:
    async def test_of_the_old_version_are_drained_by_the_next_controller(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        old = stage.launcher.of("b#1")[0]
        stage.launcher.eager = False
        await stage.deploying(spec(b=1))
        await stage.clock.settle()
        new = stage.launcher.made[-1]
        await stage.crash()
        old.may_answer.clear()  # its event loop is busy
        new.ready()
        await stage.recover()
        await stage.clock.advance(1.0)
        assert old.drains == [30.0] and not old.killed

    async def test_of_a_deleted_app_too(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        old = stage.launcher.of("b#1")[0]
        old.is_idle.clear()
        stage.begin(stage.controller.delete("app"))
        await stage.clock.settle()
        await stage.crash()
        old.may_answer.clear()
        await stage.recover()
        await stage.clock.advance(10.0)
        assert old.drains == [30.0] and not old.killed


@staged
class TestBackendsThatAreNoMore:
    async def test_serve_the_requests_of_their_version(self, stage: Stage) -> None:
        await stage.deploy(spec(front=1, helper=1))
        front, helper = stage.launcher.of("front#1")[0], stage.launcher.of("helper#2")[0]
        front.may_stop.clear()  # it runs a request that may call the helper
        await stage.deploying(spec(front=1, more=("/helper",)))
        await stage.clock.settle()
        assert front.drains == [30.0] and not helper.drains
        assert stage.serving["app.helper"] == ["helper#2"]
        front.may_stop.set()
        await stage.clock.settle()
        assert helper.drains == [30.0] and "app.helper" not in stage.serving

    async def test_are_there_while_the_name_is_deployed_anew(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1, c=1))
        stage.launcher.of("b#1")[0].is_idle.clear()  # it runs a request that is about to call c
        stage.begin(stage.controller.delete("app"))
        await stage.clock.settle()
        stage.launcher.eager = False
        await stage.deploying(spec(b=1, c=1))
        await stage.clock.settle()
        assert stage.serving["app.c"] == ["c#2"]


@staged
class TestTraffic:
    async def test_that_changed_during_an_update_stays_if_that_fails(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1, c=1))
        stage.launcher.eager = False
        updating = await stage.deploying(spec(b=1, c=1))
        await stage.clock.settle()
        await stage.controller.reroute("app", "/b", {"c": 1.0}, {})
        assert stage.controller.snapshot.apps[0].endpoints[0].weights == (("c", 1.0),), "at once"
        stage.launcher.made[-1].fail(ValueError("no"))
        await stage.clock.settle()
        assert isinstance(updating.result(), DeployFailed)
        assert stage.controller.specs["app"].endpoints[0].weights == (("c", 1.0),)
        await stage.follow()
        assert stage.controller.snapshot.apps[0].endpoints[0].weights == (("c", 1.0),)


@staged
class TestOwners:
    async def test_that_is_lost_before_its_deploy_is_made(self, stage: Stage) -> None:
        stage.store.may_save.clear()
        stage.controller.owners.joined("me")
        deploying = stage.begin(stage.controller.deploy(spec(owner="me", b=1)))
        await stage.clock.settle()
        stage.begin(stage.owner_lost("me", 2.0))
        await stage.clock.advance(3.0)
        stage.store.may_save.set()
        await stage.clock.settle()
        assert deploying.done() and stage.running
        waiting = stage.begin(stage.controller.owners.await_one("me"))
        await stage.clock.advance(RETURN_S + 0.1)
        assert waiting.done() and not stage.running

    async def test_that_comes_back_to_its_deploy(self, stage: Stage) -> None:
        await stage.deploy(spec(owner="me", b=1))
        waiting = stage.begin(stage.controller.owners.await_one("me"))
        await stage.clock.advance(RETURN_S - 1.0)
        stage.controller.owners.joined("me")
        await stage.clock.advance(RETURN_S)
        assert waiting.done() and stage.running == ["b#1"]


@staged
class TestNodes:
    async def test_one_that_is_lost_with_replicas_that_start(self, stage: Stage) -> None:
        stage.launcher.eager = False
        deployed = await stage.deploying(spec(b=MAX_SILENT_DEATHS + 1))
        await stage.clock.settle()
        for process in list(stage.launcher.made):
            process.die("the node was lost")
        await stage.clock.settle()
        assert not deployed.done()
        for process in stage.launcher.of("b"):
            process.ready()
        await stage.clock.settle()
        assert isinstance(deployed.result(), Deployed)

    async def test_one_whose_server_does_not_start_holds_nobody_up(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def nodes() -> list[Node]:
            return [Node("0123456789", "127.0.0.1", True), Node("9876543210", "127.0.0.2", False)]

        monkeypatch.setattr(stage.hands, "nodes", nodes)
        stage.launcher.eager = False
        options = {**msgspec.json.decode(proxy_order().options), "location": "EveryNode"}
        order = msgspec.structs.replace(proxy_order(), options=msgspec.json.encode(options))
        opening = stage.begin(stage.controller.proxies.open(None, order))
        await stage.clock.settle()
        stage.launcher.made[0].ready()
        await stage.clock.settle()
        second = stage.begin(stage.controller.proxies.open(None, None))
        await stage.clock.settle()
        assert second.done() and not opening.done()
        await stage.clock.advance(OTHERS_S + 0.1)
        assert opening.result() == second.result()


@staged
class TestShutdown:
    async def test_is_kept_as_soon_as_the_store_can(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        stage.store.error = OSError("slow")
        ending = stage.begin(stage.controller.shutdown())
        await stage.clock.advance(1.0)
        assert not ending.done()
        stage.store.error = None
        await stage.clock.advance(60.0)
        assert ending.done() and stage.kept.octets is None

    async def test_a_store_that_is_gone_does_not_hold_it_up_for_ever(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        stage.store.error = OSError("gone")
        ending = stage.begin(stage.controller.shutdown())
        await stage.clock.advance(MAX_ATTEMPTS * 10.0)
        assert ending.done() and not stage.running
        stage.store.error = None
        await stage.store.clear()

    async def test_does_not_wait_for_a_deadline_in_an_hour(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        old = stage.launcher.of("b#1")[0]
        old.may_stop.clear()
        await stage.deploy(spec(b=1))
        assert old.drains == [30.0] and old.to_deadlines
        ending = stage.begin(stage.controller.shutdown())
        await stage.clock.advance(60.0)
        assert not ending.done()
        await stage.clock.advance(20.0)
        assert ending.done() and old.killed

    async def test_what_a_controller_was_removing_is_kept_while_the_next_looks(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1, c=1))
        stage.begin(stage.controller.proxies.open(None, proxy_order()))
        await stage.clock.settle()
        busy = stage.launcher.of("b#1")[0]
        busy.is_idle.clear()
        stage.begin(stage.controller.delete("app"))
        await stage.clock.settle()
        await stage.crash()
        busy.may_answer.clear()
        beginning = await stage.begin_recovery()
        await stage.clock.settle()
        assert not beginning.done() and len(stage.kept.checkpoint.leaving) == 1
        busy.may_answer.set()
        busy.is_idle.set()
        await stage.clock.advance(10.0)
        assert beginning.done() and not stage.launcher.of("b") and not stage.launcher.of("c")


@pytest.mark.parametrize("name", ["", "team/app", "a\nb"])
def test_names_that_no_actor_could_have(name: str) -> None:
    with pytest.raises(ValueError, match="an app's name has at least one character"):
        check_app_name(name)


@staged
class TestNamesThatAreTaken:
    async def test_by_an_app_that_stays(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        stage.controller.owners.joined("me")
        with pytest.raises(ValueError, match=r"'app' runs already: it was deployed, to stay .* \(--name\)"):
            await stage.controller.deploy(spec(owner="me", b=1))
        assert isinstance(await stage.deploy(spec(b=1)), Deployed), "its next version is another matter"

    async def test_by_another_program(self, stage: Stage) -> None:
        stage.controller.owners.joined("first")
        await stage.deploy(spec(owner="first", b=1))
        with pytest.raises(ValueError, match="'app' runs already: it is served by another program"):
            await stage.controller.deploy(spec(owner="second", b=1))
        assert isinstance(await stage.deploy(spec(owner="first", b=1)), Deployed)

    async def test_by_a_program_that_is_gone(self, stage: Stage) -> None:
        stage.controller.owners.joined("first")
        await stage.deploy(spec(owner="first", b=1))
        stage.begin(stage.owner_lost("first", 2.0))
        await stage.clock.settle()
        stage.controller.owners.joined("second")
        assert isinstance(await stage.deploy(spec(owner="second", b=1)), Deployed)
        await stage.clock.advance(10.0)
        assert stage.serving == {"app.b": ["b#2"]}, "it is not the first one's any more"


@staged
class TestBackendsThatAreGivenUp:
    async def test_callers_are_told(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1, c=1))
        for _ in range(5):
            stage.launcher.of("b")[0].die("segfault")
            await stage.clock.advance(5.0)
        told = {backend.name: backend.given_up for backend in stage.controller.snapshot.apps[0].backends}
        assert "5 replicas of backend 'b' died within 60 s" in told["b"] and told["c"] == ""
        await stage.controller.update("app", "b", scaled_to(1))
        await stage.clock.settle()
        assert not any(backend.given_up for backend in stage.controller.snapshot.apps[0].backends)

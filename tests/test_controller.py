from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from serveit.control.controller import Controller
from serveit.control.orders import Deployed, DeployFailed, ProxyOrder, Started, StartFailed
from serveit.exceptions import NotServing
from tests.stage import (
    FakeCluster,
    FakeStore,
    Hands,
    Kept,
    Stage,
    actor_name,
    spec,
    staged,
)


@pytest.fixture
def stage() -> Stage:
    return Stage()


@staged
class TestApps:
    async def test_are_independent(self, stage: Stage) -> None:
        await stage.deploy(spec("one", b=1))
        await stage.deploy(spec("two", c=1))
        assert stage.serving == {"one.b": ["b#1"], "two.c": ["c#2"]}
        stage.launcher.eager = False
        failing = await stage.deploying(spec("two", c=1))
        await stage.clock.settle()
        stage.launcher.made[-1].fail(ValueError("no"))
        await stage.clock.settle()
        assert isinstance(failing.result(), DeployFailed)
        await stage.result(stage.controller.delete("two"))
        assert stage.serving == {"one.b": ["b#1"]}
        assert "one" in repr(stage.controller)

    async def test_may_not_take_each_others_routes(self, stage: Stage) -> None:
        await stage.deploy(spec("one", b=1))
        with pytest.raises(ValueError, match="GET /b of app 'two' is taken by app 'one'.*prefix"):
            await stage.controller.deploy(spec("two", b=1))
        assert isinstance(await stage.deploy(spec("two", prefix="/two", b=1)), Deployed)
        assert isinstance(await stage.deploy(spec("one", b=1)), Deployed), "its own are its own"

    async def test_keep_the_routes_that_they_may_go_back_to(self, stage: Stage) -> None:
        await stage.deploy(spec("one", b=1))
        stage.launcher.eager = False
        await stage.controller.deploy(spec("one", c=1))
        for wanted in (spec("two", b=1), spec("two", c=1)):
            with pytest.raises(ValueError, match="taken by app 'one'"):
                await stage.controller.deploy(wanted)
        assert len(stage.launcher.made) == 1


@staged
class TestDelete:
    async def test_routes_go_first(self, stage: Stage) -> None:
        member = stage.member()
        await stage.deploy(spec(b=2))
        member.hears.clear()
        deleting = stage.begin(stage.controller.delete("app"))
        await stage.clock.settle()
        (leaving,) = stage.controller.snapshot.apps
        assert leaving.routes == () and len(leaving.backends[0].replicas) == 2
        assert not stage.controller.is_empty
        assert [process.idles for process in stage.launcher.made] == [[], []]
        member.hears.set()
        await stage.clock.settle()
        assert deleting.done() and stage.controller.snapshot.apps == ()
        assert stage.controller.is_empty
        assert [process.idles for process in stage.launcher.made] == [[30.0], [30.0]]
        assert [process.drains for process in stage.launcher.made] == [[30.0], [30.0]]

    async def test_of_nothing(self, stage: Stage) -> None:
        await stage.result(stage.controller.delete("app"))
        with pytest.raises(KeyError, match="no app 'app'; running: none"):
            stage.controller.describe("app")
        with pytest.raises(KeyError, match="no app 'app'; running: none"):
            await stage.controller.status("app")

    async def test_while_it_starts(self, stage: Stage) -> None:
        stage.launcher.eager = False
        deployed = await stage.deploying(spec(b=2))
        await stage.clock.settle()
        stage.launcher.made[0].place()
        await stage.result(stage.controller.delete("app"))
        assert deployed.result() == DeployFailed("the app was deleted")
        assert [process.killed for process in stage.launcher.made] == [1, 1]

    async def test_as_it_gets_ready(self, stage: Stage) -> None:
        stage.launcher.eager = False
        await stage.controller.deploy(spec())
        await stage.clock.settle()
        deleting = stage.begin(stage.controller.delete("app"))
        stage.launcher.made[0].ready()
        await stage.clock.settle()
        assert deleting.done()
        assert not stage.launcher.of("")
        assert stage.controller.snapshot.apps == ()

    async def test_and_deployed_again_at_once(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        old = stage.launcher.made[0]
        old.may_stop.clear()
        deleting = stage.begin(stage.controller.delete("app"))
        await stage.clock.settle()
        assert isinstance(await stage.deploy(spec(b=1)), Deployed)
        assert stage.serving == {"app.b": ["b#2"]}
        assert not deleting.done()
        old.may_stop.set()
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#2"]}
        assert deleting.done()

    async def test_who_asks_again_waits_for_the_same_end(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        (process,) = stage.launcher.made
        process.is_idle.clear()
        process.may_stop.clear()
        deletions = [stage.begin(stage.controller.delete("app"))]
        await stage.clock.settle()
        deletions.append(stage.begin(stage.controller.delete("app")))
        await stage.clock.settle()
        assert not any(deletion.done() for deletion in deletions), "what it runs may end"
        assert not stage.controller.is_empty
        process.is_idle.set()
        await stage.clock.settle()
        deletions.append(stage.begin(stage.controller.delete("app")))
        await stage.clock.settle()
        assert not any(deletion.done() for deletion in deletions), "it is being stopped"
        assert not stage.controller.is_empty
        process.may_stop.set()
        await stage.clock.settle()
        assert all(deletion.done() for deletion in deletions)
        assert stage.controller.is_empty
        assert process.drains == [30.0]

    async def test_who_asked_again_leaves_what_was_deployed_meanwhile(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        old = stage.launcher.made[0]
        old.is_idle.clear()
        deletions = [stage.begin(stage.controller.delete("app")) for _ in range(2)]
        await stage.clock.settle()
        await stage.deploy(spec(b=1))
        old.is_idle.set()
        await stage.clock.settle()
        assert all(deletion.done() for deletion in deletions)
        assert stage.serving == {"app.b": ["b#2"]}

    async def test_two_of_one_name_at_once(self, stage: Stage) -> None:
        for _ in range(2):
            await stage.deploy(spec(b=1))
            stage.launcher.made[-1].is_idle.clear()
            stage.begin(stage.controller.delete("app"))
            await stage.clock.settle()
        assert [app.name for app in stage.controller.snapshot.apps] == ["app"]
        assert stage.serving == {"app.b": ["b#2"]}, "the later one"
        stage.launcher.made[1].is_idle.set()
        await stage.clock.settle()
        assert not stage.launcher.of("b#2")
        assert stage.launcher.of("b#1")

    async def test_goes_on_without_whoever_wanted_it(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        (process,) = stage.launcher.made
        process.is_idle.clear()
        deleting = stage.begin(stage.controller.delete("app"))
        await stage.clock.settle()
        deleting.cancel()
        process.is_idle.set()
        await stage.clock.settle()
        assert not process.alive
        assert stage.controller.is_empty

    async def test_replicas_that_die_meanwhile_are_sent_nothing(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2))
        one, two = stage.launcher.made
        two.is_idle.clear()
        stage.begin(stage.controller.delete("app"))
        await stage.clock.settle()
        one.die()
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#2"]}
        assert stage.launcher.of("") == [two], "nothing is started in its place"

    async def test_what_cannot_say_whether_it_is_idle_is_ended(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        await stage.deploy(spec(b=1))

        async def idle(timeout_s: float) -> None:
            raise RuntimeError("Ray is gone")

        monkeypatch.setattr(stage.launcher.made[0], "idle", idle)
        await stage.result(stage.controller.delete("app"))
        assert "Ray is gone" in caplog.text
        assert not stage.launcher.of("")
        assert stage.controller.is_empty

    async def test_the_last_one_waits_for_what_a_failed_deploy_has_left(self, stage: Stage) -> None:
        await stage.deploy(spec("one", c=1))
        stage.launcher.eager = False
        failing = await stage.deploying(spec("two", b=2))
        await stage.clock.settle()
        _, started, raises = stage.launcher.made
        started.ready()
        started.may_stop.clear()
        await stage.clock.settle()
        raises.fail(ValueError("no"))
        await stage.clock.settle()
        assert isinstance(failing.result(), DeployFailed)
        deleting = stage.begin(stage.controller.delete("one"))
        await stage.clock.settle()
        assert not deleting.done(), "nobody else would ask whether the instance is empty"
        assert not stage.controller.is_empty
        started.may_stop.set()
        await stage.clock.settle()
        assert deleting.done()
        assert stage.controller.is_empty


@staged
class TestOwners:
    async def test_an_app_ends_with_its_owner(self, stage: Stage) -> None:
        stage.controller.owners.joined("driver")
        await stage.deploy(spec("mine", owner="driver", b=1))
        await stage.deploy(spec("other", c=1))
        lost = stage.begin(stage.owner_lost("driver", 2.0))
        await stage.clock.advance(1.9)
        assert set(stage.serving) == {"mine.b", "other.c"}
        await stage.clock.advance(0.2)
        assert lost.done()
        assert set(stage.serving) == {"other.c"}
        assert not stage.launcher.of("b")

    async def test_who_comes_back_keeps_it(self, stage: Stage) -> None:
        stage.controller.owners.joined("driver")
        await stage.deploy(spec(owner="driver", b=1))
        stage.begin(stage.owner_lost("driver", 2.0))
        await stage.clock.advance(1.0)
        stage.controller.owners.joined("driver")
        await stage.clock.advance(10.0)
        assert set(stage.serving) == {"app.b"}

    async def test_who_comes_and_goes_gets_its_time_each_time(self, stage: Stage) -> None:
        stage.controller.owners.joined("driver")
        await stage.deploy(spec(owner="driver", b=1))
        stage.begin(stage.owner_lost("driver", 2.0))
        await stage.clock.advance(1.0)
        stage.controller.owners.joined("driver")
        stage.begin(stage.owner_lost("driver", 2.0))
        await stage.clock.advance(1.5)
        assert set(stage.serving) == {"app.b"}
        await stage.clock.advance(1.0)
        assert stage.controller.is_empty

    async def test_another_that_leaves_does_not_cut_it_short(self, stage: Stage) -> None:
        for owner, backend in (("lost", "b"), ("leaves", "c")):
            stage.controller.owners.joined(owner)
            counts: dict[str, Any] = {backend: 1}
            await stage.deploy(spec(owner, owner=owner, **counts))
        (busy,) = stage.launcher.of("b")
        busy.is_idle.clear()
        lost = stage.begin(stage.owner_lost("lost", 0.0))
        await stage.clock.settle()
        await stage.result(stage.controller.delete("leaves", "leaves"))
        stage.controller.owners.left("leaves")
        assert not stage.controller.is_empty
        assert not lost.done()
        busy.is_idle.set()
        await stage.clock.settle()
        assert lost.done()
        assert stage.controller.is_empty

    async def test_what_its_failed_deploy_has_left_is_waited_for(self, stage: Stage) -> None:
        stage.launcher.eager = False
        stage.controller.owners.joined("driver")
        await stage.controller.deploy(spec(owner="driver", b=2))
        await stage.clock.settle()
        started, raises = stage.launcher.made
        started.ready()
        started.may_stop.clear()
        await stage.clock.settle()
        raises.fail(ValueError("no"))
        lost = stage.begin(stage.owner_lost("driver", 0.0))
        await stage.clock.settle()
        assert not lost.done()
        assert not stage.controller.is_empty
        started.may_stop.set()
        await stage.clock.settle()
        assert lost.done()
        assert stage.controller.is_empty

    async def test_only_its_own_is_waited_for(self, stage: Stage) -> None:
        await stage.deploy(spec(owner="first", b=1))
        stage.launcher.made[0].is_idle.clear()
        deleting = stage.begin(stage.controller.delete("app", "first"))
        await stage.clock.settle()
        await stage.deploy(spec(owner="second", b=1))
        await stage.result(stage.controller.delete("app", "second"))
        assert stage.serving == {"app.b": ["b#1"]}
        assert not deleting.done()

    async def test_who_has_said_goodbye_is_not_missed(self, stage: Stage) -> None:
        stage.controller.owners.joined("driver")
        await stage.deploy(spec(owner="driver", b=1))
        stage.controller.owners.left("driver")
        await stage.result(stage.owner_lost("driver", 2.0))
        assert set(stage.serving) == {"app.b"}, "it was not its end"

    async def test_a_second_line_counts(self, stage: Stage) -> None:
        stage.controller.owners.joined("driver")
        stage.controller.owners.joined("driver")
        await stage.deploy(spec(owner="driver", b=1))
        stage.begin(stage.owner_lost("driver", 2.0))
        await stage.clock.advance(10.0)
        assert set(stage.serving) == {"app.b"}


@staged
class TestShutdown:
    async def test_proxy_first(self, stage: Stage) -> None:
        await stage.result(stage.controller.proxies.open(None, proxy_order()))
        await stage.deploy(spec(b=2))
        proxy = stage.launcher.of("proxy")[0]
        proxy.may_stop.clear()
        shutdown = stage.begin(stage.controller.shutdown())
        await stage.clock.settle()
        assert proxy.drains == [30.0]
        assert [process.drains for process in stage.launcher.of("b")] == [[], []]
        with pytest.raises(NotServing, match="shutting down"):
            await stage.controller.deploy(spec(b=1))

        stage.launcher.of("b")[0].die()
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#2"]}, "what drains is not sent to the dead"
        assert len(stage.launcher.made) == 3, "nothing is started any more"
        proxy.may_stop.set()
        await stage.clock.settle()
        assert shutdown.done()
        assert stage.controller.is_empty

    async def test_waits_for_what_is_being_ended(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        old = stage.launcher.made[0]
        old.may_stop.clear()
        deleting = stage.begin(stage.controller.delete("app"))
        await stage.clock.settle()
        shutdown = stage.begin(stage.controller.shutdown())
        again = stage.begin(stage.controller.shutdown())
        await stage.clock.settle()
        assert not shutdown.done()
        assert not again.done()
        old.may_stop.set()
        await stage.clock.settle()
        assert shutdown.done()
        assert again.done()
        assert deleting.done()

    async def test_what_is_leaving_has_its_time(self, stage: Stage) -> None:
        await stage.result(stage.controller.proxies.open(None, proxy_order()))
        await stage.deploy(spec(b=1))
        (process,), (proxy,) = stage.launcher.of("b"), stage.launcher.of("proxy")
        process.is_idle.clear()
        deleting = stage.begin(stage.controller.delete("app"))
        await stage.clock.settle()
        shutdown = stage.begin(stage.controller.shutdown())
        await stage.clock.settle()
        assert proxy.drains == [30.0]
        assert not shutdown.done()
        process.is_idle.set()
        await stage.clock.settle()
        assert deleting.done() and shutdown.done()
        assert stage.launcher.of("") == []

    async def test_what_fails_to_end_holds_nothing_up(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        await stage.deploy(spec(b=2))
        broken = stage.launcher.made[0]

        async def stop(drain_s: float, *, to_deadlines: bool = False) -> None:
            raise RuntimeError("Ray is gone")

        monkeypatch.setattr(broken, "stop", stop)
        await stage.result(stage.controller.shutdown())
        assert "Ray is gone" in caplog.text
        assert not stage.launcher.of("b#2")
        assert stage.controller.is_empty
        broken.die()


def proxy_order(**options: Any) -> ProxyOrder:
    encoded = msgspec.json.encode({"host": "127.0.0.1", "port": 0, **options})
    return ProxyOrder("proxy", encoded, b"s")


@staged
class TestHTTP:
    async def test_is_started_once(self, stage: Stage) -> None:
        order = proxy_order()
        assert await stage.result(stage.controller.proxies.open(None, None)) is None
        assert stage.controller.proxies.url is None
        started = await stage.result(stage.controller.proxies.open(order.options, order))
        assert started == Started(17, "http://127.0.0.1:4321/a:b")
        assert await stage.result(stage.controller.proxies.open(order.options, order)) == started
        assert await stage.result(stage.controller.proxies.open(None, proxy_order(port=9))) == started
        assert stage.controller.proxies.url == started.address
        assert len(stage.launcher.made) == 1

    async def test_at_once_is_started_once(self, stage: Stage) -> None:
        order = proxy_order()
        both = await stage.result(
            asyncio.gather(*(stage.controller.proxies.open(None, order) for _ in range(2)))
        )
        assert both[0] == both[1]
        assert len(stage.launcher.made) == 1

    async def test_other_options_are_refused_by_name(self, stage: Stage) -> None:
        order = proxy_order(port=8000)
        await stage.result(stage.controller.proxies.open(order.options, order))
        other = proxy_order(port=9000, debug=True)
        with pytest.raises(ValueError, match="port=8000, debug=None; asked for port=9000, debug=True"):
            await stage.result(stage.controller.proxies.open(other.options, other))

    async def test_what_cannot_be_bound_is_said(self, stage: Stage) -> None:
        stage.launcher.eager = False
        asked = stage.begin(stage.controller.proxies.open(None, proxy_order()))
        await stage.clock.settle()
        stage.launcher.made[0].fail(OSError("in use"))
        await stage.clock.settle()
        assert isinstance(asked.result(), StartFailed)
        assert stage.launcher.made[0].killed == 1
        stage.launcher.eager = True
        assert isinstance(await stage.result(stage.controller.proxies.open(None, proxy_order())), Started)

    async def test_one_that_dies_while_it_starts_is_said(self, stage: Stage) -> None:
        stage.launcher.eager = False
        asked = stage.begin(stage.controller.proxies.open(None, proxy_order()))
        await stage.clock.settle()
        stage.launcher.made[0].die("OOM")
        await stage.clock.settle()
        assert asked.result().where == "the HTTP server: it died while it started: OOM"

    async def test_a_caller_who_gives_up_leaves_none(self, stage: Stage) -> None:
        stage.launcher.eager = False
        asked = stage.begin(stage.controller.proxies.open(None, proxy_order()))
        await stage.clock.settle()
        asked.cancel()
        await stage.clock.settle()
        assert stage.launcher.made[0].killed == 1

    async def test_one_that_dies_is_started_at_the_same_port(self, stage: Stage) -> None:
        order = proxy_order()
        await stage.result(stage.controller.proxies.open(order.options, order))
        watching = stage.begin(
            stage.controller.publisher.watch("proxy-01234567-1", stage.controller.snapshot.version)
        )
        await stage.clock.settle()
        stage.launcher.made[0].die()
        await stage.clock.settle()
        again = stage.launcher.made[1].order
        assert isinstance(again, ProxyOrder)
        assert again.id == "proxy-01234567-2"
        assert msgspec.json.decode(again.options)["port"] == 4321
        assert watching.done(), "it is waited for no more"
        assert isinstance(await stage.result(stage.controller.proxies.open(order.options, None)), Started)

    async def test_one_that_does_not_come_back_is_tried_until_it_does(
        self, stage: Stage, caplog: pytest.LogCaptureFixture
    ) -> None:
        await stage.result(stage.controller.proxies.open(None, proxy_order()))
        stage.launcher.eager = False
        stage.launcher.made[0].die()
        await stage.clock.settle()
        stage.launcher.made[1].fail(OSError("in use"))
        await stage.clock.settle()
        stage.launcher.refuses = RuntimeError("no more processes")
        await stage.clock.advance(0.5)
        assert "no more processes" in caplog.text
        stage.launcher.refuses = None
        await stage.clock.advance(1.0)
        assert len(stage.launcher.made) == 3
        stage.launcher.made[2].ready()
        await stage.clock.settle()

        await stage.clock.advance(100.0)
        stage.launcher.made[2].die()
        await stage.clock.settle()
        assert len(stage.launcher.made) == 4, "it had been steady: no pause"

    async def test_not_while_shutting_down(self, stage: Stage) -> None:
        stage.launcher.eager = False
        asked = stage.begin(stage.controller.proxies.open(None, proxy_order()))
        await stage.clock.settle()
        shutdown = stage.begin(stage.controller.shutdown())
        await stage.clock.settle()
        assert shutdown.done()
        assert isinstance(asked.result(), StartFailed)
        assert not stage.launcher.of("")
        with pytest.raises(NotServing, match="shutting down"):
            await stage.controller.proxies.open(None, proxy_order())

    async def test_one_that_gets_ready_while_shutting_down_is_ended(self, stage: Stage) -> None:
        stage.launcher.eager = False
        asked = stage.begin(stage.controller.proxies.open(None, proxy_order()))
        await stage.clock.settle()
        stage.launcher.made[0].may_stop.clear()
        shutdown = stage.begin(stage.controller.shutdown())
        await stage.clock.settle()
        stage.launcher.made[0].ready()
        await stage.clock.settle()
        assert "shutting down" in asked.result().where
        assert stage.controller.proxies.url is None
        stage.launcher.made[0].may_stop.set()
        await stage.clock.settle()
        assert shutdown.done()


def make_controller(cluster: FakeCluster) -> Controller:
    """By the loop's own clock."""
    return Controller(Hands(cluster), FakeStore(Kept()), folder="/x", over_tcp=True, log_level="info")


async def test_by_the_loops_own_clock() -> None:
    controller = make_controller(FakeCluster())
    await controller.take_over(await controller.restore())
    assert isinstance(await controller.outcomes.deployed("app", await controller.deploy(spec(b=1))), Deployed)
    assert "v1 ready" in repr(controller)
    await controller.shutdown()
    assert controller.is_empty


async def test_replicas_of_two_instances_have_other_names() -> None:
    names, secrets = set(), set()
    for _ in range(2):
        cluster = FakeCluster()
        controller = make_controller(cluster)
        await controller.take_over(await controller.restore())
        await controller.outcomes.deployed("app", await controller.deploy(spec(b=1)))
        name = actor_name(cluster.made[0])
        assert (name.app, name.replica, name.version) == ("app", "b#1", 1)
        names.add(name)
        secrets.add(controller.secret)
        await controller.shutdown()
    assert len(names) == len(secrets) == 2

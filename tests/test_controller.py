from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serveit.control.controller import MAX_OUTCOMES, Controller
from serveit.control.orders import Deployed, DeployFailed, ProxyOrder, ReplicaOrder, Started, StartFailed
from serveit.control.processes import ProcessDied
from serveit.control.publisher import ACKNOWLEDGE_S
from serveit.control.reconciler import MAX_SILENT_DEATHS
from serveit.control.snapshot import BackendInfo, EndpointInfo, RouteInfo, Snapshot
from serveit.control.spec import AppSpec, BackendSpec
from serveit.exceptions import NotServing
from serveit.running.failures import failure_of
from serveit.testing import ManualClock

LONG_S = 3600.0


class FakeProcess:
    """A process in the test's hands: what a start gives, when it dies, how long a stop takes."""

    def __init__(self, order: ReplicaOrder | ProxyOrder, address: str) -> None:
        loop = asyncio.get_running_loop()
        self.order = order
        self.address = address
        self.here: asyncio.Future[None] = loop.create_future()
        self.outcome: asyncio.Future[Started | StartFailed] = loop.create_future()
        self.gone: asyncio.Future[str] = loop.create_future()
        self.may_stop = asyncio.Event()
        self.may_stop.set()
        self.is_idle = asyncio.Event()
        self.is_idle.set()
        self.drains: list[float] = []
        self.idles: list[float] = []
        self.killed = 0
        self.starts = 0

    def __repr__(self) -> str:
        return f"<FakeProcess {self.order.id}>"

    # in the test's hands

    def place(self) -> None:
        if not self.here.done():
            self.here.set_result(None)

    def ready(self) -> None:
        self.place()
        if not self.outcome.done():
            self.outcome.set_result(Started(17, self.address))

    def fail(self, error: BaseException) -> None:
        failure = failure_of(error, others=0, in_user_code=True)
        self.place()
        self.outcome.set_result(
            StartFailed(
                msgspec.msgpack.encode(failure), where=self.order.id, text=f"{failure.kind}: {failure.text}"
            )
        )

    def die(self, how: str = "SIGKILL") -> None:
        if not self.gone.done():
            self.gone.set_result(how)
        for future in (self.here, self.outcome):
            if not future.done():
                future.set_exception(ProcessDied(how))
                future.exception()

    @property
    def alive(self) -> bool:
        return not self.gone.done()

    # what the controller asks for

    async def placed(self) -> None:
        await asyncio.shield(self.here)

    async def start(self) -> Started | StartFailed:
        self.starts += 1
        return await asyncio.shield(self.outcome)

    async def status(self) -> dict[str, Any]:
        return {"running": 3}

    async def idle(self, timeout_s: float) -> None:
        self.idles.append(timeout_s)
        await self.is_idle.wait()

    async def death(self) -> str:
        return await asyncio.shield(self.gone)

    async def stop(self, drain_s: float) -> None:
        self.drains.append(drain_s)
        await self.may_stop.wait()
        self.die("stopped")

    def kill(self) -> None:
        self.killed += 1
        self.die("killed")


class FakeLauncher:
    """Makes FakeProcesses; with `eager` they are ready at once."""

    def __init__(self) -> None:
        self.eager = True
        self.refuses: Exception | None = None
        self.made: list[FakeProcess] = []

    def replica(self, order: ReplicaOrder, max_ongoing: int) -> FakeProcess:
        return self._make(order, f"at {order.id}")

    def proxy(self, order: ProxyOrder) -> FakeProcess:
        port = msgspec.json.decode(order.options).get("port") or 4321
        return self._make(order, f"http://127.0.0.1:{port}/a:b")

    def _make(self, order: ReplicaOrder | ProxyOrder, address: str) -> FakeProcess:
        if self.refuses is not None:
            raise self.refuses
        process = FakeProcess(order, address)
        self.made.append(process)
        if self.eager:
            process.ready()
        return process

    def of(self, prefix: str) -> list[FakeProcess]:
        """Those that live, in the order they were made."""
        return [process for process in self.made if process.alive and process.order.id.startswith(prefix)]


class Member:
    """A watcher: takes in every snapshot, unless it is `deaf`."""

    def __init__(self, controller: Controller, name: str = "member") -> None:
        self.name = name
        self.controller = controller
        self.snapshots: list[Snapshot] = []
        self.hears = asyncio.Event()
        self.hears.set()
        self.task = asyncio.ensure_future(self._follow())

    async def _follow(self) -> None:
        version = (0, 0)
        while True:
            snapshot = await self.controller.watch(self.name, version)
            await self.hears.wait()
            self.snapshots.append(snapshot)
            version = snapshot.version

    @property
    def replicas(self) -> dict[str, list[str]]:
        """What it knows, by backend."""
        return serving(self.snapshots[-1])


class Stage:
    """A controller with everything around it."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.launcher = FakeLauncher()
        self.controller = Controller(
            self.launcher,
            folder="/x",
            secret=b"s",
            over_tcp=False,
            log_level="info",
            clock=self.clock,
            token="t0",
        )
        self._tasks: list[asyncio.Future[Any]] = []

    def member(self, name: str = "member") -> Member:
        member = Member(self.controller, name)
        self._tasks.append(member.task)
        return member

    def begin(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.append(task)
        return task

    async def result(self, awaitable: Awaitable[Any]) -> Any:
        """Of what needs no time to pass."""
        task = asyncio.ensure_future(awaitable)
        await self.clock.settle()
        assert task.done() or task.cancel() is None, "it takes time"
        return task.result()

    async def deploy(self, spec: AppSpec) -> Deployed | DeployFailed:
        outcome = await self.result(self.controller.deployed(spec.name, self.controller.deploy(spec)))
        assert isinstance(outcome, Deployed | DeployFailed)
        return outcome

    @property
    def serving(self) -> dict[str, list[str]]:
        return serving(self.controller.snapshot)

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        for process in self.launcher.made:
            process.may_stop.set()
            process.is_idle.set()
        self.begin(self.controller.shutdown())
        await self.clock.advance(LONG_S)
        await asyncio.wait(self._tasks[-1:])
        assert not self.launcher.of("")


@pytest.fixture
def stage() -> Stage:
    return Stage()


def staged(tests: type) -> type:
    """Each test closes its stage in its own time: what it leaves running is found after it."""
    for name, test in list(vars(tests).items()):
        if name.startswith("test_"):
            setattr(tests, name, _closing(test))
    return tests


def _closing(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def run(*args: Any, **fixtures: Any) -> None:
        try:
            await test(*args, **fixtures)
        finally:
            await fixtures["stage"].aclose()

    return run


def serving(snapshot: Snapshot) -> dict[str, list[str]]:
    return {
        f"{app.name}.{backend.name}": [replica.id for replica in backend.replicas]
        for app in snapshot.apps
        for backend in app.backends
    }


def spec(name: str = "app", *, prefix: str = "", owner: str = "", **backends: int) -> AppSpec:
    """An app with so many replicas of each backend, each at a route of its own."""
    return AppSpec(
        name=name,
        backends=tuple(
            BackendSpec(BackendInfo(name, (), max_ongoing_requests=7), num_replicas=number, drain_s=30.0)
            for name, number in (backends or {"b": 1}).items()
        ),
        endpoints=tuple(EndpointInfo(f"/{name}", ((name, 1.0),)) for name in backends or {"b": 1}),
        routes=tuple(
            RouteInfo(f"/{name}", f"/{name}", ("GET", "HEAD"), f"/{name}", prefix)
            for name in backends or {"b": 1}
        ),
        code=b"code",
        owner=owner,
        deploy_timeout_s=60.0,
    )


@staged
class TestFirstDeploy:
    async def test_all_replicas_are_started_and_published_together(self, stage: Stage) -> None:
        stage.launcher.eager = False
        deployed = stage.begin(stage.controller.deployed("app", stage.controller.deploy(spec(b=2, c=1))))
        await stage.clock.settle()
        one, two, three = stage.launcher.made
        assert [process.order.id for process in (one, two, three)] == ["b#1", "b#2", "c#3"]
        assert one.order == ReplicaOrder("b#1", "app", "b", b"code", "/x", b"s", False, "info", "app/b#1@t0")

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

    async def test_it_is_deployed_once_those_who_watch_know(self, stage: Stage) -> None:
        member = stage.member()
        await stage.clock.settle()
        member.hears.clear()
        deployed = stage.begin(stage.controller.deployed("app", stage.controller.deploy(spec())))
        await stage.clock.settle()
        assert not deployed.done()
        member.hears.set()
        await stage.clock.settle()
        assert isinstance(deployed.result(), Deployed)
        assert member.replicas == {"app.b": ["b#1"]}

    async def test_what_raises_fails_it_and_nothing_of_it_stays(self, stage: Stage) -> None:
        stage.launcher.eager = False
        deployed = stage.begin(stage.controller.deployed("app", stage.controller.deploy(spec(b=2, c=1))))
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
        version = stage.controller.deploy(spec())
        await stage.clock.settle()
        stage.launcher.made[0].fail(OSError("disk"))
        await stage.clock.settle()
        failed = await stage.result(stage.controller.deployed("app", version))
        assert "OSError: disk" in failed.text

    async def test_outcomes_are_kept_for_some_time_only(self, stage: Stage) -> None:
        first = stage.controller.deploy(spec())
        for _ in range(MAX_OUTCOMES):
            stage.controller.deploy(spec())
        failed = await stage.result(stage.controller.deployed("app", first))
        assert failed == DeployFailed("app 'app' was changed or deleted meanwhile")

    async def test_what_dies_in_silence_is_tried_again(self, stage: Stage) -> None:
        stage.launcher.eager = False
        deployed = stage.begin(stage.controller.deployed("app", stage.controller.deploy(spec())))
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
        deployed = stage.begin(stage.controller.deployed("app", stage.controller.deploy(spec())))
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

    async def test_a_failure_without_words_is_told_by_its_place(self, stage: Stage) -> None:
        stage.launcher.eager = False
        version = stage.controller.deploy(spec())
        await stage.clock.settle()
        stage.launcher.made[0].place()
        stage.launcher.made[0].outcome.set_result(StartFailed(b"", where="somewhere"))
        failed = await stage.result(stage.controller.deployed("app", version))
        assert failed.text == "replica b#1 cannot start: somewhere"


@staged
class TestPlaces:
    async def test_a_process_that_gets_no_place_fails_the_deploy(self, stage: Stage) -> None:
        stage.launcher.eager = False
        deployed = stage.begin(stage.controller.deployed("app", stage.controller.deploy(spec(b=2))))
        await stage.clock.settle()
        stage.launcher.made[0].ready()
        await stage.clock.advance(59.0)
        assert not deployed.done()
        await stage.clock.advance(1.5)
        text = deployed.result().text
        assert "replica b#2 has waited 60 s for its process" in text
        assert "ray status" in text
        assert "deploy_timeout_s" in text
        assert not stage.launcher.of("")

    async def test_a_constructor_may_take_longer(self, stage: Stage) -> None:
        stage.launcher.eager = False
        deployed = stage.begin(stage.controller.deployed("app", stage.controller.deploy(spec())))
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
class TestUpdate:
    async def test_the_old_ones_go_when_everybody_knows_the_new(self, stage: Stage) -> None:
        member = stage.member()
        await stage.deploy(spec(b=2))
        old = stage.launcher.of("b")
        stage.launcher.eager = False
        deployed = stage.begin(stage.controller.deployed("app", stage.controller.deploy(spec(b=2))))
        await stage.clock.settle()
        new = stage.launcher.of("b")[2:]
        new[0].ready()
        await stage.clock.settle()
        assert member.replicas == {"app.b": ["b#1", "b#2"]}

        member.hears.clear()
        new[1].ready()
        await stage.clock.settle()
        assert stage.serving == {"app.b": ["b#3", "b#4"]}
        assert [process.drains for process in old] == [[], []], "the member may still send to them"
        member.hears.set()
        await stage.clock.settle()
        assert [process.drains for process in old] == [[30.0], [30.0]]
        assert isinstance(deployed.result(), Deployed)
        assert stage.launcher.of("b") == new
        assert all(len(s.apps[0].backends[0].replicas) == 2 for s in member.snapshots if s.apps)

    async def test_one_that_fails_leaves_the_old_one_whole(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2))
        before = stage.controller.snapshot
        stage.launcher.eager = False
        deployed = stage.begin(stage.controller.deployed("app", stage.controller.deploy(spec(b=2, c=1))))
        await stage.clock.settle()
        stage.launcher.of("b")[2].ready()
        stage.launcher.of("c")[0].fail(ValueError("no"))
        await stage.clock.settle()
        assert "ValueError: no" in deployed.result().text
        assert stage.controller.snapshot == before
        assert [process.order.id for process in stage.launcher.of("")] == ["b#1", "b#2"]
        assert [process.drains for process in stage.launcher.of("")] == [[], []]
        assert stage.controller.describe("app") == spec(b=2)

    async def test_the_dead_of_the_old_version_are_replaced_meanwhile(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        stage.launcher.eager = False
        stage.controller.deploy(spec(b=1))
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
        second = stage.begin(stage.controller.deployed("app", stage.controller.deploy(spec(b=1))))
        await stage.clock.settle()
        third = stage.begin(stage.controller.deployed("app", stage.controller.deploy(spec(b=1))))
        await stage.clock.settle()
        assert second.result() == DeployFailed("another deploy of the app came in between")
        assert [process.order.id for process in stage.launcher.of("b")] == ["b#1", "b#3"], "b#2 is of no use"
        stage.launcher.of("b#3")[0].ready()
        await stage.clock.settle()
        assert isinstance(third.result(), Deployed)
        assert stage.serving == {"app.b": ["b#3"]}

    async def test_a_deploy_right_behind_starts_nothing_twice(self, stage: Stage) -> None:
        stage.controller.deploy(spec(b=1))
        await stage.deploy(spec(b=1))
        assert [process.order.id for process in stage.launcher.made] == ["b#2"]

    async def test_a_slow_stop_holds_nothing_up(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        old = stage.launcher.of("b")[0]
        old.may_stop.clear()
        assert isinstance(await stage.deploy(spec(b=1)), Deployed)
        assert old.alive
        assert (await stage.result(stage.controller.status("app")))["backends"]["b"] == {
            "b#1": {"state": "stopping"},
            "b#2": {"state": "ready", "running": 3},
        }
        assert isinstance(await stage.deploy(spec(b=1)), Deployed)
        assert old.drains == [30.0], "it is stopped once"

    async def test_new_replicas_that_die_before_all_are_up_fail_it_in_the_end(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        stage.launcher.eager = False
        deployed = stage.begin(stage.controller.deployed("app", stage.controller.deploy(spec(b=1, c=1))))
        for _ in range(5):
            await stage.clock.advance(3.0)
            stage.launcher.of("b")[-1].ready()
            await stage.clock.settle()
            stage.launcher.of("b")[-1].die("segfault")
        await stage.clock.settle()
        assert "5 replicas of backend 'b' died within 60 s" in deployed.result().text
        assert stage.serving == {"app.b": ["b#1"]}


@staged
class TestScale:
    async def test_up(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        stage.launcher.eager = False
        stage.controller.scale("app", "b", 3)
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
        stage.controller.scale("app", "b", 1)
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
        stage.controller.scale("app", "b", 2)
        stage.controller.scale("app", "b", 1)
        await stage.clock.settle()
        assert [process.drains for process in stage.launcher.made] == [[], [30.0], [30.0]]

    async def test_one_that_fails_leaves_the_number_that_was(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        stage.launcher.eager = False
        stage.controller.scale("app", "b", 3)
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
        deployed = stage.begin(stage.controller.deployed("app", stage.controller.deploy(spec(b=1))))
        await stage.clock.settle()
        stage.controller.scale("app", "b", 2)
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
        stage.controller.deploy(spec(b=1))
        stage.controller.scale("app", "b", 2)
        settled = stage.begin(stage.controller.settled("app"))
        await stage.clock.settle()
        stage.launcher.made[1].fail(ValueError("no"))
        await stage.clock.settle()
        assert isinstance(settled.result(), DeployFailed)
        assert stage.controller.describe("app") == spec(b=1)

    async def test_what_is_unknown(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        with pytest.raises(KeyError, match="no backend 'bb': did you mean 'b'"):
            stage.controller.scale("app", "bb", 2)
        with pytest.raises(ValueError, match="negative"):
            stage.controller.scale("app", "b", -1)
        with pytest.raises(KeyError, match="no app 'other'; running: app"):
            stage.controller.scale("other", "b", 1)
        assert isinstance(await stage.result(stage.controller.settled("app")), Deployed)

    async def test_to_none_and_back(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        stage.controller.scale("app", "b", 0)
        assert isinstance(await stage.result(stage.controller.settled("app")), Deployed)
        assert stage.serving == {"app.b": []}
        stage.controller.scale("app", "b", 1)
        assert isinstance(await stage.result(stage.controller.settled("app")), Deployed)
        assert stage.serving == {"app.b": ["b#2"]}

    async def test_another_backend_that_is_lost_does_not_matter(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1, c=1))
        stage.launcher.eager = False
        stage.controller.scale("app", "b", 2)
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
        stage.controller.reroute("app", "/b", [["b", 0.5], ["c", 0.5]], [["c", 0.1]])
        await stage.result(stage.controller.acknowledged(stage.controller.snapshot.version))
        endpoint = member.snapshots[-1].apps[0].endpoints[0]
        assert endpoint == EndpointInfo("/b", (("b", 0.5), ("c", 0.5)), (("c", 0.1),))

    async def test_leads_nowhere_else(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        before = stage.controller.snapshot
        with pytest.raises(KeyError, match="no backend 'c'"):
            stage.controller.reroute("app", "/b", [["c", 1.0]], [])
        with pytest.raises(KeyError, match="no endpoint '/c'"):
            stage.controller.reroute("app", "/c", [["b", 1.0]], [])
        assert stage.controller.snapshot == before

    async def test_of_a_version_that_is_coming_up_comes_with_it(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1, c=1))
        stage.launcher.eager = False
        stage.controller.deploy(spec(b=1, c=1))
        stage.controller.reroute("app", "/b", [["c", 1.0]], [])
        assert stage.controller.snapshot.apps[0].endpoints[0].weights == (("b", 1.0),)
        await stage.clock.settle()
        for process in stage.launcher.made[2:]:
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
        stage.controller.scale("app", "b", 1)
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
        stage.controller.scale("app", "b", 1)
        await stage.clock.settle()
        going.die()
        await stage.clock.settle()
        assert len(stage.launcher.made) == 2
        assert list((await stage.result(stage.controller.status("app")))["backends"]["b"]) == ["b#1", "b#2"]
        going.may_stop.set()
        await stage.clock.settle()
        assert list((await stage.result(stage.controller.status("app")))["backends"]["b"]) == ["b#1"]


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
        assert await stage.result(stage.controller.status("app")) == {"backends": {}, "failed": {}}

    async def test_while_it_starts(self, stage: Stage) -> None:
        stage.launcher.eager = False
        deployed = stage.begin(stage.controller.deployed("app", stage.controller.deploy(spec(b=2))))
        await stage.clock.settle()
        stage.launcher.made[0].place()
        await stage.result(stage.controller.delete("app"))
        assert deployed.result() == DeployFailed("the app was deleted")
        assert [process.killed for process in stage.launcher.made] == [1, 1]

    async def test_as_it_gets_ready(self, stage: Stage) -> None:
        stage.launcher.eager = False
        stage.controller.deploy(spec())
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
        failing = stage.begin(stage.controller.deployed("two", stage.controller.deploy(spec("two", b=2))))
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
class TestApps:
    async def test_are_independent(self, stage: Stage) -> None:
        await stage.deploy(spec("one", b=1))
        await stage.deploy(spec("two", c=1))
        assert stage.serving == {"one.b": ["b#1"], "two.c": ["c#2"]}
        stage.launcher.eager = False
        failing = stage.begin(stage.controller.deployed("two", stage.controller.deploy(spec("two", c=1))))
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
            stage.controller.deploy(spec("two", b=1))
        assert isinstance(await stage.deploy(spec("two", prefix="/two", b=1)), Deployed)
        assert isinstance(await stage.deploy(spec("one", b=1)), Deployed), "its own are its own"

    async def test_keep_the_routes_that_they_may_go_back_to(self, stage: Stage) -> None:
        await stage.deploy(spec("one", b=1))
        stage.launcher.eager = False
        stage.controller.deploy(spec("one", c=1))
        for wanted in (spec("two", b=1), spec("two", c=1)):
            with pytest.raises(ValueError, match="taken by app 'one'"):
                stage.controller.deploy(wanted)
        assert len(stage.launcher.made) == 1


@staged
class TestOwners:
    async def test_an_app_ends_with_its_owner(self, stage: Stage) -> None:
        stage.controller.owner_joined("driver")
        await stage.deploy(spec("mine", owner="driver", b=1))
        await stage.deploy(spec("other", c=1))
        lost = stage.begin(stage.controller.owner_lost("driver", 2.0))
        await stage.clock.advance(1.9)
        assert set(stage.serving) == {"mine.b", "other.c"}
        await stage.clock.advance(0.2)
        assert lost.done()
        assert set(stage.serving) == {"other.c"}
        assert not stage.launcher.of("b")

    async def test_who_comes_back_keeps_it(self, stage: Stage) -> None:
        stage.controller.owner_joined("driver")
        await stage.deploy(spec(owner="driver", b=1))
        stage.begin(stage.controller.owner_lost("driver", 2.0))
        await stage.clock.advance(1.0)
        stage.controller.owner_joined("driver")
        await stage.clock.advance(10.0)
        assert set(stage.serving) == {"app.b"}

    async def test_who_comes_and_goes_gets_its_time_each_time(self, stage: Stage) -> None:
        stage.controller.owner_joined("driver")
        await stage.deploy(spec(owner="driver", b=1))
        stage.begin(stage.controller.owner_lost("driver", 2.0))
        await stage.clock.advance(1.0)
        stage.controller.owner_joined("driver")
        stage.begin(stage.controller.owner_lost("driver", 2.0))
        await stage.clock.advance(1.5)
        assert set(stage.serving) == {"app.b"}
        await stage.clock.advance(1.0)
        assert stage.controller.is_empty

    async def test_another_that_leaves_does_not_cut_it_short(self, stage: Stage) -> None:
        for owner, backend in (("lost", "b"), ("leaves", "c")):
            stage.controller.owner_joined(owner)
            counts: dict[str, Any] = {backend: 1}
            await stage.deploy(spec(owner, owner=owner, **counts))
        (busy,) = stage.launcher.of("b")
        busy.is_idle.clear()
        lost = stage.begin(stage.controller.owner_lost("lost", 0.0))
        await stage.clock.settle()
        await stage.result(stage.controller.delete("leaves", "leaves"))
        stage.controller.owner_left("leaves")
        assert not stage.controller.is_empty
        assert not lost.done()
        busy.is_idle.set()
        await stage.clock.settle()
        assert lost.done()
        assert stage.controller.is_empty

    async def test_what_its_failed_deploy_has_left_is_waited_for(self, stage: Stage) -> None:
        stage.launcher.eager = False
        stage.controller.owner_joined("driver")
        stage.controller.deploy(spec(owner="driver", b=2))
        await stage.clock.settle()
        started, raises = stage.launcher.made
        started.ready()
        started.may_stop.clear()
        await stage.clock.settle()
        raises.fail(ValueError("no"))
        lost = stage.begin(stage.controller.owner_lost("driver", 0.0))
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

    async def test_a_second_line_counts(self, stage: Stage) -> None:
        stage.controller.owner_joined("driver")
        stage.controller.owner_joined("driver")
        await stage.deploy(spec(owner="driver", b=1))
        stage.begin(stage.controller.owner_lost("driver", 2.0))
        await stage.clock.advance(10.0)
        assert set(stage.serving) == {"app.b"}


@staged
class TestWatching:
    async def test_whoever_is_new_gets_what_is(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        assert await stage.result(stage.controller.watch("new", (0, 0))) is stage.controller.snapshot

    async def test_what_is_known_is_not_told_again(self, stage: Stage) -> None:
        watching = stage.begin(stage.controller.watch("member", stage.controller.snapshot.version))
        await stage.clock.settle()
        assert not watching.done()
        stage.controller.deploy(spec(b=1))
        await stage.clock.settle()
        assert watching.result() is stage.controller.snapshot

    async def test_versions_grow(self, stage: Stage) -> None:
        before = stage.controller.snapshot.version
        await stage.deploy(spec(b=1))
        stage.controller.reroute("app", "/b", [["b", 1.0]], [])
        assert stage.controller.snapshot.version == (before[0], before[1] + 1), "nothing new, nothing said"

    async def test_who_is_forgotten_is_let_go(self, stage: Stage) -> None:
        watching = stage.begin(stage.controller.watch("member", stage.controller.snapshot.version))
        await stage.clock.settle()
        stage.controller.forget("member")
        await stage.clock.settle()
        assert watching.done()
        assert isinstance(await stage.deploy(spec(b=1)), Deployed)

    async def test_who_says_nothing_is_waited_for_once(
        self, stage: Stage, caplog: pytest.LogCaptureFixture
    ) -> None:
        stage.begin(stage.controller.watch("mute", stage.controller.snapshot.version))
        deployed = stage.begin(stage.controller.deployed("app", stage.controller.deploy(spec(b=1))))
        await stage.clock.advance(ACKNOWLEDGE_S - 0.1)
        assert not deployed.done()
        await stage.clock.advance(0.2)
        assert isinstance(deployed.result(), Deployed)
        assert "no word from mute" in caplog.text
        assert isinstance(await stage.deploy(spec(b=1)), Deployed)

    async def test_a_lost_replica_goes_though_somebody_says_nothing(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2))
        stage.begin(stage.controller.watch("mute", stage.controller.snapshot.version))
        await stage.clock.settle()
        stage.controller.scale("app", "b", 1)
        await stage.clock.advance(1.0)
        assert len(stage.launcher.of("b")) == 2
        await stage.clock.advance(ACKNOWLEDGE_S)
        assert len(stage.launcher.of("b")) == 1


def proxy_order(**options: Any) -> ProxyOrder:
    encoded = msgspec.json.encode({"host": "127.0.0.1", "port": 0, **options})
    return ProxyOrder("proxy", encoded, b"s")


@staged
class TestHTTP:
    async def test_is_started_once(self, stage: Stage) -> None:
        order = proxy_order()
        assert await stage.result(stage.controller.http(None, None)) is None
        assert stage.controller.url is None
        started = await stage.result(stage.controller.http(order.options, order))
        assert started == Started(17, "http://127.0.0.1:4321/a:b")
        assert await stage.result(stage.controller.http(order.options, order)) == started
        assert await stage.result(stage.controller.http(None, proxy_order(port=9))) == started
        assert stage.controller.url == started.address
        assert len(stage.launcher.made) == 1

    async def test_at_once_is_started_once(self, stage: Stage) -> None:
        order = proxy_order()
        both = await stage.result(asyncio.gather(*(stage.controller.http(None, order) for _ in range(2))))
        assert both[0] == both[1]
        assert len(stage.launcher.made) == 1

    async def test_other_options_are_refused_by_name(self, stage: Stage) -> None:
        order = proxy_order(port=8000)
        await stage.result(stage.controller.http(order.options, order))
        other = proxy_order(port=9000, debug=True)
        with pytest.raises(ValueError, match="port=8000, debug=None; asked for port=9000, debug=True"):
            await stage.result(stage.controller.http(other.options, other))

    async def test_what_cannot_be_bound_is_said(self, stage: Stage) -> None:
        stage.launcher.eager = False
        asked = stage.begin(stage.controller.http(None, proxy_order()))
        await stage.clock.settle()
        stage.launcher.made[0].fail(OSError("in use"))
        await stage.clock.settle()
        assert isinstance(asked.result(), StartFailed)
        assert stage.launcher.made[0].killed == 1
        stage.launcher.eager = True
        assert isinstance(await stage.result(stage.controller.http(None, proxy_order())), Started)

    async def test_one_that_dies_while_it_starts_is_said(self, stage: Stage) -> None:
        stage.launcher.eager = False
        asked = stage.begin(stage.controller.http(None, proxy_order()))
        await stage.clock.settle()
        stage.launcher.made[0].die("OOM")
        await stage.clock.settle()
        assert asked.result().where == "the HTTP server: it died while it started: OOM"

    async def test_a_caller_who_gives_up_leaves_none(self, stage: Stage) -> None:
        stage.launcher.eager = False
        asked = stage.begin(stage.controller.http(None, proxy_order()))
        await stage.clock.settle()
        asked.cancel()
        await stage.clock.settle()
        assert stage.launcher.made[0].killed == 1

    async def test_one_that_dies_is_started_at_the_same_port(self, stage: Stage) -> None:
        order = proxy_order()
        await stage.result(stage.controller.http(order.options, order))
        watching = stage.begin(stage.controller.watch("proxy", stage.controller.snapshot.version))
        await stage.clock.settle()
        stage.launcher.made[0].die()
        await stage.clock.settle()
        again = stage.launcher.made[1].order
        assert isinstance(again, ProxyOrder)
        assert again.id == "proxy-1"
        assert msgspec.json.decode(again.options)["port"] == 4321
        assert watching.done(), "it is waited for no more"
        assert isinstance(await stage.result(stage.controller.http(order.options, None)), Started)

    async def test_one_that_does_not_come_back_is_tried_until_it_does(
        self, stage: Stage, caplog: pytest.LogCaptureFixture
    ) -> None:
        await stage.result(stage.controller.http(None, proxy_order()))
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
        asked = stage.begin(stage.controller.http(None, proxy_order()))
        await stage.clock.settle()
        shutdown = stage.begin(stage.controller.shutdown())
        await stage.clock.settle()
        assert shutdown.done()
        assert isinstance(asked.result(), StartFailed)
        assert not stage.launcher.of("")
        with pytest.raises(NotServing, match="shutting down"):
            await stage.controller.http(None, proxy_order())

    async def test_one_that_gets_ready_while_shutting_down_is_ended(self, stage: Stage) -> None:
        stage.launcher.eager = False
        asked = stage.begin(stage.controller.http(None, proxy_order()))
        await stage.clock.settle()
        stage.launcher.made[0].may_stop.clear()
        shutdown = stage.begin(stage.controller.shutdown())
        await stage.clock.settle()
        stage.launcher.made[0].ready()
        await stage.clock.settle()
        assert "shutting down" in asked.result().where
        assert stage.controller.url is None
        stage.launcher.made[0].may_stop.set()
        await stage.clock.settle()
        assert shutdown.done()


@staged
class TestShutdown:
    async def test_proxy_first(self, stage: Stage) -> None:
        await stage.result(stage.controller.http(None, proxy_order()))
        await stage.deploy(spec(b=2))
        proxy = stage.launcher.of("proxy")[0]
        proxy.may_stop.clear()
        shutdown = stage.begin(stage.controller.shutdown())
        await stage.clock.settle()
        assert proxy.drains == [30.0]
        assert [process.drains for process in stage.launcher.of("b")] == [[], []]
        with pytest.raises(NotServing, match="shutting down"):
            stage.controller.deploy(spec(b=1))

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
        await stage.result(stage.controller.http(None, proxy_order()))
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

        async def stop(drain_s: float) -> None:
            raise RuntimeError("Ray is gone")

        monkeypatch.setattr(broken, "stop", stop)
        await stage.result(stage.controller.shutdown())
        assert "Ray is gone" in caplog.text
        assert not stage.launcher.of("b#2")
        assert stage.controller.is_empty
        broken.die()


steps = st.lists(
    st.tuples(
        st.sampled_from(["deploy", "scale", "delete", "ready", "ready", "fail", "die", "wait", "settle"]),
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
    stage.launcher.eager = False
    outcomes: list[asyncio.Task[Any]] = []
    for step, number, backend in sequence:
        if step in ("ready", "fail", "die"):
            _befall(stage, step, number)
        elif step == "wait":
            await stage.clock.advance(float(number))
        elif step == "settle":
            await stage.clock.settle()
        else:
            outcomes += _order(stage, step, number, backend)
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


def _order(stage: Stage, step: str, number: int, backend: str) -> list[asyncio.Task[Any]]:
    """What a driver asks for, and waits for."""
    if step == "deploy":
        wanted = spec(b=number % 3, c=1) if number > 3 else spec(b=number % 3)
        version = stage.controller.deploy(wanted)
        return [stage.begin(stage.controller.deployed("app", version))]
    if step == "delete":
        return [stage.begin(stage.controller.delete("app"))]
    try:
        stage.controller.scale("app", backend, number)
    except KeyError:  # no app, or no such backend in its version
        return []
    return [stage.begin(stage.controller.settled("app"))]


async def test_by_the_loops_own_clock() -> None:
    controller = Controller(FakeLauncher(), folder="/x", secret=b"", over_tcp=True, log_level="info")
    assert isinstance(await controller.deployed("app", controller.deploy(spec(b=1))), Deployed)
    assert "v1 ready" in repr(controller)
    await controller.shutdown()
    assert controller.is_empty


async def test_replicas_of_two_controllers_have_other_names() -> None:
    names = set()
    for _ in range(2):
        launcher = FakeLauncher()
        controller = Controller(launcher, folder="/x", secret=b"", over_tcp=True, log_level="info")
        await controller.deployed("app", controller.deploy(spec(b=1)))
        order = launcher.made[0].order
        assert isinstance(order, ReplicaOrder)
        assert order.actor.startswith("app/b#1@")
        names.add(order.actor)
        await controller.shutdown()
    assert len(names) == 2

"""Who looks after replicas that serve: the controller, and in their processes the checks themselves."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import msgspec
import pytest

from serveit import App
from serveit.control.orders import Deployed, Health
from serveit.control.spec import AppSpec
from serveit.observe import NullObserver
from serveit.running.health import MAX_FAILURES, Checkup
from serveit.running.replica import Replica
from serveit.testing import ManualClock
from tests.stage import Stage, scaled_to, spec, staged
from tests.support import wait_until

BLOCKED = Health("its event loop has been blocked for 30 s", hangs=True)
ILL = Health("check_health() raised OSError: no database (3 times in a row)")


@pytest.fixture
def stage() -> Stage:
    return Stage()


# -- by the controller -----------------------------------------------------------------------


@staged
class TestOneThatFellIll:
    async def test_gets_no_more_and_ends_what_it_runs_while_another_takes_its_place(
        self, stage: Stage, caplog: pytest.LogCaptureFixture
    ) -> None:
        member = stage.member()
        await stage.deploy(spec(b=2))
        stage.launcher.eager = False
        ill = stage.launcher.made[0]
        ill.may_stop.clear()
        ill.condition = ILL
        await stage.clock.advance(5.0)
        assert member.replicas == {"app.b": ["b#2"]}
        assert stage.running == ["b#1", "b#2", "b#3"]
        assert (ill.drains, ill.to_deadlines, ill.killed) == ([30.0], True, 0)
        told = (await stage.status())["backends"]["b"]["b#1"]
        assert (told["state"], told["illness"]) == ("unhealthy", ILL.illness)
        assert f"replica b#1 of app 'app' is unhealthy: {ILL.illness}; another" in caplog.text
        stage.launcher.made[2].ready()
        await stage.clock.settle()
        assert member.replicas == {"app.b": ["b#2", "b#3"]}
        ill.may_stop.set()
        await stage.clock.settle()
        assert stage.running == ["b#2", "b#3"]

    async def test_is_not_asked_any_more(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        ill = stage.launcher.made[0]
        ill.may_stop.clear()
        ill.condition = ILL
        await stage.clock.advance(60.0)
        assert ill.looks == 1

    async def test_is_killed_if_it_hangs(self, stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
        member = stage.member()
        await stage.deploy(spec(b=2))
        stage.launcher.made[0].condition = BLOCKED
        await stage.clock.advance(5.0)
        assert (stage.launcher.made[0].killed, stage.launcher.made[0].drains) == (1, [])
        assert member.replicas == {"app.b": ["b#2", "b#3"]}
        assert f"is unhealthy: {BLOCKED.illness}; killing it" in caplog.text

    async def test_counts_as_a_death(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        for _ in range(5):
            await stage.clock.advance(4.0)
            stage.launcher.of("b")[0].condition = ILL
            await stage.clock.advance(5.0)
        assert stage.serving == {"app.b": []}
        assert (await stage.status())["failed"] == {
            "b": "5 replicas of backend 'b' died within 60 s, the last: "
            f"replica b#5 was unhealthy: {ILL.illness}"
        }
        assert isinstance(await stage.deploy(spec(b=1)), Deployed)
        assert len(stage.serving["app.b"]) == 1

    async def test_is_found_by_the_next_controller(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2))
        await stage.follow()
        assert stage.serving == {"app.b": ["b#1", "b#2"]}
        stage.launcher.made[1].condition = ILL
        await stage.clock.advance(5.0)
        assert stage.serving == {"app.b": ["b#1", "b#3"]}

    async def test_goes_with_its_app(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        ill = stage.launcher.made[0]
        ill.may_stop.clear()
        ill.condition = ILL
        await stage.clock.advance(5.0)
        removal = stage.begin(stage.controller.delete("app"))
        await stage.clock.settle()
        assert not removal.done() and stage.running == ["b#1"]
        ill.may_stop.set()
        await stage.clock.settle()
        assert removal.done() and stage.running == []


@staged
class TestOneThatDoesNotAnswer:
    async def test_is_killed(self, stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
        await stage.deploy(spec(b=2))
        frozen = stage.launcher.made[0]
        frozen.may_tell.clear()
        await stage.clock.advance(5.0 + 30.0)
        assert frozen.alive
        await stage.clock.advance(2.0)
        assert frozen.killed == 1 and stage.serving == {"app.b": ["b#2", "b#3"]}
        assert "is unhealthy: it has not answered for 30 s; killing it" in caplog.text

    async def test_in_time_is_well(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        slow = stage.launcher.made[0]
        for _ in range(3):
            slow.may_tell.clear()
            await stage.clock.advance(5.0 + 29.0)
            slow.may_tell.set()
            await stage.clock.settle()
        assert slow.alive and slow.looks == 3

    async def test_of_a_controller_that_had_no_turn(self, stage: Stage) -> None:
        """The answer has come meanwhile: it only was not read."""
        await stage.deploy(spec(b=1))
        process = stage.launcher.made[0]
        process.may_tell.clear()
        await stage.clock.advance(5.0 + 30.0 + 1.5)
        process.may_tell.set()
        await stage.clock.advance(2.0)
        assert process.alive

    async def test_nor_has_answered_a_controller_that_took_over(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2))
        frozen = stage.launcher.made[0]
        await stage.crash()
        frozen.may_answer.clear()
        frozen.may_tell.clear()
        await stage.recover()
        assert stage.serving == {"app.b": ["b#2"]}
        await stage.clock.advance(5.0 + 32.0)
        assert frozen.killed == 1 and stage.serving == {"app.b": ["b#2", "b#3"]}

    async def test_while_it_drains_is_no_matter(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2))
        going = stage.launcher.made[1]
        going.may_stop.clear()
        await stage.controller.update("app", "b", scaled_to(1))
        going.may_tell.clear()
        await stage.clock.advance(60.0)
        assert going.alive and going.looks == 0
        assert stage.running == ["b#1", "b#2"]


@staged
class TestOptions:
    async def test_of_the_backend(self, stage: Stage) -> None:
        await stage.deploy(_with(spec(b=1), health_check_period_s=1.0, health_check_timeout_s=2.0))
        process = stage.launcher.made[0]
        await stage.clock.advance(3.0)
        assert process.looks == 3
        process.may_tell.clear()
        await stage.clock.advance(1.0 + 2.0 + 2.0)
        assert process.killed == 1


def _with(spec: AppSpec, **options: float) -> AppSpec:
    backends = tuple(
        msgspec.structs.replace(backend, config=backend.config.merge(**options)) for backend in spec.backends
    )
    return msgspec.structs.replace(spec, backends=backends)


# -- in the replica's process ----------------------------------------------------------------


class Patient:
    """Its checks do as the test says."""

    def __init__(self) -> None:
        self.checks = 0
        self.error: BaseException | None = None
        self.may_return = asyncio.Event()
        self.may_return.set()

    async def __call__(self) -> None:
        """Nothing to do."""

    async def check_health(self) -> None:
        self.checks += 1
        await self.may_return.wait()
        if self.error is not None:
            raise self.error


class Events(NullObserver):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def replica_event(self, backend: str, replica: str, event: str) -> None:
        self.seen.append(f"{replica} {event}")


class Ward:
    """A replica with its checkup, and a clock that stands still."""

    def __init__(self, target: type[Any], **options: Any) -> None:
        app = App()
        app.backend(target, name="patient", **options)
        self.clock, self.events = ManualClock(), Events()
        self.replica = Replica(
            app.backends["patient"], id="patient#1", app="app", clock=self.clock, observer=self.events
        )
        self.told: list[Health] = []
        self.checkup = Checkup(self.replica, self.told.append)

    async def __aenter__(self) -> Ward:
        await self.replica.start()
        self.checkup.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.checkup.stop()
        await self.clock.settle()
        await self.replica.aclose()

    @property
    def patient(self) -> Any:
        return self.replica.instance._object

    @property
    def health(self) -> Health:
        return self.checkup.health


async def test_it_is_checked_again_and_again() -> None:
    async with Ward(Patient, health_check_period_s=2) as ward:
        assert ward.patient.checks == 1, "when it started"
        await ward.clock.advance(6)
        assert ward.patient.checks == 4 and ward.health == Health()


async def test_three_failures_in_a_row_are_too_many(caplog: pytest.LogCaptureFixture) -> None:
    async with Ward(Patient) as ward:
        ward.patient.error = OSError("no database")
        await ward.clock.advance(5 * (MAX_FAILURES - 1))
        assert ward.health == Health() and ward.told == []
        assert "replica patient#1: check_health() raised OSError: no database (2 of 3)" in caplog.text
        ward.patient.error = None
        await ward.clock.advance(5)
        ward.patient.error = OSError("no database")
        await ward.clock.advance(5 * (MAX_FAILURES - 1))
        assert ward.told == [], "the good one in between counts"
        await ward.clock.advance(5)
        assert ward.told == [ILL] and ward.health == ILL
        assert ward.events.seen == ["patient#1 started", "patient#1 unhealthy"]
        checks = ward.patient.checks
        await ward.clock.advance(60)
        assert ward.patient.checks == checks and ward.told == [ILL]


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError(), StopAsyncIteration()])
async def test_whatever_a_check_raises_is_a_failure(error: BaseException) -> None:
    async with Ward(Patient) as ward:
        ward.patient.error = error
        await ward.clock.advance(15)
        assert type(error).__name__ in ward.health.illness and not ward.health.hangs


async def test_a_check_that_does_not_return() -> None:
    async with Ward(Patient, health_check_timeout_s=8) as ward:
        ward.patient.may_return.clear()
        await ward.clock.advance(5 + 7)
        assert ward.told == []
        await ward.clock.advance(1)
        assert ward.told == [Health("check_health() has not returned for 8 s", hangs=True)]


async def test_a_slow_check_is_no_reason() -> None:
    async with Ward(Patient, health_check_timeout_s=8) as ward:
        for _ in range(3):
            ward.patient.may_return.clear()
            await ward.clock.advance(5 + 7)
            ward.patient.may_return.set()
            await ward.clock.settle()
        await ward.clock.advance(4)
        assert ward.told == [] and ward.patient.checks == 4


async def test_a_replica_that_drains_is_not_checked(caplog: pytest.LogCaptureFixture) -> None:
    async with Ward(Patient) as ward:
        ward.patient.may_return.clear()
        ward.patient.error = OSError("closing")
        await ward.clock.advance(5)
        ward.replica.close_doors()
        ward.patient.may_return.set()
        await ward.clock.advance(60)
        assert ward.patient.checks == 2 and ward.told == []


class WithoutCheck:
    async def __call__(self) -> None:
        """Nothing to do."""


async def test_without_a_check_there_is_nothing_to_do() -> None:
    async with Ward(WithoutCheck) as ward:
        timers = len(ward.clock._timers)
        await ward.clock.advance(60)
        assert ward.health == Health() and len(ward.clock._timers) == timers == 0


class InThreads:
    """With a check that is `def`."""

    def __init__(self) -> None:
        self.home = threading.get_ident()
        self.may_return, self.may_check = threading.Event(), threading.Event()
        self.may_check.set()
        self.checks = 0

    def __call__(self) -> None:
        self.may_return.wait(10)

    def check_health(self) -> None:
        if threading.get_ident() != self.home:
            raise RuntimeError("made in another thread")
        self.checks += 1
        self.may_check.wait(10)


async def test_a_def_check_waits_for_its_thread_however_long_that_takes() -> None:
    async with Ward(InThreads) as ward:
        running = asyncio.ensure_future(ward.replica.instance.in_thread(ward.patient))
        await ward.clock.advance(1000)
        assert ward.told == [] and ward.patient.checks == 1, "it waits behind a request"
        ward.patient.may_return.set()
        await running
        await wait_until(lambda: ward.patient.checks == 2, 5, "its turn has come")
        await wait_until(lambda: ward.checkup._task is None, 5, "it is through")
        await ward.clock.advance(5)
        await wait_until(lambda: ward.patient.checks == 3, 5, "the next one")


async def test_a_def_check_that_hangs() -> None:
    async with Ward(InThreads) as ward:
        ward.patient.may_check.clear()
        await ward.clock.advance(5)
        await wait_until(lambda: ward.checkup._patience is not None, 5, "it has begun")
        await ward.clock.advance(30)
        assert ward.told == [Health("check_health() has not returned for 30 s", hangs=True)]
        ward.patient.may_check.set()
        await wait_until(lambda: ward.checkup._task is None, 5, "it is through")

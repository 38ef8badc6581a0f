"""The controller is killed at each step of the event loop between a change and its acknowledgement, and some
steps beyond: what follows finds the change made or not made, never half, and callers lose nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest

from serveit.control.controller import Controller
from serveit.control.orders import BackendChange, Deployed, DeployFailed, Started
from serveit.control.snapshot import Snapshot
from serveit.control.spec import AppSpec
from tests.stage import FakeProcess, Stage, scaled_to, serving, spec, version_of

STEPS_AFTER = 12
"""The controller still has something to do when its caller has its answer."""
GROWTH_STEPS = 3
"""So many steps take processes to start."""


@dataclass
class Change:
    """What a driver wants, of an app that runs or is to run."""

    before: AppSpec | None
    ask: Callable[[Controller], Awaitable[object]]
    after: AppSpec | None
    least: dict[str, int] = field(default_factory=dict)
    """So many replicas of each backend serve at any time."""
    num_made: int = 0
    """Processes that it takes, beyond those that were there."""
    fails: bool = False
    """What it starts raises."""

    def grow(self, stage: Stage) -> None:
        """One process that was starting is through with it."""
        starting = [process for process in stage.launcher.of("") if not process.outcome.done()]
        if starting and self.fails and version_of(starting[0]) > 1:
            starting[0].fail(ValueError("no"))
        elif starting:
            starting[0].ready()


def deploying(wanted: AppSpec) -> Callable[[Controller], Awaitable[object]]:
    async def ask(controller: Controller) -> object:
        return await controller.outcomes.deployed(wanted.name, await controller.deploy(wanted))

    return ask


def deploying_twice(first: AppSpec, second: AppSpec) -> Callable[[Controller], Awaitable[object]]:
    async def ask(controller: Controller) -> object:
        await controller.deploy(first)
        return await deploying(second)(controller)

    return ask


async def scale_up(controller: Controller) -> object:
    await controller.update("app", "b", scaled_to(3))
    return await controller.settled("app")


async def scale_down(controller: Controller) -> object:
    await controller.update("app", "b", scaled_to(1))
    return await controller.settled("app")


async def reroute(controller: Controller) -> None:
    await controller.reroute("app", "/b", {"b": 0.5, "c": 0.5}, {})


async def delete(controller: Controller) -> None:
    await controller.delete("app")


async def configure(controller: Controller) -> object:
    await controller.update("app", "b", LATER)
    return await controller.settled("app")


async def replace(controller: Controller) -> object:
    await controller.update("app", "b", THREADS)
    return await controller.settled("app")


OLD = spec(b=2, c=1)
LATER, THREADS = BackendChange({"request_timeout_s": 5.0}), BackendChange({"num_threads": 4})
NEW = spec(b=2, c=1, id="new")
CHANGES = {
    "a first deploy": Change(None, deploying(NEW), NEW, num_made=3),
    "an update": Change(OLD, deploying(NEW), NEW, {"b": 2, "c": 1}, 3),
    "an update in place": Change(
        OLD, deploying(spec(b=2, c=1, surge=0, id="new")), spec(b=2, c=1, surge=0, id="new"), {"b": 1}, 3
    ),
    "an update without a route": Change(
        spec(b=2, c=1, more=("/old",)), deploying(NEW), NEW, {"b": 2, "c": 1}, 3
    ),
    "an update to fewer": Change(spec(b=3, c=1), deploying(NEW), NEW, {"b": 2, "c": 1}, 3),
    "an update that fails": Change(OLD, deploying(NEW), OLD, {"b": 2, "c": 1}, 2, fails=True),
    "one update behind another": Change(
        OLD, deploying_twice(spec(b=2, c=1, id="first"), NEW), NEW, {"b": 2, "c": 1}, 5
    ),
    "more replicas": Change(OLD, scale_up, spec(b=3, c=1), {"b": 2, "c": 1}, 1),
    "fewer replicas": Change(OLD, scale_down, spec(b=1, c=1), {"b": 1, "c": 1}),
    "other traffic": Change(OLD, reroute, OLD.rerouted("/b", {"b": 0.5, "c": 0.5}, {}), {"b": 2, "c": 1}),
    "other options": Change(OLD, configure, OLD.changed("b", LATER), {"b": 2, "c": 1}),
    "options that need new replicas": Change(
        OLD, replace, OLD.changed("b", THREADS).as_next(1, "b"), {"b": 2, "c": 1}, 2
    ),
    "options that fail": Change(OLD, replace, OLD, {"b": 2, "c": 1}, 1, fails=True),
    "a delete": Change(OLD, delete, None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
async def test_a_change_is_made_or_not_and_nobody_notices(change: Change) -> None:
    steps, steps_left = 0, STEPS_AFTER
    while steps_left:
        stage = Stage()
        await stage.open()
        steps += 1
        is_acknowledged = await _killed_after(stage, change, steps)
        steps_left -= is_acknowledged
        await stage.aclose()
    assert steps > STEPS_AFTER, "it takes some steps"


@pytest.mark.parametrize("first", [3, 9, 15])
@pytest.mark.parametrize("name", ["an update", "an update in place", "more replicas", "a delete"])
async def test_one_that_is_killed_as_it_begins_leaves_no_trace(name: str, first: int) -> None:
    change = CHANGES[name]
    steps, has_begun = 0, False
    while not has_begun:
        stage = Stage()
        await stage.open()
        steps += 1
        assert change.before is not None, "it runs"
        await stage.deploy(change.before)
        there = list(stage.launcher.made)
        stage.launcher.eager = False
        stage.begin(_asked(stage, change))
        await _step(stage, change, first)
        await stage.crash()
        beginning = stage.begin_at_once()
        await _step(stage, change, steps)
        has_begun = beginning.done()
        await stage.crash()
        await stage.recover()
        again = stage.begin(_asked(stage, change))
        await _rest(stage, change)
        assert again.done(), "nobody waits for ever"
        _check_callers(change, stage.witness.snapshots)
        _check_processes(stage, change.after, there)
        await stage.aclose()
    assert steps > 1, "it takes some steps"


async def test_a_shutdown_goes_on() -> None:
    steps_left = STEPS_AFTER
    steps = 0
    while steps_left:
        stage = Stage()
        await stage.open()
        await stage.deploy(OLD)
        steps += 1
        asked = stage.begin(stage.controller.shutdown())
        await _step(stage, CHANGES["an update"], steps)
        is_acknowledged = asked.done()
        steps_left -= is_acknowledged
        await stage.crash()
        is_made = stage.kept.octets is None or stage.kept.checkpoint.ending
        await stage.recover()
        assert is_made or not is_acknowledged
        if is_made:
            assert stage.running == []
            assert stage.controller.is_empty
        else:
            assert stage.running == ["b#1", "b#2", "c#3"]
        assert len(stage.launcher.made) == 3, "nothing is started for that"
        await stage.aclose()
    assert steps > STEPS_AFTER, "it takes some steps"


async def _step(stage: Stage, change: Change, steps: int) -> None:
    for step in range(steps):
        await asyncio.sleep(0)
        if step % GROWTH_STEPS == 0:
            change.grow(stage)


async def _killed_after(stage: Stage, change: Change, steps: int) -> bool:
    """Whether the driver had its answer then."""
    if change.before is not None:
        await stage.deploy(change.before)
    known = stage.member("known")
    await stage.clock.settle()
    there = list(stage.launcher.made)
    stage.launcher.eager = False
    asked = stage.begin(_asked(stage, change))
    await _step(stage, change, steps)
    is_acknowledged = asked.done()
    before = stage.controller.snapshot
    await stage.crash()

    await stage.recover()
    assert stage.controller.snapshot.version > before.version
    await _rest(stage, change)
    specs = stage.controller.specs
    expected = [change.after] if is_acknowledged else [change.before, change.after]
    assert specs.get("app") in [*expected, *_in_between(change)], "made or not, never half"
    _check_callers(change, [*known.snapshots, *stage.witness.snapshots])
    _check_processes(stage, specs.get("app"), there)

    again = stage.begin(_asked(stage, change))  # a driver that has no answer asks again
    await _rest(stage, change)
    assert again.done(), "nobody waits for ever"
    assert stage.controller.specs.get("app") == change.after
    _check_callers(change, [*known.snapshots, *stage.witness.snapshots])
    _check_processes(stage, change.after, there)
    if not change.fails and not is_acknowledged:
        assert len(stage.launcher.made) == len(there) + change.num_made or _in_between(change)
    return is_acknowledged


async def _asked(stage: Stage, change: Change) -> None:
    outcome = await change.ask(stage.controller)
    if change.fails:
        assert isinstance(outcome, DeployFailed)
        assert "ValueError: no" in outcome.text
    elif outcome is not None:
        assert isinstance(outcome, Deployed)
        assert outcome.version <= stage.controller.snapshot.version


async def _rest(stage: Stage, change: Change) -> None:
    """Until nothing happens any more."""
    for _ in range(12):
        await stage.clock.settle()
        if not any(not process.outcome.done() for process in stage.launcher.of("")):
            return
        change.grow(stage)
    raise AssertionError(f"it does not come to rest: {stage.launcher.of('')}")


def _in_between(change: Change) -> list[AppSpec]:
    """Of two deploys, one behind the other, the first may be all that has come to pass."""
    return [spec(b=2, c=1, id="first")] if change is CHANGES["one update behind another"] else []


def _check_callers(change: Change, snapshots: list[Snapshot]) -> None:
    """They have never been told of fewer replicas than they were promised."""
    for snapshot in snapshots:
        if snapshot.apps or change.least:
            known = serving(snapshot)
            for backend, number in change.least.items():
                assert len(known[f"app.{backend}"]) >= number, snapshot
    versions = [snapshot.version for snapshot in snapshots]
    assert versions == sorted(versions)


def _check_processes(stage: Stage, wanted: AppSpec | None, there: list[FakeProcess]) -> None:
    """Those that run serve, each was started once, and none of them was ended by force."""
    running = stage.launcher.of("")
    told = {f"{backend}#" for ids in stage.serving.values() for backend in ids}
    assert len(told) == len(running)
    for backend in wanted.backends if wanted is not None else ():
        names = [process.order.id for process in stage.launcher.of(f"{backend.name}#")]
        assert stage.serving[f"app.{backend.name}"] == names
        assert len(names) == backend.num_replicas
    assert [process.name for process in stage.launcher.made if process.killed and process in there] == []
    started = [process for process in stage.launcher.made if _has_started(process)]
    assert len({process.name for process in started}) == len(started), "no name is used twice"


def _has_started(process: FakeProcess) -> bool:
    done = process.outcome.done() and process.outcome.exception() is None
    return done and isinstance(process.outcome.result(), Started)

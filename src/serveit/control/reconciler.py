"""Brings an instance's apps to what they are to be, one step whenever something happened: the
controller's hands.

A deploy, a start that ended, a death: each sets off `reconcile`, which decides by `control/plan`, without
I/O, and sets tasks off, which come back with what they found.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from serveit.control.adoption import ADOPT_S, STRAY_DRAIN_S
from serveit.control.health import last_of
from serveit.control.orders import ActorName, Configured, Deployed, DeployFailed, Leaving, StartFailed
from serveit.control.plan import Start, Stop, Wait, plan
from serveit.control.processes import ProcessDied, all_done, ended
from serveit.control.replicas import Replica, Version, answered
from serveit.control.starting import Starter

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Mapping

    from serveit.control.adoption import Home, Origin
    from serveit.control.apps import RunningApp
    from serveit.control.checkpoint import Checkpoint
    from serveit.control.orders import Health, ReplicaOrder, Started
    from serveit.control.processes import Launcher, Process
    from serveit.control.publisher import Publisher
    from serveit.control.starting import Surroundings
    from serveit.types import Clock

logger = logging.getLogger("serveit.controller")

MAX_SILENT_DEATHS = 3
"""Processes that vanish while they start, without a word: so often is it tried."""
LATE_S = 10.0
"""At the end of all, beyond what apps get to end what they run, and then their replicas."""


class Reconciler:
    """All mutable state: `apps` (by name), `_leaving` (deleted, with requests that still run), `stopping`
    (nothing is started any more), `_adopting` (it is still found out what runs), `number` (of the last
    replica), `_turns` (of replicas that are to be started), `_tasks`, and of them those that end apps,
    `_removals`, and replicas, `_endings`."""

    def __init__(
        self,
        launcher: Launcher,
        clock: Clock,
        publisher: Publisher,
        surroundings: Surroundings,
        on_change: Callable[[], None],
    ) -> None:
        """
        Args:
            launcher: makes the processes.
            clock: for pauses and patience.
            publisher: tells callers.
            surroundings: what replicas are told.
            on_change: called when there is something new to keep for the next controller.
        """
        self.apps: dict[str, RunningApp] = {}
        self.stopping = False
        self.number = 0
        self._launcher = launcher
        self._clock = clock
        self._publisher = publisher
        self._starter = Starter(launcher, clock, surroundings)
        self._on_change = on_change
        self._adopting = False
        self._leaving: list[RunningApp] = []
        self._turns = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._removals: dict[RunningApp, asyncio.Task[None]] = {}
        self._endings: set[asyncio.Task[None]] = set()

    @property
    def surroundings(self) -> Surroundings:
        """What all replicas are told."""
        return self._starter.surroundings

    @property
    def is_empty(self) -> bool:
        """Whether nothing runs, and nothing is still ending."""
        return not (self.apps or self._removals or self._endings)

    @property
    def drain_s(self) -> float:
        """The longest that anything may take to end what it runs."""
        apps = (*self.apps.values(), *self._removals)
        return max((app.drain_s for app in apps), default=0.0)

    @property
    def removing(self) -> list[RunningApp]:
        """Those that have been deleted, and end what they run."""
        return list(self._removals)

    def publish(self) -> None:
        """Tell callers what serves; of two apps of one name: the later."""
        told = (app.published() for app in (*self._leaving, *self.apps.values()))
        infos = {info.name: info for info in told if info is not None}
        self._publisher.publish(tuple(infos.values()))

    def remove(self, app: RunningApp) -> None:
        """End an app: its routes first, then what it runs may end, then its replicas; see `removed`."""
        if self.apps.get(app.name) is app:  # not one that was deployed under its name
            del self.apps[app.name]
        app.leaving = True
        app.settle(DeployFailed("the app was deleted"))
        removal = self._removals[app] = self._run(self._removed(app))
        removal.add_done_callback(lambda _: self._forget(app))

    def _forget(self, app: RunningApp) -> None:
        del self._removals[app]
        self._on_change()

    async def removed(self, name: str, owner: str | None = None) -> None:
        """Wait for the end of apps of this name that were removed, not for another that was deployed under
        it meanwhile. Goes on if whoever waits is cancelled.

        Args:
            name: of the app.
            owner: only this one's; None for anybody's.
        """
        await all_done([end for app, end in self._removals.items() if app.name == name and app.is_of(owner)])

    async def _removed(self, app: RunningApp) -> None:
        try:
            await self._let_end(app)
        finally:
            endings = [self._end(app, replica) for replica in app.replicas.values()]
            self.publish()
        await self._publisher.acknowledged(self._publisher.snapshot.version)
        await all_done(endings)

    async def _let_end(self, app: RunningApp) -> None:
        """Without its routes, until nothing runs: what one of its requests calls is to be there still."""
        self._leaving.append(app)
        try:
            self.publish()
            await self._publisher.acknowledged(self._publisher.snapshot.version)
            await app.idle()
        finally:
            self._leaving.remove(app)

    async def ended(self) -> None:
        """Wait for all replicas that are being ended by now."""
        await all_done(self._endings)

    async def aclose(self) -> None:
        """End all apps, and wait for all of them, and all replicas, that are being ended."""
        self.stopping = True
        for app in list(self.apps.values()):
            self.remove(app)
        late = self._clock.call_later(2 * self.drain_s + LATE_S, self._kill_all)
        await all_done(self._removals.values())
        await self.ended()
        late.cancel()
        for task in self._tasks:
            task.cancel()
        await all_done(self._tasks)

    def _kill_all(self) -> None:
        """What an update has given more time than there is now."""
        for app in self._removals:
            for replica in app.replicas.values():
                if replica.process is not None:
                    replica.process.kill()

    def reconcile(self, app: RunningApp) -> None:
        """One step: start what is missing, publish what is up, stop what is too many.

        Nothing in it calls back: what it sets off happens in tasks, which come back here.
        """
        if self._adopting:
            return
        if self.stopping or self.apps.get(app.name) is not app:
            self.publish()  # what is leaving is not sent to the dead
            return
        before = app.live, app.target.proven
        complete = app.advance()
        versions = {version.number: version for version in app.versions}
        serving = app.live.wanted if app.live is not None else None
        now = self._clock.time()
        for action in plan(app.target.wanted, serving, app.states(), now):
            match action:
                case Start(backend, number):
                    self._start(app, versions[number], backend)
                case Stop(id):
                    self._end(app, app.replicas[id])
                case Wait(until):
                    app.look_again(self._clock.call_later(until - now, self.reconcile, app))
        for replica in app.to_configure():
            replica.taking_in = app.settings_of(replica)
            self._run(self._configure(app, replica, replica.taking_in))
        self.publish()
        if before != (app.live, app.target.proven) or (complete and app.changing):
            self._on_change()
        if complete:
            app.settle(Deployed(self._publisher.snapshot.version))
        app.move()

    def _start(self, app: RunningApp, version: Version, backend: str) -> None:
        self.number += 1
        replica = Replica(f"{backend}#{self.number}", backend, version)
        app.replicas[replica.id] = replica
        self._on_change()  # its number is not to be used again
        self._run(self._supervise(app, replica, self._launcher.replica))

    # -- what a controller before this one has left ------------------------------------------

    def restore(self, kept: Checkpoint) -> None:
        """Go on as the instance that it was."""
        self._starter.surroundings = self.surroundings._replace(token=kept.token, secret=kept.secret)
        self.number = kept.number

    async def adopt(self, homes: Mapping[Origin, Home], found: Iterable[ActorName]) -> None:
        """Take over the replicas that run; returns when it is known which of them are ready, or nearly so.

        Args:
            homes: whose they may be.
            found: the actors that there are.
        """
        self._adopting = True
        looking: list[Replica] = []
        for name in found:
            self.number = max(self.number, name.number)
            app, version = homes.get((name.app, name.backend, name.version), (None, None))
            if name.token != self.surroundings.token or app is None or version is None:
                self.dismiss(str(name))
                continue
            replica = Replica(name.replica, name.backend, version, adopted=True)
            app.replicas[name.replica] = replica
            looking.append(replica)
            self._run(self._supervise(app, replica, self._launcher.adopt))
        answers = self._run(answered(looking))
        await ended(self._clock, answers, ADOPT_S)
        answers.cancel()
        self._adopting = False
        for app in list(self.apps.values()):
            self.reconcile(app)
        self.publish()

    def dismiss(self, name: str) -> None:
        """End an actor that nobody looks after any more."""
        self._run(self._launcher.stray(name).stop(STRAY_DRAIN_S))

    async def _supervise(
        self, app: RunningApp, replica: Replica, launch: Callable[[ReplicaOrder], Process]
    ) -> None:
        """One replica's life, if nobody ends it."""
        silent = False
        outcome: Started | Leaving | DeployFailed
        async with self._turns:  # Ray takes some 10 ms for each, and others are to be answered in between
            await asyncio.sleep(0)
        if replica.ending is not None:
            return
        try:
            outcome = await self._starter.start(app, replica, launch)
        except ProcessDied as error:
            outcome = DeployFailed(f"replica {replica.id} died while it started: {error}")
            silent = True
        except Exception as error:
            outcome = DeployFailed(f"replica {replica.id} cannot start: {type(error).__name__}: {error}")
        replica.answered.set()
        if replica.ending is not None:
            return
        match outcome:
            case DeployFailed():
                self._not_started(app, replica, outcome, silent=silent)
                return
            case Leaving():
                replica.started = True
                self._end(app, replica)
                return
        replica.become(outcome)
        if not replica.adopted:
            app.tally.started(replica.backend)
        logger.info("replica %s of app %r is ready (pid %d)", replica.id, app.name, outcome.pid)
        self.reconcile(app)
        last = await last_of(replica, self._clock)
        if replica.ending is not None:
            return
        if isinstance(last, str):
            app.fear(replica)
            del app.replicas[replica.id]
            app.tally.died(replica.backend)
            logger.error("replica %s of app %r died: %s", replica.id, app.name, last)
            self._count(app, replica, f"replica {replica.id} died: {last}")
        else:
            self._replace(app, replica, last)

    def _replace(self, app: RunningApp, replica: Replica, health: Health) -> None:
        """It is not well: nobody is sent there any more, another comes in its place. What it runs may end,
        if it can be asked to."""
        what = "killing it" if health.hangs else "another takes its place"
        logger.error("replica %s of app %r is unhealthy: %s; %s", replica.id, app.name, health.illness, what)
        replica.health = health
        app.fear(replica)
        app.tally.died(replica.backend)
        self._end(app, replica)
        self._count(app, replica, f"replica {replica.id} was unhealthy: {health.illness}")

    async def _configure(self, app: RunningApp, replica: Replica, settings: bytes) -> None:
        """Give a replica other settings while it serves. Where it cannot take them in, the change that
        asked for them fails; one that cannot go back, either, is replaced."""
        try:
            outcome = await self._starter.configure(app, replica, settings)
        except ProcessDied:
            app.fear(replica)
            return  # whoever supervises it sees that, too
        except Exception as error:
            outcome = StartFailed(b"", where=replica.id, text=f"{type(error).__name__}: {error}")
        finally:
            replica.taking_in = None
        if isinstance(outcome, Configured):
            replica.settings = settings
        elif isinstance(outcome, StartFailed):
            replica.settings = b""  # some of it may have come into force
            logger.error("app %r: replica %s: %s", app.name, replica.id, outcome.text)
            is_wanted = replica.ending is None and settings == app.settings_of(replica)
            if is_wanted and app.hangs_on(replica):
                text = f"replica {replica.id} cannot take in its new configuration: {outcome.text}"
                self._fail(app, DeployFailed(text, outcome if outcome.failure else None))
            elif is_wanted:
                self._end(app, replica)
        self.reconcile(app)

    def _not_started(self, app: RunningApp, replica: Replica, failed: DeployFailed, *, silent: bool) -> None:
        """What raises while it starts fails the change that hangs on it, what dies in silence is tried
        again; where none does, it counts as a death."""
        del app.replicas[replica.id]
        app.tally.died(replica.backend)
        if replica.process is not None:
            replica.process.kill()
        logger.error("app %r: %s", app.name, failed.text)
        version = replica.version
        if not app.hangs_on(replica):
            self._count(app, replica, failed.text)
            return
        version.silent += silent
        # Those that die at the same time were on one node that was lost.
        num_replicas = max(1, version.spec.backend(replica.backend).num_replicas)
        if silent and version.silent < MAX_SILENT_DEATHS * num_replicas:
            self.reconcile(app)
        elif silent:
            self._fail(app, DeployFailed(f"{failed.text} ({version.silent} times)"))
        else:
            self._fail(app, failed)

    def _count(self, app: RunningApp, replica: Replica, how: str) -> None:
        """A death: another replica in its place, in time, or its backend is given up."""
        version, backend = replica.version, replica.backend
        now = self._clock.time()
        version.died(backend, now, how)
        if backend in version.given_up:
            logger.error("app %r: %s: given up", app.name, version.given_up[backend])
            self._on_change()
            if app.hangs_on(replica):
                self._fail(app, DeployFailed(version.given_up[backend]))
                return
        self.reconcile(app)

    def _fail(self, app: RunningApp, outcome: DeployFailed) -> None:
        """The change does not come into force: back to what serves, if anything does."""
        if not app.go_back():
            del self.apps[app.name]
            for replica in app.replicas.values():
                self._end(app, replica)
        app.settle(outcome)
        self._on_change()
        self.reconcile(app)

    def _end(self, app: RunningApp, replica: Replica) -> asyncio.Task[None]:
        """End a replica, once those who may know it have been told; the task that does it."""
        if replica.ending is None:
            replica.ending = self._run(self._ended(app, replica))
            self._endings.add(replica.ending)
            replica.ending.add_done_callback(self._endings.discard)
        return replica.ending

    async def _ended(self, app: RunningApp, replica: Replica) -> None:
        try:
            if replica.started and not replica.health.hangs:
                await self._publisher.acknowledged(self._publisher.snapshot.version)
                # An update cuts nothing off; the end of an app, or of all, does not take that long.
                stays = self.apps.get(app.name) is app and not self.stopping
                await replica.stop(to_deadlines=stays)
            elif replica.process is not None:
                replica.process.kill()
                await replica.process.death()
        finally:
            del app.replicas[replica.id]
            self.reconcile(app)  # its room is free

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a task of the controller failed", exc_info=error)

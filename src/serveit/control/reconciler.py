"""Brings an instance's apps to what they are to be, one step whenever something happened: the
controller's hands.

A deploy, a start that ended, a death: each sets off `reconcile`, which decides by `control/plan`, without
I/O, and sets tasks off, which come back with what they found.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

from serveit.control.orders import Deployed, DeployFailed, ReplicaOrder, StartFailed
from serveit.control.plan import Stop, plan
from serveit.control.processes import ProcessDied, ended
from serveit.control.replicas import Replica, RunningApp

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable

    from serveit.control.processes import Launcher, Process
    from serveit.control.publisher import Publisher
    from serveit.control.replicas import Version
    from serveit.types import Clock

logger = logging.getLogger("serveit.controller")

MAX_SILENT_DEATHS = 3
"""Processes that vanish while they start, without a word: so often is it tried."""


class Surroundings(NamedTuple):
    """What all replicas of an instance are told."""

    folder: str
    secret: bytes
    over_tcp: bool
    log_level: str
    token: str
    """Of this instance's controller: what a controller before it has left running has other names."""


class Reconciler:
    """All mutable state: `apps` (by name), `_leaving` (deleted, with requests that still run), `stopping`
    (nothing is started any more), `_number` (of the last replica), `_tasks`, and of them those that end
    apps, `_removals`, and replicas, `_endings`."""

    def __init__(
        self, launcher: Launcher, clock: Clock, publisher: Publisher, surroundings: Surroundings
    ) -> None:
        self.apps: dict[str, RunningApp] = {}
        self.stopping = False
        self._launcher = launcher
        self._clock = clock
        self._publisher = publisher
        self._surroundings = surroundings
        self._leaving: list[RunningApp] = []
        self._number = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._removals: dict[RunningApp, asyncio.Task[None]] = {}
        self._endings: set[asyncio.Task[None]] = set()

    @property
    def is_empty(self) -> bool:
        """Whether nothing runs, and nothing is still ending."""
        return not (self.apps or self._removals or self._endings)

    @property
    def drain_s(self) -> float:
        """The longest that anything may take to end what it runs."""
        apps = (*self.apps.values(), *self._removals)
        return max((app.drain_s for app in apps), default=0.0)

    def publish(self) -> None:
        """Tell callers what serves; of two apps of one name: the later."""
        known = {app.name: app for app in (*self._leaving, *self.apps.values())}
        infos = (app.published() for app in known.values())
        self._publisher.publish(tuple(info for info in infos if info is not None))

    async def remove(self, name: str, owner: str | None = None) -> None:
        """End an app: its routes first, then what it runs may end, then its replicas. Goes on if whoever
        waits for it is cancelled; who asks again waits for the same end, not for another app's that was
        deployed under the name meanwhile.

        Args:
            name: of the app.
            owner: only this one's; None for anybody's.
        """
        app = self.apps.get(name)
        if app is not None and app.is_of(owner):
            self._remove(app)
        await _all([end for app, end in self._removals.items() if app.name == name and app.is_of(owner)])

    def _remove(self, app: RunningApp) -> None:
        del self.apps[app.name]
        app.settle(DeployFailed("the app was deleted"))
        removal = self._removals[app] = self._run(self._removed(app))
        removal.add_done_callback(lambda _: self._removals.pop(app))

    async def _removed(self, app: RunningApp) -> None:
        try:
            await self._let_end(app)
        finally:
            endings = [self._end(app, replica) for replica in app.replicas.values()]
            self.publish()
        await self._publisher.acknowledged(self._publisher.snapshot.version)
        await _all(endings)

    async def _let_end(self, app: RunningApp) -> None:
        """Without its routes, until nothing runs: what one of its requests calls is to be there still."""
        app.leaving = True
        self._leaving.append(app)
        try:
            self.publish()
            await self._publisher.acknowledged(self._publisher.snapshot.version)
            await app.idle()
        finally:
            self._leaving.remove(app)

    async def ended(self) -> None:
        """Wait for all replicas that are being ended by now."""
        await _all(self._endings)

    async def aclose(self) -> None:
        """End all apps, and wait for all of them, and all replicas, that are being ended."""
        self.stopping = True
        for app in list(self.apps.values()):
            self._remove(app)
        await _all(self._removals.values())
        await self.ended()
        for task in self._tasks:
            task.cancel()
        await _all(self._tasks)

    def reconcile(self, app: RunningApp) -> None:
        """One step: start what is missing, publish what is up, stop what is too many.

        Nothing in it calls back: what it sets off happens in tasks, which come back here.
        """
        if self.stopping or self.apps.get(app.name) is not app:
            self.publish()  # what is leaving is not sent to the dead
            return
        complete = app.complete
        if complete:
            app.live = app.target
            app.target.silent = 0
        versions = {version.number: version for version in app.versions}
        serving = app.live.wanted if app.live is not None else None
        for action in plan(app.target.wanted, serving, app.states()):
            if isinstance(action, Stop):
                self._end(app, app.replicas[action.replica])
            else:
                self._start(app, versions[action.version], action.backend)
        self.publish()
        if complete:
            app.settle(Deployed(self._publisher.snapshot.version))

    def _start(self, app: RunningApp, version: Version, backend: str) -> None:
        """Start a replica, unless its backend was given up or has to wait: then `_count` comes back."""
        if backend in version.given_up or version.put_off(backend, self._clock.time()):
            return
        self._number += 1
        replica = Replica(f"{backend}#{self._number}", backend, version)
        app.replicas[replica.id] = replica
        self._run(self._supervise(app, replica))

    async def _supervise(self, app: RunningApp, replica: Replica) -> None:
        """One replica's life, if nobody ends it."""
        silent = False
        try:
            failed = await self._become(app, replica)
        except ProcessDied as error:
            failed = DeployFailed(f"replica {replica.id} died while it started: {error}")
            silent = True
        except Exception as error:
            failed = DeployFailed(f"replica {replica.id} cannot start: {type(error).__name__}: {error}")
        if replica.ending is not None:
            return
        if failed is not None:
            self._not_started(app, replica, failed, silent=silent)
            return
        self.reconcile(app)
        assert replica.process is not None, "it has started"
        how = await replica.process.death()
        if replica.ending is None:
            del app.replicas[replica.id]
            logger.error("replica %s of app %r died: %s", replica.id, app.name, how)
            self._count(app, replica, f"replica {replica.id} died: {how}")

    async def _become(self, app: RunningApp, replica: Replica) -> DeployFailed | None:
        """Make it a replica; why not, if not. Raises ProcessDied."""
        if replica.ending is not None:
            return None
        spec, around = replica.version.spec, self._surroundings
        order = ReplicaOrder(
            id=replica.id,
            app=spec.name,
            backend=replica.backend,
            code=spec.code,
            folder=around.folder,
            secret=around.secret,
            over_tcp=around.over_tcp,
            log_level=around.log_level,
            actor=f"{spec.name}/{replica.id}@{around.token}",
        )
        limit = spec.backend(replica.backend).info.max_ongoing_requests
        process = replica.process = self._launcher.replica(order, limit)
        if not await self._placed(app, replica, process):
            return DeployFailed(
                f"replica {replica.id} has waited {spec.deploy_timeout_s:g} s for its process to exist: no "
                "node has free what it asks for (`ray status` shows what there is); give the cluster "
                "more, ask for less, or wait longer with deploy_timeout_s"
            )
        outcome = await process.start()
        if isinstance(outcome, StartFailed):
            return DeployFailed(
                f"replica {replica.id} cannot start: {outcome.text or outcome.where}", outcome
            )
        if replica.ending is None:
            replica.address = outcome.address
            logger.info("replica %s of app %r is ready (pid %d)", replica.id, spec.name, outcome.pid)
        return None

    async def _placed(self, app: RunningApp, replica: Replica, process: Process) -> bool:
        """Wait for its process; not for ever, if a change hangs on it. Whether it is there."""
        waiting = asyncio.ensure_future(process.placed())
        timeout_s = replica.version.spec.deploy_timeout_s
        try:
            while not await ended(self._clock, waiting, timeout_s):
                if app.hangs_on(replica):
                    return False
                logger.warning("replica %s still waits for its process to exist", replica.id)
            waiting.result()
            return True
        finally:
            waiting.cancel()

    def _not_started(self, app: RunningApp, replica: Replica, failed: DeployFailed, *, silent: bool) -> None:
        """What raises while it starts fails the change that hangs on it, what dies in silence is tried
        again; where none does, it counts as a death."""
        del app.replicas[replica.id]
        if replica.process is not None:
            replica.process.kill()
        logger.error("app %r: %s", app.name, failed.text)
        version = replica.version
        if not app.hangs_on(replica):
            self._count(app, replica, failed.text)
            return
        version.silent += silent
        if silent and version.silent < MAX_SILENT_DEATHS:
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
            if app.hangs_on(replica):
                self._fail(app, DeployFailed(version.given_up[backend]))
                return
        elif wait_s := version.put_off(backend, now):
            self._clock.call_later(wait_s, self.reconcile, app)
        self.reconcile(app)

    def _fail(self, app: RunningApp, outcome: DeployFailed) -> None:
        """The change does not come into force: back to what serves, if anything does."""
        if not app.go_back():
            del self.apps[app.name]
            for replica in app.replicas.values():
                self._end(app, replica)
        app.settle(outcome)
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
            if replica.address is not None:
                await self._publisher.acknowledged(self._publisher.snapshot.version)
                await replica.stop()
            elif replica.process is not None:
                replica.process.kill()
                await replica.process.death()
        finally:
            del app.replicas[replica.id]

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a task of the controller failed", exc_info=error)


async def _all(tasks: Iterable[asyncio.Task[None]]) -> None:
    if pending := list(tasks):
        await asyncio.wait(pending)

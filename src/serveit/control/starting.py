"""From an order to a replica that serves: its process gets a place in the cluster, and becomes one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from serveit.control.health import told
from serveit.control.orders import ActorName, DeployFailed, ReplicaOrder, StartFailed
from serveit.control.processes import NoPlace, ended

if TYPE_CHECKING:
    from collections.abc import Callable

    from serveit.control.apps import RunningApp
    from serveit.control.orders import Configured, Leaving, Started
    from serveit.control.processes import Launcher, Process
    from serveit.control.replicas import Replica
    from serveit.types import Clock

LOOK_S = 1.0
"""So often is it looked what a replica waits for that has no place yet, or not taken in its settings."""


class Surroundings(NamedTuple):
    """What all replicas of an instance are told."""

    folder: str
    secret: bytes
    over_tcp: bool
    log_level: str
    token: str
    """Of this instance: another's actors in the cluster have other names."""


class Starter:
    """Makes processes replicas. All mutable state: `surroundings`, before anything is started."""

    def __init__(self, launcher: Launcher, clock: Clock, surroundings: Surroundings) -> None:
        self.surroundings = surroundings
        self._launcher = launcher
        self._clock = clock

    async def start(
        self, app: RunningApp, replica: Replica, launch: Callable[[ReplicaOrder], Process]
    ) -> Started | Leaving | DeployFailed:
        """Make it a replica, or find out what has become of one.

        Args:
            app: that it is of.
            replica: gets its process.
            launch: makes the process, or finds it.

        Raises:
            ProcessDied: without a word.
        """
        order = self._order(app, replica)
        process = replica.process = launch(order)
        try:
            if (lacking := await self._placed(app, replica, order)) is not None:
                return DeployFailed(lacking)
        except NoPlace as error:
            return DeployFailed(f"replica {replica.id} cannot start: {error}")
        # It may have been ready long ago: what it runs may end, though it has no time to answer now.
        replica.started = replica.adopted
        outcome = await (told(replica, self._clock) if replica.adopted else process.start())
        if isinstance(outcome, StartFailed):
            why = outcome.text or outcome.where
            return DeployFailed(f"replica {replica.id} cannot start: {why}", outcome)
        return outcome

    async def configure(
        self, app: RunningApp, replica: Replica, settings: bytes
    ) -> Configured | StartFailed | Leaving:
        """Give one that serves other settings. The user's `reconfigure` may take its time, and the change
        that waits for it tells so.

        Raises:
            ProcessDied: meanwhile.
        """
        assert replica.process is not None, "it is ready"
        configuring = asyncio.ensure_future(replica.process.configure(settings))
        began = self._clock.time()
        try:
            while not await ended(self._clock, configuring, LOOK_S):
                waited_s = self._clock.time() - began
                replica.waiting = (
                    f"replica {replica.id} takes in its configuration; waiting for {waited_s:.0f} s"
                )
                app.move()
            return configuring.result()
        finally:
            replica.waiting = ""
            configuring.cancel()

    def _order(self, app: RunningApp, replica: Replica) -> ReplicaOrder:
        spec, around = replica.version.spec, self.surroundings
        backend = app.spec_of(replica)
        return ReplicaOrder(
            id=replica.id,
            app=spec.name,
            backend=replica.backend,
            code=spec.code,
            folder=around.folder,
            secret=around.secret,
            over_tcp=around.over_tcp,
            log_level=around.log_level,
            actor=str(ActorName(spec.name, replica.id, replica.origin, around.token)),
            actor_options=backend.ray_actor_options,
            settings=backend.settings,
            max_ongoing=backend.config.ongoing_limit(is_async=backend.is_async),
        )

    async def _placed(self, app: RunningApp, replica: Replica, order: ReplicaOrder) -> str | None:
        """Wait for its process; not for ever, if a change hangs on it. What the cluster lacks, if it is
        not there then."""
        assert replica.process is not None, "it was launched"
        placing = asyncio.ensure_future(replica.process.placed())
        timeout_s = replica.version.spec.deploy_timeout_s
        began = self._clock.time()
        try:
            while not await ended(self._clock, placing, min(LOOK_S, timeout_s)):
                waited_s = self._clock.time() - began
                lacking = await self._launcher.lacking(order)
                if waited_s >= timeout_s and app.hangs_on(replica) and not app.is_ending_some:
                    return _without_place(app, replica, lacking, timeout_s)
                if lacking:
                    replica.waiting = f"replica {replica.id} {lacking}; waiting for {waited_s:.0f} s"
                    app.move()
            placing.result()
            return None
        finally:
            replica.waiting = ""
            placing.cancel()


def _without_place(app: RunningApp, replica: Replica, lacking: str, timeout_s: float) -> str:
    is_update = app.live is not None and app.target is not app.live
    beside = replica.version.spec.backend(replica.backend).config.max_surge
    less = ", update in place with max_surge=0" if is_update and beside else ""
    return (
        f"replica {replica.id} has waited {timeout_s:g} s for its process to exist: it "
        f"{lacking or 'has not been started by Ray'}; give the cluster more, ask for less{less}, or wait "
        "longer (deploy_timeout_s, --deploy-timeout)"
    )

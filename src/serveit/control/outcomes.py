"""What became of changes, for whoever has asked for them, and how far they are."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from serveit.control.orders import Deployed, DeployFailed
from serveit.control.processes import ended

if TYPE_CHECKING:
    from collections.abc import Mapping

    from serveit.control.apps import RunningApp
    from serveit.control.checkpoint import Checkpoints
    from serveit.control.orders import Deploying
    from serveit.control.publisher import Publisher
    from serveit.types import Clock

MAX_OUTCOMES = 20
"""Deploys whose outcome is kept for whoever has not asked yet."""
GO_BACK_S = 10.0
"""What replicas get to take a configuration back that another one has refused."""


class Outcomes:
    """All mutable state: `_deploys` (what becomes of them, by version), and `failures` (why apps of which
    nothing is left did not come up, by name)."""

    def __init__(
        self, apps: Mapping[str, RunningApp], checkpoints: Checkpoints, publisher: Publisher, clock: Clock
    ) -> None:
        """
        Args:
            apps: those that there are now, by name.
            checkpoints: what has failed is kept before it is told.
            publisher: what has come into force is known to all before it is told.
            clock: for patience.
        """
        self._apps = apps
        self._checkpoints = checkpoints
        self._publisher = publisher
        self._clock = clock
        self.failures: dict[str, str] = {}
        self._deploys: dict[int, asyncio.Future[Deployed | DeployFailed]] = {}

    def remember(self, app: RunningApp) -> None:
        """There will be an outcome of its target's deploy."""
        self._deploys[app.target.number] = app.outcome
        done = [version for version, outcome in self._deploys.items() if outcome.done()]
        for version in done[:-MAX_OUTCOMES]:
            del self._deploys[version]
        self.failures.pop(app.name, None)
        app.outcome.add_done_callback(lambda outcome: self._note(app, outcome.result()))

    def _note(self, app: RunningApp, outcome: Deployed | DeployFailed) -> None:
        if isinstance(outcome, DeployFailed) and app.name not in self._apps and not app.leaving:
            self.failures[app.name] = outcome.text
            if len(self.failures) > MAX_OUTCOMES:
                del self.failures[next(iter(self.failures))]

    def _of(self, name: str, version: int) -> asyncio.Future[Deployed | DeployFailed] | None:
        app = self._apps.get(name)
        if version not in self._deploys and app is not None and app.target.number == version:
            return app.outcome
        return self._deploys.get(version)

    async def deployed(self, name: str, version: int) -> Deployed | DeployFailed:
        """Wait until the app is up, or failed to come up; then proxies know of it, too."""
        outcome = self._of(name, version)
        if outcome is None:
            app = self._apps.get(name)
            why = app.failed if app is not None else ""
            return DeployFailed(why or f"app {name!r} was changed or deleted meanwhile")
        return await self._in_force(outcome)

    async def progressed(
        self, name: str, version: int, seen: Deploying | None
    ) -> Deployed | DeployFailed | Deploying:
        """What `deployed` tells, or how far it is as soon as that is not what was seen."""
        while True:
            outcome, app = self._of(name, version), self._apps.get(name)
            if outcome is None or outcome.done() or app is None or app.target.number != version:
                return await self.deployed(name, version)
            if (progress := app.progress) != seen:
                return progress
            await app.moved.wait()

    async def moved(self, name: str, seen: Deploying | None) -> Deploying | None:
        """How far the change of an app is that is under way, as soon as that is not what was seen; None when
        there is none."""
        while (app := self._apps.get(name)) is not None and app.changing:
            if (progress := app.progress) != seen:
                return progress
            await app.moved.wait()
        return None

    async def settled(self, app: RunningApp) -> Deployed | DeployFailed:
        """Wait until an app is what it is to be, or what the last change made of it has failed: then its
        replicas have gone back to what they were configured by, if that does not take too long."""
        outcome = await self._in_force(app.outcome)
        if isinstance(outcome, DeployFailed):
            going_back = asyncio.ensure_future(app.configured())
            await ended(self._clock, going_back, GO_BACK_S)
            going_back.cancel()
        return outcome

    async def _in_force(self, change: asyncio.Future[Deployed | DeployFailed]) -> Deployed | DeployFailed:
        outcome = await asyncio.shield(change)
        await self._checkpoints.kept()
        if isinstance(outcome, Deployed):
            if outcome.version < (self._publisher.epoch, 0):
                outcome = Deployed(self._publisher.snapshot.version)  # it was before this controller's time
            await self._publisher.acknowledged(outcome.version)
        return outcome

"""The controller: what is to be against what is. One per instance; a plain class, an actor runs it.

Here is what drivers ask for; the `reconciler` brings the apps to what they are to be, the `publisher`
tells callers of it by whole, numbered snapshots, and the `proxies` are kept running. Processes are
started and stopped through a `Launcher`, which is Ray's in `actors` and a fake in tests.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from typing import TYPE_CHECKING, Any

from serveit.clock import LoopClock
from serveit.control.orders import Deployed, DeployFailed
from serveit.control.processes import pause
from serveit.control.proxies import Proxies
from serveit.control.publisher import Publisher
from serveit.control.reconciler import Reconciler, Surroundings
from serveit.control.replicas import Replica, RunningApp, Version
from serveit.exceptions import NotServing

if TYPE_CHECKING:
    from serveit.control.orders import ProxyOrder, Started, StartFailed
    from serveit.control.processes import Launcher
    from serveit.control.snapshot import Snapshot
    from serveit.control.spec import AppSpec
    from serveit.types import Clock

logger = logging.getLogger("serveit.controller")

MAX_OUTCOMES = 20
"""Deploys whose outcome is kept for whoever has not asked yet."""


class Controller:
    """Desired state, actual state, and what brings them together.

    All mutable state: `_outcomes` (of deploys, by version), `_owners` (drivers that are connected, how
    often), `_losses` (of their connections), `_version` (the last of an app's), `_shutdown` (the task;
    None before); the apps are the reconciler's, the snapshots the publisher's.
    """

    def __init__(
        self,
        launcher: Launcher,
        *,
        folder: str,
        secret: bytes,
        over_tcp: bool,
        log_level: str,
        clock: Clock | None = None,
        token: str = "",
    ) -> None:
        """
        Args:
            launcher: makes the processes.
            folder: for the sockets of this instance.
            secret: for channels between nodes.
            over_tcp: whether there may be other nodes.
            log_level: of the processes.
            clock: the running event loop's, if there is none.
            token: part of the names of its replicas' actors; made up, if it is empty.
        """
        self._clock = clock if clock is not None else LoopClock()
        self._publisher = Publisher(self._clock, epoch=time.time_ns() // 1_000_000)
        self._proxies = Proxies(launcher, self._clock, self._publisher.forget)
        surroundings = Surroundings(folder, secret, over_tcp, log_level, token or secrets.token_hex(3))
        self._reconciler = Reconciler(launcher, self._clock, self._publisher, surroundings)
        self._apps = self._reconciler.apps
        self._outcomes: dict[int, asyncio.Future[Deployed | DeployFailed]] = {}
        self._owners: dict[str, int] = {}
        self._losses: dict[str, int] = {}
        self._version = 0
        self._shutdown: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Controller {self.snapshot.version} {list(self._apps.values())}>"

    def check_open(self) -> None:
        """Raises NotServing once the instance shuts down."""
        if self._shutdown is not None:
            raise NotServing("the instance is shutting down")

    # -- what drivers ask for ----------------------------------------------------------------

    def deploy(self, spec: AppSpec) -> int:
        """Set what an app is to be; `deployed` tells what became of it.

        Returns:
            The version of this spec.

        Raises:
            ValueError: a route of it belongs to another app already.
            NotServing: the instance is shutting down.
        """
        self.check_open()
        self._check_routes(spec)
        self._version += 1
        version = Version(self._version, spec)
        app = self._apps.get(spec.name)
        if app is None:
            app = self._apps[spec.name] = RunningApp(version)
        else:
            app.begin(version)
        self._outcomes[version.number] = app.outcome
        if len(self._outcomes) > MAX_OUTCOMES:
            del self._outcomes[next(iter(self._outcomes))]
        self._reconciler.reconcile(app)
        return version.number

    async def deployed(self, name: str, version: int) -> Deployed | DeployFailed:
        """Wait until the app is up, or failed to come up; then proxies know of it, too."""
        outcome = self._outcomes.get(version)
        if outcome is None:
            return DeployFailed(f"app {name!r} was changed or deleted meanwhile")
        return await self._in_force(outcome)

    def scale(self, name: str, backend: str, num_replicas: int) -> None:
        """Change a backend's number of replicas; `settled` waits for it. A backend that was given up is
        tried anew.

        Raises:
            KeyError: no such app or backend.
            ValueError: a negative number.
        """
        app = self._known(name)
        app.target.spec.scaled(backend, num_replicas)  # raises before anything is changed
        app.begin()
        app.scale(backend, num_replicas)
        self._reconciler.reconcile(app)

    def reroute(self, name: str, endpoint: str, weights: list[Any], shadows: list[Any]) -> None:
        """Change where an endpoint leads; while a new version comes up: where that one's will.

        Raises:
            KeyError: no such app, endpoint or backend.
        """
        target = self._known(name).target
        target.spec = target.spec.rerouted(endpoint, weights, shadows)
        self._reconciler.publish()

    async def settled(self, name: str) -> Deployed | DeployFailed:
        """Wait until an app is what it is to be, or what the last change made of it has failed."""
        return await self._in_force(self._known(name).outcome)

    async def delete(self, name: str, owner: str | None = None) -> None:
        """End an app: its routes first, then what it runs may end, then its replicas. One that is ending
        already is waited for.

        Args:
            name: of the app.
            owner: who wants it; an app that another driver has taken over stays. None: whoever has it.
        """
        await self._reconciler.remove(name, owner)
        await self._last_ended()

    async def shutdown(self) -> None:
        """End everything: stop accepting, let what runs end, stop the processes. Once is enough."""
        if self._shutdown is None:
            self._shutdown = asyncio.get_running_loop().create_task(self._shut_down())
        await asyncio.shield(self._shutdown)

    async def _shut_down(self) -> None:
        self._reconciler.stopping = True
        try:
            await self._proxies.aclose(self._reconciler.drain_s)
        finally:
            await self._reconciler.aclose()

    async def status(self, name: str) -> dict[str, Any]:
        """What an app's replicas are doing, and which backends were given up."""
        app = self._apps.get(name)
        if app is None:
            return {"backends": {}, "failed": {}}
        replicas = list(app.replicas.values())
        told = await asyncio.gather(*map(_status, replicas))
        backends: dict[str, dict[str, Any]] = {backend.name: {} for backend in app.target.spec.backends}
        for replica, status in zip(replicas, told, strict=True):
            backends.setdefault(replica.backend, {})[replica.id] = status
        failed = {name: why for version in app.versions for name, why in version.given_up.items()}
        return {"backends": backends, "failed": failed}

    def describe(self, name: str) -> AppSpec:
        """The spec of an app. KeyError lists the known ones."""
        return self._known(name).target.spec

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to run, nothing is still ending, and nobody may be about to deploy something."""
        return self._reconciler.is_empty and not any(self._owners.values())

    # -- HTTP --------------------------------------------------------------------------------

    @property
    def url(self) -> str | None:
        """Where the instance answers HTTP."""
        return self._proxies.url

    async def http(self, options: bytes | None, order: ProxyOrder | None) -> Started | StartFailed | None:
        """The HTTP server of the instance, started if need be; see `Proxies.open`."""
        return await self._proxies.open(options, order)

    # -- owners ------------------------------------------------------------------------------

    def owner_joined(self, owner: str) -> None:
        """A driver whose end is its apps' has connected."""
        self._owners[owner] = self._owners.get(owner, 0) + 1

    def owner_left(self, owner: str) -> None:
        """It has ended its apps itself."""
        self._owners.pop(owner, None)

    async def owner_lost(self, owner: str, grace_s: float) -> None:
        """Its connection is gone; without another in so long its apps are deleted."""
        if owner not in self._owners:
            return  # it had said so
        self._owners[owner] -= 1
        loss = self._losses[owner] = self._losses.get(owner, 0) + 1
        await pause(self._clock, grace_s)
        if self._owners.get(owner) or self._losses.get(owner) != loss:
            return
        self._owners.pop(owner, None)
        self._losses.pop(owner, None)
        names = [app.name for app in self._apps.values() if app.target.spec.owner == owner]
        for name in names:
            logger.warning("the driver of app %r is gone: deleting the app", name)
        await asyncio.gather(*map(self.delete, names))
        await self._last_ended()

    async def _last_ended(self) -> None:
        """Without any app: wait for what a failed deploy has left. Whoever ended the last app, or was the
        last, looks next whether this is empty, and nobody does so later."""
        if not self._apps:
            await self._reconciler.ended()

    # -- snapshots ---------------------------------------------------------------------------

    @property
    def snapshot(self) -> Snapshot:
        """The latest."""
        return self._publisher.snapshot

    async def watch(self, member: str, version: tuple[int, int]) -> Snapshot:
        """A later snapshot than the one that the member has taken in; see `Publisher.watch`."""
        return await self._publisher.watch(member, version)

    def forget(self, member: str) -> None:
        """The member watches no longer."""
        self._publisher.forget(member)

    async def acknowledged(self, version: tuple[int, int]) -> None:
        """Wait until every watcher has taken in this snapshot; see `Publisher.acknowledged`."""
        await self._publisher.acknowledged(version)

    async def _in_force(self, change: asyncio.Future[Deployed | DeployFailed]) -> Deployed | DeployFailed:
        outcome = await asyncio.shield(change)
        if isinstance(outcome, Deployed):
            await self.acknowledged(outcome.version)
        return outcome

    # -- small things ------------------------------------------------------------------------

    def _known(self, name: str) -> RunningApp:
        app = self._apps.get(name)
        if app is None:
            raise KeyError(f"there is no app {name!r}; running: {', '.join(sorted(self._apps)) or 'none'}")
        return app

    def _check_routes(self, spec: AppSpec) -> None:
        """ValueError for one that another app has, or goes back to if its change fails."""
        taken = {
            place: other.name
            for other in self._apps.values()
            if other.name != spec.name
            for version in other.versions
            for place in _places(version.spec)
        }
        for place, route in _places(spec).items():
            if place in taken:
                raise ValueError(
                    f"{place[1]} {route} of app {spec.name!r} is taken by app {taken[place]!r}: "
                    "give one of them a prefix"
                )


async def _status(replica: Replica) -> dict[str, Any]:
    told = {}
    if replica.process is not None and replica.stage == "ready":
        told = await replica.process.status()
    return {"state": replica.stage, **told}


def _places(spec: AppSpec) -> dict[tuple[str, str], str]:
    """Where its routes are, once the parameters' names are taken out: (regex, method) to pattern."""
    return {
        (re.escape(route.prefix) + route.regex, method): route.prefix + route.pattern
        for route in spec.routes
        for method in route.methods
    }

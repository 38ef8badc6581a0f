"""The controller: what is to be against what is. One per instance; a plain class, an actor runs it.

Here is what drivers ask for; the `reconciler` brings the apps to what they are to be, the `publisher`
tells callers of it by whole, numbered snapshots, and the `proxies` are kept running. Processes are
started and stopped through a `Launcher`, which is Ray's in `launching` and a fake in tests. A change is
kept (`checkpoint`) before it is made: a controller that died is followed by one that goes on from there.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from typing import TYPE_CHECKING, Any

import msgspec

from serveit.clock import LoopClock
from serveit.control.adoption import restored
from serveit.control.apps import RunningApp, no_app
from serveit.control.checkpoint import MAX_PAUSE_S, AppRecord, Checkpoint, Checkpoints
from serveit.control.orders import ActorName, Deployed, DeployFailed
from serveit.control.outcomes import Outcomes
from serveit.control.owners import Owners
from serveit.control.processes import backoff_s, pause
from serveit.control.proxies import Proxies
from serveit.control.publisher import Publisher
from serveit.control.reconciler import Reconciler
from serveit.control.replicas import Version
from serveit.control.starting import Surroundings
from serveit.exceptions import NotServing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from serveit.control.checkpoint import Store
    from serveit.control.orders import BackendChange
    from serveit.control.processes import Launcher
    from serveit.control.snapshot import Snapshot
    from serveit.control.spec import AppSpec
    from serveit.types import Clock

logger = logging.getLogger("serveit.controller")


class Controller:
    """Desired state, actual state, and what brings them together. Watchers come to its `publisher`, whoever
    needs an HTTP server to its `proxies`.

    All mutable state: `_version` (the last of an app's), `_to_remove` (apps whose end a controller before
    this one has begun), `_ending` (all of it is to end) and `_shutdown` (the task that does it; None
    before); the apps are the reconciler's, the snapshots the publisher's, what became of changes the
    `outcomes`', drivers the `owners`'.
    """

    def __init__(
        self,
        launcher: Launcher,
        store: Store,
        *,
        folder: str,
        over_tcp: bool,
        log_level: str,
        clock: Clock | None = None,
    ) -> None:
        """
        Args:
            launcher: makes the processes.
            store: keeps what the next controller has to know.
            folder: for the sockets of this instance.
            over_tcp: whether there may be other nodes.
            log_level: of the processes.
            clock: the running event loop's, if there is none.
        """
        self._launcher = launcher
        self._clock = clock if clock is not None else LoopClock()
        self.owners = Owners(self._clock, self._end_apps)
        self.publisher = Publisher(self._clock)
        self._checkpoints = Checkpoints(store, self._clock, self._checkpoint)
        self.proxies = Proxies(launcher, self._clock, self.publisher.forget, self._checkpoints.mark)
        fresh = Surroundings(folder, secrets.token_bytes(32), over_tcp, log_level, secrets.token_hex(3))
        self._reconciler = Reconciler(launcher, self._clock, self.publisher, fresh, self._checkpoints.mark)
        self._apps = self._reconciler.apps
        self.outcomes = Outcomes(self._apps, self._checkpoints, self.publisher, self._clock)
        self._version = 0
        self._to_remove: tuple[AppRecord, ...] = ()
        self._ending = False
        self._shutdown: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Controller {self.snapshot.version} {list(self._apps.values())}>"

    @property
    def secret(self) -> bytes:
        """For channels between nodes."""
        return self._reconciler.surroundings.secret

    def check_open(self) -> None:
        """Raises NotServing once the instance shuts down."""
        if self._ending:
            raise NotServing("the instance is shutting down")

    # -- starting, for the first time or again -----------------------------------------------

    async def restore(self) -> Checkpoint | None:
        """Read what a controller before this one has kept; the instance is the same then.

        Raises:
            ValueError: another version of serveit has written it.
        """
        kept = await self._checkpoints.load()
        now = time.time_ns() // 1_000_000
        self.publisher.begin(now if kept is None else max(now, kept.epoch + 1))
        if kept is not None:
            self._version = kept.version
            self._ending = self._reconciler.stopping = kept.ending
            self._reconciler.restore(kept)
        return kept

    async def take_over(self, kept: Checkpoint | None) -> None:
        """Take over what runs, and end what nobody wants. Callers are told nothing before.

        Args:
            kept: what `restore` gave.
        """
        names = await self._launcher.running()
        replicas = [name for name in map(ActorName.parse, names) if name is not None]
        if kept is None:
            # Another instance's, whose controller was ended by force.
            for name in replicas:
                self._launcher.stray(str(name)).kill()
            await self.proxies.recover(None, names)
            self._checkpoints.mark()
            return
        logger.info("a controller has started anew: it takes over %d actors", len(names))
        self._to_remove = kept.leaving
        apps, homes = restored((*kept.leaving, *kept.apps.values()))
        leaving = [app for app in apps if app.leaving]
        for app in apps:
            if not app.leaving:
                self._apps[app.name] = app
                self.outcomes.remember(app)
        await self.proxies.recover(kept.http, names)
        for member in self.proxies.members:
            self.publisher.expect(member)
        await self._reconciler.adopt(homes, replicas)
        for app in leaving:
            self._reconciler.remove(app)
        self._to_remove = ()
        for owner in {app.target.spec.owner for app in self._apps.values()} - {""}:
            self.owners.expect(owner)
        self._checkpoints.mark()

    async def await_owners(self, kept: Checkpoint) -> None:
        """After `take_over`: apps whose drivers do not come back end. Then the instance may be empty."""
        if kept.ending:
            await self.shutdown()
            return
        await self.owners.await_expected()
        for app in self._reconciler.removing:
            await self._reconciler.removed(app.name)  # whoever has deleted it may be gone
        await self.last_ended()

    # -- what drivers ask for ----------------------------------------------------------------

    async def deploy(self, spec: AppSpec) -> int:
        """Set what an app is to be; `outcomes` tell what became of it. Asked again for the same, it is the
        same deploy.

        Returns:
            The version of this spec.

        Raises:
            ValueError: a route of it belongs to another app already.
            NotServing: the instance is shutting down.
            OSError: the change cannot be kept, and is not made.
        """
        async with self._checkpoints.changing:
            self.check_open()
            app = self._apps.get(spec.name)
            if app is not None and spec.id and app.target.spec.id == spec.id:
                return app.target.number
            if app is not None:
                self.owners.check(app.target.spec, spec.owner)
            spec.check_routes(v.spec for other in self._apps.values() for v in other.versions)
            version = Version(self._version + 1, spec)
            app = await self._retarget(app, version)
        self._reconciler.reconcile(app)
        return version.number

    async def _retarget(self, app: RunningApp | None, version: Version, *, joins: bool = False) -> RunningApp:
        """Keep, and then set, that an app is to be another version of itself; the first one, for None. See
        `RunningApp.begin`."""
        name = version.spec.name
        record = (
            AppRecord((version.record,), version.number, changing=True)
            if app is None
            else app.record.retargeted(version.record)
        )
        await self._keep(name, record, version=version.number)
        self.check_open()
        self._version += 1
        app = self._apps.get(name)  # a failed change may have ended it meanwhile
        if app is None:
            app = self._apps[name] = RunningApp(version)
        else:
            app.begin(version, joins=joins)
        self.outcomes.remember(app)
        return app

    async def update(self, name: str, backend: str, wanted: BackendChange) -> None:
        """Change the options of a backend; `settled` waits for it. Its replicas take them in while they run,
        where they can; else they are replaced, turn by turn, and those of other backends run on. A backend
        that was given up is tried anew.

        Args:
            name: of the app.
            backend: of it.
            wanted: what is to be another than now.

        Raises:
            KeyError: no such app or backend.
            TypeError, ValueError: an option that there is not, or a value that does not fit.
            OSError: the change cannot be kept, and is not made.
        """
        async with self._checkpoints.changing:
            app = self._known(name)
            spec, number = app.target.spec, app.target.number
            changed = spec.changed(backend, wanted)
            if spec.backend(backend).config.needs_new_replicas(changed.backend(backend).config):
                version = Version(self._version + 1, changed.as_next(number, backend))
                await self._retarget(app, version, joins=True)
            else:
                await self._keep(name, app.record.updated(backend, wanted))
                self._known(name).update(backend, wanted)  # a failed change may have ended it meanwhile
        self._reconciler.reconcile(self._known(name))

    async def reroute(
        self, name: str, endpoint: str, weights: Mapping[str, float] | None, shadows: Mapping[str, float]
    ) -> None:
        """Change where an endpoint leads, in a new version that is coming up, too: see `AppSpec.rerouted`.

        Raises:
            KeyError, ValueError: no such app or endpoint, or it cannot lead there.
            OSError: the change cannot be kept, and is not made.
        """
        async with self._checkpoints.changing:
            app = self._known(name)
            app.target.spec.rerouted(endpoint, weights, shadows)  # raises before anything is changed
            await self._keep(name, app.record.rerouted(endpoint, weights, shadows))
            app.reroute(endpoint, weights, shadows)
        self._reconciler.publish()

    async def settled(self, name: str) -> Deployed | DeployFailed:
        """What becomes of the last change of an app. KeyError lists the known ones."""
        return await self.outcomes.settled(self._known(name))

    async def delete(self, name: str, owner: str | None = None) -> None:
        """End an app: its routes first, then what it runs may end, then its replicas. One that is ending
        already is waited for.

        Args:
            name: of the app.
            owner: who wants it; an app that another driver has taken over stays. None: whoever has it.
        """
        async with self._checkpoints.changing:
            app = self._apps.get(name)
            if app is not None and app.is_of(owner):
                record = msgspec.structs.replace(app.record, leaving=True)
                await self._keep(name, None, leaving=(*self._checkpoint().leaving, record))
                self._reconciler.remove(app)
        await self._reconciler.removed(name, owner)
        await self.last_ended()

    async def shutdown(self) -> None:
        """End everything: stop accepting, let what runs end, stop the processes. Once is enough."""
        if self._shutdown is None:
            self._ending = True
            self._shutdown = asyncio.get_running_loop().create_task(self._shut_down())
        await asyncio.shield(self._shutdown)

    async def _shut_down(self) -> None:
        self._reconciler.stopping = True
        self._checkpoints.mark()  # the next controller would go on with it
        try:
            await self.proxies.aclose(self._reconciler.drain_s)
        finally:
            await self._reconciler.aclose()
            await self._checkpoints.aclose()

    async def status(self, name: str) -> dict[str, Any]:
        """What an app's replicas are doing, and which backends were given up. KeyError lists the known
        apps."""
        for app in (self._apps.get(name), *self._reconciler.removing):
            if app is not None and app.name == name:
                return await app.status()
        if name in self.outcomes.failures:  # for whoever has not waited
            return no_app(self.outcomes.failures[name])
        raise self._unknown(name)

    async def overview(self) -> dict[str, Any]:
        """All apps' status, and where the instance answers."""
        apps = {app.name: app for app in (*self._reconciler.removing, *self._apps.values())}
        told = await asyncio.gather(*(app.status() for app in apps.values()))
        return {
            "url": self.proxies.url,
            "epoch": self.publisher.epoch,
            "proxies": self.proxies.status(),
            "apps": dict(zip(apps, told, strict=True)),
        }

    @property
    def specs(self) -> dict[str, AppSpec]:
        """All apps, as they are to be."""
        return {name: app.target.spec for name, app in self._apps.items()}

    def describe(self, name: str) -> AppSpec:
        """The spec of an app. KeyError lists the known ones."""
        return self._known(name).target.spec

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to run, nothing is still ending, and nobody may be about to deploy something."""
        return self._reconciler.is_empty and not self.owners.are_there

    # -- owners ------------------------------------------------------------------------------

    async def _end_apps(self, owner: str) -> None:
        names = [app.name for app in self._apps.values() if app.target.spec.owner == owner]
        for name in names:
            logger.warning("the driver of app %r is gone: deleting the app", name)
        await asyncio.gather(*(self._delete_by_all_means(name, owner) for name in names))

    async def _delete_by_all_means(self, name: str, owner: str) -> None:
        """There is nobody who could try again."""
        attempts = 0
        while True:
            try:
                return await self.delete(name, owner)
            except OSError as error:
                logger.error("app %r cannot be deleted now: %s", name, error)
                attempts += 1
                await pause(self._clock, backoff_s(attempts + 1, MAX_PAUSE_S))

    async def last_ended(self) -> None:
        """Without any app: wait for what a failed deploy has left. Whoever ended the last app, or was the
        last, looks next whether this is empty, and nobody does so later."""
        if not self._apps:
            await self._reconciler.ended()

    # -- snapshots ---------------------------------------------------------------------------

    @property
    def snapshot(self) -> Snapshot:
        """The latest."""
        return self.publisher.snapshot

    # -- keeping -----------------------------------------------------------------------------

    def _checkpoint(self) -> Checkpoint:
        """All that the next controller has to know."""
        around = self._reconciler.surroundings
        return Checkpoint(
            epoch=self.publisher.epoch,
            token=around.token,
            secret=around.secret,
            version=self._version,
            number=self._reconciler.number,
            apps={name: app.record for name, app in self._apps.items()},
            leaving=(
                *self._to_remove,
                *(msgspec.structs.replace(app.record, leaving=True) for app in self._reconciler.removing),
            ),
            http=self.proxies.kept,
            ending=self._ending,
        )

    async def _keep(self, name: str, record: AppRecord | None, **changes: Any) -> None:
        """Keep what is now, but for one app, which is to become this; None without it. Raises OSError."""
        now = self._checkpoint()
        apps = {other: app for other, app in now.apps.items() if other != name}
        if record is not None:
            apps[name] = record
        await self._checkpoints.keep(msgspec.structs.replace(now, apps=apps, **changes))

    def _known(self, name: str) -> RunningApp:
        if (app := self._apps.get(name)) is None:
            raise self._unknown(name)
        return app

    def _unknown(self, name: str) -> KeyError:
        return KeyError(f"there is no app {name!r}; running: {', '.join(sorted(self._apps)) or 'none'}")

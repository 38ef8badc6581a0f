"""The replicas of an app that run in this process: made, started, given other settings, ended."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from serveit.control.snapshot import ReplicaInfo
from serveit.control.tally import Tally
from serveit.running.health import Checkup
from serveit.running.httpjob import Bindings
from serveit.running.listener import Listener
from serveit.running.replica import Replica
from serveit.running.settings import LiveSettings, configured
from serveit.wire.memory import memory_pair

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from serveit.context import Resolver
    from serveit.control.orders import Health
    from serveit.control.spec import BackendSpec
    from serveit.declare.app import App
    from serveit.observe import Observer
    from serveit.types import Clock
    from serveit.wire.link import Link, Receiver

logger = logging.getLogger("serveit.local")

SLOW_START_S = 2.0
"""A start that takes longer says that it goes on."""
SLOW_STOP_S = 1.0
"""Constructors that run on for so long after another has failed are worth a line in the log."""


class LocalReplica:
    """A replica, and what its links and its settings need. All mutable state: `state` ("starting", "ready",
    "stopping")."""

    def __init__(
        self, replica: Replica, settings: LiveSettings, on_illness: Callable[[LocalReplica, Health], None]
    ) -> None:
        self.replica = replica
        self.checkup = Checkup(replica, partial(on_illness, self))
        self.settings = settings
        self.bindings = Bindings(replica.backend)
        self.state = "starting"

    @property
    def backend(self) -> str:
        """Its name."""
        return self.replica.backend.name

    async def start(self) -> None:
        self.bindings.prepare()
        await self.replica.start()

    def serve(self) -> None:
        """It may be called, and is looked after, from now on."""
        self.state = "ready"
        self.checkup.start()


class LocalReplicas:
    """All mutable state: `_replicas` (by id), `_numbers` (of the last one, by backend), `tally` (of those
    that came and died)."""

    def __init__(
        self,
        app: App,
        name: str,
        *,
        clock: Clock,
        observer: Observer | None,
        resolver: Resolver,
        on_illness: Callable[[LocalReplica, Health], None],
    ) -> None:
        """
        Args:
            app: what the user declared.
            name: of the app.
            clock: where time comes from.
            observer: told what happens, in the place of replicas' own meters.
            resolver: where user code finds handles.
            on_illness: told of a replica that is not to be used any more.
        """
        self._app = app
        self._name = name
        self._clock = clock
        self._observer = observer
        self._resolver = resolver
        self._on_illness = on_illness
        self._replicas: dict[str, LocalReplica] = {}
        self._numbers: dict[str, int] = {}
        self.tally = Tally()

    def all(self) -> list[LocalReplica]:
        return list(self._replicas.values())

    def ready(self, backend: str) -> list[LocalReplica]:
        """Those of a backend that serve, the oldest first."""
        return [r for r in self._replicas.values() if r.state == "ready" and r.backend == backend]

    def infos(self) -> dict[str, list[ReplicaInfo]]:
        """Where those are that serve, by backend."""
        found: dict[str, list[ReplicaInfo]] = {}
        for id, known in self._replicas.items():
            if known.state == "ready":
                found.setdefault(known.backend, []).append(ReplicaInfo(id, id))
        return found

    def status(self) -> dict[str, dict[str, Any]]:
        """What each does, by backend and id."""
        told: dict[str, dict[str, Any]] = {}
        for id, known in self._replicas.items():
            statistics = known.replica.statistics()
            told.setdefault(known.backend, {})[id] = {
                "state": known.state,
                "running": statistics.running,
                "waiting": statistics.waiting,
            }
            if known.checkup.health.illness:
                told[known.backend][id]["illness"] = known.checkup.health.illness
        return told

    def make(self, backend: BackendSpec) -> LocalReplica:
        """One more, which has to be started, and ended even where that fails."""
        name, settings = backend.name, backend.settings
        declared = self._app.backends[name]
        record = configured(declared, settings)
        number = self._numbers[name] = self._numbers.get(name, 0) + 1
        id = f"{name}#{number}"
        replica = Replica(
            record,
            id=id,
            app=self._name,
            clock=self._clock,
            observer=self._observer,
            resolver=self._resolver,
        )
        made = self._replicas[id] = LocalReplica(
            replica, LiveSettings(declared.config, settings), self._fell_ill
        )
        return made

    def _fell_ill(self, known: LocalReplica, health: Health) -> None:
        self.tally.died(known.backend)
        self._on_illness(known, health)

    async def start(self, replicas: Collection[LocalReplica]) -> None:
        """Start all of these at once; raises what the first one that fails has raised."""
        loop = asyncio.get_running_loop()
        names = ", ".join(dict.fromkeys(known.backend for known in replicas))
        slow = loop.call_later(SLOW_START_S, logger.info, "still starting %s", names)
        starts = [loop.create_task(self._start(known)) for known in replicas]
        try:
            await asyncio.gather(*starts)
        except BaseException as error:
            for start in starts:
                start.cancel()
            await _outlast_starts(starts, error)
            raise
        finally:
            slow.cancel()

    async def _start(self, known: LocalReplica) -> None:
        try:
            await known.start()
            self.tally.started(known.backend)
        except Exception as error:
            self.tally.died(known.backend)
            error.add_note(f"(while replica {known.replica.id} of app {self._name!r} started)")
            raise

    async def configure(self, replicas: Sequence[LocalReplica], settings: bytes) -> None:
        """Give all of these other settings, one after the other; raises what the first one raises that
        cannot take them in."""
        for known in replicas:
            try:
                await known.settings.take_in(known.replica, settings)
            except BaseException as error:
                error.add_note(f"(while replica {known.replica.id} of app {self._name!r} was configured)")
                raise

    async def go_back(self, replicas: Sequence[LocalReplica], settings: bytes) -> list[LocalReplica]:
        """Give these back the settings that they had; those that cannot take them."""
        stuck = []
        for known in replicas:
            try:
                await known.settings.take_in(known.replica, settings)
            except Exception as error:
                stuck.append(known)
                logger.error(
                    "replica %s cannot go back to the configuration before: %s: %s; another takes its place",
                    known.replica.id,
                    type(error).__name__,
                    error,
                )
        return stuck

    def dismiss(self, replicas: Collection[LocalReplica]) -> None:
        """These do not serve any more; whoever publishes next says so."""
        for known in replicas:
            known.state = "stopping"

    def connect(self, info: ReplicaInfo, receiver: Receiver) -> Link:
        """A link to one of them."""
        known = self._replicas[info.address]
        near, far = memory_pair()
        near.receiver = receiver
        far.receiver = Listener(known.replica, known.bindings, far)
        return near

    async def end(self, replicas: Collection[LocalReplica], limit_s: float | None = None) -> None:
        """Let what runs in them end, in their own time or this, and close them."""
        self.dismiss(replicas)
        for known in replicas:
            known.checkup.stop()
        await asyncio.gather(*(known.replica.drain(limit_s) for known in replicas))
        await asyncio.gather(*(known.replica.aclose() for known in replicas))
        for known in replicas:  # two may have ended it at once
            self._replicas.pop(known.replica.id, None)


async def _outlast_starts(starts: Sequence[asyncio.Task[None]], error: BaseException) -> None:
    """Wait for the constructors that still run: a thread cannot be stopped."""
    ending = asyncio.gather(*starts, return_exceptions=True)
    _, still = await asyncio.wait((ending,), timeout=SLOW_STOP_S)
    if still and not isinstance(error, asyncio.CancelledError):
        logger.error("%s: %s; waiting for constructors that still run", type(error).__name__, error)
    await ending

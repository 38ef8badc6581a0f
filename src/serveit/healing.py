"""Replaces replicas that are not well where no controller does: in a `LocalRuntime`.

By the same rules: callers are sent there no more, another comes in its place, what it runs may end; five
such ends in a minute, and the backend is given up. A process that hangs is not among them: it is this one.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import msgspec

from serveit.control.processes import pause
from serveit.control.replicas import Version
from serveit.exceptions import NotServing

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from serveit.control.orders import Health
    from serveit.control.snapshot import AppInfo
    from serveit.local import LocalRuntime
    from serveit.local_replicas import LocalReplica

logger = logging.getLogger("serveit.local")


class Healer:
    """All mutable state: `_version` (how backends fare; None before anything has fallen ill) and `_tasks`
    (that replace what has)."""

    def __init__(self, runtime: LocalRuntime) -> None:
        self._runtime = runtime
        self._version: Version | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def given_up(self) -> dict[str, str]:
        """Why, by backend."""
        return {} if self._version is None else self._version.given_up

    def forgive(self, backend: str) -> None:
        """Somebody has changed it: try it as if nothing had happened."""
        if self._version is not None:
            self._version.forgive(backend)

    def told(self, info: AppInfo) -> AppInfo:
        """What callers are told, with what was given up."""
        backends = (
            msgspec.structs.replace(backend, given_up=self.given_up.get(backend.name, ""))
            for backend in info.backends
        )
        return msgspec.structs.replace(info, backends=tuple(backends))

    async def aclose(self) -> None:
        """Replace nothing more."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def fell_ill(self, known: LocalReplica, health: Health) -> None:
        """It is not to be used any more: replace it."""
        logger.error("replica %s is unhealthy: %s; another takes its place", known.replica.id, health.illness)
        self._begin(self._heal(known, health))

    def replace(self, known: LocalReplica) -> None:
        """It is not to be used any more, through no fault of its own: that counts as no death."""
        self._begin(self._replace(known))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    async def _heal(self, known: LocalReplica, health: Health) -> None:
        await self._count(known.backend, f"replica {known.replica.id} was unhealthy: {health.illness}")
        await self._replace(known, 0.0 if health.hangs else None)

    async def _replace(self, known: LocalReplica, limit_s: float | None = None) -> None:
        await asyncio.gather(self._runtime.withdraw([known], limit_s), self._fill_up(known.backend))

    async def _fill_up(self, backend: str) -> None:
        """Start what is missing, however often that takes."""
        runtime, clock = self._runtime, self._runtime.clock
        while backend not in self.given_up:
            version = await self._current()
            await pause(clock, version.wanted.not_before.get(backend, 0.0) - clock.time())
            try:
                await runtime.fill_up(backend)
            except NotServing:
                return  # it is being closed
            except Exception as error:
                await self._count(backend, f"another cannot start: {type(error).__name__}: {error}")
            else:
                return
        await runtime.withdraw(())  # who waits for one is told

    async def _count(self, backend: str, how: str) -> None:
        """A death: the next start is put off, or the backend given up."""
        version = await self._current()
        version.died(backend, self._runtime.clock.time(), how)
        if backend in version.given_up:
            logger.error("%s: given up", version.given_up[backend])

    async def _current(self) -> Version:
        spec = await self._runtime.spec()
        if self._version is None:
            self._version = Version(1, spec)
        self._version.spec = spec
        return self._version

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a replica that was not well could not be replaced", exc_info=error)

"""Runs the user's `check_health` inside a replica, again and again while it serves.

The controller asks for what came of it (`control/health`), a `LocalRuntime` is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from serveit.control.orders import Health

if TYPE_CHECKING:
    from collections.abc import Callable

    from serveit.running.replica import Replica
    from serveit.types import Timer

logger = logging.getLogger("serveit.replica")

MAX_FAILURES = 3
"""So many checks in a row have to fail. One is not enough: what a check looks at (a database, a driver)
has bad moments, and all replicas have them at the same time; replacing them all then would cost the
backend more than the moment, and five such deaths in a minute its life. Ray Serve has the same figure."""


class Checkup:
    """One replica's checks: the next is due `health_check_period_s` after the end of the last.

    A `def` check runs in the replica's own threads, like all of its user's code: what was made in such a
    thread (a connection to SQLite, a CUDA context) often works in no other. So it may stand in line behind
    requests, for as long as these run; `health_check_timeout_s` counts from when the check itself begins.

    All mutable state: `health` (as found so far; what is once ill stays so), `_failures` (in a row),
    `_timer` (until the next check), `_task` (the one under way) and `_patience` (until it hangs).
    """

    def __init__(self, replica: Replica, on_illness: Callable[[Health], None] | None = None) -> None:
        """
        Args:
            replica: that serves.
            on_illness: told once, when the replica is not to be used any more.
        """
        self.health = Health()
        self._replica = replica
        self._on_illness = on_illness
        self._failures = 0
        self._timer: Timer | None = None
        self._task: asyncio.Task[None] | None = None
        self._patience: Timer | None = None

    def __repr__(self) -> str:
        state = self.health.illness or f"{self._failures} failures"
        return f"<Checkup of {self._replica.id}: {state}>"

    def start(self) -> None:
        """The first check has been part of the replica's start. Without a `check_health` there is nothing
        to do."""
        if self._replica.instance.has_check:
            self._loop = asyncio.get_running_loop()
            self._wait()

    def stop(self) -> None:
        """No more checks; one that runs in a thread cannot be stopped."""
        for timer in (self._timer, self._patience):
            if timer is not None:
                timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def _wait(self) -> None:
        self._timer = self._replica.clock.call_later(
            self._replica.config.health_check_period_s, self._check_now
        )

    def _check_now(self) -> None:
        if not self._replica.admission.closed:  # else it drains, and is not looked at any more
            self._task = self._loop.create_task(self._check())

    async def _check(self) -> None:
        try:
            await self._replica.check_health(self._begun)
        except Exception as error:
            self._failed(f"check_health() raised {type(error).__name__}: {error}")
        else:
            self._failures = 0
        finally:
            self._task = None
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None
        if not self.health.illness:
            self._wait()

    def _begun(self) -> None:
        """Called where the user's code begins, on the loop or in a thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._be_patient)

    def _be_patient(self) -> None:
        if self._task is not None:
            timeout_s = self._replica.config.health_check_timeout_s
            self._patience = self._replica.clock.call_later(timeout_s, self._hangs, timeout_s)

    def _hangs(self, timeout_s: float) -> None:
        self._fall_ill(Health(f"check_health() has not returned for {timeout_s:g} s", hangs=True))

    def _failed(self, why: str) -> None:
        self._failures += 1
        if self._failures >= MAX_FAILURES:
            self._fall_ill(Health(f"{why} ({self._failures} times in a row)"))
        else:
            logger.warning("replica %s: %s (%d of %d)", self._replica.id, why, self._failures, MAX_FAILURES)

    def _fall_ill(self, health: Health) -> None:
        if self.health.illness or self._replica.admission.closed:
            return
        self.health = health
        self._replica.observer.replica_event(self._replica.backend.name, self._replica.id, "unhealthy")
        if self._on_illness is not None:
            self._on_illness(health)

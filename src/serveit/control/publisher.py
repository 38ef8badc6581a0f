"""Snapshots for those who watch an instance, and who has taken in which: the controller's voice.

What a snapshot leaves out is stopped only when every watcher has taken it in (`acknowledged`).
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from serveit.control.processes import ended
from serveit.control.snapshot import Snapshot

if TYPE_CHECKING:
    from serveit.control.snapshot import AppInfo
    from serveit.types import Clock

logger = logging.getLogger("serveit.controller")

ACKNOWLEDGE_S = 5.0
"""What watchers get to take in a snapshot; who has not by then is waited for no more."""


class Publisher:
    """All mutable state: `snapshot` (the latest), `_seen` (the latest that each watcher has taken in),
    `_moved` (set, and replaced, when either changes)."""

    def __init__(self, clock: Clock) -> None:
        """
        Args:
            clock: for what watchers get to acknowledge.
        """
        self.snapshot = Snapshot((0, 0), ())
        self._clock = clock
        self._seen: dict[str, tuple[int, int]] = {}
        self._moved = asyncio.Event()

    @property
    def epoch(self) -> int:
        """The first part of all versions: later controllers have higher ones."""
        return self.snapshot.version[0]

    def begin(self, epoch: int) -> None:
        """Before anything else."""
        self.snapshot = Snapshot((epoch, 0), ())

    def expect(self, member: str) -> None:
        """The member watched a controller before this one, and comes to this one: it is waited for."""
        self._seen.setdefault(member, (0, 0))

    def publish(self, apps: tuple[AppInfo, ...]) -> None:
        """Make the next snapshot, if anything in it is new."""
        if apps != self.snapshot.apps:
            epoch, counter = self.snapshot.version
            self.snapshot = Snapshot((epoch, counter + 1), apps)
            self._move()

    async def watch(self, member: str, version: tuple[int, int]) -> Snapshot:
        """The latest snapshot, once it is another than the one that the member has taken in.

        Args:
            member: names the watcher.
            version: of the snapshot that it has taken in; that is noted.
        """
        self._seen[member] = version
        self._move()
        while self.snapshot.version == version and member in self._seen:
            await self._moved.wait()
        return self.snapshot

    def forget(self, member: str) -> None:
        """The member watches no longer."""
        self._seen.pop(member, None)
        self._move()

    async def acknowledged(self, version: tuple[int, int]) -> None:
        """Wait until every watcher has taken in this snapshot or a later one; not for ever."""
        if not self._late(version):
            return
        waiting = asyncio.ensure_future(self._taken_in(version))
        try:
            if await ended(self._clock, waiting, ACKNOWLEDGE_S):
                return
        finally:
            waiting.cancel()
        for member in self._late(version):
            logger.warning("no word from %s about snapshot %s", member, version)
            self.forget(member)

    async def _taken_in(self, version: tuple[int, int]) -> None:
        while self._late(version):
            await self._moved.wait()

    def _late(self, version: tuple[int, int]) -> list[str]:
        return [member for member, seen in self._seen.items() if seen < version]

    def _move(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

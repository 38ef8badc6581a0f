"""Drivers that are connected, and whose end is their apps'."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from serveit.control.processes import pause

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from serveit.control.spec import AppSpec
    from serveit.types import Clock

RETURN_S = 5.0
"""What drivers get to come back to a controller that has started anew."""


class Owners:
    """All mutable state: `_lines` (how many connections each has) and `_losses` (how many it has lost)."""

    def __init__(self, clock: Clock, end_apps: Callable[[str], Awaitable[None]]) -> None:
        """
        Args:
            clock: for what drivers get to come back.
            end_apps: of one that is gone.
        """
        self._clock = clock
        self._end_apps = end_apps
        self._lines: dict[str, int] = {}
        self._losses: dict[str, int] = {}

    @property
    def are_there(self) -> bool:
        """Whether any is connected: it may be about to deploy something."""
        return any(self._lines.values())

    def check(self, running: AppSpec, owner: str) -> None:
        """ValueError where a program would serve, and in the end delete, what is not its own.

        Args:
            running: the app that has the name.
            owner: who deploys; "" for an app that stays.
        """
        holder = running.owner
        if owner and owner != holder and (not holder or self._lines.get(holder)):
            whose = "is served by another program" if holder else "was deployed, to stay until it is deleted"
            raise ValueError(
                f"app {running.name!r} runs already: it {whose}. Serve yours under another name (--name), or "
                "deploy it as the next version of that one (`serveit deploy`, client.deploy)"
            )

    def expect(self, owner: str) -> None:
        """It was connected to a controller before this one, and may come to this one."""
        self._lines.setdefault(owner, 0)

    def joined(self, owner: str) -> None:
        """It has connected."""
        self._lines[owner] = self._lines.get(owner, 0) + 1

    def left(self, owner: str) -> None:
        """It has ended its apps itself."""
        self._lines.pop(owner, None)
        self._losses.pop(owner, None)

    async def lost(self, owner: str, grace_s: float) -> None:
        """One of its connections is gone; if that was the last, and no other comes in so long, its apps
        end."""
        if owner not in self._lines:
            return  # it had said so
        self._lines[owner] -= 1
        loss = self._losses[owner] = self._losses.get(owner, 0) + 1
        await pause(self._clock, grace_s)
        if not self._lines.get(owner) and self._losses.get(owner) == loss:
            await self._end(owner)

    async def await_expected(self) -> None:
        """The apps end of those that do not come back."""
        await pause(self._clock, RETURN_S)
        missing = [owner for owner, lines in self._lines.items() if lines == 0]
        await asyncio.gather(*map(self._end, missing))

    async def await_one(self, owner: str) -> None:
        """After a deploy: its driver may be gone already, or has not come back to this controller yet."""
        self.expect(owner)
        if self._lines[owner] == 0:
            await pause(self._clock, RETURN_S)
            if self._lines.get(owner) == 0:
                await self._end(owner)

    async def _end(self, owner: str) -> None:
        self.left(owner)
        await self._end_apps(owner)

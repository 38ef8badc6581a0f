"""The heartbeat of channels: each end speaks at least so often, and counts in its own ticks how long the
other has not."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    import asyncio

HEARTBEAT_S = 0.5
"""A channel that sent nothing for a tick of so long sends PING."""


class Beating(Protocol):
    """What has a heartbeat."""

    def beat(self) -> None: ...


class Heart:
    """One timer for all channels of an event loop; there while there are any."""

    _of_loops: ClassVar[dict[asyncio.AbstractEventLoop, Heart]] = {}

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.channels: set[Beating] = set()
        self._loop = loop
        self._timer = loop.call_later(HEARTBEAT_S, self._tick)

    @classmethod
    def join(cls, loop: asyncio.AbstractEventLoop, channel: Beating) -> None:
        heart = cls._of_loops.get(loop)
        if heart is None:
            for dead in [other for other in tuple(cls._of_loops) if other.is_closed()]:
                cls._of_loops.pop(dead, None)
            heart = cls._of_loops[loop] = cls(loop)
        heart.channels.add(channel)

    @classmethod
    def leave(cls, loop: asyncio.AbstractEventLoop, channel: Beating) -> None:
        heart = cls._of_loops.get(loop)
        if heart is not None:
            heart.channels.discard(channel)
            if not heart.channels:
                heart._timer.cancel()
                del cls._of_loops[loop]

    def beat(self) -> None:
        """One tick of each channel."""
        for channel in tuple(self.channels):
            channel.beat()

    def _tick(self) -> None:
        self._timer = self._loop.call_later(HEARTBEAT_S, self._tick)
        self.beat()

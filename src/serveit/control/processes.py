"""What the controller starts, watches and stops: processes, without saying of which kind.

Ray's are in `actors`, tests have fakes. Beside them is what the controller's modules need to wait by
the clock that they were given.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from serveit.control.orders import Configured, Leaving, ProxyOrder, ReplicaOrder, Started, StartFailed
    from serveit.types import Clock

BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0


class ProcessDied(Exception):
    """A process is gone without having said why."""


class NoPlace(Exception):
    """A process will never exist, and another like it neither; the text says why."""


class Process(Protocol):
    """One process of the instance."""

    async def placed(self) -> None:
        """Wait until it exists: the cluster has found a place for it. Raises ProcessDied, NoPlace."""

    async def start(self) -> Started | StartFailed | Leaving:
        """Order it to become what it is for; the same again, if that was asked before. Raises ProcessDied."""

    async def configure(self, settings: bytes) -> Configured | StartFailed | Leaving:
        """Let a replica that runs take in other `Settings`; what it said of that. Raises ProcessDied."""

    async def status(self) -> dict[str, Any]:
        """What it is doing; empty if it does not say."""

    async def idle(self, timeout_s: float) -> None:
        """Wait until it runs nothing, at most so long; what comes meanwhile, it takes."""

    async def death(self) -> str:
        """Wait for its end; the text says how it came."""

    async def stop(self, drain_s: float, *, to_deadlines: bool = False) -> None:
        """Let it end what it runs, then end it; returns when it is gone.

        Args:
            drain_s: how long what it runs may take.
            to_deadlines: whether requests that have a deadline may take as long as that.
        """

    def kill(self) -> None:
        """End it at once."""


class Node(NamedTuple):
    """A machine of the cluster."""

    id: str
    address: str
    is_head: bool


class Launcher(Protocol):
    """Makes processes."""

    def replica(self, order: ReplicaOrder) -> Process:
        """Wherever there is place."""

    def proxy(self, order: ProxyOrder) -> Process:
        """On the order's node."""

    def adopt(self, order: ReplicaOrder | ProxyOrder) -> Process:
        """The process that was made for this order, or one with the same name, by an earlier controller.
        Its `start` tells what that start has led to. One that is gone raises ProcessDied from then on."""

    async def nodes(self) -> list[Node]:
        """Those that are alive."""

    async def running(self) -> list[str]:
        """The names of all actors of replicas and proxies that there are."""

    def stray(self, name: str) -> Process:
        """One to be ended, of which only the actor's name is known."""

    async def lacking(self, order: ReplicaOrder) -> str:
        """What keeps the cluster from placing it: "needs 4 CPU, 2 free"; empty if nothing does."""


def backoff_s(attempts: int, longest_s: float = MAX_BACKOFF_S) -> float:
    """What to wait before the next attempt: nothing before the second, then twice as long each time."""
    return min(BACKOFF_S * 2.0 ** min(attempts - 2, 20), longest_s) if attempts > 1 else 0.0


async def pause(clock: Clock, seconds: float) -> None:
    """Sleep, by that clock."""
    if seconds > 0:
        await ended(clock, asyncio.get_running_loop().create_future(), seconds)


async def ended(clock: Clock, future: asyncio.Future[Any], timeout_s: float) -> bool:
    """Wait for a future, at most so long by that clock, and leave it as it is. Whether it is done."""
    expired: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    timer = clock.call_later(timeout_s, expired.cancel)
    try:
        await asyncio.wait((future, expired), return_when=asyncio.FIRST_COMPLETED)
    finally:
        timer.cancel()
    return future.done()

"""The HTTP server of an instance, as the controller keeps it: started, watched, and started again."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from serveit.control.orders import ProxyOrder, Started, StartFailed
from serveit.control.processes import ProcessDied, backoff_s, pause
from serveit.exceptions import NotServing

if TYPE_CHECKING:
    from collections.abc import Callable

    from serveit.control.processes import Launcher, Process
    from serveit.types import Clock

logger = logging.getLogger("serveit.controller")

STEADY_S = 60.0
"""A server that lived so long is started again without delay."""
MAX_PAUSE_S = 5.0


class Proxies:
    """All mutable state: `_process` (that serves or is being started) and its `_id`, `_started` (what it
    said), `_options` (what it was first ordered with; None before), `_keeper` (the task that starts it
    again), `_closed`."""

    def __init__(self, launcher: Launcher, clock: Clock, on_end: Callable[[str], None]) -> None:
        """
        Args:
            launcher: makes the processes.
            clock: for pauses between attempts.
            on_end: told the id of each that has ended.
        """
        self._launcher = launcher
        self._clock = clock
        self._on_end = on_end
        self._process: Process | None = None
        self._id = ""
        self._started: Started | None = None
        self._options: bytes | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._opening = asyncio.Lock()
        self._closed = False

    @property
    def url(self) -> str | None:
        """Where the instance answers HTTP."""
        return self._started.address if self._started is not None else None

    async def open(self, options: bytes | None, order: ProxyOrder | None) -> Started | StartFailed | None:
        """The server, started if need be.

        Args:
            options: what the caller wants, encoded; None to take it as it is.
            order: to start one with, if there is none yet; None not to.

        Raises:
            ValueError: there is one with other options.
            NotServing: the instance is shutting down.
        """
        async with self._opening:
            if self._closed:
                raise NotServing("the instance is shutting down")
            if self._options is not None:
                _check_same(self._options, options)
                return self._started
            if order is None:
                return None
            outcome = await self._start(order)
            if isinstance(outcome, Started):
                self._options = order.options
                self._keeper = asyncio.get_running_loop().create_task(self._keep(order))
            return outcome

    async def aclose(self, drain_s: float) -> None:
        """Stop accepting, let the requests that run end."""
        self._closed = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait((self._keeper,))
        if self._process is not None:
            await self._process.stop(drain_s)
            self._on_end(self._id)

    async def _start(self, order: ProxyOrder) -> Started | StartFailed:
        process = self._process = self._launcher.proxy(order)
        self._id = order.id
        try:
            outcome = await process.start()
        except ProcessDied as error:
            return _failed(f"it died while it started: {error}")
        except BaseException:
            process.kill()
            raise
        if isinstance(outcome, StartFailed):
            process.kill()
        elif self._closed:
            return _failed("the instance is shutting down")
        else:
            self._started = outcome
        return outcome

    async def _keep(self, order: ProxyOrder) -> None:
        """Start another whenever it died, where it was: at the same port."""
        number = attempts = 0
        while True:
            began = self._clock.time()
            assert self._process is not None, "it was started before"
            how = await self._process.death()
            logger.error("the HTTP server died: %s", how)
            self._on_end(self._id)
            if self._clock.time() - began > STEADY_S:
                attempts = 0
            started = False
            while not started:
                number, attempts = number + 1, attempts + 1
                await pause(self._clock, backoff_s(attempts, MAX_PAUSE_S))
                started = await self._restart(self._again(order, number))

    async def _restart(self, order: ProxyOrder) -> bool:
        try:
            outcome = await self._start(order)
        except Exception:
            logger.exception("the HTTP server cannot be started")
            return False
        if isinstance(outcome, StartFailed):
            logger.error("the HTTP server does not start: %s", outcome.where)
        return isinstance(outcome, Started)

    def _again(self, order: ProxyOrder, number: int) -> ProxyOrder:
        """The order for the next one: another name, for the last one's may be taken still."""
        assert self._started is not None, "it was started before"
        options = msgspec.json.decode(order.options)
        options["port"] = urlsplit(self._started.address).port
        return msgspec.structs.replace(order, id=f"{order.id}-{number}", options=msgspec.json.encode(options))


def _failed(how: str) -> StartFailed:
    return StartFailed(b"", where=f"the HTTP server: {how}")


def _check_same(here: bytes, asked: bytes | None) -> None:
    """ValueError names the options that differ."""
    if asked is None or asked == here:
        return
    ours: dict[str, Any] = msgspec.json.decode(here)
    theirs: dict[str, Any] = msgspec.json.decode(asked)
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    raise ValueError(
        f"the instance serves HTTP already, with {_shown(ours, names)}; asked for {_shown(theirs, names)}: "
        "leave http out to take it as it is"
    )


def _shown(options: dict[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name}={options.get(name)!r}" for name in names)

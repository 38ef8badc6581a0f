"""SIGINT and SIGTERM of a process that serves: the first asks it to stop, the second ends it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import sys
from typing import Any, NoReturn

STARTING_S = 0.5
"""What a start may take to give up. A constructor in a thread does not hear of it."""
DRAINING_S = 5.0
"""What stopping may take beyond the time that running requests get."""
ENDING_S = 0.5
"""What the event loop's own end may take."""
RENEW_S = 0.02
"""How often to set the handlers again while Ray starts."""

WHILE_STARTING = b"stopped while the app was starting, without waiting for what had begun\n"
WHILE_RUNNING = b"stopped, without waiting for code that still runs\n"
AT_ONCE = b"stopped at once, by a second signal\n"


class StopSignals:
    """While inside: the first SIGINT or SIGTERM sets the event of `attach`, a second ends the process.

    What cannot be stopped, user code in a thread or one that blocks the loop, or the start of Ray, does
    not keep the process: after a while it ends without it, with exit code 0, as a stop does. Whenever
    it ends so, its last words say why; what it started elsewhere is ended by `cluster.reaper`.

    Python's own handlers, not the event loop's, which are not run while user code blocks it; and
    set explicitly, since a shell starts background commands with SIGINT ignored.
    """

    def __init__(self, longest_s: float) -> None:
        """
        Args:
            longest_s: what running requests may take to end.
        """
        self._longest_s = longest_s
        self._patience_s = STARTING_S
        self._words = WHILE_STARTING
        self._received = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event = asyncio.Event()
        self._previous: dict[int, Any] = {}
        self._handlers: dict[int, Any] = {
            signal.SIGINT: self._stop,
            signal.SIGTERM: self._stop,
            signal.SIGALRM: self._give_up,
        }

    def __enter__(self) -> StopSignals:
        try:
            for number, handler in self._handlers.items():
                self._previous[number] = signal.signal(number, handler)
        except ValueError:
            raise RuntimeError(
                "serveit.run() is for the main thread, which gets the signals: "
                "elsewhere write `with serveit.serve(...)`"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def attach(self) -> asyncio.Event:
        """The event, to be waited for in the running loop."""
        self._loop = asyncio.get_running_loop()
        if self._received:
            self._event.set()
        return self._event

    async def first_of(self, *futures: asyncio.Future[Any]) -> None:
        """Wait for one of them. Ray may start meanwhile, and then handles SIGTERM below Python's handlers,
        by printing where it came and dying: these are set again and again."""
        while not (await asyncio.wait(futures, timeout=RENEW_S, return_when=asyncio.FIRST_COMPLETED))[0]:
            for number, handler in self._handlers.items():
                if signal.getsignal(number) == handler:  # as far as Python knows
                    signal.signal(number, handler)

    def started(self) -> None:
        """From here on a stop waits for the requests that run."""
        self._patience_s = self._longest_s + DRAINING_S
        self._words = WHILE_RUNNING

    def ending(self) -> None:
        """Nothing is left to wait for."""
        self._patience_s = ENDING_S
        if self._received:
            self._arm()

    def _stop(self, number: int, _: Any) -> None:
        if self._received:
            _leave(AT_ONCE, 128 + number)
        self._received = True
        self._arm()
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._event.set)

    def _arm(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, self._patience_s)

    def _give_up(self, *_: Any) -> NoReturn:
        signal.setitimer(signal.ITIMER_REAL, ENDING_S)  # in case that nobody reads what is flushed
        with contextlib.suppress(Exception):  # the signal came in the midst of another
            sys.stdout.flush()
        _leave(self._words, 0)


def _leave(words: bytes, code: int) -> NoReturn:
    with contextlib.suppress(OSError, ValueError):
        if select.select((), (2,), (), 0)[1]:  # else nobody reads them, and writing would wait
            over = b"\r\x1b[K" if os.isatty(2) else b""  # what a progress display has left in its line
            os.write(2, over + words)
    os._exit(code)

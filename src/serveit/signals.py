"""SIGINT and SIGTERM of a process that serves: the first asks it to stop, the second ends it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from typing import Any, NoReturn

STARTING_S = 0.5
"""What a start may take to give up. A constructor in a thread does not hear of it."""
DRAINING_S = 5.0
"""What stopping may take beyond the time that running requests get."""
ENDING_S = 0.5
"""What the event loop's own end may take."""


class StopSignals:
    """While inside: the first SIGINT or SIGTERM sets the event of `attach`, a second ends the process.

    What cannot be stopped, user code in a thread or one that blocks the loop, does not keep the
    process: after a while it ends without it, with exit code 0, as a stop does.

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
        self._received = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event = asyncio.Event()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        handlers: dict[int, Any] = {
            signal.SIGINT: self._stop,
            signal.SIGTERM: self._stop,
            signal.SIGALRM: self._give_up,
        }
        try:
            for number, handler in handlers.items():
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

    def started(self) -> None:
        """From here on a stop waits for the requests that run."""
        self._patience_s = self._longest_s + DRAINING_S

    def ending(self) -> None:
        """Nothing is left to wait for."""
        self._patience_s = ENDING_S
        if self._received:
            self._arm()

    def _stop(self, number: int, _: Any) -> None:
        if self._received:
            os._exit(128 + number)
        self._received = True
        self._arm()
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._event.set)

    def _arm(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, self._patience_s)

    def _give_up(self, *_: Any) -> NoReturn:
        os.write(2, b"stopped, without waiting for code that still runs\n")
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(0)

"""Notices from outside, in a thread, that an event loop is blocked, and logs what blocks it."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

logger = logging.getLogger("serveit.watchdog")

THRESHOLD_S = 1.0


class Watchdog:
    """Watches the loop that it was started in.

    A blocked loop makes every request of its process wait, health checks included, and nothing on
    the loop can report it. One log record per blockage, with the stack of the loop's thread.
    """

    def __init__(self, threshold_s: float = THRESHOLD_S) -> None:
        self._threshold_s = threshold_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._beat = 0.0

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to watch; call it in the loop's thread."""
        self._thread = threading.Thread(
            target=self._watch,
            args=(loop, threading.get_ident()),
            name="serveit-watchdog",
            daemon=True,
        )
        self._beat = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _watch(self, loop: asyncio.AbstractEventLoop, loop_thread: int) -> None:
        reported = False
        while not self._stop.wait(self._threshold_s / 4):
            blocked_s = time.monotonic() - self._beat
            if blocked_s >= self._threshold_s:
                if not reported:
                    reported = True
                    self._report(blocked_s, loop_thread)
                continue
            reported = False
            try:
                loop.call_soon_threadsafe(self._alive)
            except RuntimeError:  # the loop is closed
                return

    def _alive(self) -> None:
        self._beat = time.monotonic()

    def _report(self, blocked_s: float, loop_thread: int) -> None:
        frame = sys._current_frames().get(loop_thread)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else "  (no stack)\n"
        logger.warning(
            "the event loop has been blocked for %.1f s; code that blocks belongs in a `def` function, "
            "which runs in a thread. It is here:\n%s",
            blocked_s,
            stack,
        )

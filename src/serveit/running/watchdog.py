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

    It goes by a probe that the loop leaves unanswered, not by the time since the last answer: under
    load this thread itself may get no turn for seconds, which blocks nobody.
    """

    def __init__(self, threshold_s: float = THRESHOLD_S) -> None:
        self._threshold_s = threshold_s
        self._stop = threading.Event()
        self._probe = threading.Event()
        self._thread: threading.Thread | None = None
        self.num_answered = 0

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to watch; call it in the loop's thread."""
        self._thread = threading.Thread(
            target=self._watch,
            args=(loop, threading.get_ident()),
            name="serveit-watchdog",
            daemon=True,
        )
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._probe.set()  # the loop, which may be waiting here, answers no more
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _watch(self, loop: asyncio.AbstractEventLoop, loop_thread: int) -> None:
        while not self._stop.wait(self._threshold_s / 4):
            answered = self._probe = threading.Event()
            if self._stop.is_set():  # stop() may have set the probe before this one
                return
            sent = time.monotonic()
            try:
                loop.call_soon_threadsafe(answered.set)
            except RuntimeError:  # the loop is closed
                return
            if not answered.wait(self._threshold_s) and not self._stop.is_set():
                self._report(time.monotonic() - sent, loop_thread)
                while not answered.wait(self._threshold_s / 4) and not self._stop.is_set():
                    pass
            self.num_answered += answered.is_set()

    def _report(self, blocked_s: float, loop_thread: int) -> None:
        frame = sys._current_frames().get(loop_thread)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else "  (no stack)\n"
        logger.warning(
            "the event loop has been blocked for %.1f s; code that blocks belongs in a `def` function, "
            "which runs in a thread. It is here:\n%s",
            blocked_s,
            stack,
        )

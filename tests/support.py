"""What many tests need: waiting without sleeping, and finding what a test left behind."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

GRACE_S = 1.0
"""What threads and tasks that are already ending get to end."""


async def wait_until(predicate: Callable[[], object], timeout_s: float, what: str) -> None:
    """Let the loop turn until `predicate()` is true.

    Raises:
        AssertionError: it is still false after `timeout_s`; the text says what was waited for.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    pause_s = 0.0
    while not predicate():
        if loop.time() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        await asyncio.sleep(pause_s)
        pause_s = min(0.005, pause_s + 0.0001)


class Leftovers:
    """What was there before a test, and what is there after it that was not: `found()`."""

    def __init__(self) -> None:
        self._threads = set(threading.enumerate())
        self._sockets = set(open_sockets())
        self._complaints = _Complaints()

    def __enter__(self) -> Leftovers:
        logging.getLogger("asyncio").addHandler(self._complaints)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("asyncio").removeHandler(self._complaints)

    def found(self) -> list[str]:
        """One line for each non-daemon thread, socket and forgotten asyncio task."""
        deadline = time.monotonic() + GRACE_S
        threads = [t for t in threading.enumerate() if t not in self._threads and not t.daemon]
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        while (sockets := self._new_sockets()) and time.monotonic() < deadline:
            time.sleep(0.01)  # another thread's loop may be closing them
        alive = [f"a running thread: {thread}" for thread in threads if thread.is_alive()]
        return alive + sockets + [f"asyncio says: {text}" for text in self._complaints.texts]

    def _new_sockets(self) -> list[str]:
        return [
            f"an open socket: {describe_socket(fd)}"
            for key, fd in open_sockets().items()
            if key not in self._sockets and not is_of_ray(fd)
        ]


class _Complaints(logging.Handler):
    """Keeps what asyncio only logs: tasks that were lost and exceptions that nobody saw."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "was never retrieved" in text or "was destroyed but it is pending" in text:
            self.texts.append(text)


def open_sockets() -> dict[str, int]:
    """This process's sockets, by an identity that is not used twice; empty where there is no /proc."""
    sockets = {}
    for entry in Path("/proc/self/fd").glob("*"):
        try:
            target = os.readlink(entry)
        except OSError:  # the directory's own descriptor, closed by now
            continue
        if target.startswith("socket:"):
            sockets[target] = int(entry.name)
    return sockets


def is_of_ray(fd: int) -> bool:
    """Whether it belongs to the Ray that this process is connected to, which connects to each of its
    processes when they are first needed. Ray uses the node's address, or loopback's in IPv6's terms
    (::ffff:127.0.0.1); nothing of ours does either."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as copy:
        if "ray" in sys.modules and copy.family in (socket.AF_INET, socket.AF_INET6):
            return not str(copy.getsockname()[0]).startswith(("127.", "::1"))
    return False


def describe_socket(fd: int) -> str:
    with socket.socket(fileno=os.dup(fd)) as copy:
        return f"fd {fd}, {copy}"


def leaving_no_tasks(test: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """`test`, failing when tasks that it started still run a moment after it."""

    @functools.wraps(test)
    async def run(*args: Any, **kwargs: Any) -> None:
        before = asyncio.all_tasks()
        await test(*args, **kwargs)
        started = asyncio.all_tasks() - before
        if started:
            _, running = await asyncio.wait(started, timeout=GRACE_S)
            assert not running, f"the test left tasks running: {running}"

    return run

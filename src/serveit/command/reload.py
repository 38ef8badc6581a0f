"""`--reload --local`: a parent holds the listening socket, a child serves; a saved file starts the next.

The old child goes on until the new one answers, and for good if that one does not come up: no
request is refused in between, since both accept from the same socket.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from serveit.command.watching import changes, describe, distrust_bytecode, folders
from serveit.signals import DRAINING_S

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence
    from pathlib import Path

    from serveit.config import HTTPOptions

STARTING_S = 5.0
"""How long a child that has not answered yet may take to end before it is killed."""
MARGIN_S = DRAINING_S + 5.0
"""What a child may take to end beyond what its requests get. It ends itself sooner."""


class Child:
    """A serving process, in a group of its own: Ctrl-C in a terminal goes to this process alone, which
    asks the child to stop, once. It therefore cannot read from the terminal, and is given no input.

    Attributes:
        process: it.
        longest_s: what its requests may take to end, in seconds; None until it answers.
    """

    def __init__(self, process: subprocess.Popen[bytes], ready_fd: int) -> None:
        """
        Args:
            process: just started.
            ready_fd: where it tells that it answers, and `longest_s`; closed with it.
        """
        self.process = process
        self.longest_s: float | None = None
        self._ready_fd = ready_fd
        self._asked_at: float | None = None
        os.set_blocking(ready_fd, False)

    def look(self) -> bool:
        """Whether it answers by now."""
        if self.longest_s is None:
            with contextlib.suppress(BlockingIOError):
                told = os.read(self._ready_fd, 64)
                self.longest_s = float(told) if told else None
        return self.longest_s is not None

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def stop(self) -> None:
        """Ask it, once, to finish what it runs, and to end."""
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            self.process.terminate()

    @property
    def left_s(self) -> float:
        """What it has still to end in; endless while it is not asked to."""
        if self._asked_at is None:
            return math.inf
        longest_s = self.longest_s if self.look() else None
        patience_s = STARTING_S if longest_s is None else longest_s + MARGIN_S
        return self._asked_at + patience_s - time.monotonic()

    def kill(self) -> None:
        """End it at once, and what it started."""
        if not self.has_ended():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def wait(self) -> None:
        """For its end, by itself or by force, after `stop`."""
        try:
            self.process.wait(max(0.0, self.left_s))
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.wait()

    def close(self) -> None:
        """It has ended, and nobody asks for it any more."""
        os.close(self._ready_fd)


class Stop:
    """Set by the first SIGINT or SIGTERM while inside; the second ends the process, and the children."""

    def __init__(self) -> None:
        self.children: list[Child] = []
        """Those that run."""
        self._is_set = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def is_set(self) -> bool:
        return self._is_set

    def _received(self, number: int, _: Any) -> None:
        if self._is_set:
            for child in self.children:
                child.kill()
            os._exit(128 + number)
        self._is_set = True


class Supervisor:
    """Starts children on one socket. Each watches a pipe, and stops when this process is gone.

    All mutable state: `_serving` (the child whose code is the newest that answered), `_starting` (the one
    with newer code), and in `stop.children` both, and those that finish what they run.
    """

    def __init__(self, target: str, arguments: Sequence[str], sock: socket.socket | None, stop: Stop) -> None:
        self._target = target
        self._arguments = arguments
        self._sock = sock
        self._stop = stop
        self._parent_reader, self._parent_writer = os.pipe()
        self._serving: Child | None = None
        self._starting: Child | None = None

    def close(self) -> None:
        os.close(self._parent_reader)
        os.close(self._parent_writer)

    def follow(self, watched: Sequence[Path]) -> None:
        """Serve, and start the new code whenever a file changes, until `stop` is set."""
        is_first = True
        try:
            for changed in changes(watched, self._stop):
                if changed and not is_first:
                    click.echo(f"{describe(changed)} changed: starting the new code", err=True)
                self._look()
                if changed or is_first:  # only now that no change can be missed
                    is_first = False
                    self._start(changed)
        finally:
            for child in self._stop.children:
                child.stop()
            for child in self._stop.children:
                child.wait()
                child.close()
            self._stop.children.clear()

    def _start(self, changed: Sequence[Path]) -> None:
        """Start `serveit run` on the socket, in place of one that does not answer yet."""
        if self._starting is not None:
            self._starting.stop()
        distrust_bytecode(changed)
        reader, writer = os.pipe()
        passed = {"--ready-fd": writer, "--parent-fd": self._parent_reader}
        if self._sock is not None:
            passed["--fd"] = self._sock.fileno()
        command = [sys.executable, "-m", "serveit", "run", self._target, *self._arguments]
        for option, fd in passed.items():
            command += [option, str(fd)]
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=list(passed.values()), process_group=0
            )
        finally:
            os.close(writer)
        self._starting = Child(process, reader)
        self._stop.children.append(self._starting)

    def _look(self) -> None:
        """See how the children do, and wait for none."""
        if self._stop.is_set():
            return
        starting, serving = self._starting, self._serving
        if starting is not None and starting.look():
            self._starting, self._serving = None, starting
            if serving is not None:
                serving.stop()
        elif starting is not None and starting.has_ended():
            self._starting = None
            if serving is None:
                click.echo("the app does not start: saving a file tries again", err=True)
            else:
                click.echo("the new code does not start: the old one goes on serving", err=True)
        if self._serving is not None and self._serving.has_ended():
            code, self._serving = self._serving.process.returncode, None
            then = "the new code is starting" if self._starting else "saving a file starts it again"
            click.echo(f"the app's process has ended (exit code {code}): {then}", err=True)
        for child in [*self._stop.children]:
            if child.left_s <= 0:
                child.kill()
            if child.has_ended():
                self._stop.children.remove(child)
                child.close()


def supervise(target: str, options: HTTPOptions, arguments: Sequence[str]) -> int:
    """Serve `target` in a child and follow its files until SIGINT or SIGTERM.

    Args:
        target: what `serveit run` was given.
        options: of the server; its address is bound here, once.
        arguments: passed on to each child.

    Returns:
        The exit code.
    """
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(_bound(options)) if options.serves else None
        stop = stack.enter_context(Stop())
        supervisor = Supervisor(target, arguments, sock, stop)
        stack.callback(supervisor.close)
        supervisor.follow(folders(target))
    return 0


def _bound(options: HTTPOptions) -> socket.socket:
    """Bound, and not listening before the first child does: until then clients are refused, not kept."""
    from serveit.web.proxy import bind

    try:
        return bind(options)
    except OSError as error:
        raise click.ClickException(error.strerror or str(error)) from None

"""`--reload`: a parent holds the listening socket, a child serves; a saved file starts the next child.

The old child goes on until the new one answers, and for good if that one does not come up: no
request is refused in between, since both accept from the same socket.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import watchfiles

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Sequence

    from serveit.config import HTTPOptions

STOP_S = 40.0
"""How long a child may take to finish its requests before it is killed. Its own time is shorter."""
LOOK_S = 0.25
"""How often to look whether the child still runs."""


@dataclass
class Child:
    """A serving process.

    Attributes:
        process: it.
        ready: whether it answered; False: it ended before.
    """

    process: subprocess.Popen[bytes]
    ready: bool = False

    def stop(self, timeout_s: float = STOP_S) -> None:
        """Let it finish what it runs, and wait for its end."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


class Stop:
    """Set by the first SIGINT or SIGTERM while inside; the second ends the process, and with it the children.

    A pipe beside the flag, so that one can wait for it and for something else at once.
    """

    def __init__(self) -> None:
        self._is_set = False
        self._reader, self._writer = os.pipe()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._reader)
        os.close(self._writer)

    def is_set(self) -> bool:
        return self._is_set

    def fileno(self) -> int:
        """Readable once set."""
        return self._reader

    def _received(self, number: int, _: Any) -> None:
        if self._is_set:
            os._exit(128 + number)
        self._is_set = True
        os.write(self._writer, b"1")


class Supervisor:
    """Starts children on one socket. Each watches a pipe, and stops when this process is gone."""

    def __init__(self, target: str, arguments: Sequence[str], sock: socket.socket | None, stop: Stop) -> None:
        self._target = target
        self._arguments = arguments
        self._sock = sock
        self._stop = stop
        self._parent_reader, self._parent_writer = os.pipe()

    def close(self) -> None:
        os.close(self._parent_reader)
        os.close(self._parent_writer)

    def start_child(self) -> Child:
        """Start `serveit run` on the socket, and wait until it answers or ends, or this process shall."""
        reader, writer = os.pipe()
        passed = {"--ready-fd": writer, "--parent-fd": self._parent_reader}
        if self._sock is not None:
            passed["--fd"] = self._sock.fileno()
        command = [sys.executable, "-m", "serveit", "run", self._target, *self._arguments]
        for option, fd in passed.items():
            command += [option, str(fd)]
        with os.fdopen(reader, "rb", buffering=0) as pipe:
            try:
                child = Child(subprocess.Popen(command, pass_fds=list(passed.values())))
            finally:
                os.close(writer)
            either: list[Any] = [pipe, self._stop]
            readable, _, _ = select.select(either, [], [])
            child.ready = pipe in readable and pipe.read(1) == b"1"
        if not child.ready:
            child.stop()
        return child

    def follow(self, folders: Sequence[Path]) -> None:
        """Serve, and start the new code whenever a file changes, until `stop` is set."""
        child: Child | None = None
        try:
            for changed in _changes(folders, self._stop):
                if child is None:  # only now that no change can be missed
                    child = self.start_child()
                    if not child.ready and not self._stop.is_set():
                        click.echo("the app does not start: saving a file tries again", err=True)
                elif changed:
                    click.echo(f"{', '.join(changed)} changed: starting the new code", err=True)
                    child = self._replace(child)
                elif child.ready and child.process.poll() is not None:
                    child.ready = False
                    click.echo(
                        f"the app's process has ended (exit code {child.process.returncode}): "
                        "saving a file starts it again",
                        err=True,
                    )
        finally:
            if child is not None:
                child.stop()

    def _replace(self, child: Child) -> Child:
        following = self.start_child()
        if following.ready:
            child.stop()
            return following
        if not self._stop.is_set():
            then = "the old one goes on serving" if child.ready else "saving a file tries again"
            click.echo(f"the new code does not start: {then}", err=True)
        return child


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
        supervisor.follow(_folders(target))
    return 0


def _bound(options: HTTPOptions) -> socket.socket:
    from serveit.web.proxy import bind

    """Bound, and not listening before the first child does: until then clients are refused, not kept."""
    try:
        return bind(options)
    except OSError as error:
        raise click.ClickException(error.strerror or str(error)) from None


def _folders(target: str) -> list[Path]:
    """Where the app's code is: the working directory, and a file's own where it is elsewhere."""
    here = Path.cwd()
    file = Path(target.partition(":")[0]).resolve()
    if file.suffix != ".py" or not file.is_file() or here in file.parents:
        return [here]
    return [here, file.parent]


def _changes(folders: Sequence[Path], stop: Stop) -> Iterator[list[str]]:
    """Names of Python files as they are saved; every `LOOK_S` an empty list."""
    watched = watchfiles.watch(
        *folders,
        watch_filter=watchfiles.PythonFilter(),
        stop_event=stop,
        raise_interrupt=False,
        debounce=100,
        step=20,
        rust_timeout=int(LOOK_S * 1000),
        yield_on_timeout=True,
    )
    for batch in watched:
        yield sorted({os.path.relpath(path) for _, path in batch})

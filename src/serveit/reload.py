"""`--reload`: a parent holds the listening socket, a child serves; a saved file starts the next child.

The old child goes on until the new one answers, and for good if that one does not come up: no
request is refused in between, since both accept from the same socket.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import watchfiles

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Sequence

    from serveit.config import HTTPOptions

STOP_S = 30.0
"""How long an old child may take to finish its requests before it is killed."""


@dataclass
class Child:
    """A serving process.

    Attributes:
        process: it.
        ready: whether it answered; False: it ended before.
    """

    process: subprocess.Popen[bytes]
    ready: bool

    def stop(self, timeout_s: float = STOP_S) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


def start_child(target: str, arguments: Sequence[str], sock: socket.socket | None) -> Child:
    """Start `serveit run` on the socket and wait until it answers or ends."""
    reader, writer = os.pipe()
    passed = [writer] if sock is None else [writer, sock.fileno()]
    command = [sys.executable, "-m", "serveit", "run", target, *arguments, "--ready-fd", str(writer)]
    if sock is not None:
        command += ["--fd", str(sock.fileno())]
    with os.fdopen(reader, "rb") as pipe:
        try:
            process = subprocess.Popen(command, pass_fds=passed)
        finally:
            os.close(writer)
        ready = pipe.read(1) == b"1"
    if not ready:
        process.wait()
    return Child(process, ready)


def supervise(target: str, options: HTTPOptions, arguments: Sequence[str]) -> int:
    """Serve `target` in a child and follow its files until SIGINT or SIGTERM.

    Args:
        target: what `serveit run` was given.
        options: of the server; its address is bound here, once.
        arguments: passed on to each child.

    Returns:
        The exit code.
    """
    from serveit.web.proxy import BACKLOG, bind

    sock = None
    if options.serves:
        try:
            sock = bind(options)
        except OSError as error:
            raise click.ClickException(error.strerror or str(error)) from None
        sock.listen(BACKLOG)
        sock.set_inheritable(True)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    child = start_child(target, arguments, sock)
    try:
        for changed in _changes(stop):
            click.echo(f"{', '.join(changed)} changed: starting the new code", err=True)
            following = start_child(target, arguments, sock)
            if following.ready or not child.ready:
                child.stop()
                child = following
            else:
                click.echo("the new code does not start: the old one goes on serving", err=True)
    finally:
        child.stop()
        if sock is not None:
            sock.close()
    return 0


def _changes(stop: threading.Event) -> Iterator[list[str]]:
    """Names of saved Python files below the working directory, as they are saved."""
    watched: Any = watchfiles.watch(
        Path.cwd(),
        watch_filter=watchfiles.PythonFilter(),
        stop_event=stop,
        raise_interrupt=False,
        debounce=100,
        step=20,
    )
    for batch in watched:
        yield sorted({os.path.relpath(path) for _, path in batch})

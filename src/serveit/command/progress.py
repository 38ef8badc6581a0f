"""How far a start is, on standard error: a display that moves on a terminal, elsewhere a line per step."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Any, Protocol

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from types import TracebackType

    from rich.console import RenderableType
    from rich.live import Live

    from serveit.control.orders import Deploying

REFRESH_PER_S = 8


class Progress(Protocol):
    """Shown while one is inside, or until `close`."""

    def __enter__(self) -> Progress: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None: ...

    def deploying(self, so_far: Deploying) -> None:
        """Replicas start: how many are there, and what is waited for."""

    def close(self) -> None:
        """Show no more. Once is enough."""


def show_progress(what: str) -> Progress:
    """What suits standard error.

    Args:
        what: goes on until there are replicas to wait for: "starting Ray".
    """
    return Display(what) if sys.stderr.isatty() else Lines()


class Lines:
    """For files and pipes: a line when a backend has one more replica ready, or waits for something else.

    All mutable state: `_ready` (by backend, as shown last) and `_waiting` (for what, as told last).
    """

    def __init__(self) -> None:
        self._ready: dict[str, int] = {}
        self._waiting: Collection[str] = ()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def deploying(self, so_far: Deploying) -> None:
        for name, (ready, wanted) in so_far.backends.items():
            if ready > self._ready.get(name, 0):
                click.echo(f"{name}: {ready} of {wanted} ready", err=True)
            self._ready[name] = ready
        reasons = so_far.reasons
        for reason, text in reasons.items():
            if reason not in self._waiting:
                click.echo(f"waiting: {text}", err=True)
        self._waiting = reasons.keys()

    def close(self) -> None:
        """Lines stay."""


class Display:
    """For terminals: what goes on, for how long, and each backend's replicas; gone when it is done.

    All mutable state: `_what`, `_backends` and `_waiting` (as told last), `_live` (None while not shown) and
    `_streams` (of the handlers whose lines go above it).
    """

    def __init__(self, what: str, now: Callable[[], float] = time.monotonic, *, file: Any = None) -> None:
        """
        Args:
            what: goes on until there are replicas to wait for.
            now: gives seconds.
            file: where to; None for standard error.
        """
        self._what = what
        self._now = now
        self._file = file
        self._began = now()
        self._backends: Mapping[str, tuple[int, int]] = {}
        self._waiting: tuple[str, ...] = ()
        self._live: Live | None = None
        self._streams: list[tuple[logging.StreamHandler[Any], Any]] = []

    def __enter__(self) -> Display:
        from rich.console import Console
        from rich.live import Live

        class Screen(Console):
            """Its cursor stays: whoever ends the process in the middle would leave it hidden."""

            def show_cursor(self, show: bool = True) -> bool:
                return False

        self._live = Live(
            get_renderable=self.render,
            console=Screen(file=self._file, stderr=True),
            refresh_per_second=REFRESH_PER_S,
            transient=True,
        )
        self._live.start()
        for handler in logging.getLogger("serveit").handlers:
            if isinstance(handler, logging.StreamHandler):  # a line in the middle of it would tear it up
                self._streams.append((handler, handler.setStream(sys.stderr)))
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def deploying(self, so_far: Deploying) -> None:
        self._what = "starting replicas"
        self._backends, self._waiting = so_far.backends, so_far.waiting

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        for handler, stream in self._streams:
            if stream is not None:
                handler.setStream(stream)
        self._streams.clear()

    def render(self) -> RenderableType:
        """What it looks like now."""
        from rich.console import Group
        from rich.spinner import Spinner
        from rich.table import Table
        from rich.text import Text

        passed_s = self._now() - self._began
        head = Table.grid(padding=(0, 1))
        head.add_row(Spinner("dots"), Text(f"{self._what}  {passed_s:.0f} s"))
        body = Table.grid(padding=(0, 2))
        for name, (ready, wanted) in self._backends.items():
            style = "green" if ready >= wanted else ""
            body.add_row("", Text(name), Text(f"{ready}/{wanted}", style=style))
        waits = [Text(f"  waiting: {text}", style="yellow") for text in self._waiting]
        return Group(head, body, *waits) if self._backends else head

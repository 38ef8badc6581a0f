"""How far a start is: on a terminal, and in a file."""

from __future__ import annotations

import io
import logging
import sys

import pytest
from rich.console import Console

from serveit.command.progress import Display, Lines, show_progress
from serveit.control.orders import Deploying


def test_a_file_gets_a_line_when_something_is_reached(capsys: pytest.CaptureFixture[str]) -> None:
    with Lines() as lines:
        for so_far in (
            Deploying({"one": (0, 2), "two": (0, 1)}),
            Deploying({"one": (1, 2), "two": (0, 1)}, ("two#1 waits for 4 CPUs, 1 s",)),
            Deploying({"one": (1, 2), "two": (0, 1)}, ("two#1 waits for 4 CPUs, 2 s",)),
            Deploying({"one": (0, 2), "two": (0, 1)}),  # it died
            Deploying({"one": (2, 2), "two": (0, 1)}, ("two#1 waits for 4 CPUs",)),
        ):
            lines.deploying(so_far)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "one: 1 of 2 ready",
        "waiting: two#1 waits for 4 CPUs, 1 s",
        "one: 2 of 2 ready",
        "waiting: two#1 waits for 4 CPUs",
    ]


def test_what_suits_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(show_progress("starting"), Lines)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert isinstance(show_progress("starting"), Display)


def rendered(display: Display) -> list[str]:
    console = Console(file=io.StringIO(), width=60, record=True)
    console.print(display.render())
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_a_display_says_what_goes_on_and_for_how_long() -> None:
    seconds = iter([0.0, 3.2, 3.4])
    display = Display("starting Ray", lambda: next(seconds))
    (line,) = rendered(display)
    assert line.endswith(" starting Ray  3 s")
    display.deploying(Deploying({"one": (1, 2), "other": (1, 1)}, ("one#2 waits for 4 CPUs",)))
    head, *rest = rendered(display)
    assert head.endswith(" starting replicas  3 s")
    assert rest == ["  one    1/2", "  other  1/1", "  waiting: one#2 waits for 4 CPUs"]


def test_a_display_leaves_nothing_and_hides_no_cursor() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    file, stderr = Terminal(), sys.stderr
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("serveit")
    logger.addHandler(handler)
    try:
        with Display("starting", file=file) as display:
            display.deploying(Deploying({"one": (0, 1)}))
            assert handler.stream is sys.stderr is not stderr, "the log's lines go above the display"
            display.close()
            assert handler.stream is sys.stderr is stderr
    finally:
        logger.removeHandler(handler)
    assert "starting" in file.getvalue() and "\x1b[?25l" not in file.getvalue()

"""Log lines: a record begins at the left edge, nothing in it can pass for another."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

import pytest

from serveit.logs import LineFormatter, configure


def formatted(message: str, *args: object, exc_info: object = None) -> str:
    record = logging.LogRecord("serveit.x", logging.INFO, "f", 1, message, args, exc_info)  # type: ignore[arg-type]
    return LineFormatter("%(levelname)s %(message)s").format(record)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nINFO forged", "a\n    INFO forged"),
        ("a\r\x1b[31m\x00", r"a\x0d\x1b[31m\x00"),
        ("\x9b31m\x7f", r"\x9b31m\x7f"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ("a\tä€", "a\tä€"),
    ],
)
def test_control_characters(text: str, shown: str) -> None:
    assert formatted("%s", text) == f"INFO {shown}"


def test_tracebacks_are_indented_and_escaped() -> None:
    try:
        raise ValueError("no\n12:00 forged\x1b")
    except ValueError:
        lines = formatted("failed", exc_info=sys.exc_info()).splitlines()
    assert lines[0] == "INFO failed"
    assert lines[-1] == r"    12:00 forged\x1b" and all(line.startswith("    ") for line in lines[1:])


@pytest.fixture
def loggers() -> Iterator[tuple[logging.Logger, logging.Logger]]:
    found = logging.getLogger("serveit"), logging.getLogger("uvicorn")
    before = [(logger.handlers, logger.level, logger.propagate) for logger in found]
    yield found
    for logger, (handlers, level, propagate) in zip(found, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.mark.parametrize(
    ("level", "ours", "uvicorns"),
    [
        ("debug", logging.DEBUG, logging.DEBUG),
        ("info", logging.INFO, logging.WARNING),
        ("error", logging.ERROR, logging.ERROR),
    ],
)
def test_configure(
    loggers: tuple[logging.Logger, logging.Logger], level: str, ours: int, uvicorns: int
) -> None:
    root = logging.getLogger().handlers[:]
    configure(level)
    configure(level)
    assert [logger.level for logger in loggers] == [ours, uvicorns]
    assert all(len(logger.handlers) == 1 and not logger.propagate for logger in loggers)
    assert logging.getLogger().handlers == root

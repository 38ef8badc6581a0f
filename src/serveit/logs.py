"""How serveit logs: under `serveit.*`, one line a record. Only the command line configures it."""

from __future__ import annotations

import logging
import sys

_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), 0x7F) if chr(code) not in "\n\t"}


class LineFormatter(logging.Formatter):
    """Escapes control characters, so that a request cannot forge a record or drive a terminal.

    Tracebacks keep their lines; the message itself is one line.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record).replace("\n", "\\n").translate(_ESCAPES)


def configure(level: str = "info") -> None:
    """Send serveit's and uvicorn's records to standard error.

    Args:
        level: "debug", "info", "warning" or "error"; uvicorn's own notices need "debug".
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S"))
    number = logging.getLevelNamesMapping()[level.upper()]
    for name, floor in (("serveit", logging.DEBUG), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(number if number == logging.DEBUG else max(number, floor))
        logger.propagate = False

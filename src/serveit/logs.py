"""How serveit logs: under `serveit.*`, one line a record. Only the command line configures it."""

from __future__ import annotations

import logging
import sys

_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
_ESCAPES |= {code: f"\\u{code:04x}" for code in (0x2028, 0x2029)}


class LineFormatter(logging.Formatter):
    """A record begins at the left edge and whatever follows in it, a traceback say, is indented.

    Control characters are escaped. So what came with a request can neither forge a record nor drive
    a terminal.
    """

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).translate(_ESCAPES).replace("\n", "\n    ")


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

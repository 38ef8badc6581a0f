"""`python -m serveit` is the command; the installed `serveit` begins here, too."""

from __future__ import annotations

import os
import signal
from typing import Any


def main() -> None:
    """Run the command. Ctrl-C ends it at once while its modules are imported: nothing has begun then, and in
    the midst of an extension's import an exception may be lost, or worse."""

    def leave(number: int, _: Any) -> None:
        os._exit(128 + number)

    previous = signal.signal(signal.SIGINT, leave)
    from serveit.command import cli

    signal.signal(signal.SIGINT, previous)
    cli.main(prog_name="serveit")


if __name__ == "__main__":
    main()

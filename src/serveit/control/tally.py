"""How many of an app's replicas have come and died; published along with what serves.

A controller counts what it sees itself: after its own death its successor begins at 0, as Prometheus
expects of counters.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from serveit.control.snapshot import AppInfo


class Tally:
    """The counts of one app, over all its versions. All mutable state: `_started`, `_died` (by backend)."""

    def __init__(self) -> None:
        self._started: Counter[str] = Counter()
        self._died: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<Tally started={dict(self._started)} died={dict(self._died)}>"

    def started(self, backend: str) -> None:
        """A replica of it has become ready."""
        self._started[backend] += 1

    def died(self, backend: str) -> None:
        """A replica of it ended though nobody ended it, or did not come up."""
        self._died[backend] += 1

    def told(self, info: AppInfo) -> AppInfo:
        """The same, with the counts."""
        backends = (
            msgspec.structs.replace(
                backend, num_started=self._started[backend.name], num_died=self._died[backend.name]
            )
            for backend in info.backends
        )
        return msgspec.structs.replace(info, backends=tuple(backends))

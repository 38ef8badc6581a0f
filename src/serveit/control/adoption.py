"""What a controller before this one has left: its apps, and where the replicas that run belong."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serveit.control.apps import RunningApp
from serveit.control.replicas import Version

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from serveit.control.checkpoint import AppRecord

ADOPT_S = 1.5
"""What replicas that a controller before this one has started get to answer, until callers are told of
those that have."""
STRAY_DRAIN_S = 30.0
"""What an actor that nobody knows may take to end what it runs."""

Origin = tuple[str, str, int]
"""What a replica is made of: the names of its app and backend, and the version."""
Home = tuple[RunningApp, Version]
"""Where a replica belongs."""


def restored(records: Iterable[AppRecord]) -> tuple[list[RunningApp], Mapping[Origin, Home]]:
    """The apps again, still without their replicas; and where those that may run belong."""
    apps, homes = [], {}
    for record in records:
        versions = {version.number: Version.of(version) for version in record.versions}
        app = RunningApp.of(record, versions)
        apps.append(app)
        # What two versions share belongs to the one that serves.
        for version in sorted(versions.values(), key=lambda version: version is app.live):
            for backend in version.spec.backends:
                homes[app.name, backend.name, version.origin(backend.name)] = app, version
    return apps, homes

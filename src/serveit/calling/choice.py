"""Which of a backend's replicas gets a request: decided from what its router knows, without asking.

Hot path: `choose` once per request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence, Set

    from serveit.calling.connection import Connection


def choose(
    ring: Sequence[Connection], refused_by: Set[str], random: Callable[[], float]
) -> Connection | None:
    """The less loaded of two drawn at random; where neither has a free slot, of those that do.

    "Power of two choices" (Mitzenmacher, 1996): nearly as even as asking all of them, and two
    routers with the same stale view do not both run to the same replica. While slots are free
    it costs the same for 2 replicas and for 200.

    Args:
        ring: the replicas.
        refused_by: ids of those that are not to be asked.
        random: uniform in [0, 1).
    """
    if len(ring) == 1:
        (only,) = ring
        usable = only.has_room and only.ready and only.replica.id not in refused_by
        return only if usable else None
    drawn = _draw_two(ring, random)
    free: Sequence[Connection] = [
        c for c in drawn if c.has_free_slot and c.ready and c.replica.id not in refused_by
    ]
    if not free:
        roomy = [c for c in ring if c.has_room and c.ready and c.replica.id not in refused_by]
        free = _draw_two([c for c in roomy if c.has_free_slot] or roomy, random)
    if not free:
        return None
    chosen = min(free, key=_load)
    for other in drawn:
        if other is not chosen:
            other.passed_over()
    return chosen


def _draw_two(connections: Sequence[Connection], random: Callable[[], float]) -> Sequence[Connection]:
    """Two different ones in random order: so ties are broken at random, too."""
    count = len(connections)
    if count < 2:
        return connections
    first = int(random() * count)
    second = int(random() * (count - 1))
    return connections[first], connections[second + (second >= first)]


def _load(connection: Connection) -> int:
    return connection.load

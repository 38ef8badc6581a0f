"""What a router says to the requests that it cannot pass on: errors, each with what is to be done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serveit.calling.exchange import Phase
from serveit.exceptions import DeadlineExceeded, Draining, NoReplica, QueueFull

if TYPE_CHECKING:
    from serveit.control.snapshot import BackendInfo


def shut_down(backend: BackendInfo) -> Exception:
    """No replica takes anything any more."""
    name = backend.name
    if backend.given_up:
        return NoReplica(
            f"backend {name!r} was given up: `serveit status` says why; a deploy, or "
            f"`serveit scale {name}=...`, tries it again"
        )
    return Draining(f"backend {name!r} is being shut down")


def queue_full(backend: BackendInfo, num_waiting: int, limit: int) -> QueueFull:
    """So many wait already as may."""
    return QueueFull(
        f"{num_waiting} requests to backend {backend.name!r} are waiting already "
        f"(max_queued_requests={limit})"
    )


def too_late(backend: BackendInfo, phase: Phase, *, has_replica: bool) -> Exception:
    """The deadline came first.

    Args:
        backend: that the request is for.
        phase: of the request.
        has_replica: whether there is one that takes requests.
    """
    name = backend.name
    if phase == Phase.WAITING and not has_replica:
        return NoReplica(f"no replica of backend {name!r} was ready in time")
    if phase in (Phase.WAITING, Phase.QUEUED):
        return DeadlineExceeded(f"still waiting for a slot of backend {name!r}", executed="no")
    return DeadlineExceeded(f"backend {name!r} did not answer in time", executed="maybe")

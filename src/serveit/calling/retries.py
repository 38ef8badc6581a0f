"""Which requests of a lost replica are sent again, and what their callers are told of the rest.

Hot path: `num_requests` grows by one with each request; everything else is for when a link is lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from serveit.calling.exchange import Phase
from serveit.exceptions import ReplicaDied
from serveit.wire.frames import FrameType

if TYPE_CHECKING:
    from collections.abc import Callable

    from serveit.calling.exchange import Exchange

PER_REQUEST, PER_S = 0.2, 10.0
"""What may be executed twice: a fifth of the requests, and so many a second on top (as Finagle has it). What
kills one replica after the other is not to be handed on from each to the next for ever."""
WINDOW_S = 10.0
"""What was not used for so long is lost."""


class Retries:
    """The second chances of one router's requests.

    All mutable state: `num_requests` (since the last look), `_budget` (second executions that are left)
    and `_looked_at` (when that was found).
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.num_requests = 0
        self._now = now
        self._budget = PER_S * WINDOW_S
        self._looked_at = now()

    def __repr__(self) -> str:
        return f"<Retries {self._budget:.1f} left>"

    def grant(self, exchange: Exchange, lost: str, *, idempotent: bool) -> ReplicaDied | None:
        """A replica was lost with the request on it. None: it is to be sent again, which happens once.

        Args:
            exchange: the request, in the phase that it had come to.
            lost: the replica's id.
            idempotent: whether it may run twice.
        """
        has_not_run = exchange.phase == Phase.QUEUED or exchange.frame_type == FrameType.RESERVE
        error = ReplicaDied(
            f"replica {lost} was lost with the request on it", executed="no" if has_not_run else "maybe"
        )
        if exchange.resent or exchange.expendable or exchange.phase >= Phase.ANSWERING:
            return error
        if not has_not_run:
            if not idempotent or not self._spend():
                return error
            exchange.loss = error
        exchange.resent = True
        return None

    def _spend(self) -> bool:
        """Take one from the budget, if there is one."""
        now = self._now()
        passed_s = now - self._looked_at
        kept = max(0.0, 1.0 - passed_s / WINDOW_S)
        counting = min(1.0, WINDOW_S / passed_s) if passed_s else 1.0
        self._budget = self._budget * kept + counting * (PER_S * passed_s + PER_REQUEST * self.num_requests)
        self._looked_at, self.num_requests = now, 0
        if self._budget < 1.0:
            return False
        self._budget -= 1.0
        return True

"""Chooses a replica in the caller's process; queues and bounds what waits.

Hot path: `submit` and `room_made` once per request each. Everything is decided synchronously,
without I/O, from what is already known here; links do the I/O afterwards. Admission has one owner,
the replica: what a router believes free may be taken, and then the replica queues or refuses.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict
from contextvars import copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serveit.calling.choice import choose
from serveit.calling.connection import Connection
from serveit.calling.exchange import Exchange, Phase
from serveit.calling.refusals import queue_full, shut_down, too_late
from serveit.calling.retries import Retries
from serveit.context import is_nested
from serveit.exceptions import DeadlineExceeded, NotServing, QueueFull
from serveit.wire.frames import FREED

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from contextvars import Context

    from serveit.calling.exchange import Answer
    from serveit.clock import DeadlineWheel
    from serveit.control.snapshot import BackendInfo, ReplicaInfo
    from serveit.observe import Observer
    from serveit.types import Clock
    from serveit.wire.link import Link, Receiver

    Connector = Callable[["ReplicaInfo", Receiver], Awaitable[Link]]

logger = logging.getLogger("serveit.router")

SLOW_QUEUE_S = 1.0
"""A wait for a thread of this length is worth a hint at `num_threads`."""


@dataclass(frozen=True)
class RouterStatistics:
    """A router at one moment."""

    waiting: int
    outstanding: int
    replicas_ready: int
    refused: int = 0
    """Since its start, for the queue was full."""


class Router:
    """The way of one process to the replicas of one backend.

    All mutable state: `_connections` (by replica id) and `_ring` (the same, to draw from), `_queue`
    (who waits, oldest first: exactly the exchanges in phase WAITING, and the context of the code that
    waits for them), `_retries`, `_ending` (all replicas that the snapshot names are going away), `_guarded`
    (only running requests may still call), `_closed` (nobody may), `_refused` (so often, for the queue was
    full), `_hinted` (the hint at `num_threads` has been given). With `replaced` others come in the place
    of replicas that go away.
    """

    def __init__(
        self,
        info: BackendInfo,
        *,
        default_queue: int,
        connect: Connector,
        clock: Clock,
        wheel: DeadlineWheel,
        observer: Observer,
        rng: random.Random | None = None,
        replaced: bool = False,
    ) -> None:
        self.info = info
        self._replaced = replaced
        self.now = clock.time
        self._default_queue = default_queue
        self._connect = connect
        self._wheel = wheel
        self._observer = observer
        self._random = (rng or random.Random()).random
        self._connections: dict[str, Connection] = {}
        self._ring: list[Connection] = []
        self._queue: OrderedDict[Exchange, Context | None] = OrderedDict()
        self._retries = Retries(clock.time)
        self._refused = 0
        self._closed = False
        self._guarded = False
        self._ending = False
        self._hinted = False

    def __repr__(self) -> str:
        return f"<Router {self.info.name} waiting={len(self._queue)} {self._ring}>"

    @property
    def max_queued_requests(self) -> int:
        limit = self.info.max_queued_requests
        return self._default_queue if limit is None else limit

    @property
    def idle(self) -> bool:
        """Whether there is nothing left to close: no connection, so no request on one."""
        return not self._connections

    @property
    def incomplete(self) -> bool:
        """Whether a replica that the latest snapshot names has no connection: `update` tries again."""
        return not self._closed and any(r.id not in self._connections for r in self.info.replicas)

    def statistics(self) -> RouterStatistics:
        return RouterStatistics(
            waiting=len(self._queue),
            outstanding=sum(connection.outstanding for connection in self._ring),
            replicas_ready=sum(connection.ready for connection in self._ring),
            refused=self._refused,
        )

    @property
    def connections(self) -> Sequence[Connection]:
        """To the replicas, those that leave included."""
        return self._ring

    @property
    def _has_replica(self) -> bool:
        return any(connection.ready for connection in self._ring)

    # -- from whoever has the snapshots ------------------------------------------------------

    async def update(self, info: BackendInfo) -> None:
        """Follow a snapshot: connect to new replicas, then let go of those that are gone.

        A replica that cannot be reached is left out; the next snapshot tries it again.
        """
        if self._closed:
            return
        self.info = info
        limit, prefetch = info.max_ongoing_requests, info.prefetch
        wanted = {replica.id for replica in info.replicas}
        gone = [each for each in self._ring if each.replica.id not in wanted]
        for connection in [each for each in self._ring if each.replica.id in wanted]:
            if connection.closed:
                self._forget(connection)
            else:
                connection.adjust(limit, prefetch)
        new = [Connection(r, limit, prefetch, self) for r in info.replicas if r.id not in self._connections]
        # Known before they are connected: an update that overlaps this one leaves them alone.
        self._connections.update((connection.replica.id, connection) for connection in new)
        self._ring = list(self._connections.values())
        self._look_for_end()
        for connection in list(self._ring):
            self.room_made(connection)
        await asyncio.gather(*map(self._open, new))
        for connection in gone if self.info is info else ():  # a later snapshot may want them again
            connection.retire()

    def drain(self) -> None:
        """Take calls of running requests only, which are to come to their ends; fail what else waits."""
        self._guarded = True
        # Of those that had been sent it is not known: they may go on.
        waiting = [(exchange, code) for exchange, code in self._queue.items() if code is not None]
        self._end_waiting([exchange for exchange, code in waiting if not code.run(is_nested)])

    def retire(self) -> None:
        """The backend is gone: fail what waits, let what is under way end, then close the links."""
        self._take_no_more()
        for connection in list(self._ring):
            connection.retire()

    def close(self) -> None:
        """Fail what waits and close the links."""
        self._take_no_more()
        for connection in list(self._ring):
            connection.close()

    # -- from callers ------------------------------------------------------------------------

    def submit(self, exchange: Exchange) -> None:
        """Send the request, or queue it until a replica has room.

        Raises:
            QueueFull: `max_queued_requests` are waiting already.
            DeadlineExceeded: its deadline is over already.
            NotServing: the router is closed.
            Draining: the backend is being shut down.
            ProtocolError: the request's metadata does not fit a frame.
        """
        if self._guarded:
            self._check_open()
        deadline = exchange.deadline
        if deadline is not None and deadline <= self.now():
            name = self.info.name
            raise DeadlineExceeded(f"the deadline was over before backend {name!r} was asked", executed="no")
        exchange.owner = self
        self._retries.num_requests += 1
        connection = choose(self._ring, exchange.refused_by, self._random) if not self._queue else None
        if connection is not None:
            connection.send(exchange)
        else:
            self._wait(exchange)
        if deadline is not None:
            exchange.bucket = self._wheel.add(exchange, deadline)

    def submit_now(self, exchange: Exchange) -> None:
        """Send the request if some replica would run it at once; it never waits here, nor comes back.

        Raises:
            QueueFull: none would.
        """
        connection = choose(self._ring, exchange.refused_by, self._random) if not self._queue else None
        if connection is None or not connection.has_free_slot:
            raise QueueFull(f"no replica of backend {self.info.name!r} has a free slot right now")
        exchange.owner = self
        exchange.expendable = True
        connection.send(exchange)
        if exchange.deadline is not None:
            exchange.bucket = self._wheel.add(exchange, exchange.deadline)

    def give_away(self, exchange: Exchange, answer: Answer[Any]) -> None:
        """Nobody reads the answer of a request that was sent by `submit_now`. A whole one need not come. A
        stream is user code that runs, and has `request_timeout_s` to come to its end."""
        if answer.inflow is None:
            return
        if answer.flags & FREED:
            self.cancel(exchange)
            return
        answer.inflow.discard()
        limit_s = self.info.request_timeout_s
        if limit_s is not None and exchange.phase < Phase.DONE:
            exchange.bucket = self._wheel.add(exchange, self.now() + limit_s)

    def cancel(self, exchange: Exchange) -> None:
        """Give the request up, wherever it is."""
        self._withdraw(exchange)
        self._forget_deadline(exchange)
        exchange.answer.cancel()

    def expire(self, exchange: Exchange) -> None:
        """Its deadline has passed and no answer has begun."""
        exchange.bucket = None
        phase = exchange.phase
        self._withdraw(exchange)
        exchange.fail(too_late(self.info, phase, has_replica=self._has_replica))

    # -- from connections --------------------------------------------------------------------

    def room_made(self, connection: Connection) -> None:
        queue = self._queue
        while queue and connection.has_room and connection.ready:
            exchange, _ = queue.popitem(last=False)
            if exchange.deadline is not None and exchange.deadline <= self.now():
                self._end(exchange, too_late(self.info, Phase.WAITING, has_replica=self._has_replica))
            else:
                self._send(connection, exchange)

    def answered(self, exchange: Exchange) -> None:
        if exchange.bucket is not None:
            self._forget_deadline(exchange)

    def refused(self, exchange: Exchange) -> None:
        """Not executed: try those that have not refused it, then those that refused it before and have
        room by now. Where there is none it waits for room, wherever that comes up."""
        assert exchange.connection is not None, "it was sent"
        just_now = frozenset((exchange.connection.replica.id,))
        for refused_by in (exchange.refused_by | just_now, just_now):
            exchange.refused_by = refused_by
            connection = choose(self._ring, exchange.refused_by, self._random)
            if connection is not None:
                break
        self._resubmit(exchange, connection)

    def lost(self, connection: Connection, exchanges: list[Exchange]) -> None:
        """A link broke: what was only queued goes elsewhere once, and so does what may run twice."""
        self._forget(connection)
        for exchange in exchanges:
            died = self._retries.grant(exchange, connection.replica.id, idempotent=self.info.idempotent)
            if died is None:
                self._resubmit(exchange, choose(self._ring, exchange.refused_by, self._random))
            else:
                self._end(exchange, died)

    def draining(self, connection: Connection) -> None:
        self._look_for_end()

    def _look_for_end(self) -> None:
        """Where no replica is left that takes requests, and none is to come, there is nothing to wait for."""
        known = [self._connections.get(replica.id) for replica in self.info.replicas]
        none_comes = bool(self.info.given_up) or (bool(known) and not self._replaced)
        self._ending = none_comes and all(one and one.draining for one in known)
        if self._ending:
            self._end_waiting(list(self._queue))

    # -- connections -------------------------------------------------------------------------

    async def _open(self, connection: Connection) -> None:
        """Connect; whatever happens meanwhile, no link stays open that nobody uses."""
        try:
            link = await self._connect(connection.replica, connection)
        except BaseException as error:
            self._forget(connection)
            if not isinstance(error, Exception):
                raise
            logger.debug("replica %s cannot be reached: %s", connection.replica.id, error)
            return
        connection.link = link
        if connection.retired or self._closed:
            connection.close()
        self.room_made(connection)

    def _forget(self, connection: Connection) -> None:
        if self._connections.get(connection.replica.id) is connection:
            del self._connections[connection.replica.id]
            self._ending &= bool(self.info.given_up)
            self._ring = list(self._connections.values())

    def _take_no_more(self) -> None:
        self._closed = self._guarded = True
        self._end_waiting(list(self._queue))

    def _end_waiting(self, exchanges: list[Exchange]) -> None:
        for exchange in exchanges:
            del self._queue[exchange]
            self._end(exchange, shut_down(self.info))

    def _check_open(self) -> None:
        if self._closed:
            raise NotServing(f"backend {self.info.name!r} has been shut down")
        if not is_nested():
            raise shut_down(self.info)

    # -- decisions ---------------------------------------------------------------------------

    def _wait(self, exchange: Exchange) -> None:
        if self._ending:
            raise shut_down(self.info)
        if len(self._queue) >= self.max_queued_requests:
            self._refused += 1
            self._observer.refused(self.info.name, "router", "full")
            raise queue_full(self.info, len(self._queue), self.max_queued_requests)
        exchange.waiting_since = self.now()
        self._queue[exchange] = copy_context()

    def _resubmit(self, exchange: Exchange, connection: Connection | None) -> None:
        if self._closed:
            self._end(exchange, shut_down(self.info))
            return
        if exchange.expendable:
            self._end(exchange, QueueFull("dropped: another replica would have to be found"))
            return
        exchange.connection = None
        exchange.outflow = None
        exchange.phase = Phase.WAITING
        if connection is not None:
            self._send(connection, exchange)
            return
        if self._ending:
            self._end(exchange, shut_down(self.info))
            return
        exchange.refused_by = frozenset()
        exchange.waiting_since = self.now()
        self._queue[exchange] = None
        self._queue.move_to_end(exchange, last=False)

    def _send(self, connection: Connection, exchange: Exchange) -> None:
        try:
            connection.send(exchange)
        except Exception as error:
            # The caller has gone on: whatever is wrong with the request has to reach it this way.
            self._end(exchange, error)
        threads = self.info.num_threads
        if threads is not None and not self._hinted and exchange.waiting_since:
            if self.now() - exchange.waiting_since >= SLOW_QUEUE_S:
                self._hinted = True
                logger.warning(
                    "requests to backend %r wait over 1 s for a thread: its functions are `def` and "
                    "num_threads=%d; more threads, more replicas or `async def` would help",
                    self.info.name,
                    threads,
                )

    def _withdraw(self, exchange: Exchange) -> None:
        phase, exchange.phase = exchange.phase, Phase.DONE
        if phase == Phase.WAITING:
            self._queue.pop(exchange, None)
        else:
            assert exchange.connection is not None, "it was sent"
            exchange.connection.cancel(exchange)

    def _end(self, exchange: Exchange, error: BaseException) -> None:
        exchange.phase = Phase.DONE
        self._forget_deadline(exchange)
        exchange.fail(error)

    def _forget_deadline(self, exchange: Exchange) -> None:
        if exchange.bucket is not None:
            self._wheel.discard(exchange, exchange.bucket)
            exchange.bucket = None

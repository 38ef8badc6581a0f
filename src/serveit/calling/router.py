"""Chooses a replica in the caller's process; queues and bounds what waits.

Hot path: `submit` and `room_made` once per request each. Everything is decided synchronously,
without I/O, from what is already known here; links do the I/O afterwards. Admission has one owner,
the replica: what a router believes free may be taken, and then the replica queues or refuses.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serveit.calling.connection import Connection
from serveit.calling.exchange import Exchange, Phase
from serveit.exceptions import (
    DeadlineExceeded,
    Draining,
    NoReplica,
    NotServing,
    ProtocolError,
    QueueFull,
    ReplicaDied,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from serveit.clock import DeadlineWheel
    from serveit.control.snapshot import BackendInfo, ReplicaInfo
    from serveit.observe import Observer
    from serveit.types import Clock, Executed
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


class Router:
    """The way of one process to the replicas of one backend.

    All mutable state: `_connections` (by replica id), `_queue` (who waits, oldest first; cancelled
    ones stay in it as gaps), `_waiting` (how many of them are alive).
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
    ) -> None:
        self.info = info
        self.now = clock.time
        self._default_queue = default_queue
        self._connect = connect
        self._wheel = wheel
        self._observer = observer
        self._random = rng or random.Random()
        self._connections: dict[str, Connection] = {}
        self._queue: deque[Exchange] = deque()
        self._waiting = 0
        self._closed = False
        self._hinted = False

    def __repr__(self) -> str:
        return f"<Router {self.info.name} waiting={self._waiting} {list(self._connections.values())}>"

    @property
    def max_queued_requests(self) -> int:
        limit = self.info.max_queued_requests
        return self._default_queue if limit is None else limit

    def statistics(self) -> RouterStatistics:
        connections = self._connections.values()
        return RouterStatistics(
            waiting=self._waiting,
            outstanding=sum(connection.outstanding for connection in connections),
            replicas_ready=sum(connection.ready for connection in connections),
        )

    async def update(self, info: BackendInfo) -> None:
        """Follow a snapshot: connect to new replicas, let go of those that are gone."""
        self.info = info
        wanted = {replica.id: replica for replica in info.replicas}
        for replica_id in self._connections.keys() - wanted.keys():
            self._connections[replica_id].draining = True
        for replica_id, replica in wanted.items():
            known = self._connections.get(replica_id)
            if known is not None:
                known.limit, known.prefetch = info.max_ongoing_requests, info.prefetch
                continue
            connection = Connection(replica, info.max_ongoing_requests, info.prefetch, self)
            connection.link = await self._connect(replica, connection)
            self._connections[replica_id] = connection
        self._pump()

    def close(self) -> None:
        """Fail what waits and close the links."""
        self._closed = True
        queue, self._queue = self._queue, deque()
        self._waiting = 0
        for exchange in queue:
            if exchange.phase == Phase.WAITING:
                self._end(exchange, Draining("the instance is stopping"))
        for connection in self._connections.values():
            connection.close()

    # -- from callers ------------------------------------------------------------------------

    def submit(self, exchange: Exchange) -> None:
        """Send the request, or queue it until a replica has room.

        Raises:
            QueueFull: `max_queued_requests` are waiting already.
            NotServing: the router is closed.
            ProtocolError: the request's metadata does not fit a frame.
        """
        if self._closed:
            raise NotServing(f"backend {self.info.name!r} has been shut down")
        exchange.owner = self
        connection = self._choose(exchange) if not self._waiting else None
        if connection is not None:
            connection.send(exchange)
        else:
            if self._waiting >= self.max_queued_requests:
                self._observer.refused(self.info.name, "router", "full")
                raise QueueFull(
                    f"{self._waiting} requests to backend {self.info.name!r} are waiting already "
                    f"(max_queued_requests={self.max_queued_requests})"
                )
            exchange.waiting_since = self.now()
            self._queue.append(exchange)
            self._waiting += 1
        if exchange.deadline is not None:
            exchange.bucket = self._wheel.add(exchange, exchange.deadline)

    def submit_now(self, exchange: Exchange) -> None:
        """Send the request if some replica has room; it never waits here.

        Raises:
            QueueFull: none has.
        """
        exchange.owner = self
        connection = self._choose(exchange) if not self._waiting else None
        if connection is None:
            raise QueueFull(f"no replica of backend {self.info.name!r} has room right now")
        connection.send(exchange)

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
        exchange.fail(self._too_late(phase))

    # -- from connections --------------------------------------------------------------------

    def room_made(self, connection: Connection) -> None:
        while self._waiting and connection.has_room and connection.ready:
            exchange = self._next_waiting()
            if exchange is None:
                return
            self._waiting -= 1
            self._send(connection, exchange)

    def answered(self, exchange: Exchange) -> None:
        self._forget_deadline(exchange)

    def refused(self, exchange: Exchange, reason: str) -> None:
        """Not executed: try elsewhere. Where all others refused it too, it waits for room."""
        connection = exchange.connection
        if connection is not None:
            exchange.refused_by |= {connection.replica.id}
            if reason == "draining":
                connection.draining = True
        self._resubmit(exchange)

    def lost(self, connection: Connection, exchanges: list[Exchange]) -> None:
        """A link broke: what was only queued goes elsewhere once, the rest may have been executed."""
        self._connections.pop(connection.replica.id, None)
        for exchange in exchanges:
            if exchange.phase == Phase.QUEUED and not exchange.resent and not self._closed:
                exchange.resent = True
                self._resubmit(exchange)
            else:
                executed: Executed = "no" if exchange.phase == Phase.QUEUED else "maybe"
                error = ReplicaDied(
                    f"replica {connection.replica.id} was lost with the request on it", executed=executed
                )
                self._end(exchange, error)

    # -- decisions ---------------------------------------------------------------------------

    def _choose(self, exchange: Exchange) -> Connection | None:
        """Least loaded of two drawn at random among those with a free slot, else with room.

        "Power of two choices" (Mitzenmacher, 1996): nearly as even as asking all of them, and two
        routers with the same stale view do not both run to the same replica.
        """
        ready = [
            connection
            for connection in self._connections.values()
            if connection.has_room and connection.ready and connection.replica.id not in exchange.refused_by
        ]
        if len(ready) > 1:
            ready = [connection for connection in ready if connection.has_free_slot] or ready
        if len(ready) > 2:
            ready = self._random.sample(ready, 2)
        if len(ready) == 2:
            one, other = ready
            loads = one.outstanding + one.others, other.outstanding + other.others
            if loads[0] == loads[1]:
                return one if self._random.random() < 0.5 else other
            return one if loads[0] < loads[1] else other
        return ready[0] if ready else None

    def _resubmit(self, exchange: Exchange) -> None:
        exchange.connection = None
        exchange.outflow = None
        exchange.phase = Phase.WAITING
        connection = self._choose(exchange)
        if connection is not None:
            self._send(connection, exchange)
            return
        # Everybody refused: from here on any room, wherever it comes up, is worth a try.
        exchange.refused_by = frozenset()
        exchange.waiting_since = self.now()
        self._queue.appendleft(exchange)
        self._waiting += 1

    def _send(self, connection: Connection, exchange: Exchange) -> None:
        try:
            connection.send(exchange)
        except ProtocolError as error:
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

    def _pump(self) -> None:
        for connection in list(self._connections.values()):
            self.room_made(connection)

    def _next_waiting(self) -> Exchange | None:
        while self._queue:
            exchange = self._queue.popleft()
            if exchange.phase == Phase.WAITING:
                return exchange
        return None

    def _withdraw(self, exchange: Exchange) -> None:
        phase, exchange.phase = exchange.phase, Phase.DONE
        if phase == Phase.WAITING:
            self._waiting -= 1
            if not self._waiting:
                self._queue.clear()
        elif exchange.connection is not None:
            exchange.connection.cancel(exchange)

    def _end(self, exchange: Exchange, error: BaseException) -> None:
        exchange.phase = Phase.DONE
        self._forget_deadline(exchange)
        exchange.fail(error)

    def _forget_deadline(self, exchange: Exchange) -> None:
        if exchange.bucket is not None:
            self._wheel.discard(exchange, exchange.bucket)
            exchange.bucket = None

    def _too_late(self, phase: Phase) -> Exception:
        name = self.info.name
        if phase in (Phase.WAITING, Phase.QUEUED):
            if any(connection.ready for connection in self._connections.values()):
                return DeadlineExceeded(f"still waiting for a slot of backend {name!r}", executed="no")
            return NoReplica(f"no replica of backend {name!r} was ready in time")
        return DeadlineExceeded(f"backend {name!r} did not answer in time", executed="maybe")

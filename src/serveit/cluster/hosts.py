"""What runs inside the processes of an instance: a replica with its channels, a proxy with its watch.

Plain classes on the event loop that they are made in; `actors` has their Ray shells.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from serveit.clock import LoopClock
from serveit.cluster.gateways import Resolver
from serveit.cluster.objects import install
from serveit.cluster.session import node_address
from serveit.cluster.shipping import Shipment, find, unpack
from serveit.cluster.watch import Watch
from serveit.config import HTTP_QUEUE, NODE_HOST, HTTPOptions
from serveit.context import serving
from serveit.control.orders import (
    Configured,
    Health,
    Leaving,
    Place,
    ProxyOrder,
    ReplicaOrder,
    Started,
    StartFailed,
    parse_place,
    place_text,
)
from serveit.exceptions import ServeitError
from serveit.logs import configure as configure_logs
from serveit.running.failures import failure_of
from serveit.running.health import Checkup
from serveit.running.httpjob import Bindings
from serveit.running.listener import Listener
from serveit.running.replica import Replica
from serveit.running.reservation import Reservations
from serveit.running.settings import LiveSettings, configured
from serveit.running.watchdog import Watchdog
from serveit.wire.channel import listen
from serveit.wire.frames import FrameType, encode_message
from serveit.wire.pickles import dump_exception

if TYPE_CHECKING:
    from serveit.control.snapshot import Snapshot
    from serveit.web.exposition import Scope
    from serveit.web.proxy import Proxy
    from serveit.wire.channel import Channel, Listening
    from serveit.wire.link import Receiver

logger = logging.getLogger("serveit.replica")

MAX_EXCEPTION = 1024 * 1024
LAST_WORDS_S = 0.05
QUIET_S = 0.1
"""What a caller on another node gets to hear of a free slot, and to hand over the next request."""
PROXY_ROLE, REPLICA_ROLE = "proxy", "replica"


class ReplicaHost:
    """One replica and the channels of its callers.

    All mutable state: `_starting` and `_closing` (the tasks, kept for what they give), `runs` (the user's
    object is there), `_is_leaving` (it is about to close), `has_run_tasks`, and what `start` makes.
    """

    def __init__(self, order: ReplicaOrder, node: str) -> None:
        self._order = order
        self._node = node
        self.has_run_tasks = False
        self._starting: asyncio.Task[Started | StartFailed] | None = None
        self._closing: asyncio.Task[None] | None = None
        self.runs = self._is_leaving = False
        self._exit = contextlib.AsyncExitStack()
        self._doors: list[Listening] = []

    async def start(self) -> Started | StartFailed | Leaving:
        """Load the user's code, construct the backend, listen. Who asks again is told what became of it."""
        if self._closing is not None or self._is_leaving:
            return Leaving()
        if self._starting is None:
            self._starting = asyncio.get_running_loop().create_task(self._start())
        outcome = await asyncio.shield(self._starting)
        if isinstance(outcome, Started):  # whoever asks again hears what has become of it
            outcome = msgspec.structs.replace(outcome, settings=self._settings.octets)
        return outcome

    async def _start(self) -> Started | StartFailed:
        order = self._order
        configure_logs(order.log_level)
        try:
            await self._start_replica()
            place = await self._open_doors()
        except BaseException as error:  # a SystemExit of user code too: it must not end the event loop
            return start_failed(error, f"replica {order.id} of app {order.app!r}")
        settle()
        return Started(os.getpid(), place_text(place))

    async def _start_replica(self) -> None:
        install()
        order = self._order
        shipment = msgspec.msgpack.decode(order.code, type=Shipment)
        app = unpack(shipment, order.actor_options.get("runtime_env", {}))
        declared = find(app, order.backend, shipment)
        self._settings = LiveSettings(declared.config, order.settings)
        backend = configured(declared, order.settings)
        loop = asyncio.get_running_loop()
        resolver = Resolver(app, order.app, REPLICA_ROLE)
        await resolver.open()
        self._exit.push_async_callback(resolver.aclose)
        self._exit.enter_context(serving(app, resolver))
        self.replica = Replica(
            backend, id=order.id, app=order.app, clock=LoopClock(), resolver=resolver, on_exit=self._leave
        )
        self.reservations = Reservations(self.replica)
        self._bindings = Bindings(backend)
        self._bindings.prepare()
        await self.replica.start()
        self._checkup = Checkup(self.replica)
        self._checkup.start()
        self._exit.callback(self._checkup.stop)
        self.runs = True
        watchdog = Watchdog()
        watchdog.start(loop)
        self._exit.callback(watchdog.stop)

    async def _open_doors(self) -> Place:
        order = self._order
        unix = f"unix:{order.folder}/{order.id.rsplit('#', 1)[-1]}-{os.getpid()}.sock"
        self._doors.append(await listen(unix, self._accept, role=REPLICA_ROLE))
        tcp = ""
        if order.over_tcp:
            address = f"tcp:{node_address()}:0"
            door = await listen(address, self._accept, role=REPLICA_ROLE, secret=order.secret)
            self._doors.append(door)
            tcp = door.address
        return Place(self._node, unix, tcp, order.actor)

    def _accept(self, channel: Channel) -> Receiver:
        may_call = channel.peer.role != PROXY_ROLE
        return Listener(
            self.replica, self._bindings, channel, reservations=self.reservations, may_call=may_call
        )

    async def configure(self, settings: bytes) -> Configured | StartFailed | Leaving:
        """Take in other settings while it serves."""
        if self._closing is not None or self._is_leaving:
            return Leaving()
        try:
            await self._settings.take_in(self.replica, settings)
        except BaseException as error:
            return start_failed(error, f"replica {self._order.id} of app {self._order.app!r}")
        return Configured()

    async def idle(self, timeout_s: float) -> None:
        """Wait until nothing runs, and nothing more has come for a moment, at most so long: callers hand over
        what waits with them one by one, when they hear that there is room."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while await self.replica.idle(timeout_s):
                    before = self.replica.meter.requests
                    await asyncio.sleep(QUIET_S)
                    if self.replica.is_idle and self.replica.meter.requests == before:
                        return

    def leave(self, otherwise_s: float) -> float:
        """Take nothing new; what the requests that run may take at most, those without a deadline so long."""
        self._is_leaving = True
        self._say_goaway()
        self.replica.close_doors()
        return self.replica.longest_s(otherwise_s)

    async def aclose(self, timeout_s: float) -> None:
        """Take nothing new, let what runs end, close the user's object and the channels. Once is enough."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close(timeout_s))
        await asyncio.shield(self._closing)

    async def _close(self, timeout_s: float) -> None:
        if self.runs:
            self._say_goaway()
            await self.replica.drain(timeout_s)
            await self.replica.aclose()
        for door in self._doors:
            await door.aclose()
        await self._exit.aclose()

    def _leave(self, error: BaseException) -> None:
        """User code raised SystemExit or KeyboardInterrupt: the process ends, once the answers of this tick
        are out. What still comes is refused, and goes to the one in its place."""
        self._say_goaway()
        loop = asyncio.get_running_loop()
        self._leaving = loop.create_task(self.replica.drain(0.0))
        loop.call_later(LAST_WORDS_S, os._exit, 1)

    def _say_goaway(self) -> None:
        for door in self._doors:
            for channel in door.channels:
                channel.send(FrameType.GOAWAY, 0)

    def health(self) -> Health:
        """What its checks have found so far."""
        return self._checkup.health

    def status(self) -> dict[str, Any]:
        statistics = self.replica.statistics()
        return {"running": statistics.running, "waiting": statistics.waiting, "pid": os.getpid()}


class ProxyHost:
    """One HTTP server, fed by a watch.

    All mutable state: `_starting` (the task, kept for what it gives), `_proxy` and `_watch` (once there),
    `_closed`.
    """

    def __init__(self, order: ProxyOrder, controller: Any) -> None:
        self._order = order
        self._controller = controller
        self._starting: asyncio.Task[Started | StartFailed] | None = None
        self._proxy: Proxy | None = None
        self._watch: Watch | None = None
        self._closed = False

    async def start(self) -> Started | StartFailed:
        """Listen, and answer by the snapshots from then on. Who asks again is told what became of it."""
        if self._closed:
            return StartFailed(b"", where="the HTTP server: it is being stopped")
        if self._starting is None:
            self._starting = asyncio.get_running_loop().create_task(self._start())
        return await asyncio.shield(self._starting)

    async def _start(self) -> Started | StartFailed:
        from serveit.web.ingress import Ingress
        from serveit.web.proxy import Proxy, bind

        configure_logs(self._order.log_level)
        sys.path[:0] = [path for path in self._order.paths if path not in sys.path]
        try:
            options = HTTPOptions(**msgspec.json.decode(self._order.options))
            if options.host == NODE_HOST:
                options = dataclasses.replace(options, host=node_address())
            watch = Watch(
                self._controller,
                member=self._order.id,
                role=PROXY_ROLE,
                secret=self._order.secret,
                default_queue=HTTP_QUEUE,
                on_snapshot=self._updated,
            )
            self._ingress = Ingress(options, watch.directories, watch.clock, self._scope(options))
            proxy = Proxy(options, self._ingress)
            with contextlib.ExitStack() as stack:
                sock = bind(options)  # first: an address that is taken is found at once
                stack.callback(sock.close)
                self._watch = watch
                await watch.open()
                await proxy.start(sock)  # whoever is answered, is answered by the routes
                stack.pop_all()
            self._proxy = proxy
        except BaseException as error:
            return start_failed(error, "the HTTP server")
        settle()
        return Started(os.getpid(), proxy.url)

    def _scope(self, options: HTTPOptions) -> Scope:
        """Where every node has a server, each exposes the metrics of its own node's replicas."""
        from serveit.web.exposition import EVERYTHING, Scope

        if options.location != "EveryNode":
            return EVERYTHING
        node = self._order.node
        return Scope(lambda replica: parse_place(replica.address).node == node, self._order.is_first)

    def _updated(self, snapshot: Snapshot) -> None:
        self._ingress.update(snapshot)

    async def aclose(self, timeout_s: float) -> None:
        self._closed = True
        if self._proxy is not None:
            self._ingress.ready = False
            await self._proxy.aclose(timeout_s)
        if self._watch is not None:
            await self._watch.aclose()


def start_failed(error: BaseException, where: str) -> StartFailed:
    """What a start raised, as octets: whoever passes it on need not have its classes."""
    serveits = isinstance(error, ServeitError)
    failure = failure_of(error, others=0, in_user_code=not serveits)
    pickled = dump_exception(error, MAX_EXCEPTION)
    return StartFailed(encode_message(failure), pickled, where, f"{failure.kind}: {failure.text}")


def settle() -> None:
    """What is there by now stays: garbage collection leaves it alone, for looking at all of it holds
    requests up for some 10 ms each time."""
    gc.collect()
    gc.freeze()

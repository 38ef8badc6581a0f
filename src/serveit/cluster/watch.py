"""Follows an instance's snapshots in one event loop: a directory per app, connected to its replicas.

Proxies have one, drivers, and replicas whose code has handles. One actor call is pending at the
controller all the time; what it brings replaces what was known.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

import msgspec
import ray

from serveit.calling.directory import Directory
from serveit.clock import DeadlineWheel, LoopClock
from serveit.cluster.contact import find_controller, join
from serveit.control.orders import parse_place
from serveit.control.snapshot import AppInfo, Snapshot
from serveit.exceptions import NotServing
from serveit.observe import NullObserver
from serveit.wire.channel import connect

if TYPE_CHECKING:
    from collections.abc import Callable

    from serveit.cluster.contact import Line
    from serveit.control.snapshot import ReplicaInfo
    from serveit.wire.link import Link, Receiver

logger = logging.getLogger("serveit.watch")

RETRY_S = 0.5
"""Between attempts to reach replicas, or a controller, that could not be reached."""
LOOK_S = 2.0
"""So often is it looked whether all replicas are connected still. One that died the controller tells of at
once; this is for connections that broke though their replicas live."""


class Watch:
    """What one event loop knows of an instance.

    All mutable state: `directories` (by app), `version` (of the snapshot taken in), `_infos` (its apps),
    `_unreachable` (replicas that could not be reached), `_news` (set when there is a later snapshot).
    """

    def __init__(
        self,
        controller: Any,
        *,
        member: str,
        role: str,
        secret: bytes,
        default_queue: int,
        on_snapshot: Callable[[Snapshot], None] | None = None,
        line: Line | None = None,
    ) -> None:
        """
        Args:
            controller: its actor.
            member: a name of this watcher, unique in the instance.
            role: of this process on its channels: "proxy", "driver" or "replica".
            secret: the instance's, for channels between nodes.
            default_queue: `max_queued_requests` where a backend names none.
            on_snapshot: called when a snapshot has been taken in.
            line: to the controller, which forgets this watcher when it is closed; its end is this one's.
        """
        self.clock = LoopClock()
        self.directories: dict[str, Directory] = {}
        self.version = (0, 0)
        self._controller = controller
        self._member = member
        self._role = role
        self._secret = secret
        self._default_queue = default_queue
        self._on_snapshot = on_snapshot
        self._line = line
        self._wheel = DeadlineWheel(self.clock)
        self._node = ray.get_runtime_context().get_node_id()
        self._infos: dict[str, AppInfo] = {}
        self._unreachable: set[str] = set()
        self._news = asyncio.Event()
        self._following: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Watch {self._member} {self.version} {list(self.directories.values())}>"

    async def open(self) -> None:
        """Take in what is, and follow it from then on. Raises NotServing without a controller."""
        self._following = asyncio.get_running_loop().create_task(self._follow())
        news = asyncio.ensure_future(self._news.wait())
        try:
            await asyncio.wait((self._following, news), return_when=asyncio.FIRST_COMPLETED)
        finally:
            news.cancel()
        if self._following.done():
            self._following.result()

    async def reached(self, version: tuple[int, int]) -> None:
        """Wait until a snapshot of this version or a later one has been taken in."""
        while self.version < version:
            await self._news.wait()

    async def aclose(self) -> None:
        """Follow no more and close all channels."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait((self._following,))
        self.close()
        await asyncio.sleep(0)  # the channels' last frames

    def close(self) -> None:
        """Close all channels."""
        for directory in self.directories.values():
            directory.close()
        self._wheel.close()
        if self._line is not None:
            self._line.close()

    # -- following ---------------------------------------------------------------------------

    async def _follow(self) -> None:
        try:
            while True:
                await self._take_in(await self._next())
        except NotServing as error:
            if self.version == (0, 0):
                raise
            logger.warning("%s", error)
        finally:
            self.close()
            # Here, where loops that are not closed in order come by, too: whoever is not forgotten is
            # waited for at the next change.
            if ray.is_initialized():
                with contextlib.suppress(ray.exceptions.RayError):
                    self._controller.forget.remote(self._member)

    async def _next(self) -> Snapshot:
        """The next snapshot; meanwhile, replicas that could not be reached are tried again."""
        while True:
            _check_connected()
            call = asyncio.ensure_future(_result(self._controller.watch.remote(self._member, self.version)))
            try:
                while not call.done():
                    _check_connected()
                    await asyncio.wait((call,), timeout=await self._reconnected())
                return msgspec.msgpack.decode(call.result(), type=Snapshot)
            except ray.exceptions.ActorDiedError as error:
                if self.version == (0, 0):
                    raise NotServing(f"the controller is gone ({type(error).__name__})") from None
                # Requests go on without it.
                logger.warning("the controller is gone; what is known of the app stays")
                await self._find_another()
            except ray.exceptions.RayError as error:
                logger.warning("the controller does not answer (%s): it is asked again", type(error).__name__)
                await asyncio.sleep(RETRY_S)
            finally:
                call.cancel()

    async def _find_another(self) -> None:
        """Wait for the controller that comes after one that died: nobody is left who would tell."""
        dead = self._controller
        while self._controller is dead:
            _check_connected()
            await asyncio.sleep(await self._reconnected())
            try:
                controller = await asyncio.to_thread(find_controller)
                if controller._actor_id != dead._actor_id:
                    self._secret = (await join(controller)).secret
                    self._controller = controller
            except NotServing:
                continue

    async def _take_in(self, snapshot: Snapshot) -> None:
        infos = {info.name: info for info in snapshot.apps}
        for name in infos:
            if name not in self.directories:
                self.directories[name] = self._make_directory(name)
        await asyncio.gather(*(self.directories[name].update(info) for name, info in infos.items()))
        self._infos = infos
        self.version = snapshot.version
        if self._on_snapshot is not None:
            self._on_snapshot(snapshot)
        for name in self.directories.keys() - infos.keys():
            directory = self.directories.pop(name)
            await directory.update(AppInfo(name, (), (), ()))
            directory.closed = True
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _reconnected(self) -> float:
        """Try replicas that are not connected again; seconds until the next look."""
        for name, info in self._infos.items():
            if self.directories[name].incomplete:
                await self.directories[name].update(info)
        incomplete = any(directory.incomplete for directory in self.directories.values())
        return RETRY_S if incomplete else LOOK_S

    def _make_directory(self, app: str) -> Directory:
        return Directory(
            app,
            default_queue=self._default_queue,
            connect=self._connect,
            clock=self.clock,
            wheel=self._wheel,
            observer=NullObserver(),
            replaced=True,
        )

    async def _connect(self, info: ReplicaInfo, receiver: Receiver) -> Link:
        try:
            link = await self._connected(info, receiver)
        except OSError as error:
            if info.id not in self._unreachable:  # once is enough: it is tried again and again
                logger.warning("replica %s cannot be reached: %s", info.id, error)
                self._unreachable.add(info.id)
            raise
        self._unreachable.discard(info.id)
        return link

    async def _connected(self, info: ReplicaInfo, receiver: Receiver) -> Link:
        place = parse_place(info.address)
        if place.node == self._node:
            return await connect(place.unix, receiver, role=self._role)
        if not place.tcp:
            raise OSError(f"replica {info.id} is on another node and listens on none of its addresses")
        return await connect(place.tcp, receiver, role=self._role, secret=self._secret)


def _check_connected() -> None:
    """Whatever is asked of Ray once it has been shut down starts it anew."""
    if not ray.is_initialized():
        raise NotServing("Ray has been shut down in this process: nothing is followed any more")


async def _result(ref: Any) -> bytes:
    octets: bytes = await ref
    return octets

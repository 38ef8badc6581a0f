"""The controller's actor: a thin shell around `control.controller`, and the doors for lines."""

from __future__ import annotations

import asyncio
import os
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import ray

from serveit.cluster.actors import Actor
from serveit.cluster.launching import RayLauncher, actor_options, end_actors, remote_class
from serveit.cluster.session import node_address
from serveit.control.controller import Controller
from serveit.control.orders import CONTROLLER, Joined, Place, ProxyOrder, encode, place_text
from serveit.control.spec import AppSpec
from serveit.logs import configure

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from serveit.wire.channel import Channel, Listening
    from serveit.wire.link import Receiver

NUM_WATCHERS = 10_000
"""Calls that a controller has to take at once: each watcher has one pending."""
LAST_WORDS_S = 0.1
OWNER_GRACE_S = 2.0
"""What a driver whose connection broke gets to come back."""


class ControllerActor(Actor):
    """The process of the controller."""

    def __init__(self, folder: str, over_tcp: bool, log_level: str) -> None:
        configure(log_level)
        self._secret = os.urandom(32)
        self._over_tcp = over_tcp
        self._folder = folder
        self._controller = Controller(
            RayLauncher(), folder=folder, secret=self._secret, over_tcp=over_tcp, log_level=log_level
        )
        self._lines: str = ""
        self._doors: list[Listening] = []
        self._opening = asyncio.Lock()

    async def join(self) -> bytes:
        """What a process needs to take part: an encoded Joined. Raises NotServing where this is ending."""
        self._controller.check_open()
        async with self._opening:
            if not self._lines:
                end_actors()
                self._lines = await self._open()
        return encode(Joined(self._secret, self._lines))

    async def _open(self) -> str:
        """Listen for those whose end is to be known."""
        from serveit.wire.channel import listen

        def accept(channel: Channel) -> Receiver:
            member, owner = (str(channel.peer.extra.get(key, "")) for key in ("member", "owner"))
            if member:
                return End(partial(self.forget, member))
            self._controller.owner_joined(owner)
            return End(partial(self._owner_lost, owner))

        unix = f"unix:{self._folder}/controller-{os.getpid()}.sock"
        # Kept: uvloop closes a server that nobody holds.
        self._doors = [await listen(unix, accept, role="controller")]
        tcp = ""
        if self._over_tcp:
            address = f"tcp:{node_address()}:0"
            self._doors.append(await listen(address, accept, role="controller", secret=self._secret))
            tcp = self._doors[-1].address
        return place_text(Place(ray.get_runtime_context().get_node_id(), unix, tcp))

    async def deploy(self, spec: bytes) -> int:
        return self._controller.deploy(msgspec.msgpack.decode(spec, type=AppSpec))

    async def deployed(self, name: str, version: int) -> bytes:
        return encode(await self._controller.deployed(name, version))

    async def scale(self, name: str, backend: str, num_replicas: int) -> bytes:
        self._controller.scale(name, backend, num_replicas)
        return encode(await self._controller.settled(name))

    async def reroute(self, name: str, endpoint: str, weights: list[Any], shadows: list[Any]) -> None:
        self._controller.reroute(name, endpoint, weights, shadows)
        await self._controller.acknowledged(self._controller.snapshot.version)

    async def http(self, options: bytes | None, order: bytes | None) -> bytes:
        wanted = msgspec.msgpack.decode(order, type=ProxyOrder) if order is not None else None
        return encode(await self._controller.http(options, wanted))

    async def watch(self, member: str, version: tuple[int, int]) -> bytes:
        return encode(await self._controller.watch(member, (version[0], version[1])))

    async def forget(self, member: str) -> None:
        self._controller.forget(member)

    async def describe(self, name: str) -> bytes:
        return encode(self._controller.describe(name))

    async def status(self, name: str) -> bytes:
        return encode(await self._controller.status(name))

    async def url(self) -> str | None:
        return self._controller.url

    async def delete(self, name: str, owner: str | None) -> None:
        """End an app; with the last one ends the instance."""
        await self._controller.delete(name, owner)
        if owner is not None:
            self._controller.owner_left(owner)
        await self._end_if_empty()

    async def shutdown(self) -> None:
        await self._controller.shutdown()

    async def _owner_lost(self, owner: str) -> None:
        await self._controller.owner_lost(owner, OWNER_GRACE_S)
        await self._end_if_empty()

    async def _end_if_empty(self) -> None:
        if self._controller.is_empty:
            await self._controller.shutdown()
            for door in self._doors:
                await door.aclose()
            # Not at once: whoever has asked for this gets an answer.
            asyncio.get_running_loop().call_later(LAST_WORDS_S, _die)


def _die() -> None:
    """Ray logs nothing of an actor that is killed, and pages of one that exits."""
    ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


class End:
    """The controller's side of a line: somebody's end is the end of it."""

    def __init__(self, on_lost: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._on_lost = on_lost
        self._ending: asyncio.Task[None] | None = None

    def frame_received(self, frame: Any) -> None:
        """Nothing is said here."""

    def link_lost(self, error: BaseException | None) -> None:
        self._ending = asyncio.get_running_loop().create_task(self._on_lost())


def start_controller(folder: str, over_tcp: bool, log_level: str) -> Any:
    """The controller's actor, made if there is none yet."""
    options = actor_options(
        CONTROLLER, num_cpus=0, get_if_exists=True, max_concurrency=NUM_WATCHERS, on_head=True
    )
    return remote_class(ControllerActor).options(**options).remote(folder, over_tcp, log_level)

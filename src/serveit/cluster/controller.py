"""The controller's actor: a thin shell around `control.controller`, and the doors for lines."""

from __future__ import annotations

import asyncio
import logging
import os
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import ray

from serveit.cluster.actors import Actor
from serveit.cluster.launching import RayLauncher, actor_options, end_actors, remote_class
from serveit.cluster.session import node_address
from serveit.cluster.store import RayStore
from serveit.control.controller import Controller
from serveit.control.orders import (
    CONTROLLER,
    BackendChange,
    Deployed,
    DeployFailed,
    Deploying,
    Joined,
    Place,
    ProxyOrder,
    encode,
    place_text,
)
from serveit.control.spec import AppSpec
from serveit.logs import configure

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from serveit.control.checkpoint import Checkpoint
    from serveit.wire.channel import Channel, Listening
    from serveit.wire.link import Receiver

logger = logging.getLogger("serveit.controller")

NUM_WATCHERS = 10_000
"""Calls that a controller has to take at once: each watcher has one pending."""
LAST_WORDS_S = 0.1
AGAIN_S = 1.0
"""Before the end of a controller that cannot begin: Ray starts the next one at once."""
OWNER_GRACE_S = 2.0
"""What a driver whose connection broke gets to come back."""


class ControllerActor(Actor):
    """The process of the controller. Ray starts it anew when it dies, and it goes on from its checkpoint."""

    def __init__(self, folder: str, over_tcp: bool, log_level: str) -> None:
        configure(log_level)
        self._over_tcp = over_tcp
        self._folder = folder
        self._controller = Controller(
            RayLauncher(), RayStore(), folder=folder, over_tcp=over_tcp, log_level=log_level
        )
        self._lines: str = ""
        self._doors: list[Listening] = []
        self._tasks: set[asyncio.Task[None]] = set()
        loop = asyncio.get_running_loop()
        self._opening = loop.create_task(self._open())
        self._beginning = loop.create_task(self._begin())

    async def _begin(self) -> None:
        """Take over what a controller before this one has left, before anything is answered."""
        try:
            kept = await self._opening
            await self._controller.take_over(kept)
        except ValueError:
            raise  # no controller of this version can read it: whoever asks is told so
        except Exception:
            logger.exception("the controller cannot begin: Ray starts another")
            await asyncio.sleep(AGAIN_S)
            os._exit(1)
        if kept is not None:
            self._run(self._await_owners(kept))

    async def _await_owners(self, kept: Checkpoint) -> None:
        await self._controller.await_owners(kept)
        if kept.ending:
            await self._end()
        else:
            await self.end_if_empty()

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _begun(self) -> Controller:
        await asyncio.shield(self._beginning)
        return self._controller

    async def is_there(self) -> None:
        """Returns at once: whoever waits for something else may go on waiting."""

    async def join(self) -> bytes:
        """What a process needs to take part: an encoded Joined. Raises NotServing where this is ending."""
        await asyncio.shield(self._opening)
        self._controller.check_open()
        return encode(Joined(self._controller.secret, self._lines))

    async def _open(self) -> Checkpoint | None:
        """Listen for those whose end is to be known; what there is to go on from."""
        from serveit.wire.channel import listen

        kept = await self._controller.restore()

        def accept(channel: Channel) -> Receiver:
            member, owner = (str(channel.peer.extra.get(key, "")) for key in ("member", "owner"))
            if member:
                return End(partial(self.forget, member))
            self._controller.owners.joined(owner)
            return End(partial(self._owner_lost, owner))

        unix = f"unix:{self._folder}/controller-{os.getpid()}.sock"
        # Kept: uvloop closes a server that nobody holds.
        self._doors = [await listen(unix, accept, role="controller")]
        tcp = ""
        if self._over_tcp:
            address = f"tcp:{node_address()}:0"
            secret = self._controller.secret
            self._doors.append(await listen(address, accept, role="controller", secret=secret))
            tcp = self._doors[-1].address
        self._lines = place_text(Place(ray.get_runtime_context().get_node_id(), unix, tcp))
        return kept

    async def deploy(self, spec: bytes) -> int:
        controller = await self._begun()
        wanted = msgspec.msgpack.decode(spec, type=AppSpec)
        version = await controller.deploy(wanted)
        self._run(self._see_to(wanted, version))
        return version

    async def _see_to(self, spec: AppSpec, version: int) -> None:
        """A deploy whose driver is gone ends; so does an instance that was started for one that failed."""
        if spec.owner:
            await self._controller.owners.await_one(spec.owner)
        if isinstance(await self._controller.outcomes.deployed(spec.name, version), DeployFailed):
            await self._controller.last_ended()
            await self.end_if_empty()

    async def deployed(self, name: str, version: int, seen: bytes) -> bytes:
        """What became of a deploy, or how far it is: an encoded Deployed, DeployFailed or Deploying."""
        controller = await self._begun()
        return encode(await controller.outcomes.progressed(name, version, _progress(seen)))

    async def moved(self, name: str, seen: bytes) -> bytes | None:
        """How far an app's change is: an encoded Deploying; None when none is under way."""
        progress = await (await self._begun()).outcomes.moved(name, _progress(seen))
        return None if progress is None else encode(progress)

    async def update(self, name: str, backend: str, wanted: bytes, wait: bool) -> bytes:
        controller = await self._begun()
        await controller.update(name, backend, msgspec.msgpack.decode(wanted, type=BackendChange))
        return encode(await controller.settled(name) if wait else Deployed(controller.snapshot.version))

    async def reroute(
        self, name: str, endpoint: str, weights: dict[str, float] | None, shadows: dict[str, float]
    ) -> None:
        controller = await self._begun()
        await controller.reroute(name, endpoint, weights, shadows)
        await controller.publisher.acknowledged(controller.snapshot.version)

    async def http(self, options: bytes | None, order: bytes | None) -> bytes:
        wanted = msgspec.msgpack.decode(order, type=ProxyOrder) if order is not None else None
        return encode(await (await self._begun()).proxies.open(options, wanted))

    async def watch(self, member: str, version: tuple[int, int]) -> bytes:
        return encode(await (await self._begun()).publisher.watch(member, (version[0], version[1])))

    async def forget(self, member: str) -> None:
        self._controller.publisher.forget(member)

    async def describe(self, name: str) -> bytes:
        return encode((await self._begun()).describe(name))

    async def specs(self) -> bytes:
        return encode((await self._begun()).specs)

    async def status(self, name: str | None) -> bytes:
        """Of one app, or of the whole instance."""
        controller = await self._begun()
        if name is not None:
            return encode(await controller.status(name))
        told = await controller.overview()
        return encode({"controller": {"pid": os.getpid(), "epoch": told.pop("epoch")}, **told})

    async def url(self) -> str | None:
        return (await self._begun()).proxies.url

    async def delete(self, name: str, owner: str | None) -> None:
        """End an app; with the last one ends the instance."""
        controller = await self._begun()
        await controller.delete(name, owner)
        if owner is not None:
            controller.owners.left(owner)
        await self.end_if_empty()

    async def shutdown(self) -> None:
        """End all apps, and then this process: drivers that find it gone know what that means."""
        try:
            controller = await self._begun()
        except ValueError:  # what cannot be read can be ended
            await asyncio.to_thread(end_actors)
            await RayStore().clear()
        else:
            await controller.shutdown()
        await self._end()

    async def _owner_lost(self, owner: str) -> None:
        await self._controller.owners.lost(owner, OWNER_GRACE_S)
        await self._controller.last_ended()
        await self.end_if_empty()

    async def end_if_empty(self) -> None:
        """End the instance, if no app runs and nobody is about to deploy one."""
        if self._controller.is_empty:
            await self._controller.shutdown()
            await self._end()

    async def _end(self) -> None:
        for door in self._doors:
            await door.aclose()
        # Not at once: whoever has asked for this gets an answer.
        asyncio.get_running_loop().call_later(LAST_WORDS_S, _die)


def _progress(octets: bytes) -> Deploying | None:
    return msgspec.msgpack.decode(octets, type=Deploying) if octets else None


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
        CONTROLLER,
        num_cpus=0,
        get_if_exists=True,
        max_concurrency=NUM_WATCHERS,
        max_restarts=-1,
        on_head=True,
    )
    return remote_class(ControllerActor).options(**options).remote(folder, over_tcp, log_level)

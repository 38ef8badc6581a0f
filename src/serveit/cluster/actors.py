"""The Ray actors: thin shells around plain classes, and what the controller starts and stops them with.

Every method is `async def`: a `def` would run on the actor's event loop and block it. The methods of
the group "control" have a loop and thread of their own, so they answer though user code blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serveit.cluster.session import node_address
from serveit.control.controller import Controller
from serveit.control.orders import (
    CONTROLLER,
    NAMESPACE,
    Joined,
    Place,
    ProxyOrder,
    ReplicaOrder,
    Started,
    StartFailed,
    decode_outcome,
    encode,
    place_text,
)
from serveit.control.processes import ProcessDied
from serveit.control.spec import AppSpec
from serveit.logs import configure

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from serveit.cluster.hosts import ProxyHost, ReplicaHost
    from serveit.control.processes import Process
    from serveit.wire.channel import Channel, Listening
    from serveit.wire.link import Receiver

logger = logging.getLogger("serveit.controller")

CONTROL_GROUP = "control"
NUM_CONTROLS = 100
"""Control calls that a process has to take at once: one waits for its death all the time."""
NUM_WATCHERS = 10_000
"""Calls that a controller has to take at once: each watcher has one pending."""
LEAST_CALLS = 1_000
KILL_S = 5.0
"""What a drain may take beyond its time until its process is killed."""
STATUS_S = 1.0
LAST_WORDS_S = 0.1
OWNER_GRACE_S = 2.0
"""What a driver whose connection broke gets to come back."""

control = ray.method(concurrency_group=CONTROL_GROUP)


class _Actor:
    """What every process of an instance can do."""

    @control
    async def placed(self) -> None:
        """Returns once the process is there."""

    @control
    async def end(self) -> None:
        """Never returns: who awaits it hears of the process's death."""
        await asyncio.Event().wait()


class ReplicaActor(_Actor):
    """The process of one replica."""

    def __init__(self) -> None:
        self._host: ReplicaHost | None = None
        self._loop = asyncio.get_running_loop()

    async def start(self, order: bytes) -> bytes:
        """Become the replica that is ordered; an encoded Started or StartFailed."""
        from serveit.cluster.hosts import ReplicaHost

        host = ReplicaHost(
            msgspec.msgpack.decode(order, type=ReplicaOrder), ray.get_runtime_context().get_node_id()
        )
        outcome = await host.start()
        if isinstance(outcome, Started):
            self._host = host
        return encode(outcome)

    async def run(self, reserved: list[Any]) -> Any:
        """The task of a slot that was reserved: its request id, arguments, and named arguments."""
        assert self._host is not None, "only started replicas are published"
        request_id, args, kwargs = reserved
        return await self._host.reservations.run(request_id, tuple(args), kwargs)

    async def run_with_refs(self, serveit_request_id: str, *args: Any, **kwargs: Any) -> Any:
        """The same, spread out, so that Ray puts the values of ObjectRefs in their places."""
        return await self.run([serveit_request_id, args, kwargs])

    @control
    async def idle(self, timeout_s: float) -> None:
        """Wait until nothing runs, at most so long. What is called meanwhile is taken."""
        if self._host is not None:
            await self._on_loop(self._host.idle(timeout_s))

    @control
    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, let what runs end, close the user's object."""
        if self._host is not None:
            await self._on_loop(self._host.aclose(timeout_s))

    @control
    async def status(self) -> bytes:
        """What it is doing: an encoded dict."""
        assert self._host is not None, "only started replicas are asked"
        return encode(self._host.status())

    async def _on_loop(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))


class ProxyActor(_Actor):
    """The process of one HTTP server."""

    def __init__(self) -> None:
        self._host: ProxyHost | None = None
        self._loop = asyncio.get_running_loop()

    async def start(self, order: bytes) -> bytes:
        """Become the proxy that is ordered; an encoded Started or StartFailed."""
        from serveit.cluster.hosts import ProxyHost

        host = self._host = ProxyHost(msgspec.msgpack.decode(order, type=ProxyOrder), controller_handle())
        return encode(await host.start())

    async def drain(self, timeout_s: float) -> None:
        """Stop listening, let requests that run end."""
        if self._host is not None:
            await self._host.aclose(timeout_s)


class ControllerActor(_Actor):
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
                self._lines = await self._open()
        return encode(Joined(self._secret, self._lines))

    async def _open(self) -> str:
        """Listen for those whose end is to be known."""
        from serveit.wire.channel import listen

        def accept(channel: Channel) -> Receiver:
            member, owner = (str(channel.peer.extra.get(key, "")) for key in ("member", "owner"))
            if member:
                return Line(partial(self.forget, member))
            self._controller.owner_joined(owner)
            return Line(partial(self._owner_lost, owner))

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
            # Not at once: whoever has asked for this gets an answer.
            asyncio.get_running_loop().call_later(LAST_WORDS_S, os._exit, 0)


class Line:
    """A connection that tells of somebody's end."""

    def __init__(self, on_lost: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._on_lost = on_lost
        self._ending: asyncio.Task[None] | None = None

    def frame_received(self, frame: Any) -> None:
        """Nothing is said here."""

    def link_lost(self, error: BaseException | None) -> None:
        self._ending = asyncio.get_running_loop().create_task(self._on_lost())


def controller_handle() -> Any:
    """The controller of the instance in this process's Ray. ValueError if there is none."""
    return ray.get_actor(CONTROLLER, namespace=NAMESPACE)


def start_controller(folder: str, over_tcp: bool, log_level: str) -> Any:
    """The controller's actor, made if there is none yet."""
    options = _options(CONTROLLER, num_cpus=0, get_if_exists=True, max_concurrency=NUM_WATCHERS, on_head=True)
    return _remote(ControllerActor).options(**options).remote(folder, over_tcp, log_level)


class RayProcess:
    """A process of the instance that is a Ray actor."""

    def __init__(self, actor: Any, order: ReplicaOrder | ProxyOrder) -> None:
        self._actor = actor
        self._order = order
        self._end = actor.end.remote()

    async def placed(self) -> None:
        try:
            await self._actor.placed.remote()
        except ray.exceptions.RayActorError as error:
            raise ProcessDied(_how(error)) from error

    async def start(self) -> Started | StartFailed:
        try:
            return decode_outcome(await self._actor.start.remote(encode(self._order)))
        except ray.exceptions.RayActorError as error:
            raise ProcessDied(_how(error)) from error

    async def status(self) -> dict[str, Any]:
        try:
            octets = await asyncio.wait_for(self._actor.status.remote(), STATUS_S)
        except (TimeoutError, ray.exceptions.RayError):
            return {}
        told: dict[str, Any] = msgspec.msgpack.decode(octets)
        return told

    async def death(self) -> str:
        while True:
            try:
                await self._end
            except ray.exceptions.ActorUnavailableError:
                await asyncio.sleep(0.5)  # it may be alive: ask again
                self._end = self._actor.end.remote()
            except ray.exceptions.RayActorError as error:
                return _how(error)

    async def idle(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError, ray.exceptions.RayError):
            async with asyncio.timeout(timeout_s + KILL_S):
                await self._actor.idle.remote(timeout_s)

    async def stop(self, drain_s: float) -> None:
        try:
            async with asyncio.timeout(drain_s + KILL_S):
                await self._actor.drain.remote(drain_s)
        except TimeoutError:
            logger.warning("%s does not end in its time: killing it", self._order.id)
        except ray.exceptions.RayError as error:
            logger.debug("%s was gone already: %s", self._order.id, error)
        self.kill()
        await self.death()

    def kill(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(self._actor, no_restart=True)


class RayLauncher:
    """Makes processes that are detached, named actors."""

    def replica(self, order: ReplicaOrder, max_ongoing: int) -> Process:
        calls = max(LEAST_CALLS, 2 * max_ongoing)
        options = _options(f"{order.app}/{order.id}", max_concurrency=calls)
        return RayProcess(_remote(ReplicaActor).options(**options).remote(), order)

    def proxy(self, order: ProxyOrder) -> Process:
        options = _options(order.id, num_cpus=0, on_head=True, max_concurrency=LEAST_CALLS)
        return RayProcess(_remote(ProxyActor).options(**options).remote(), order)


def _remote(kind: type[Any]) -> Any:
    decorate: Any = ray.remote
    return decorate(concurrency_groups={CONTROL_GROUP: NUM_CONTROLS})(kind)


def _options(name: str, *, on_head: bool = False, **more: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"name": name, "namespace": NAMESPACE, "lifetime": "detached", **more}
    if on_head:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(head_node(), soft=False)
    return options


def head_node() -> str:
    """The id of the head node."""
    nodes: Any = ray.nodes  # typed by nobody
    for node in nodes():
        if node["Alive"] and "node:__internal_head__" in node["Resources"]:
            return str(node["NodeID"])
    return str(ray.get_runtime_context().get_node_id())


def _how(error: BaseException) -> str:
    """The telling line of what Ray says of a death."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "exit" in line.lower() or "cause" in line.lower()]
    return (told or lines or [type(error).__name__])[0]

"""How the controller starts and stops processes: detached, named actors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

import msgspec
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serveit.cluster.actors import CONTROL_GROUP, ProxyActor, ReplicaActor
from serveit.control.orders import (
    CONTROLLER,
    NAMESPACE,
    ProxyOrder,
    ReplicaOrder,
    Started,
    StartFailed,
    decode_outcome,
    encode,
)
from serveit.control.processes import ProcessDied

if TYPE_CHECKING:
    from serveit.control.processes import Process

logger = logging.getLogger("serveit.controller")

NUM_CONTROLS = 100
"""Control calls that a process has to take at once: one waits for its death all the time."""
LEAST_CALLS = 1_000
KILL_S = 5.0
"""What a drain may take beyond its time until its process is killed."""
STATUS_S = 1.0
END_S = 0.05


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
                await asyncio.sleep(END_S)  # it has left, and is about to end
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
                may_owe = await self._actor.drain.remote(drain_s)
            if may_owe:
                await self._leave()
        except TimeoutError:
            logger.warning("%s does not end in its time: killing it", self._order.id)
        except ray.exceptions.RayError as error:
            logger.debug("%s was gone already: %s", self._order.id, error)
        self.kill()
        await self.death()

    async def _leave(self) -> None:
        """Let the process end by itself, when Ray has passed on all that its tasks returned."""
        await self._actor.leave.remote()
        self._end = self._actor.__ray_terminate__.remote()
        with contextlib.suppress(TimeoutError, ray.exceptions.RayActorError):
            async with asyncio.timeout(KILL_S):
                await self._end

    def kill(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(self._actor, no_restart=True)


class RayLauncher:
    """Makes processes that are detached, named actors."""

    def replica(self, order: ReplicaOrder, max_ongoing: int) -> Process:
        calls = max(LEAST_CALLS, 2 * max_ongoing)
        options = actor_options(order.actor, max_concurrency=calls)
        return RayProcess(remote_class(ReplicaActor).options(**options).remote(), order)

    def proxy(self, order: ProxyOrder) -> Process:
        options = actor_options(order.id, num_cpus=0, on_head=True, max_concurrency=LEAST_CALLS)
        return RayProcess(remote_class(ProxyActor).options(**options).remote(), order)


def remote_class(kind: type[Any]) -> Any:
    decorate: Any = ray.remote
    return decorate(concurrency_groups={CONTROL_GROUP: NUM_CONTROLS})(kind)


def actor_options(name: str, *, on_head: bool = False, **more: Any) -> dict[str, Any]:
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


def end_actors(app: str = "") -> None:
    """End the actors of an app that no controller looks after any more; with the last app's, proxies too.

    Args:
        app: its name; empty for all apps.
    """
    actors = ray.util.list_named_actors(all_namespaces=True)
    names = {actor["name"] for actor in actors if actor["namespace"] == NAMESPACE} - {CONTROLLER}
    going = {name for name in names if name.startswith(f"{app}/" if app else "")}
    if not any("/" in name for name in names - going):
        going = names
    for name in going:
        with contextlib.suppress(ValueError, ray.exceptions.RayError):
            ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)

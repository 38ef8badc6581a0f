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
from serveit.cluster.environments import reason
from serveit.cluster.rooms import Room, lacking, rooms
from serveit.control.orders import (
    CONTROLLER,
    NAMESPACE,
    Configured,
    Health,
    Leaving,
    ProxyOrder,
    ReplicaOrder,
    Started,
    StartFailed,
    decode_configured,
    decode_health,
    decode_outcome,
    encode,
)
from serveit.control.processes import Node, NoPlace, ProcessDied

if TYPE_CHECKING:
    from serveit.control.processes import Process

logger = logging.getLogger("serveit.controller")

NUM_CONTROLS = 100
"""Control calls that a process has to take at once: one waits for its death all the time."""
SHARED_S = 0.5
"""For so long is a look at the nodes good enough."""
LEAST_CALLS, MOST_CALLS = 1_000, 2**31 - 1
KILL_S = 5.0
"""What a drain may take beyond its time until its process is killed."""
STATUS_S = 1.0
END_S = 0.05
AGAIN_S = 0.5
"""Until a process that cannot be reached just now is asked again."""


class RayProcess:
    """A process of the instance that is a Ray actor."""

    def __init__(self, actor: Any, name: str, order: ReplicaOrder | ProxyOrder | None = None) -> None:
        """
        Args:
            actor: its handle.
            name: for messages.
            order: what it is to become; None for one that is only to be ended.
        """
        self._actor = actor
        self._name = name
        self._order = order
        self._end = actor.end.remote()

    async def placed(self) -> None:
        try:
            await self._actor.placed.remote()
        except ray.exceptions.RayActorError as error:
            raise ProcessDied(_how(error)) from error
        except ray.exceptions.RuntimeEnvSetupError as error:
            raise NoPlace(f"its runtime_env cannot be set up: {reason(error)}") from error

    async def start(self) -> Started | StartFailed | Leaving:
        assert self._order is not None, "what is only to be ended is not started"
        return decode_outcome(await self._ask(self._actor.start, encode(self._order)))

    async def configure(self, settings: bytes) -> Configured | StartFailed | Leaving:
        return decode_configured(await self._ask(self._actor.configure, settings))

    @staticmethod
    async def _ask(method: Any, octets: bytes) -> bytes:
        """What the process says, and says again however often it is asked. Raises ProcessDied."""
        while True:
            try:
                said: bytes = await method.remote(octets)
                return said
            except (ray.exceptions.RayActorError, ray.exceptions.ActorUnschedulableError) as error:
                if not isinstance(error, ray.exceptions.ActorUnavailableError):
                    raise ProcessDied(_how(error)) from error
            await asyncio.sleep(AGAIN_S)  # it may be alive

    async def status(self) -> dict[str, Any]:
        try:
            octets = await asyncio.wait_for(self._actor.status.remote(), STATUS_S)
        except (TimeoutError, ray.exceptions.RayError):
            return {}
        told: dict[str, Any] = msgspec.msgpack.decode(octets)
        return told

    async def health(self, timeout_s: float) -> Health:
        while True:
            try:
                return decode_health(await self._actor.health.remote(timeout_s))
            except ray.exceptions.ActorUnavailableError:
                await asyncio.sleep(AGAIN_S)  # it may be alive: silent so far
            except ray.exceptions.RayError:
                return Health()  # it is gone, as `death` says

    async def death(self) -> str:
        while True:
            try:
                await self._end
                await asyncio.sleep(END_S)  # it has left, and is about to end
            except ray.exceptions.ActorUnavailableError:
                await asyncio.sleep(AGAIN_S)  # it may be alive: ask again
                self._end = self._actor.end.remote()
            except (ray.exceptions.RayActorError, ray.exceptions.ActorUnschedulableError) as error:
                return _how(error)

    async def idle(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError, ray.exceptions.RayError):
            async with asyncio.timeout(timeout_s + KILL_S):
                await self._actor.idle.remote(timeout_s)

    async def stop(self, drain_s: float, *, to_deadlines: bool = False) -> None:
        try:
            if to_deadlines:
                async with asyncio.timeout(drain_s + KILL_S):
                    drain_s = await self._actor.close_doors.remote(drain_s)
            async with asyncio.timeout(drain_s + KILL_S):
                may_owe = await self._actor.drain.remote(drain_s)
            if may_owe:
                await self._leave()
        except TimeoutError:
            logger.warning("%s does not end in its time: killing it", self._name)
        except ray.exceptions.RayError as error:
            logger.debug("%s was gone already: %s", self._name, error)
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


class GoneProcess:
    """One that ended before it could be adopted."""

    def __init__(self, name: str) -> None:
        self._name = name

    async def placed(self) -> None:
        raise ProcessDied(await self.death())

    async def start(self) -> Started | StartFailed:
        raise ProcessDied(await self.death())

    async def configure(self, settings: bytes) -> Configured | StartFailed | Leaving:
        raise ProcessDied(await self.death())

    async def status(self) -> dict[str, Any]:
        return {}

    async def health(self, timeout_s: float) -> Health:
        return Health()

    async def idle(self, timeout_s: float) -> None:
        """It runs nothing."""

    async def death(self) -> str:
        return f"{self._name} is gone"

    async def stop(self, drain_s: float, *, to_deadlines: bool = False) -> None:
        """It is gone."""

    def kill(self) -> None:
        """It is gone."""


class RayLauncher:
    """Makes processes that are detached, named actors. All mutable state: `_looking` (at the nodes: the last
    look, None before), and `_looked` (when that began)."""

    def __init__(self) -> None:
        self._looking: asyncio.Task[list[Room]] | None = None
        self._looked = 0.0

    def replica(self, order: ReplicaOrder) -> Process:
        calls = min(max(LEAST_CALLS, 2 * order.max_ongoing), MOST_CALLS)
        asked = order.actor_options
        if asked:
            asked = {"num_cpus": 0, **asked}
        options = actor_options(order.actor, max_concurrency=calls, **asked)
        return RayProcess(remote_class(ReplicaActor).options(**options).remote(), order.id, order)

    def proxy(self, order: ProxyOrder) -> Process:
        there = NodeAffinitySchedulingStrategy(order.node, soft=False)
        options = actor_options(order.id, num_cpus=0, scheduling_strategy=there, max_concurrency=LEAST_CALLS)
        return RayProcess(remote_class(ProxyActor).options(**options).remote(), order.id, order)

    def adopt(self, order: ReplicaOrder | ProxyOrder) -> Process:
        name = order.actor if isinstance(order, ReplicaOrder) else order.id
        try:
            return RayProcess(ray.get_actor(name, namespace=NAMESPACE), order.id, order)
        except ValueError:
            return GoneProcess(name)

    def stray(self, name: str) -> Process:
        try:
            return RayProcess(ray.get_actor(name, namespace=NAMESPACE), name)
        except ValueError:
            return GoneProcess(name)

    async def running(self) -> list[str]:
        return await asyncio.to_thread(_actor_names)

    async def lacking(self, order: ReplicaOrder) -> str:
        asked = order.actor_options
        if lack := lacking(asked, await self._rooms()):
            return lack
        if environment := asked.get("runtime_env"):
            return f"is being given its runtime_env by Ray ({', '.join(environment)})"
        return ""

    async def _rooms(self) -> list[Room]:
        """One look for all that ask at the same time: hundreds of replicas may wait for a place."""
        now = asyncio.get_running_loop().time()
        if self._looking is None or now - self._looked > SHARED_S:
            self._looked = now
            self._looking = asyncio.ensure_future(asyncio.to_thread(rooms))
        return await asyncio.shield(self._looking)

    async def nodes(self) -> list[Node]:
        # Asked for in a thread, again and again: Ray tells nobody of nodes in public by itself.
        return await asyncio.to_thread(_alive_nodes)


def remote_class(kind: type[Any]) -> Any:
    decorate: Any = ray.remote
    return decorate(concurrency_groups={CONTROL_GROUP: NUM_CONTROLS})(kind)


def actor_options(name: str, *, on_head: bool = False, **more: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"name": name, "namespace": NAMESPACE, "lifetime": "detached", **more}
    if on_head:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(head_node(), soft=False)
    return options


def _actor_names() -> list[str]:
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [
        actor["name"] for actor in actors if actor["namespace"] == NAMESPACE and actor["name"] != CONTROLLER
    ]


def head_node() -> str:
    """The id of the head node."""
    return next(node.id for node in _alive_nodes() if node.is_head)


def _alive_nodes() -> list[Node]:
    """Those of the cluster; one of them is the head: this process's, if Ray does not say which it is."""
    list_nodes: Any = ray.nodes  # typed by nobody
    alive = [node for node in list_nodes() if node["Alive"]]
    heads = [node["NodeID"] for node in alive if "node:__internal_head__" in node["Resources"]]
    head = heads[0] if heads else ray.get_runtime_context().get_node_id()
    return [Node(node["NodeID"], node["NodeManagerAddress"], node["NodeID"] == head) for node in alive]


def _how(error: BaseException) -> str:
    """The telling line of what Ray says of a death."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "exit" in line.lower() or "cause" in line.lower()]
    telling = (told or lines or [type(error).__name__])[0]
    return telling.partition(" Some common causes include")[0]


def end_actors(app: str = "") -> None:
    """End the actors of an app that no controller looks after any more; with the last app's, proxies too.

    Args:
        app: its name; empty for all apps.
    """
    names = set(_actor_names())
    going = {name for name in names if name.startswith(f"{app}/" if app else "")}
    if not any("/" in name for name in names - going):
        going = names
    for name in going:
        with contextlib.suppress(ValueError, ray.exceptions.RayError):
            ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)

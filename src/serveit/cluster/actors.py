"""The Ray actors of replicas and proxies: thin shells around the classes of `hosts`.

Every method is `async def`: a `def` would run on the actor's event loop and block it. The methods of
the group "control" have a loop and thread of their own, so they answer though user code blocks.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec
import ray

from serveit.cluster.contact import find_controller
from serveit.control.orders import ProxyOrder, ReplicaOrder, Started, encode

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from serveit.cluster.hosts import ProxyHost, ReplicaHost

CONTROL_GROUP = "control"
control = ray.method(concurrency_group=CONTROL_GROUP)
_leaving = asyncio.Event()  # of this process; of the control group's loop


class Actor:
    """What every process of an instance can do."""

    @control
    async def placed(self) -> None:
        """Returns once the process is there."""

    @control
    async def end(self) -> None:
        """Does not return before `leave`: who awaits it hears of the process's death."""
        await _leaving.wait()

    @control
    async def leave(self) -> None:
        """Nothing is to keep the process from ending by itself any more."""
        _leaving.set()


class ReplicaActor(Actor):
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
        self._host.has_run_tasks = True
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
    async def drain(self, timeout_s: float) -> bool:
        """Take nothing new, let what runs end, close the user's object.

        Returns:
            Whether actor tasks have run here: then the last results may still be on their way.
        """
        if self._host is None:
            return False
        await self._on_loop(self._host.aclose(timeout_s))
        return self._host.has_run_tasks

    @control
    async def status(self) -> bytes:
        """What it is doing: an encoded dict."""
        assert self._host is not None, "only started replicas are asked"
        return encode(self._host.status())

    async def _on_loop(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))


class ProxyActor(Actor):
    """The process of one HTTP server."""

    def __init__(self) -> None:
        self._host: ProxyHost | None = None

    async def start(self, order: bytes) -> bytes:
        """Become the proxy that is ordered; an encoded Started or StartFailed."""
        from serveit.cluster.hosts import ProxyHost

        host = self._host = ProxyHost(msgspec.msgpack.decode(order, type=ProxyOrder), find_controller())
        return encode(await host.start())

    async def drain(self, timeout_s: float) -> None:
        """Stop listening, let requests that run end."""
        if self._host is not None:
            await self._host.aclose(timeout_s)

"""The Ray actors of replicas and proxies: thin shells around the classes of `hosts`.

Every method is `async def`: a `def` would run on the actor's event loop and block it. The methods of
the group "control" have a loop and thread of their own, so they answer though user code blocks.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import ray

from serveit.cluster.contact import find_controller
from serveit.control.orders import ProxyOrder, ReplicaOrder, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from serveit.cluster.hosts import ProxyHost, ReplicaHost

T = TypeVar("T")

CONTROL_GROUP = "control"
control = ray.method(concurrency_group=CONTROL_GROUP)
_leaving = asyncio.Event()  # of this process; of the control group's loop
_waiting: asyncio.Future[Any] | None = None  # for it


class Actor:
    """What every process of an instance can do."""

    @control
    async def placed(self) -> None:
        """Returns once the process is there."""

    @control
    async def end(self) -> None:
        """Does not return before `leave`: who awaits it hears of the process's death. One at a time: a
        controller that asks is the next after one that died while it waited."""
        global _waiting
        if _waiting is not None:
            _waiting.cancel()
        _waiting = asyncio.ensure_future(_leaving.wait())
        await asyncio.wait((_waiting,))

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
        """Become the replica that is ordered; an encoded Started, StartFailed or Leaving. Asked again, also
        by another controller and while it starts, it says what became of the first order."""
        from serveit.cluster.hosts import ReplicaHost

        if self._host is None:
            self._host = ReplicaHost(
                msgspec.msgpack.decode(order, type=ReplicaOrder), ray.get_runtime_context().get_node_id()
            )
        return encode(await self._host.start())

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
    async def configure(self, settings: bytes) -> bytes:
        """Take in other settings while it serves; an encoded Configured, StartFailed or Leaving."""
        assert self._host is not None, "only started replicas are configured"
        return encode(await self._on_loop(self._host.configure(settings)))

    @control
    async def idle(self, timeout_s: float) -> None:
        """Wait until nothing runs, at most so long. What is called meanwhile is taken."""
        if self._host is not None:
            await self._on_loop(self._host.idle(timeout_s))

    @control
    async def close_doors(self, otherwise_s: float) -> float:
        """Take nothing new. What the requests that run may take: to their deadlines, without one so long."""
        if self._host is None:
            return 0.0
        return await self._on_loop(_later(self._host.leave, otherwise_s))

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

    async def _on_loop(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))


async def _later(function: Callable[..., T], *args: Any) -> T:
    return function(*args)


class ProxyActor(Actor):
    """The process of one HTTP server."""

    def __init__(self) -> None:
        self._host: ProxyHost | None = None

    async def start(self, order: bytes) -> bytes:
        """Become the proxy that is ordered; an encoded Started or StartFailed. Asked again, also by another
        controller and while it starts, it says the same again."""
        from serveit.cluster.hosts import ProxyHost

        if self._host is None:
            self._host = ProxyHost(msgspec.msgpack.decode(order, type=ProxyOrder), find_controller())
        return encode(await self._host.start())

    async def drain(self, timeout_s: float) -> None:
        """Stop listening, let requests that run end."""
        if self._host is not None:
            await self._host.aclose(timeout_s)

"""ObjectRefs: actor tasks behind `handle.remote`, and ObjectRefs among the arguments of calls."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Any

import ray

from serveit.control.orders import NAMESPACE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from serveit.control.snapshot import ReplicaInfo

WAIT_S = 0.02
"""How long the waiting thread looks at the refs that it has before it takes in new ones."""


class RayTasks:
    """What handles on one app need of Ray. All mutable state: `_actors` (by replica id)."""

    def __init__(self, app: str) -> None:
        self._app = app
        self._actors: dict[str, Any] = {}

    def are_among(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Hot path: once per call."""
        for value in args:
            if isinstance(value, ray.ObjectRef):
                return True
        return bool(kwargs) and any(isinstance(value, ray.ObjectRef) for value in kwargs.values())

    async def fetch(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with the values of ObjectRefs in their places. Raises what a ref's task raised."""
        values = iter(await asyncio.gather(*_refs(args, kwargs)))
        fetched = tuple(next(values) if isinstance(value, ray.ObjectRef) else value for value in args)
        named = {k: next(values) if isinstance(v, ray.ObjectRef) else v for k, v in kwargs.items()}
        return fetched, named

    async def wait(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Wait until the tasks behind the refs have ended; their values stay where they are."""
        for ref in list(_refs(args, kwargs)):
            await _waiter.wait(ref)

    async def start(
        self, replica: ReplicaInfo, request_id: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The actor task for a slot that is held."""
        actor: Any = self._actors.get(replica.id)
        if actor is None:
            name = f"{self._app}/{replica.id}"
            actor = await asyncio.to_thread(ray.get_actor, name, namespace=NAMESPACE)
            self._actors[replica.id] = actor
        if self.are_among(args, kwargs):
            return actor.run_with_refs.remote(request_id, *args, **kwargs)
        # As one list of lists, which costs Ray less than an argument more.
        return actor.run.remote([request_id, [*args], kwargs])


class _Waiter:
    """One thread that waits for all refs that somebody waits for, without fetching them.

    All mutable state: `_new` (refs that the thread has not taken in yet), `_thread` (while there is
    something to wait for).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._new: list[tuple[Any, asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._thread: threading.Thread | None = None

    async def wait(self, ref: Any) -> None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        with self._lock:
            self._new.append((ref, loop, future))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="serveit-refs", daemon=True)
                self._thread.start()
        await future

    def _run(self) -> None:
        waiting: dict[Any, list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]]] = {}
        while True:
            with self._lock:
                for ref, loop, future in self._new:
                    waiting.setdefault(ref, []).append((loop, future))
                self._new.clear()
                if not waiting:
                    self._thread = None
                    return
            try:
                ready, _ = ray.wait(list(waiting), num_returns=1, timeout=WAIT_S, fetch_local=False)
            except Exception:
                # Ray was shut down: whoever waits goes on, and hears of it from what it does next.
                ready = list(waiting)
            for ref in ready:
                for loop, future in waiting.pop(ref):
                    with contextlib.suppress(RuntimeError):  # the loop is closed
                        loop.call_soon_threadsafe(_set, future)


_waiter = _Waiter()


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _refs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, ray.ObjectRef):
            yield value

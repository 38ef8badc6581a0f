"""ObjectRefs: actor tasks behind `handle.remote`, and ObjectRefs among the arguments of calls."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Any

import ray

from serveit.control.orders import NAMESPACE, parse_place
from serveit.exceptions import EncodingError, NotServing

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
        if not ray.is_initialized():
            raise NotServing(f"Ray has been shut down: replica {replica.id} of app {self._app!r} is gone")
        actor: Any = self._actors.get(replica.id)
        if actor is None:
            name = parse_place(replica.address).actor
            actor = await asyncio.to_thread(ray.get_actor, name, namespace=NAMESPACE)
            self._actors[replica.id] = actor
        try:
            if self.are_among(args, kwargs):
                return actor.run_with_refs.remote(request_id, *args, **kwargs)
            # As one list of lists, which costs Ray less than an argument more.
            return actor.run.remote([request_id, [*args], kwargs])
        except ray.exceptions.RayError:
            raise
        except Exception as error:
            reason = error.__cause__ or error  # Ray writes pages about a TypeError
            raise EncodingError(
                f"an argument for replica {replica.id} cannot be pickled ({type(reason).__name__}: {reason})",
                executed="no",
            ) from reason


class _Waiter:
    """One thread that waits for all refs that somebody waits for, without fetching them.

    All mutable state: `_new` (refs that the thread has not taken in yet), `_thread` (while there is
    something to wait for), `_stopping`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._new: list[_Waiting] = []
        self._thread: threading.Thread | None = None
        self._stopping = False

    async def wait(self, ref: Any) -> None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        with self._lock:
            self._new.append((ref, loop, future))
            if self._thread is None:
                self._stopping = False
                self._thread = threading.Thread(target=self._run, name="serveit-refs", daemon=True)
                self._thread.start()
        await future

    def stop(self) -> None:
        """Ray is about to be shut down: who waits goes on, and hears of it from what it does next."""
        with self._lock:
            thread, self._stopping = self._thread, True
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        waiting: list[_Waiting] = []
        while True:
            with self._lock:
                # Without those whose waiters have given up.
                waiting = [one for one in (*waiting, *self._new) if not one[2].done()]
                self._new.clear()
                if not waiting or self._stopping:
                    self._thread = None
                    break
            ready = _ready([ref for ref, _, _ in waiting])
            waiting = [one for one in waiting if not _tell(one, ready)]
        for one in waiting:
            _tell(one, {one[0]})


_Waiting = tuple[Any, asyncio.AbstractEventLoop, "asyncio.Future[None]"]
_waiter = _Waiter()
stop_waiting = _waiter.stop


def _ready(refs: list[Any]) -> set[Any]:
    """Those that can be had, or all of them where Ray is gone."""
    distinct = list(dict.fromkeys(refs))
    if not ray.is_initialized():
        return set(distinct)
    try:
        ready, _ = ray.wait(distinct, num_returns=1, timeout=WAIT_S, fetch_local=False)
    except Exception:
        return set(distinct)
    return set(ready)


def _tell(waiting: _Waiting, ready: set[Any]) -> bool:
    ref, loop, future = waiting
    if ref not in ready:
        return False
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(_set, future)
    return True


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _refs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, ray.ObjectRef):
            yield value

"""The user's object inside a replica: made, configured, checked, called and closed.

Knows where each kind of function runs: coroutines on the event loop, `def` in the replica's own
threads, with the context copied.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from serveit.types import DEFAULT_METHOD

if TYPE_CHECKING:
    from serveit.declare.backend import BackendRecord, Method

logger = logging.getLogger("serveit.replica")

_END = object()


class Instance:
    """One copy of a backend's function or class.

    Not anyio's worker threads: under a loop that was started with `run_forever`, as in a Ray actor,
    these start a thread per call.
    """

    def __init__(self, backend: BackendRecord) -> None:
        self.backend = backend
        self._object: Any = None
        self._methods: dict[str, tuple[Method, Callable[..., Any]]] = {}
        self._executor = ThreadPoolExecutor(
            backend.config.num_threads, thread_name_prefix=f"serveit-{backend.name}"
        )

    async def start(self) -> None:
        """Import, construct, `setup`, `reconfigure`, first health check.

        The constructor runs where the class's `__call__` does: a `def` model is built in the thread
        that will use it.

        Raises:
            Exception: whatever the user's code raised.
        """
        target = self.backend.load()
        if inspect.isclass(target):
            make = partial(target, *self.backend.init_args, **self.backend.init_kwargs)
            self._object = make() if self.backend.is_async else await self.in_thread(make)
            setup = getattr(self._object, "setup", None)
            if setup is not None:
                await self._run(setup)
        if self.backend.config.user_config is not None:
            await self.reconfigure(self.backend.config.user_config)
        await self.check_health()

    async def reconfigure(self, user_config: Any) -> None:
        """Hand a new `user_config` to the object."""
        await self._run(self._object.reconfigure, user_config)

    async def check_health(self) -> None:
        """Run the user's `check_health`, if there is one. What it raises means: unhealthy."""
        check = getattr(self._object, "check_health", None)
        if check is not None:
            await self._run(check)

    async def aclose(self) -> None:
        """Let the object clean up (`aclose`, else `close`), and end the threads."""
        cleanup = getattr(self._object, "aclose", None) or getattr(self._object, "close", None)
        if cleanup is not None:
            try:
                await self._run(cleanup)
            except Exception:
                logger.exception("%s() of backend %r raised", cleanup.__name__, self.backend.name)
        self._executor.shutdown(wait=False, cancel_futures=True)

    def method(self, name: str) -> tuple[Method, Callable[..., Any]]:
        """A callable of the backend, bound to the object.

        Raises:
            AttributeError: there is none of that name.
        """
        found = self._methods.get(name)
        if found is None:
            method = self.backend.method(name)
            function = method.function
            if self._object is not None:
                function = self._object if name == DEFAULT_METHOD else getattr(self._object, name)
            found = self._methods[name] = method, function
        return found

    async def call(self, method: Method, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call it where it belongs; a generator comes back unstarted."""
        if method.is_generator:
            return function(*args, **kwargs)
        if method.is_async:
            return await function(*args, **kwargs)
        value = await self.in_thread(partial(function, *args, **kwargs))
        return await value if inspect.isawaitable(value) else value

    async def iterate(self, items: Iterator[Any]) -> AsyncIterator[Any]:
        """A plain generator as an async one: each `next` runs in the threads."""
        try:
            while (item := await self.in_thread(partial(next, items, _END))) is not _END:
                yield item
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                await self.in_thread(close)

    async def in_thread(self, function: Callable[[], Any]) -> Any:
        """Run `function` in the object's threads with the context copied.

        A thread cannot be stopped: once the function runs, a cancelled caller is let go only when it
        has returned, so that its slot stays counted.
        """
        work = self._executor.submit(contextvars.copy_context().run, function)
        future = asyncio.wrap_future(work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if not work.cancel():
                await _outlast(future)
            raise

    async def _run(self, function: Callable[..., Any], *args: Any) -> None:
        if inspect.iscoroutinefunction(function):
            await function(*args)
        else:
            await self.in_thread(partial(function, *args))


async def _outlast(future: asyncio.Future[Any]) -> None:
    """Wait until the thread is done, whatever else is cancelled meanwhile, and drop its outcome."""
    while not future.done():
        try:
            await asyncio.wait((future,))
        except asyncio.CancelledError:
            continue
    if not future.cancelled():
        future.exception()

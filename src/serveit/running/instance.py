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

from serveit.declare.backend import no_reconfigure
from serveit.types import DEFAULT_METHOD

if TYPE_CHECKING:
    from serveit.declare.backend import BackendRecord, Method

logger = logging.getLogger("serveit.replica")

_END = object()


def _nothing() -> None:
    """Nobody wants to know."""


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
        target = await self._run("the import", self.backend.load, on_loop=True)
        if inspect.isclass(target):
            make = partial(self._make, target)
            await self._run("__init__()", make, on_loop=self.backend.is_async)
            setup = getattr(self._object, "setup", None)
            if setup is not None:
                await self._run("setup()", setup)
        if self.backend.config.user_config is not None:
            await self.reconfigure(self.backend.config.user_config)
        await self.check_health()

    def _make(self, target: type[Any]) -> None:
        """Kept right here: whoever waits for it may be cancelled meanwhile, and it is to be closed."""
        self._object = target(*self.backend.init_args, **self.backend.init_kwargs)

    async def reconfigure(self, user_config: Any) -> None:
        """Hand a new `user_config` to the object.

        Raises:
            TypeError: it has no method for that.
            Exception: whatever the user's code raised.
        """
        self.check_reconfigures()
        await self._run("reconfigure()", partial(self._object.reconfigure, user_config))

    def check_reconfigures(self) -> None:
        """TypeError where there is no method that a `user_config` could be handed to."""
        if not hasattr(self._object, "reconfigure"):
            raise TypeError(no_reconfigure(self.backend.name))

    @property
    def has_check(self) -> bool:
        """Whether the user's object has a `check_health`."""
        return hasattr(self._object, "check_health")

    async def check_health(self, on_begin: Callable[[], None] = _nothing) -> None:
        """Run the user's `check_health`, if there is one. What it raises means: unhealthy.

        Args:
            on_begin: called just before, in its thread.
        """
        if self.has_check:
            await self._run("check_health()", self._object.check_health, on_begin=on_begin)

    async def aclose(self) -> None:
        """Let the object clean up (`aclose`, else `close`); what that raises is logged."""
        name = "aclose" if hasattr(self._object, "aclose") else "close"
        cleanup = getattr(self._object, name, None)
        if cleanup is not None:
            try:
                await self._run(f"{name}()", cleanup)
            except Exception:
                logger.exception("%s() of backend %r raised", name, self.backend.name)

    def end_threads(self) -> None:
        """Take no more calls for the threads. A function that runs in one goes on: it can't be stopped."""
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

    async def call(
        self,
        method: Method,
        function: Callable[..., Any],
        args: Any,
        kwargs: Any,
        on_begin: Callable[[], None] = _nothing,
    ) -> Any:
        """Call it where it belongs; a generator comes back unstarted.

        Args:
            method: what is known of it.
            function: it, bound to the object.
            args: positional arguments.
            kwargs: keyword arguments.
            on_begin: for one that takes a thread: called in it, just before.
        """
        if method.is_generator:
            value = function(*args, **kwargs)
        elif method.is_async:
            return await function(*args, **kwargs)
        else:
            value = await self.in_thread(partial(_after, on_begin, partial(function, *args, **kwargs)))
        return await value if inspect.isawaitable(value) else value

    async def iterate(self, items: Iterator[Any]) -> AsyncIterator[Any]:
        """A plain generator as an async one: each `next` runs in the threads.

        All steps share one context, as they would in one thread.
        """
        context = contextvars.copy_context()
        try:
            while (item := await self.in_thread(partial(next, items, _END), context)) is not _END:
                yield item
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                await self.in_thread(close, context, must_run=True)

    async def in_thread(
        self,
        function: Callable[[], Any],
        context: contextvars.Context | None = None,
        *,
        must_run: bool = False,
    ) -> Any:
        """Run `function` in the object's threads.

        A thread cannot be stopped: once the function runs, a cancelled caller is let go only when it
        has returned, so that its slot stays counted.

        Args:
            function: what to run.
            context: to run it in; None for a copy of the caller's.
            must_run: it is not to be left out where the caller is cancelled before a thread is free.
        """
        context = context or contextvars.copy_context()
        work = self._executor.submit(context.run, _returning, function)
        future = asyncio.wrap_future(work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if must_run or not work.cancel():
                await _outlast(future)
            raise

    async def _run(
        self,
        what: str,
        function: Callable[[], Any],
        *,
        on_loop: bool = False,
        on_begin: Callable[[], None] = _nothing,
    ) -> Any:
        """Run a piece of the user's code that no request asked for.

        Raises:
            RuntimeError: it raised what must not leave it: SystemExit and KeyboardInterrupt would end
                the event loop, a CancelledError of its own would look like a cancellation.
            Exception: whatever else it raised.
        """
        try:
            if on_loop:
                return function()
            if inspect.iscoroutinefunction(function):
                on_begin()
                return await function()
            value = await self.in_thread(partial(_after, on_begin, function))
            return await value if inspect.isawaitable(value) else value
        except (SystemExit, KeyboardInterrupt, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            raise RuntimeError(f"{what} of backend {self.backend.name!r} raised {error!r}") from error


def _after(before: Callable[[], None], function: Callable[[], Any]) -> Any:
    before()
    return function()


def _returning(function: Callable[[], Any]) -> Any:
    """Call it in its thread. A future cannot carry StopIteration; generators turn it into the same."""
    try:
        return function()
    except StopIteration as error:
        raise RuntimeError("the function raised StopIteration") from error


async def _outlast(future: asyncio.Future[Any]) -> None:
    """Wait until the thread is done, whatever else is cancelled meanwhile, and drop its outcome."""
    while not future.done():
        try:
            await asyncio.wait((future,))
        except asyncio.CancelledError:
            continue
    if not future.cancelled():
        future.exception()

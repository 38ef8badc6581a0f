"""The apps of these tests, and plain Ray tasks and actors that use them. At module level: replicas and
Ray's workers import them."""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import ray

import serveit
from serveit import App, context
from tests.flow.gates import Gate


class OwnError(LookupError):
    """A user's own."""


class WordedError(Exception):
    """What its constructor takes is not what `args` are."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")
        self.one = one


# -- remote --------------------------------------------------------------------------------------

tasks = App()


@tasks.backend
async def double(number: Any) -> Any:
    return 2 * number


@tasks.backend
class Work:
    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and not kwargs else (args, kwargs)

    async def fail(self, kind: str) -> None:
        if kind == "not pickled":
            raise OwnError("holds a lock", threading.Lock())
        raise OwnError("nothing there") if kind == "own" else WordedError(1, 2)

    async def count(self, end: int) -> AsyncIterator[int]:
        for number in range(end):
            yield number

    async def noting(self, folder: str, value: Any) -> Any:
        Gate(folder).note("in")
        return value

    async def through(self, number: int) -> Any:
        """ObjectRefs from inside a replica: one handed on by place, one by name, the last one awaited."""
        twice = await double.call(await double.remote(number))
        return await (await plain.remote(number=await double.remote(twice)))

    async def of_another_app(self, app: str, number: int) -> Any:
        """A program of its own could do the same: the app is found in the instance that this runs in."""
        async with serveit.connect(app=app) as client:
            return await client.get_handle("double").call(number)


@tasks.backend
def plain(number: int) -> int:
    return number + 1


@tasks.backend(max_batch_size=4, batch_wait_timeout_s=0.05)
async def half(numbers: list[int]) -> list[Any]:
    return [ValueError(f"{n} is odd") if n % 2 else (n // 2, len(numbers)) for n in numbers]


@tasks.backend(max_ongoing_requests=2, max_queued_requests=3)
async def two(folder: str) -> str:
    gate = Gate(folder)
    with gate.inside():
        await gate.passed()
    return "done"


@ray.remote(num_cpus=0)
def add_one(number: int) -> int:
    return number + 1


@ray.remote(num_cpus=0)
def fails() -> int:
    raise OwnError("in a task of Ray's")


@ray.remote(num_cpus=0)
def make_array(count: int) -> Any:
    return np.arange(count)


@ray.remote(num_cpus=0)
def use_blocking(handle: Any, number: int) -> list[Any]:
    """In a worker that has never heard of serveit."""
    return [handle.call(number), list(handle.map([1, 2])), ray.get(handle.remote(number))]


@ray.remote(num_cpus=0)
def use_async(handle: Any, number: int) -> Any:
    async def use() -> Any:
        return [await handle.call(number), await (await handle.remote(number))]

    return asyncio.run(use())


@ray.remote(num_cpus=0)
class User:
    """An actor that keeps a handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def use(self, number: int) -> Any:
        return await self._handle.call(number)


def make_user(handle: Any) -> Any:
    kind: Any = User
    return kind.remote(handle)


# -- deaths --------------------------------------------------------------------------------------

mortals = App()


class _Mortal:
    async def __call__(self) -> str:
        return context().replica

    async def process(self) -> int:
        return os.getpid()

    async def wait(self, folder: str) -> int:
        gate = Gate(folder)
        gate.note(f"in {os.getpid()}")
        await gate.passed()
        return os.getpid()

    async def die(self, how: str) -> None:
        if how == "SystemExit":
            raise SystemExit(3)
        if how == "os._exit":
            os._exit(3)
        ctypes.string_at(0)


@mortals.route("/pair")
@mortals.backend(num_replicas=2, max_ongoing_requests=2)
class Pair(_Mortal):
    pass


@mortals.backend
class Single(_Mortal):
    pass


@mortals.route("/raise")
async def raising() -> None:
    raise OwnError("it went wrong")


# -- what comes and goes -------------------------------------------------------------------------

first, second, broken = App(), App(), App()


@first.route("/version")
async def one() -> str:
    return "first"


@second.route("/version")
async def other() -> str:
    return "second"


@second.route("/more")
async def more() -> str:
    return "more"


@broken.route("/version")
@broken.backend(num_replicas=2)
class Broken:
    def __init__(self) -> None:
        raise OwnError("no model file")

    async def __call__(self) -> str:
        return "never"

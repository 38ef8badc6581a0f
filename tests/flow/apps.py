"""The apps of these tests. At module level: replicas import them."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np

from serveit import App, context
from tests.flow.gates import Gate


class NotRebuilt(Exception):
    """Its pickle cannot be read."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")

    def __reduce__(self) -> Any:
        return type(self), ()


class WordedError(LookupError):
    """What its constructor takes is not what `args` are."""

    def __init__(self, name: str, *, hint: str) -> None:
        super().__init__(f"no {name}: {hint}")
        self.name = name


class OwnError(LookupError):
    """A user's own, with more than its text."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text, code)
        self.code = code


class Unpicklable:
    def __reduce__(self) -> Any:
        raise ValueError("stays here")


# -- what handles call ---------------------------------------------------------------------------

handles = App()


@handles.route("/double/<number:int>", name="doubles")
@handles.backend
async def double(number: int) -> int:
    return 2 * number


@handles.backend
class Desk:
    """Async methods of all kinds."""

    def __init__(self) -> None:
        self.late: list[str] = []

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and not kwargs else (args, kwargs)

    async def explain(self, number: int) -> str:
        return f"{number}!"

    async def process(self) -> int:
        return os.getpid()

    async def written(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        array[0] = 7  # arguments can be written
        return array

    async def fail(self, kind: str) -> Any:
        if kind == "own":
            raise OwnError("nothing under that name", 7)
        if kind == "worded":
            raise WordedError("such name", hint="try another")
        if kind == "not rebuilt":
            raise NotRebuilt(1, 2)
        if kind == "not pickled":
            raise LookupError("holds a lock", threading.Lock())
        return Unpicklable()

    async def wait(self, folder: str) -> str:
        gate = Gate(folder)
        with gate.inside():
            await gate.passed()
        return "done"

    async def hurry(self, number: int) -> int:
        """The larger the sooner."""
        await asyncio.sleep((10 - number) * 0.01)
        return number

    async def count(self, end: int, bad: int = -1) -> AsyncIterator[int]:
        for number in range(end):
            if number == bad:
                raise OwnError(f"{number} is bad", number)
            yield number

    async def endless(self, folder: str, count: int = 1) -> AsyncIterator[np.ndarray[Any, Any]]:
        gate = Gate(folder)
        try:
            while True:
                gate.note("made")
                yield np.zeros(count)
        finally:
            gate.note("closed")

    async def where(self) -> dict[str, Any]:
        here = context()
        return {"app": here.app, "backend": here.backend, "replica": here.replica, "id": here.request_id}

    async def time_left(self) -> float | None:
        deadline = context().deadline
        return None if deadline is None else deadline - asyncio.get_running_loop().time()

    async def through(self, number: int) -> list[int]:
        """Three ways to another backend."""
        return [
            await double.call(number),
            await handles.handle("double").call(number),
            await handles.handle(double).options(timeout_s=5).call(number),
        ]

    async def around(self, folder: str) -> str:
        """A nested call that takes its time."""
        return str(await handles.handle(Other).wait.call(folder))

    async def nested_failure(self) -> None:
        await handles.handle(Other).fail.call("own")

    async def nested_stream(self, end: int) -> AsyncIterator[int]:
        async for number in handles.handle(Other).count.stream(end):
            yield -number

    async def blocking_inside(self) -> str:
        try:
            handles.handle("double", sync=True).call(1)
        except RuntimeError as error:
            return str(error)
        return "it did not refuse"


class Other(Desk):
    """The same for nested calls: another process, where there are any."""


handles.backend(Other)


@handles.backend
class Plain:
    """A `def` backend."""

    def __init__(self) -> None:
        self.threads: set[int] = set()
        self.inside = 0
        self.peak = 0

    def __call__(self, number: int) -> int:
        self.inside += 1
        self.peak = max(self.peak, self.inside)
        self.threads.add(threading.get_ident())
        self.inside -= 1
        return number

    def seen(self) -> tuple[int, int]:
        return len(self.threads), self.peak

    def words(self, text: str) -> Iterator[str]:
        yield from text.split()

    def through(self, number: int) -> list[int]:
        blocking = handles.handle("double", sync=True)
        return [blocking.call(number), *blocking.map([1, 2])]

    def stream_through(self, end: int) -> list[int]:
        return list(handles.handle(Other, sync=True).count.stream(end))

    def around(self, folder: str) -> str:
        return str(handles.handle(Other, sync=True).wait.call(folder))

    def where(self) -> str:
        return context().backend

    def wait(self, folder: str) -> str:
        gate = Gate(folder)
        with gate.inside():
            gate.passed_by_thread()
        return "done"


# -- bounds --------------------------------------------------------------------------------------

bounds = App()


async def _wait(folder: str) -> str:
    gate = Gate(folder)
    with gate.inside():
        await gate.passed()
    return "done"


@bounds.route("/three")
@bounds.backend(max_ongoing_requests=3)
async def three(folder: str) -> str:
    with Gate(folder).inside():
        await asyncio.sleep(0.01)
    return "done"


@bounds.route("/one")
@bounds.backend(max_ongoing_requests=1, max_queued_requests=0)
async def one(folder: str) -> str:
    return await _wait(folder)


@bounds.route("/queue")
@bounds.backend(max_ongoing_requests=1, request_timeout_s=None)
async def queue(folder: str) -> str:
    return await _wait(folder)


# -- batches -------------------------------------------------------------------------------------

batches = App()


@batches.backend(max_batch_size=8, batch_wait_timeout_s=0.05)
class Half:
    def __init__(self) -> None:
        self.sizes: list[int] = []

    async def __call__(self, numbers: list[int]) -> list[Any]:
        self.sizes.append(len(numbers))
        if 13 in numbers:
            raise OwnError("no thirteen", 13)
        halves: list[Any] = [ValueError(f"{n} is odd") if n % 2 else n // 2 for n in numbers]
        return halves[1:] if 101 in numbers else halves

    async def batch_sizes(self) -> list[int]:
        sizes, self.sizes = self.sizes, []
        return sizes


@batches.backend(max_batch_size=4)
def upper(texts: list[str]) -> list[str]:
    return [text.upper() for text in texts]


batches.add_route("/half", Half, methods=["POST"])
batches.add_route("/upper", upper, methods=["POST"])


# -- traffic -------------------------------------------------------------------------------------

traffic = App()


@traffic.backend(name="v1", init_args=("v1",))
class Version:
    def __init__(self, name: str) -> None:
        self.name = name
        self.asked: list[str] = []

    async def __call__(self, text: str) -> str:
        self.asked.append(text)
        return self.name

    async def texts(self) -> list[str]:
        asked, self.asked = self.asked, []
        return asked


traffic.backend(Version, name="v2", init_args=("v2",))
traffic.backend(Version, name="v3", init_args=("v3",))
traffic.add_route("/split/<text>", traffic={"v1": 0.5, "v2": 0.5}, name="split")
traffic.add_route("/shadowed/<text>", traffic={"v1": 1.0}, shadow={"v2": 1.0}, name="shadowed")
traffic.add_route("/moved/<text>", traffic={"v1": 1.0}, name="moved")


@traffic.backend
async def inside(text: str) -> str:
    """How a handle in a replica goes."""
    return str(await traffic.handle("moved").call(text))


@traffic.backend(max_ongoing_requests=1, max_queued_requests=0)
async def narrow(text: str) -> str:
    """Takes one request, and not a second one beside it."""
    await asyncio.sleep(0.001)
    return "narrow"


@traffic.backend(max_ongoing_requests=2)
async def bad_shadow(text: str) -> str:
    """Fails, or is stuck in the folder that it is given."""
    if text == "fail":
        raise OwnError("nobody sees it", 1)
    return await _wait(text)


@traffic.backend
async def misfit(word: str) -> str:
    return word


traffic.add_route("/guarded", traffic={"narrow": 1.0}, shadow={"bad_shadow": 1.0}, name="guarded")


# -- changed while it runs -----------------------------------------------------------------------

changed = App()


@changed.route("/steady/<number:int>")
@changed.backend
async def steady(number: int) -> tuple[int, str]:
    await asyncio.sleep(0.001)
    return number, context().replica


# -- what is configured while it serves ----------------------------------------------------------

tuned = App()


@tuned.route("/limit/<number:int>")
@tuned.backend(num_replicas=2, user_config={"limit": 10})
class Limit:
    """Notes each configuration that it is given; a limit below 0 it refuses."""

    def __init__(self) -> None:
        self.given: list[Any] = []
        self.limit = 0

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        self.given.append(user_config)
        limit = user_config.get("limit", 0)
        if limit < 0:
            raise OwnError(f"a limit of {limit}", 7)
        self.limit = limit

    async def __call__(self, number: int) -> bool:
        return number <= self.limit

    async def told(self) -> tuple[str, int, list[Any], int]:
        return context().replica, os.getpid(), self.given, self.limit


@tuned.backend(max_batch_size=2, batch_wait_timeout_s=30.0)
class Sizes:
    async def __call__(self, numbers: list[int]) -> list[int]:
        return [len(numbers)] * len(numbers)


@tuned.route("/held")
@tuned.backend(max_ongoing_requests=1)
async def held(folder: str) -> str:
    gate = Gate(folder)
    with gate.inside():
        await gate.passed()
    return "done"


@tuned.backend(num_threads=1)
def threads(seconds: float = 0.0) -> tuple[str, str]:
    return context().replica, threading.current_thread().name


@tuned.backend
async def untouched() -> tuple[str, int]:
    return context().replica, os.getpid()

"""An app for tests of batches, the context and composition. At module level: replicas import it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import numpy as np

from serveit import App, ItemErrors, context

models = App()

WAIT_S = 0.5
"""What an incomplete batch waits."""


def here() -> dict[str, Any]:
    """The running code's context."""
    found: dict[str, Any] = msgspec.to_builtins(context())
    return found


# -- the context ---------------------------------------------------------------------------------


@models.backend(user_config={"level": 1})
class Witness:
    """Says what the context is in each kind of code."""

    def __init__(self) -> None:
        self.life = {"__init__": here()}

    async def setup(self) -> None:
        self.life["setup"] = here()

    def reconfigure(self, user_config: Any) -> None:
        self.life["reconfigure"] = here()

    def check_health(self) -> None:
        self.life["check_health"] = here()

    async def __call__(self) -> dict[str, Any]:
        return here()

    async def lived(self) -> dict[str, dict[str, Any]]:
        return self.life

    def plain(self) -> dict[str, Any]:
        return {**here(), "thread": threading.current_thread().name}

    async def items(self) -> AsyncIterator[dict[str, Any]]:
        yield here()
        await asyncio.sleep(0)
        yield here()

    def plain_items(self) -> Iterator[dict[str, Any]]:
        yield here()
        yield here()

    async def in_a_task(self) -> dict[str, Any]:
        return await asyncio.create_task(self())

    async def nested(self) -> dict[str, Any]:
        found: dict[str, Any] = await models.handle(Gathering).witness.call("nested")
        return found


for method in ("plain", "items", "plain_items"):
    models.add_route(f"/{method}", Witness, method_name=method)
models.add_route("/call", Witness)


# -- batches -------------------------------------------------------------------------------------

WRONG: dict[str, Any] = {
    "str": "abcd",
    "dict": {"a": 1, "b": 2, "c": 3, "d": 4},
    "set": {1, 2, 3, 4},
    "None": None,
    "int": 4,
    "shorter": [1, 2, 3],
    "longer": [1, 2, 3, 4, 5],
}
"""What is no list of one result per item, for four of them."""


@models.backend(
    max_batch_size=4,
    batch_wait_timeout_s=WAIT_S,
    batch_methods=("__call__", "other", "plain", "witness", "wrong", "raising"),
)
class Gathering:
    """Tells of each item what was gathered with it."""

    async def __call__(self, words: list[str]) -> list[Any]:
        return [["__call__", sorted(words), word] for word in words]

    async def other(self, words: list[str]) -> tuple[Any, ...]:
        return tuple(["other", sorted(words), word] for word in words)

    def plain(self, words: list[str]) -> np.ndarray[Any, Any]:
        """Off the loop: where one runs, this raises."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return np.array([threading.get_ident()] * len(words))
        raise AssertionError("it runs on the loop")

    async def loop_thread(self) -> int:
        return threading.get_ident()

    async def witness(self, words: list[str]) -> list[Any]:
        return [{**here(), "words": words}] * len(words)

    async def wrong(self, kinds: list[str]) -> Any:
        if kinds[0] == "generator":
            return (kind for kind in kinds)
        return WRONG[kinds[0]]

    async def raising(self, numbers: list[int]) -> list[int]:
        raise ItemErrors([ValueError(f"{n} is odd") if n % 2 else n // 2 for n in numbers])


models.add_route("/gather", Gathering, methods=["POST"])
models.add_route("/witness", Gathering.witness, methods=["POST"])


# -- composition ---------------------------------------------------------------------------------


@models.backend
def model_one(values: np.ndarray[Any, Any]) -> float:
    assert isinstance(values, np.ndarray)
    return float(values.mean())


@models.backend
async def model_two(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return values * 2


@models.route("/composed", methods=["POST"])
@models.backend
class Composed:
    """Asks one model, and where that is sure enough, another; several at once where it can."""

    def __init__(self) -> None:
        self.one = models.handle(model_one)
        self.two = models.handle("model_two")

    async def __call__(self, values: list[float]) -> dict[str, Any]:
        array = np.array(values)
        score = await self.one.call(array)
        if score <= 0.5:
            return {"result": 1, "score": score}
        doubled, halves = await asyncio.gather(self.two.call(array), self.halves(array))
        return {"result": 2, "score": score, "doubled": doubled, "halves": halves}

    async def halves(self, array: np.ndarray[Any, Any]) -> list[float]:
        return [score async for score in self.one.map(np.split(array, 2))]

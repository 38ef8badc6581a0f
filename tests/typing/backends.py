"""What type checkers make of `@app.backend` and `@app.route`. Read by mypy; see tests/test_typing.py."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Sequence
from typing import Any, assert_type

from serveit import App, Backend, BackendConfig, Handle, HTTPOptions
from serveit.declare.backend import BatchBackend

app = App()
backend, route = app.backend, app.route


# Functions: the plain call keeps its type, `call` gives what is awaited.


@app.backend
def plain(x: int, y: str = "") -> float:
    return x + len(y)


@app.backend(num_replicas=2, user_config=None)
async def awaited(x: int, *, y: str = "") -> float:
    return x + len(y)


@app.route("/routed/<x:int>")
@app.backend(num_replicas=2)
async def routed(x: int) -> str:
    return str(x)


@app.route("/bare/<x:int>", methods=["GET", "DELETE"], name="bare_route")
def bare(x: int) -> str:
    return str(x)


@route("/short/<x:int>")
@backend(num_threads=2)
def short(x: int) -> str:
    return str(x)


async def functions() -> None:
    assert_type(plain(1, y="a"), float)
    assert_type(await plain.call(1, y="a"), float)
    assert_type(await awaited(1, y="a"), float)
    assert_type(await awaited.call(1, y="a"), float)
    assert_type(await routed.call(1), str)
    assert_type(await routed.call(x=1), str)
    assert_type(bare(1), str)
    assert_type(await bare.call(1), str)
    assert_type(await short.call(1), str)
    assert_type(await routed.options(timeout_s=1).call(1), str)
    assert_type(await bare.options(shard_key="a").call(1), str)


# Generators.


@app.backend
async def tokens(text: str) -> AsyncIterator[int]:
    yield len(text)


@app.backend
async def more_tokens(text: str) -> AsyncGenerator[int, None]:
    yield len(text)


@app.backend
def lines(text: str) -> Iterator[str]:
    yield from text.splitlines()


@app.backend
def more_lines(text: str) -> Generator[str, None, None]:
    yield from text.splitlines()


async def generators() -> None:
    assert_type(tokens("a"), AsyncIterator[int])
    assert_type(tokens.stream("a"), AsyncIterator[int])
    assert_type(more_tokens.stream(text="a"), AsyncIterator[int])
    assert_type(lines("a"), Iterator[str])
    assert_type(lines.stream("a"), AsyncIterator[str])
    assert_type(more_lines.stream("a"), AsyncIterator[str])


# Batch functions: a list when called plainly, one item through `call`.


@app.route("/sizes", methods=["POST"])
@app.backend(max_batch_size=8)
def sizes(texts: list[str]) -> list[int]:
    return [len(text) for text in texts]


@app.backend(max_batch_size=8, batch_wait_timeout_s=0.01)
async def async_sizes(texts: list[str]) -> Sequence[int]:
    return [len(text) for text in texts]


def halves(numbers: list[int]) -> tuple[float, ...]:
    return tuple(number / 2 for number in numbers)


async def async_halves(numbers: list[int]) -> list[float]:
    return [number / 2 for number in numbers]


plain_halves = app.backend(halves, max_batch_size=4)
plain_async_halves = app.backend(async_halves, max_batch_size=4, num_replicas=2)


async def batches() -> None:
    assert_type(sizes, BatchBackend[str, int, Sequence[int]])
    assert_type(sizes(["a"]), Sequence[int])
    assert_type(await sizes.call("a"), int)
    assert_type(await sizes.options(timeout_s=1).call("a"), int)
    assert_type(await async_sizes(["a"]), Sequence[int])
    assert_type(await async_sizes.call("a"), int)
    assert_type(await plain_halves.call(3), float)
    assert_type(plain_halves([3]), Sequence[float])
    assert_type(await plain_async_halves.call(3), float)


# The plain form.


def unserved(x: int) -> bytes:
    return bytes(x)


served = app.backend(unserved, name="other", num_replicas=2)
configured = app.backend(unserved, name="configured", config=BackendConfig(num_threads=2))
imported = app.backend("package.module:thing", name="imported", init_args=(1,), max_batch_size=2)


async def plain_forms() -> None:
    assert_type(await served.call(1), bytes)
    assert_type(served(1), bytes)
    assert_type(await configured.call(x=1), bytes)
    assert_type(imported, Backend[..., Any])


# Classes stay themselves.


@app.backend(num_replicas=2)
class Model:
    def __init__(self, path: str = "") -> None:
        self.path = path

    def __call__(self, text: str) -> int:
        return len(text)


@app.backend
class Bare:
    def __call__(self) -> None: ...


@app.route("/batched", methods=["POST"])
@app.backend(max_batch_size=8)
class Batched:
    def __call__(self, texts: list[str]) -> list[int]:
        return [len(text) for text in texts]


@app.route("/only-routed")
class OnlyRouted:
    def __call__(self) -> str:
        return ""


class Sub(Model):
    pass


second = app.backend(Model, name="second", init_args=("a",), max_queued_requests=3)
app.add_route("/model", traffic={"Model": 0.9, "second": 0.1}, methods=["POST"])


def classes() -> None:
    assert_type(Model("a"), Model)
    assert_type(Model("a")("b"), int)
    assert_type(second, type[Model])
    assert_type(Bare(), Bare)
    assert_type(Batched()(["a"]), list[int])
    assert_type(OnlyRouted()(), str)
    assert_type(Sub("a").path, str)


# Records of options.

config = BackendConfig(num_replicas=2, max_batch_size=8, batch_methods=("__call__", "other"))
http = HTTPOptions(host="0.0.0.0", port=0, location="EveryNode", middlewares=["package.module:factory"])
assert_type(config.merge(num_replicas=3), BackendConfig)
assert_type(http.port, int)
handle_type: type[Handle[..., Any]] = Handle

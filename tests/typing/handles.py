"""What type checkers make of `app.handle(...)`. Read by mypy; see tests/test_typing.py."""

from __future__ import annotations

from typing import Any, assert_type

from serveit import App, Client, Handle, SyncHandle

app = App()


@app.backend
def plain(x: int, y: str = "") -> float:
    return x + len(y)


@app.backend
async def awaited(x: int, *, y: str = "") -> float:
    return x + len(y)


@app.backend(max_batch_size=8)
def sizes(texts: list[str]) -> list[int]:
    return [len(text) for text in texts]


@app.backend
class Model:
    def __init__(self, path: str = "") -> None:
        self.path = path

    def __call__(self, text: str, *, upper: bool = False) -> int:
        return len(text)

    def explain(self, label: str) -> bytes:
        return label.encode()

    async def aexplain(self, label: str) -> bytes:
        return label.encode()


@app.backend
class AsyncModel:
    async def __call__(self, text: str, *, upper: bool = False) -> int:
        return len(text)


@app.backend(max_batch_size=8)
class Batched:
    def __call__(self, texts: list[str]) -> list[int]:
        return [len(text) for text in texts]


@app.backend(max_batch_size=8)
class AsyncBatched:
    async def __call__(self, texts: list[str]) -> tuple[int, ...]:
        return tuple(len(text) for text in texts)


@app.backend
class Joiner:
    """Takes a list, and gives no list: no batch."""

    def __call__(self, texts: list[str]) -> str:
        return "".join(texts)


@app.backend
class Methods:
    def __init__(self, path: str = "") -> None:
        self.path = path

    def explain(self, label: str) -> bytes:
        return label.encode()


async def of_functions() -> None:
    assert_type(await app.handle(plain).call(1, y="a"), float)
    assert_type(await app.handle(awaited).call(1, y="a"), float)
    assert_type(await app.handle(sizes).call("a"), int)
    assert_type(await app.handle(awaited).options(timeout_s=1).call(1), float)


async def of_classes() -> None:
    assert_type(await app.handle(Model).call("a", upper=True), int)
    assert_type(await app.handle(AsyncModel).call(text="a"), int)
    assert_type(await app.handle(Batched).call("a"), int)
    assert_type(await app.handle(AsyncBatched).call("a"), int)
    assert_type(await app.handle(Joiner).call(["a"]), str)
    assert_type(app.handle(Methods), Handle[..., Any])
    assert_type(await app.handle(Model.explain).call("a"), bytes)
    assert_type(await app.handle(Model.aexplain).call(label="a"), bytes)
    assert_type(app.handle(Model).explain, Handle[..., Any])


async def of_names(client: Client) -> None:
    assert_type(app.handle("plain"), Handle[..., Any])
    assert_type(client.get_handle("plain"), Handle[..., Any])
    assert_type(client.get_handle("plain", sync=True), SyncHandle[..., Any])
    assert_type(client.get_handle("later", missing_ok=True), Handle[..., Any])
    assert_type(client.get_handle("later", sync=True, missing_ok=True), SyncHandle[..., Any])


def blocking() -> None:
    assert_type(app.handle(plain, sync=True).call(1, y="a"), float)
    assert_type(app.handle(awaited, sync=True).call(1, y="a"), float)
    assert_type(app.handle(sizes, sync=True).call("a"), int)
    assert_type(app.handle(Model, sync=True).call("a", upper=True), int)
    assert_type(app.handle(AsyncModel, sync=True).call(text="a"), int)
    assert_type(app.handle(Batched, sync=True).call("a"), int)
    assert_type(app.handle(AsyncBatched, sync=True).call("a"), int)
    assert_type(app.handle(Model.explain, sync=True).call("a"), bytes)
    assert_type(app.handle(Model.aexplain, sync=True).call("a"), bytes)
    assert_type(app.handle("plain", sync=True), SyncHandle[..., Any])

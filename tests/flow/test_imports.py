"""Backends given by import string: what only replicas import, and how its mistakes are told."""

from __future__ import annotations

import contextlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

import serveit
from serveit import App
from serveit.client import Client
from tests.cluster.instance import Instance

MODELS = """
    from serveit import Request

    class Scaler:
        def __init__(self, factor, *, offset=0):
            self.factor, self.offset, self.configs = factor, offset, []

        def reconfigure(self, user_config):
            self.configs.append(user_config)

        async def __call__(self, number: int, times: int = 1):
            return self.factor * number * times + self.offset

        def seen(self):
            return self.configs

    class Sizes:
        async def __call__(self, items: list[int]) -> list[int]:
            return [len(items)] * len(items)

    def blocking(text: str):
        return text.upper()

    def two(one: list[int], other: int): ...

    def streams(items: list[int]):
        yield from items

    instance = Scaler(1)
"""

Start = Callable[[App], contextlib.AbstractAsyncContextManager[Client]]


@pytest.fixture
def start(ray_or_none: Instance | None) -> Start:
    def start(app: App) -> contextlib.AbstractAsyncContextManager[Client]:
        if ray_or_none is None:
            return serveit.serve(app, local=True, name="imports", prefix="/imports", http={"port": 0})
        return serveit.serve(app, name="imports", prefix="/imports")

    return start


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of one that this process could import, and has not."""
    name = f"models_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(MODELS))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


async def test_classes_functions_and_batches(start: Start, kind: str, module: str) -> None:
    app = App()
    app.backend(
        f"{module}:Scaler",
        name="scaler",
        init_args=(3,),
        init_kwargs={"offset": 1},
        user_config={},
        num_replicas=2,
    )
    app.backend(f"{module}:Sizes", name="sizes", max_batch_size=4, batch_wait_timeout_s=0.2)
    app.backend(f"{module}:blocking", name="blocking")
    app.add_route("/scale/<number:int>", "scaler")
    app.add_route("/seen", "scaler", method_name="seen")
    async with start(app) as client:
        assert (module in sys.modules) == (kind == "local"), "the driver need not have it"
        handle = client.get_handle("scaler")
        assert await handle.call(5, times=2) == 31
        assert await handle.seen.call() == [{}]
        assert [result async for result in client.get_handle("sizes").map(range(4))] == [4] * 4
        calls = client.get_handle("blocking").map(["a"] * 50)
        assert [result async for result in calls] == ["A"] * 50, "one thread, whatever callers believe"
        async with httpx2.AsyncClient(base_url=f"{client.url}/imports", timeout=20) as http:
            assert (await http.get("/scale/4?times=2")).json() == 25
            assert (await http.get("/scale/four")).status_code == 404
            assert (await http.get("/seen")).json() == [{}]


def nowhere(app: App, module: str) -> None:
    app.backend("no_such_module_anywhere:Model", name="late")


def no_attribute(app: App, module: str) -> None:
    app.backend(f"{module}:Scalar", name="late", init_args=(1,))


def wrong_kind(app: App, module: str) -> None:
    app.backend(f"{module}:instance", name="late")


def wrong_arguments(app: App, module: str) -> None:
    app.backend(f"{module}:Scaler", name="late")


def arguments_of_a_function(app: App, module: str) -> None:
    app.backend(f"{module}:blocking", name="late", init_args=(1,))


def no_reconfigure(app: App, module: str) -> None:
    app.backend(f"{module}:Sizes", name="late", user_config={"a": 1})


def does_not_bind(app: App, module: str) -> None:
    app.backend(f"{module}:two", name="late")
    app.add_route("/late/<another>", "late")


def no_such_method(app: App, module: str) -> None:
    app.backend(f"{module}:Scaler", name="late", init_args=(1,))
    app.add_route("/late", "late", method_name="explain")


def two_parameters(app: App, module: str) -> None:
    app.backend(f"{module}:two", name="late", max_batch_size=2)


def batch_of_streams(app: App, module: str) -> None:
    app.backend(f"{module}:streams", name="late", max_batch_size=2)


@pytest.mark.parametrize(
    ("declare", "error", "text"),
    [
        (nowhere, ImportError, "there is no module 'no_such_module_anywhere'"),
        (no_attribute, ImportError, "has no attribute 'Scalar': did you mean 'Scaler'"),
        (wrong_kind, TypeError, "backend 'late': .* is an instance; give its class, Scaler"),
        (wrong_arguments, TypeError, "Scaler cannot be constructed: missing a required argument: 'factor'"),
        (arguments_of_a_function, TypeError, "init_args and init_kwargs are for classes"),
        (no_reconfigure, TypeError, "late. takes no user_config: it needs a class with a method `reconf"),
        (does_not_bind, TypeError, "route '/late/<another>', backend 'late': "),
        (no_such_method, (AttributeError, TypeError), "backend 'late' has no method 'explain'"),
        (two_parameters, TypeError, "must take exactly one parameter"),
        (batch_of_streams, TypeError, "streams is a generator; a batch function returns one result per item"),
    ],
)
async def test_mistakes_are_told_to_who_deploys(
    start: Start, module: str, declare: Callable[[App, str], None], error: Any, text: str
) -> None:
    app = App()
    declare(app, module)
    with pytest.raises(error, match=text) as caught:
        async with start(app):
            pytest.fail("it cannot be served")
    assert "(while replica late#" in caught.value.__notes__[-1]


async def test_what_an_import_raises_comes_with_its_traceback(
    start: Start, tmp_path: Path, module: str
) -> None:
    (tmp_path / f"{module}_bad.py").write_text("import a_driver_of_the_gpu\n")
    app = App()
    app.backend(f"{module}_bad:Model", name="late")
    with pytest.raises(ModuleNotFoundError, match="a_driver_of_the_gpu") as caught:
        async with start(app):
            pytest.fail("it cannot be served")
    traceback = str(caught.value.__cause__) if caught.value.__cause__ else str(caught.traceback[-1].path)
    assert f"{module}_bad.py" in traceback

"""Backends: what they know of their functions and classes, and whom their calls reach."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from serveit import App, BackendConfig, ImportFailed, NeedsRay, NotServing
from serveit.declare.backend import Backend, BatchBackend
from serveit.declare.decorators import BackendOptions
from serveit.declare.target import describe, find_method, method_names
from serveit.testing import local


class Model:
    size = 3

    class Inner: ...

    def __call__(self, text: str) -> str:
        return text.upper()

    async def explain(self, label: str) -> str:
        return f"because {label}"

    def tokens(self, count: int) -> Iterator[int]:
        yield from range(count)

    async def atokens(self, count: int) -> AsyncIterator[int]:
        for number in range(count):
            yield number

    @classmethod
    def version(cls) -> str:
        return cls.__name__

    @staticmethod
    def motto() -> str:
        return "m"

    def close(self) -> None: ...


class Louder(Model):
    def __call__(self, text: str) -> str:
        return text.upper() + "!"


class AllAsync:
    async def one(self) -> int:
        return 1

    async def two(self) -> int:
        return 2


class Empty: ...


def backend(target: Any, **options: Any) -> Any:
    app = App()
    app.backend(target, name="b", **options)
    return app.backends["b"]


# -- methods ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "of_class", "is_async", "is_generator"),
    [
        ("__call__", True, False, False),
        ("explain", True, True, False),
        ("tokens", True, False, True),
        ("atokens", True, True, True),
        ("version", False, False, False),
        ("motto", False, False, False),
    ],
)
def test_methods_of_a_class(name: str, of_class: bool, is_async: bool, is_generator: bool) -> None:
    for target in (Model, Louder):
        method = backend(target).method(name)
        assert (method.of_class, method.is_async, method.is_generator) == (of_class, is_async, is_generator)
        assert method.name == name and not method.is_batch


@pytest.mark.parametrize("name", ["size", "Inner", "nothing", "__init__", "__class__", "_x"])
def test_what_is_no_method(name: str) -> None:
    with pytest.raises(AttributeError, match=f"backend 'b' has no method '{name}'"):
        backend(Model).method(name)


def test_lifecycle_methods_are_not_for_requests() -> None:
    with pytest.raises(AttributeError, match="close.. of backend 'b' is called by serveit itself"):
        backend(Model).method("close")
    assert method_names(Model) == ["__call__", "atokens", "explain", "motto", "tokens", "version"]


def test_a_class_without_call_has_none() -> None:
    with pytest.raises(AttributeError, match="no method '__call__': there is none"):
        find_method(Empty, "__call__", BackendConfig(), "b")


def test_a_function_has_one_method() -> None:
    with pytest.raises(AttributeError, match="is a function and has no method 'explain'"):
        backend(describe).method("explain")


def test_batch_methods() -> None:
    class Batches:
        def __call__(self, items: list[int]) -> list[int]:
            return items

        def other(self, items: list[int], /) -> list[int]:
            return items

    record = backend(Batches, max_batch_size=2, batch_methods=["other"])
    assert record.method("other").is_batch and not record.method().is_batch


async def _coroutine() -> None: ...


async def _asyncgen() -> AsyncIterator[int]:
    yield 1


@functools.wraps(_asyncgen)
def _wrapped() -> Any:
    return _asyncgen()


@pytest.mark.parametrize(
    ("target", "is_async"),
    [(_coroutine, True), (_asyncgen, True), (_wrapped, True), (describe, False)]
    + [(Model, False), (AllAsync, True), (Empty, False)],
)
def test_where_a_backend_runs(target: Any, is_async: bool) -> None:
    assert backend(target).is_async is is_async


def test_a_target_without_a_signature_is_left_to_the_replica() -> None:
    assert backend(type("Odd", (), {"__signature__": 3, "__call__": describe}), init_args=(1,)).init_args == (
        1,
    )


def test_describe() -> None:
    assert describe("a:b") == "'a:b'"
    assert describe(Model.explain) == "tests.test_backend.Model.explain"
    assert describe(3) == "3"


# -- options ---------------------------------------------------------------------------------


def test_the_typed_options_are_the_config_s_fields() -> None:
    fields = {field.name for field in dataclasses.fields(BackendConfig)}
    assert BackendOptions.__annotations__.keys() | {"max_batch_size"} == fields
    kinds = inspect.get_annotations(BackendConfig, eval_str=False)
    differing = {
        name for name, kind in BackendOptions.__annotations__.items() if kind.__forward_arg__ != kinds[name]
    }
    assert differing == {"batch_methods"}  # any sequence is taken, a tuple is kept


# -- import strings --------------------------------------------------------------------------


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    made = ModuleType("imported_backends")
    vars(made).update(Model=Model, function=describe, served=App().backend(describe), number=3)
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


@pytest.mark.parametrize(
    ("attribute", "loaded"), [("Model", Model), ("function", describe), ("served", describe)]
)
def test_an_import_string(module: ModuleType, attribute: str, loaded: Any) -> None:
    record = backend(f"imported_backends:{attribute}")
    assert record.load() is loaded
    delattr(module, attribute)
    assert record.load() is loaded  # once is enough


def test_an_import_string_that_does_not_fit(module: ModuleType) -> None:
    with pytest.raises(TypeError, match="backend 'b': expected a function"):
        backend("imported_backends:number").load()
    with pytest.raises(TypeError, match="init_args and init_kwargs are for classes"):
        backend("imported_backends:function", init_args=(1,)).load()
    with pytest.raises(ImportFailed, match="no attribute 'nothing'"):
        backend("imported_backends:nothing").load()


def test_a_plain_call_of_an_imported_function(module: ModuleType) -> None:
    assert backend("imported_backends:function")("a:b") == "'a:b'"


# -- calls -----------------------------------------------------------------------------------


def make_app() -> tuple[App, Backend[..., Any], BatchBackend[Any, Any, Any]]:
    app = App()

    @app.backend
    async def double(value: int) -> int:
        return 2 * value

    @app.backend(max_batch_size=4)
    async def sizes(items: list[int]) -> list[int]:
        return [len(items)] * len(items)

    @app.backend
    async def nested(value: int) -> int:
        return await double.call(value) + int(await app.handle("double").call(value))

    app.backend(Model)
    return app, double, sizes


async def test_calls_reach_whoever_serves() -> None:
    app, double, sizes = make_app()
    async with local(app):
        assert await double.call(2) == 4
        assert await double.options(timeout_s=5).call(3) == 6
        assert [item async for item in double.map([1, 2])] == [2, 4]
        assert await sizes.call(7) == 1
        assert await sizes.options(timeout_s=5).call(7) == 1
        assert sorted([item async for item in sizes.map([1, 2], max_in_flight=2)])[-1] in (1, 2)
        assert await app.handle("nested").call(5) == 20
        for remote in (double.remote(1), sizes.remote(1)):
            with pytest.raises(NeedsRay):
                await remote


async def test_streams() -> None:
    app = App()

    @app.backend
    async def count(to: int) -> AsyncIterator[int]:
        for number in range(to):
            yield number

    async with local(app):
        assert [item async for item in count.stream(3)] == [0, 1, 2]


async def test_handles_in_all_forms() -> None:
    app, double, _ = make_app()
    app.add_route("/double/<value:int>", double, name="endpoint")
    async with local(app):
        assert await app.handle(double).call(1) == 2
        assert await app.handle("double").call(1) == 2
        assert await app.handle("endpoint").call(1) == 2
        assert await app.handle(Model).call("a") == "A"
        assert await app.handle(Model).explain.call("x") == "because x"
        assert await app.handle(Model.explain).call("x") == "because x"
        assert "SyncHandle" in repr(app.handle(Model, sync=True))
        with pytest.raises(KeyError, match="did you mean 'double'?"):
            app.handle("duoble")
        with pytest.raises(TypeError, match="app.handle: .*Louder is no backend of this app"):
            app.handle(Louder)


@pytest.mark.parametrize(
    "reach",
    [
        lambda app, double, sizes: double.call(1),
        lambda app, double, sizes: double.stream(1),
        lambda app, double, sizes: double.map([1]),
        lambda app, double, sizes: sizes.call(1),
        lambda app, double, sizes: app.handle("double"),
        lambda app, double, sizes: app.handle(Model.explain),
    ],
)
def test_with_nothing_running(reach: Callable[..., Any]) -> None:
    with pytest.raises(NotServing, match=r"serveit run module:app.*serveit\.serve\(app"):
        reach(*make_app())


async def test_each_runtime_is_its_own() -> None:
    app, double, _ = make_app()
    other = App()
    runs: list[str] = []

    @other.backend
    async def note(text: str) -> int:
        runs.append(text)
        return int(await double.call(len(text)))

    async with local(app), local(other), local(app) as newest:
        assert await note.call("abc") == 6
        assert await newest.get_handle("nested").call(1) == 4
    assert runs == ["abc"]

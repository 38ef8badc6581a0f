from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from serveit.running.instance import Instance
from serveit.types import DEFAULT_METHOD
from tests.callers import backend_of

color: contextvars.ContextVar[str] = contextvars.ContextVar("color", default="none")


@asynccontextmanager
async def started(target: Any, **options: Any) -> AsyncIterator[Instance]:
    instance = Instance(backend_of(target, **options))
    try:
        await instance.start()
        yield instance
    finally:
        await instance.aclose()
        instance.end_threads()


async def call(instance: Instance, *args: Any, name: str = DEFAULT_METHOD, **kwargs: Any) -> Any:
    method, function = instance.method(name)
    return await instance.call(method, function, args, kwargs)


class Model:
    """A `def` class that notes what is called where."""

    log: list[tuple[str, str]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        type(self).log = []
        self.note("init")
        self.args = args, kwargs

    def note(self, what: str) -> None:
        self.log.append((what, threading.current_thread().name.partition("_")[0]))

    def setup(self) -> None:
        self.note("setup")

    def reconfigure(self, user_config: Any) -> None:
        self.note(f"reconfigure {user_config!r}")

    def check_health(self) -> None:
        self.note("check_health")

    def close(self) -> None:
        self.note("close")

    def __call__(self, x: int = 0) -> str:
        self.note("call")
        return threading.current_thread().name


class AsyncModel(Model):
    async def __call__(self, x: int = 0) -> str:  # type: ignore[override]
        return threading.current_thread().name

    async def setup(self) -> None:  # type: ignore[override]
        self.note("setup")

    async def aclose(self) -> None:
        self.note("aclose")


HERE = threading.current_thread().name


async def test_a_def_class_lives_in_its_thread() -> None:
    async with started(Model, init_args=(1,), init_kwargs={"b": 2}, user_config={}) as instance:
        assert (await call(instance)).startswith("serveit-Model")
        assert instance._object.args == ((1,), {"b": 2})
        await instance.reconfigure([1])
        await instance.check_health()
    does = [
        "init",
        "setup",
        "reconfigure {}",
        "check_health",
        "call",
        "reconfigure [1]",
        "check_health",
        "close",
    ]
    assert Model.log == [(what, "serveit-Model") for what in does]


async def test_an_async_class_is_made_on_the_loop_and_its_def_methods_run_in_threads() -> None:
    async with started(AsyncModel) as instance:
        assert await call(instance) == HERE
    assert AsyncModel.log == [
        ("init", HERE),
        ("setup", HERE),
        ("check_health", "serveit-AsyncModel"),
        ("aclose", HERE),
    ]


async def test_without_user_config_nothing_is_configured() -> None:
    async with started(Model):
        pass
    assert [what for what, _ in Model.log] == ["init", "setup", "check_health", "close"]


async def test_a_function_has_no_life_and_takes_no_configuration() -> None:
    async with started(lambda x: x + 1, name="f") as instance:
        assert await call(instance, 1) == 2
        await instance.check_health()
        with pytest.raises(TypeError, match=r"backend 'f' takes no user_config.*reconfigure"):
            await instance.reconfigure({})


async def test_methods_are_bound_and_found_once() -> None:
    class Two:
        def __call__(self) -> str:
            return "called"

        def other(self, x: int) -> int:
            return x * 2

        @staticmethod
        def loose(x: int) -> int:
            return x * 3

    async with started(Two) as instance:
        assert await call(instance) == "called"
        assert await call(instance, 2, name="other") == 4
        assert await call(instance, 2, name="loose") == 6
        assert instance.method("other") is instance.method("other")
        with pytest.raises(AttributeError, match="did you mean 'other'"):
            instance.method("othr")


class Stubborn(Exception):
    pass


LIVES = ["__init__", "setup", "reconfigure", "check_health"]


def broken(where: str, error: BaseException, *, is_async: bool) -> type[Any]:
    """A class that raises at one point of its life."""

    def check(what: str) -> None:
        if what == where:
            raise error

    def make(self: Any) -> None:
        check("__init__")

    def reconfigure(self: Any, user_config: Any) -> None:
        check("reconfigure")

    def setup(self: Any) -> None:
        check("setup")

    async def async_setup(self: Any) -> None:
        check("setup")

    async def check_health(self: Any) -> None:
        check("check_health")

    def called(self: Any) -> None: ...

    async def async_called(self: Any) -> None: ...

    members = {
        "__init__": make,
        "__call__": async_called if is_async else called,
        "setup": async_setup if is_async else setup,
        "reconfigure": reconfigure,
        "check_health": check_health,
    }
    return type("Broken", (), members)


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("where", LIVES)
async def test_what_a_start_raises_is_what_it_raised(where: str, is_async: bool) -> None:
    with pytest.raises(Stubborn):
        async with started(broken(where, Stubborn(), is_async=is_async), user_config=1):
            pass


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()])
@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("where", LIVES)
async def test_a_start_cannot_end_the_loop_or_look_cancelled(
    where: str, is_async: bool, error: BaseException
) -> None:
    with pytest.raises(RuntimeError, match=rf"{where}\(\) of backend 'Broken' raised {type(error).__name__}"):
        async with started(broken(where, error, is_async=is_async), user_config=1):
            pass


async def test_a_cancelled_start_is_cancelled() -> None:
    class Slow:
        async def setup(self) -> None:
            await asyncio.get_running_loop().create_future()

        async def __call__(self) -> None: ...

    starting = asyncio.ensure_future(Instance(backend_of(Slow)).start())
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting


async def test_a_clean_up_that_raises_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Messy:
        def __call__(self) -> None: ...

        def close(self) -> None:
            raise SystemExit(1)

    async with started(Messy):
        pass
    (record,) = caplog.records
    assert record.getMessage() == "close() of backend 'Messy' raised"


async def test_life_may_be_written_as_def_that_returns_an_awaitable() -> None:
    done: list[str] = []

    async def later() -> None:
        done.append("awaited")

    class Wrapped:
        def setup(self) -> Any:
            return later()

        def __call__(self) -> Any:
            return later()

    async with started(Wrapped) as instance:
        assert done == ["awaited"]
        await call(instance)
    assert done == ["awaited"] * 2


async def test_a_thread_sees_the_callers_variables_and_keeps_its_own() -> None:
    def paint() -> str:
        seen = color.get()
        color.set("red")
        return seen

    async with started(paint) as instance:
        color.set("white")
        assert await call(instance) == "white"
        assert color.get() == "white"


async def test_stop_iteration_comes_out_of_a_thread_as_an_error() -> None:
    def empty() -> Any:
        return next(iter([]))

    async with started(empty) as instance:
        with pytest.raises(RuntimeError, match="raised StopIteration"):
            await call(instance)


async def test_a_cancelled_caller_waits_for_its_thread_but_not_for_its_turn() -> None:
    begun, go_on, ran = threading.Event(), threading.Event(), list[int]()

    def work(number: int) -> None:
        ran.append(number)
        begun.set()
        go_on.wait(5)

    async with started(work) as instance:
        first = asyncio.ensure_future(call(instance, 1))
        second = asyncio.ensure_future(call(instance, 2))
        await asyncio.get_running_loop().run_in_executor(None, begun.wait, 5)
        second.cancel()
        await asyncio.wait([second], timeout=1)
        assert second.cancelled()
        for _ in range(3):
            first.cancel()
            await asyncio.sleep(0.01)
            assert not first.done()
        go_on.set()
        await asyncio.wait([first], timeout=1)
        assert first.cancelled()
    assert ran == [1]


async def test_a_cancelled_caller_drops_what_its_thread_raises() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go_on.wait(5)
        raise Stubborn

    async with started(work) as instance:
        calling = asyncio.ensure_future(call(instance))
        await asyncio.get_running_loop().run_in_executor(None, begun.wait, 5)
        calling.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await calling


# Generators


async def test_a_plain_generator_is_iterated_in_the_thread_in_one_context() -> None:
    threads: set[str] = set()

    def painted() -> Iterator[str]:
        token = color.set("red")
        try:
            for _ in range(2):
                threads.add(threading.current_thread().name)
                yield color.get()
        finally:
            color.reset(token)
            threads.add(threading.current_thread().name)

    async with started(painted) as instance:
        items = await call(instance)
        assert [item async for item in instance.iterate(items)] == ["red", "red"]
        assert color.get() == "none"
    assert len(threads) == 1
    assert threads != {HERE}


async def test_a_generator_that_is_left_is_closed_in_its_thread() -> None:
    closed: list[str] = []

    def endless() -> Iterator[int]:
        try:
            yield from iter(int, 1)
        finally:
            closed.append(threading.current_thread().name)

    async with started(endless) as instance:
        steps = instance.iterate(await call(instance))
        assert await anext(steps) == 0
        await steps.aclose()  # type: ignore[attr-defined]
        assert closed[0].startswith("serveit-endless")


async def test_an_iterator_without_close_is_only_left() -> None:
    async with started(lambda: None, name="f") as instance:
        assert [item async for item in instance.iterate(iter([1, 2]))] == [1, 2]


async def test_a_generator_is_closed_after_the_step_that_runs_however_often_one_cancels() -> None:
    begun, go_on, closed = threading.Event(), threading.Event(), list[str]()

    def slow() -> Iterator[int]:
        try:
            begun.set()
            go_on.wait(5)
            yield 1
        finally:
            closed.append("closed")

    async with started(slow) as instance:
        steps = instance.iterate(await call(instance))
        reading = asyncio.ensure_future(anext(steps))
        await asyncio.get_running_loop().run_in_executor(None, begun.wait, 5)
        for _ in range(3):
            reading.cancel()
            await asyncio.sleep(0)
        assert not reading.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert closed == ["closed"]
        await steps.aclose()  # type: ignore[attr-defined]


async def test_closing_a_generator_waits_for_its_turn_even_if_cancelled() -> None:
    begun, go_on, closed = threading.Event(), threading.Event(), list[str]()

    def numbers() -> Iterator[int]:
        try:
            yield from range(9)
        finally:
            closed.append("closed")

    def block() -> None:
        begun.set()
        go_on.wait(5)

    async with started(numbers) as instance:
        steps = instance.iterate(await call(instance))
        assert await anext(steps) == 0
        blocking = asyncio.ensure_future(instance.in_thread(block))
        await asyncio.get_running_loop().run_in_executor(None, begun.wait, 5)
        closing = asyncio.ensure_future(steps.aclose())  # type: ignore[attr-defined]
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.sleep(0)
        assert not closing.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await blocking
    assert closed == ["closed"]


async def test_closing_a_generator_ends_with_the_threads() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def numbers() -> Iterator[int]:
        yield from range(9)

    def block() -> None:
        begun.set()
        go_on.wait(5)

    async with started(numbers) as instance:
        steps = instance.iterate(await call(instance))
        assert await anext(steps) == 0
        blocking = asyncio.ensure_future(instance.in_thread(block))
        await asyncio.get_running_loop().run_in_executor(None, begun.wait, 5)
        closing = asyncio.ensure_future(steps.aclose())  # type: ignore[attr-defined]
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.sleep(0)
        instance.end_threads()
        with pytest.raises(asyncio.CancelledError):
            await closing
        go_on.set()
        await blocking


async def test_a_wrapped_async_generator_function_is_awaited_for_its_generator() -> None:
    async def numbers() -> AsyncIterator[int]:
        yield 1

    @functools.wraps(numbers)
    async def wrapper() -> Any:
        return numbers()

    async with started(wrapper, name="numbers") as instance:
        assert [item async for item in await call(instance)] == [1]

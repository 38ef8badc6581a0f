from __future__ import annotations

import asyncio
import gc
import pickle
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

import serveit
from serveit import App, SyncHandle
from serveit.client import SyncClient
from serveit.exceptions import DeadlineExceeded, NeedsRay, NotServing
from serveit.testing import local
from tests.support import wait_until


class Gate:
    """Holds calls until the test lets them go; tells when they came, and whether they were cancelled."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.cancelled = threading.Event()
        self.closed = threading.Event()

    def clear(self) -> None:
        for event in (self.entered, self.cancelled, self.closed):
            event.clear()


gate = Gate()


async def double(number: int) -> int:
    return 2 * number


async def fail(text: str) -> None:
    raise ValueError(text)


async def endless() -> AsyncIterator[int]:
    number = 0
    try:
        while True:
            yield number
            number += 1
    finally:
        gate.closed.set()


def words(text: str) -> Iterator[str]:
    yield from text.split()


async def stuck() -> None:
    gate.entered.set()
    try:
        await asyncio.get_running_loop().create_future()
    except asyncio.CancelledError:
        gate.cancelled.set()
        raise


class Model:
    async def __call__(self, number: int) -> int:
        return number

    async def explain(self, number: int) -> str:
        return f"{number}!"


@pytest.fixture
def app() -> App:
    app = App()
    gate.clear()
    for target in (double, fail, endless, words, stuck, Model):
        app.backend(target, name=target.__name__, graceful_shutdown_timeout_s=0.1)

    @app.backend
    def asks_another(number: int) -> int:
        handle = app.handle("double", sync=True)
        total: int = handle.call(number) + sum(handle.map(range(number)))
        return total

    @app.backend
    def asks_with_a_deadline() -> None:
        app.handle("stuck", sync=True).call()

    @app.backend
    async def asks_blocking(number: int) -> int:
        result: int = app.handle("double", sync=True).call(number)
        return result

    return app


@pytest.fixture
def client(app: App) -> Iterator[SyncClient]:
    with serveit.serve(app, local=True, http={"location": None}) as client:
        yield client


# -- the same names, blocking ----------------------------------------------------------------


def test_call(client: SyncClient) -> None:
    handle = client.get_handle("double")
    assert handle.call(4) == 8
    with pytest.raises(ValueError, match="too bad") as caught:
        client.get_handle("fail").call("too bad")
    assert "in fail" in str(caught.value.__cause__)


def test_stream(client: SyncClient) -> None:
    assert list(client.get_handle("words").stream("a b c")) == ["a", "b", "c"]
    with pytest.raises(TypeError, match="returned a value, not a stream"):
        next(iter(client.get_handle("double").stream(1)))


def test_map(client: SyncClient) -> None:
    handle = client.get_handle("double")
    assert list(handle.map(range(100), max_in_flight=8)) == [2 * number for number in range(100)]
    assert sorted(handle.map([5, 6], ordered=False)) == [(0, 10), (1, 12)]
    with pytest.raises(ValueError, match="a"):
        list(client.get_handle("fail").map(["a", "b"]))
    with pytest.raises(ValueError, match="max_in_flight"):
        handle.map([], max_in_flight=0)


def test_options_and_methods(client: SyncClient) -> None:
    model = client.get_handle("Model")
    assert model.call(1) == 1
    assert model.explain.call(2) == "2!"
    assert model.options(method_name="explain").call(3) == "3!"
    assert repr(model.explain) == "<SyncHandle default/Model.explain>"
    with pytest.raises(AttributeError, match="'SyncHandle' object has no attribute '_x'"):
        model._x  # noqa: B018
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(model)


def test_remote_needs_ray(client: SyncClient) -> None:
    with pytest.raises(NeedsRay, match="handle.call"):
        client.get_handle("double").remote(1)


def test_options_that_no_frame_takes_are_refused_at_once(client: SyncClient) -> None:
    handle = client.get_handle("double")
    for name in ("method_name", "shard_key"):
        with pytest.raises(
            ValueError, match=rf"{name} must be text that UTF-8 has a form for, got 'a.ud800'"
        ):
            handle.options(**{name: "a\ud800"})
        handle.options(**{name: "größe\U0001f600"})


def test_a_wait_of_an_age_is_one_of_a_year(client: SyncClient) -> None:
    assert client.get_handle("double").options(timeout_s=1e17).call(2) == 4


def test_a_timeout(client: SyncClient) -> None:
    with pytest.raises(DeadlineExceeded):
        client.get_handle("stuck").options(timeout_s=0.05).call()
    assert gate.cancelled.wait(5)


def test_from_eight_threads_at_once(client: SyncClient) -> None:
    handle = client.get_handle("double")
    together = threading.Barrier(8)

    def work(thread: int) -> list[int]:
        together.wait(5)
        return [handle.call(number) for number in range(50)] + list(handle.map([thread]))

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    assert results == [[2 * number for number in range(50)] + [2 * thread] for thread in range(8)]


# -- where it may be used --------------------------------------------------------------------


async def test_in_a_running_loop_it_names_the_async_way(app: App) -> None:
    async with local(app) as client:
        handle = client.get_handle("double", sync=True)
        assert isinstance(handle, SyncHandle)
        for attempt, instead in (
            (lambda: handle.call(1), "await handle.call"),
            (lambda: handle.stream(1), "async for item in handle.stream"),
            (lambda: handle.map([1]), "async for result in handle.map"),
            (lambda: handle.remote(1), "await handle.remote"),
        ):
            with pytest.raises(RuntimeError, match="an event loop is running in this thread") as caught:
                attempt()
            assert instead in str(caught.value)
        assert await asyncio.to_thread(handle.call, 3) == 6


async def test_the_async_handle_has_it_too(app: App) -> None:
    async with local(app) as client:
        handle = client.get_handle("double").sync
        assert await asyncio.to_thread(handle.call, 3) == 6


def test_inside_a_def_backend(client: SyncClient) -> None:
    assert client.get_handle("asks_another").call(4) == 8 + 0 + 2 + 4 + 6


def test_inside_a_def_backend_the_deadline_is_inherited(client: SyncClient) -> None:
    with pytest.raises(DeadlineExceeded):
        client.get_handle("asks_with_a_deadline").options(timeout_s=0.1).call()
    assert gate.cancelled.wait(5)


def test_inside_an_async_backend_it_refuses(client: SyncClient) -> None:
    with pytest.raises(RuntimeError, match=r"use the async handle \(sync=False\): `await handle\.call"):
        client.get_handle("asks_blocking").call(1)


# -- stopping early --------------------------------------------------------------------------


def test_a_stream_closed_early_closes_the_generator(client: SyncClient) -> None:
    stream: Any = client.get_handle("endless").stream()
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    assert not gate.closed.is_set()
    stream.close()
    assert gate.closed.wait(5)


def test_a_map_closed_early_takes_its_calls_back(client: SyncClient) -> None:
    def items() -> Iterator[int]:
        yield 1
        gate.entered.wait(5)
        yield 2

    results: Any = client.get_handle("double").map(items())
    gate.entered.set()
    assert next(results) == 2
    results.close()
    with pytest.raises(StopIteration):
        next(results)


async def test_an_iterator_that_is_dropped_in_a_loop_does_not_block_it(app: App) -> None:
    async with local(app) as client:
        handle = client.get_handle("endless", sync=True)
        stream: Any = await asyncio.to_thread(handle.stream)
        assert await asyncio.to_thread(next, stream) == 0
        del stream
        gc.collect()
        await wait_until(gate.closed.is_set, 5, "the generator's end")


def test_an_interrupted_call_is_taken_back(client: SyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = Future.result
    waits: list[Future[Any]] = []

    def interrupted(self: Future[Any], timeout: float | None = None) -> Any:
        waits.append(self)
        if len(waits) == 1:  # for the call to be handed to the loop; then for its end
            return wait(self, timeout)
        assert gate.entered.wait(5)
        monkeypatch.setattr(Future, "result", wait)
        raise KeyboardInterrupt

    monkeypatch.setattr(Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        client.get_handle("stuck").call()
    assert gate.cancelled.wait(5)


# -- after the end ---------------------------------------------------------------------------


def test_after_the_end_it_says_so(app: App) -> None:
    with serveit.serve(app, local=True, http={"location": None}) as client:
        handle = client.get_handle("double")
        stream: Any = client.get_handle("endless").stream()
        assert next(stream) == 0
    for attempt in (lambda: handle.call(1), lambda: handle.stream(1), lambda: handle.map([1])):
        with pytest.raises(
            NotServing, match=r"<SyncHandle default/double>: the client that it came from has been shut down"
        ):
            attempt()
    stream.close()


def test_going_on_with_an_iterator_after_the_end_says_so(app: App) -> None:
    with serveit.serve(app, local=True, http={"location": None}) as client:
        stream: Any = client.get_handle("endless").stream()
        results: Any = client.get_handle("double").map(range(100), max_in_flight=2)
        assert (next(stream), next(results)) == (0, 0)
    for iterator, name in ((stream, "endless"), (results, "double")):
        with pytest.raises(
            NotServing, match=rf"default/{name}>: the client that it came from has been shut down"
        ):
            next(iterator)
        with pytest.raises(StopIteration):
            next(iterator)


async def test_an_iterator_in_the_loop_that_it_needs_is_no_end(app: App) -> None:
    async with local(app) as client:
        stream: Any = await asyncio.to_thread(client.get_handle("words", sync=True).stream, "a b")
        with pytest.raises(RuntimeError, match="event loop thread") as caught:
            next(stream)
        assert not isinstance(caught.value, NotServing)


async def test_a_call_that_the_end_cuts_off(app: App) -> None:
    async with local(app) as client:
        gateway = client.runtime.gateway
        call = asyncio.create_task(asyncio.to_thread(client.get_handle("stuck", sync=True).call))
        await wait_until(gate.entered.is_set, 5, "the call")
        await gateway.portal.stop(cancel_remaining=True)
        with pytest.raises(NotServing, match="the app was shut down meanwhile") as caught:
            await call
        assert caught.value.executed == "maybe"

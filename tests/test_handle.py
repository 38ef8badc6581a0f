from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import logging
import pickle
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest

import serveit
from serveit import App
from serveit.calling.directory import Directory
from serveit.calling.gateway import Gateway
from serveit.calling.handle import Handle, HandleOptions
from serveit.clock import DeadlineWheel
from serveit.context import Context, enter
from serveit.control.snapshot import AppInfo, ReplicaInfo
from serveit.exceptions import (
    DeadlineExceeded,
    EncodingError,
    NeedsRay,
    NotServing,
    QueueFull,
    RemoteError,
)
from serveit.observe import NullObserver
from serveit.testing import LocalClient, ManualClock, local
from serveit.wire.frames import END, STREAM, Call, Frame, FrameType, Reserve, Reserved, decode_message
from serveit.wire.pickles import load
from tests.fake_replicas import FakeReplica, Replicas, backend_info
from tests.support import wait_until


class Busy:
    """Counts who is inside, and holds them until the test lets them go."""

    def __init__(self) -> None:
        self.inside = 0
        self.peak = 0
        self.entered: list[Any] = []
        self.cancelled: list[Any] = []
        self.free = asyncio.Event()

    async def hold(self, item: Any) -> Any:
        self.entered.append(item)
        self.inside += 1
        self.peak = max(self.peak, self.inside)
        try:
            await self.free.wait()
            return item
        except asyncio.CancelledError:
            self.cancelled.append(item)
            raise
        finally:
            self.inside -= 1


class NotRebuilt(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")

    def __reduce__(self) -> Any:
        return type(self), ()


class Unpicklable:
    def __reduce__(self) -> Any:
        raise ValueError("stays here")


class Point:
    """Equal where its coordinates are: to see that arguments arrive as they were given."""

    def __init__(self, x: int) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and other.x == self.x

    __hash__ = None  # type: ignore[assignment]


def make_app(busy: Busy | None = None) -> App:  # noqa: C901
    app = App()

    @app.backend
    async def echo(*args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and not kwargs else (args, kwargs)

    @app.backend
    async def fail(kind: str) -> Any:
        if kind == "own":
            raise LookupError("nothing under that name")
        if kind == "serveit":
            raise QueueFull("of user code")
        if kind == "not rebuilt":
            raise NotRebuilt(1, 2)
        if kind == "cancelled":
            raise asyncio.CancelledError
        if kind == "exit":
            raise SystemExit(3)
        return Unpicklable()

    @app.backend
    async def count(end: int, bad: int = -1) -> AsyncIterator[int]:
        for number in range(end):
            if number == bad:
                raise ValueError(f"{number} is bad")
            yield number

    @app.backend
    def plain_count(end: int) -> Iterator[int]:
        yield from range(end)

    @app.backend
    class Model:
        def __init__(self) -> None:
            self.factor = 3

        async def __call__(self, number: int) -> int:
            return number * self.factor

        async def explain(self, number: int) -> str:
            return f"{number} times {self.factor}"

        async def words(self, text: str) -> AsyncIterator[str]:
            for word in text.split():
                yield word

    app.add_route("/explain", Model.explain, name="explaining")

    @app.backend(max_ongoing_requests=4)
    async def held(item: Any) -> Any:
        assert busy is not None
        return await busy.hold(item)

    @app.backend(max_ongoing_requests=1, max_queued_requests=1)
    async def narrow(item: Any) -> Any:
        assert busy is not None
        return await busy.hold(item)

    return app


@contextlib.asynccontextmanager
async def served(busy: Busy | None = None) -> AsyncIterator[LocalClient]:
    async with local(make_app(busy)) as client:
        yield client
        if busy is not None:
            busy.free.set()


async def numbers(end: int, *, bad: int = -1) -> AsyncIterator[int]:
    for number in range(end):
        if number == bad:
            raise OSError("the source broke")
        yield number


def load_of(client: LocalClient, backend: str) -> tuple[int, int]:
    statistics = client.runtime.gateway.directory.routers[backend].statistics()
    return statistics.waiting, statistics.outstanding


# -- call ------------------------------------------------------------------------------------


async def test_arguments_and_results_arrive_as_they_were_given() -> None:
    async with served() as client:
        handle = client.get_handle("echo")
        assert await handle.call(Point(3)) == Point(3)
        assert await handle.call(1, "two", three={3}) == ((1, "two"), {"three": {3}})
        assert await handle.call() == ((), {})


@pytest.mark.parametrize("count", [10, 9_000, 140_000, 700_000])
@pytest.mark.parametrize("dtype", ["u1", "f8"])
async def test_arrays_of_all_sizes_both_ways(count: int, dtype: str) -> None:
    array = np.arange(count).astype(dtype).reshape(-1, 5)
    async with served() as client:
        back = await client.get_handle("echo").call(array)
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)
    back[0, 0] = 7  # writable, and its own
    assert array[0, 0] == 0


async def test_large_octets_both_ways_at_the_same_time() -> None:
    bodies = [bytes([number]) * 5_000_000 for number in range(4)]
    async with served() as client:
        handle = client.get_handle("echo")
        results = await asyncio.gather(*map(handle.call, bodies))
        assert results == bodies
        assert load_of(client, "echo") == (0, 0)


async def test_methods_are_reached_by_name() -> None:
    async with served() as client:
        model = client.get_handle("Model")
        assert await model.call(2) == 6
        assert await model.explain.call(2) == "2 times 3"
        assert await model.options(method_name="explain").call(4) == "4 times 3"
        assert [word async for word in model.words.stream("a b")] == ["a", "b"]
        assert await client.get_handle("explaining").call(5) == "5 times 3"
        with pytest.raises(AttributeError, match="has no method 'explane': did you mean 'explain'"):
            await model.explane.call(2)
        with pytest.raises(AttributeError, match="'Handle' object has no attribute '_repr_html_'"):
            model._repr_html_  # noqa: B018
        assert repr(model.explain) == "<Handle default/Model.explain>"
        assert repr(model) == "<Handle default/Model>"


async def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    async with served() as client:
        with pytest.raises(KeyError, match="did you mean 'echo'"):
            client.get_handle("ecco")


# -- errors ----------------------------------------------------------------------------------


async def test_an_exception_arrives_as_itself_with_its_traceback() -> None:
    async with served() as client:
        with pytest.raises(LookupError, match="nothing under that name") as caught:
            await client.get_handle("fail").call("own")
    assert type(caught.value) is LookupError
    cause = caught.value.__cause__
    assert type(cause).__name__ == "RemoteTraceback"
    assert "in fail" in str(cause)
    assert 'raise LookupError("nothing under that name")' in str(cause)
    assert caught.value.executed == "yes"  # type: ignore[attr-defined]


async def test_serveit_s_own_exceptions_from_user_code_were_executed() -> None:
    async with served() as client:
        with pytest.raises(QueueFull, match="^of user code$") as caught:
            await client.get_handle("fail").call("serveit")
    assert caught.value.executed == "yes"


@pytest.mark.parametrize(
    ("kind", "text"),
    [("not rebuilt", "NotRebuilt: 1 and 2"), ("cancelled", "CancelledError"), ("exit", "SystemExit: 3")],
)
async def test_what_cannot_be_raised_here_is_described(kind: str, text: str) -> None:
    async with served() as client:
        with pytest.raises(RemoteError, match=text) as caught:
            await client.get_handle("fail").call(kind)
        assert "in fail" in caught.value.remote_traceback
        assert await client.get_handle("echo").call(1) == 1


async def test_an_argument_that_does_not_pickle() -> None:
    async with served() as client:
        with pytest.raises(EncodingError, match="an argument of 'echo' cannot be pickled") as caught:
            await client.get_handle("echo").call(Unpicklable())
        assert "stays here" in str(caught.value)
        assert caught.value.executed == "no"
        assert load_of(client, "echo") == (0, 0)


async def test_a_result_that_does_not_pickle() -> None:
    async with served() as client:
        with pytest.raises(
            EncodingError, match="the result, of type Unpicklable, cannot be pickled"
        ) as caught:
            await client.get_handle("fail").call("result")
    assert caught.value.executed == "yes"


async def test_a_stream_is_no_value_and_a_value_no_stream() -> None:
    async with served() as client:
        with pytest.raises(TypeError, match="returned a stream.*handle.stream"):
            await client.get_handle("count").call(1_000_000)
        with pytest.raises(
            TypeError, match=r"'echo' returned a value, not a stream: use `await handle\.call"
        ):
            await anext(aiter(client.get_handle("echo").stream(1)))
        with pytest.raises(TypeError, match="'echo' returned a value"):
            await anext(aiter(client.get_handle("echo").stream(bytes(1_000_000))))
        await wait_until(
            lambda: load_of(client, "count") == load_of(client, "echo") == (0, 0), 5, "free slots"
        )


async def test_a_full_queue_names_the_way_out() -> None:
    busy = Busy()
    async with served(busy) as client:
        handle = client.get_handle("narrow")
        calls = [asyncio.create_task(handle.call(number)) for number in range(3)]
        await client.clock.settle()
        with pytest.raises(
            QueueFull, match=r"max_queued_requests=1.*handle\.map\(items, max_in_flight=\.\.\.\)"
        ):
            await handle.call(4)
        busy.free.set()
        assert await asyncio.gather(*calls) == [0, 1, 2]


# -- deadlines and cancelling ----------------------------------------------------------------


async def test_timeout_s_gives_up_and_frees_the_slot() -> None:
    busy = Busy()
    async with served(busy) as client:
        call = asyncio.create_task(client.get_handle("held").options(timeout_s=0.5).call(1))
        await client.clock.advance(0.4)
        assert busy.entered == [1]
        await client.clock.advance(0.2)
        with pytest.raises(DeadlineExceeded, match="backend 'held' did not answer in time") as caught:
            await call
        assert caught.value.executed == "maybe"
        assert busy.cancelled == [1]
        assert load_of(client, "held") == (0, 0)


async def test_a_nested_call_inherits_the_deadline() -> None:
    busy = Busy()
    app = make_app(busy)
    seen: list[float | None] = []

    @app.backend
    async def outer(timeout_s: float | None) -> None:
        seen.append(serveit.context().deadline)
        await app.handle("held").options(timeout_s=timeout_s).call("inner")

    async with local(app) as client:
        handle = client.get_handle("outer").options(timeout_s=2)
        # The longer of the two does not count; the inner one ends no later than the outer.
        for own, ends_after in ((None, 2.0), (5.0, 2.0), (0.5, 0.5)):
            call = asyncio.create_task(handle.call(own))
            start = client.clock.time()
            await client.clock.advance(ends_after - 0.1)
            assert not call.done()
            assert load_of(client, "held") == (0, 1)
            await client.clock.advance(0.2)
            with pytest.raises(DeadlineExceeded):
                await call
            assert load_of(client, "held") == (0, 0)
            assert seen[-1] == pytest.approx(start + 2, abs=0.01)


async def test_a_nested_call_after_the_deadline_is_not_made() -> None:
    app = make_app()

    @app.backend(num_replicas=1)
    def outer() -> str:
        late.wait(10)
        try:
            return str(app.handle("echo", sync=True).call(1))
        except DeadlineExceeded as error:
            outcome.append(error)
            raise

    late = threading.Event()
    outcome: list[DeadlineExceeded] = []
    async with local(app) as client:
        call = asyncio.create_task(client.get_handle("outer").options(timeout_s=1).call())
        await client.clock.advance(2)
        late.set()
        with pytest.raises(DeadlineExceeded):
            await call
        await wait_until(lambda: outcome, 5, "the nested call")
    assert outcome[0].executed == "no"
    assert "was over before backend 'echo' was asked" in str(outcome[0])


async def test_cancelling_the_task_takes_the_request_back() -> None:
    busy = Busy()
    async with served(busy) as client:
        call = asyncio.create_task(client.get_handle("held").call(1))
        await wait_until(lambda: busy.entered, 5, "the function")
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await wait_until(lambda: busy.cancelled == [1], 5, "the cancellation")
        await wait_until(lambda: load_of(client, "held") == (0, 0), 5, "a free slot")


async def test_cancelling_in_the_middle_of_a_large_answer(faked: Faked) -> None:
    replica = await faked.connect()
    call = asyncio.create_task(faked.handle.call(1))
    await wait_until(lambda: replica.streams, 5, "the call")
    replica.begin_large(1, 1_000_000)
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert replica.sent(FrameType.CANCEL)
    replica.error(1)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"timeout_s": 0}, ValueError, "timeout_s must be > 0 and finite, got 0"),
        ({"timeout_s": -1.0}, ValueError, "must be > 0"),
        ({"timeout_s": float("inf")}, ValueError, "finite, got inf; None for no limit"),
        ({"timeout_s": float("nan")}, ValueError, "finite"),
        ({"timeout_s": "5"}, TypeError, "timeout_s must be a number of seconds or None, got '5'"),
        ({"timeout_s": True}, TypeError, "got True"),
        ({"method_name": 5}, TypeError, "method_name must be a str or None, got 5"),
        ({"shard_key": b"x"}, TypeError, "shard_key must be a str or None, got b'x'"),
        ({"missing_ok": 1}, TypeError, "missing_ok must be True or False, got 1"),
        ({"timeout": 5}, TypeError, "a handle has no option 'timeout': did you mean 'timeout_s'"),
    ],
)
async def test_wrong_options(
    faked: Faked, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        faked.handle.options(**options)


async def test_options_make_a_copy(faked: Faked) -> None:
    handle = faked.handle
    changed = handle.options(timeout_s=1, shard_key="k").options(timeout_s=None)
    assert changed._options == HandleOptions(shard_key="k")
    assert handle._options == HandleOptions()


# -- stream ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["count", "plain_count"])
async def test_items_come_one_by_one(name: str) -> None:
    async with served() as client:
        assert [item async for item in client.get_handle(name).stream(1000)] == list(range(1000))
        assert [item async for item in client.get_handle(name).stream(0)] == []


async def test_a_stream_that_fails_gives_its_items_first() -> None:
    got = []
    async with served() as client:
        with pytest.raises(ValueError, match="3 is bad"):
            async for item in client.get_handle("count").stream(10, bad=3):
                got.append(item)  # noqa: PERF401  # what came before the error stays
        with pytest.raises(ValueError, match="0 is bad"):
            await anext(aiter(client.get_handle("count").stream(1, bad=0)))
    assert got == [0, 1, 2]


async def test_who_stops_reading_closes_the_generator() -> None:
    app = App()
    closed = []

    @app.backend
    async def endless() -> AsyncIterator[int]:
        number = 0
        try:
            while True:
                yield number
                number += 1
        finally:
            closed.append(number)

    async with local(app) as client:
        stream: Any = client.get_handle("endless").stream()
        assert [await anext(stream) for _ in range(3)] == [0, 1, 2]
        await stream.aclose()
        await wait_until(lambda: closed, 5, "the generator's end")
        assert closed[0] < 1000  # held back: nobody read on
        await wait_until(lambda: load_of(client, "endless") == (0, 0), 5, "a free slot")


async def test_a_stream_that_nobody_reads_is_never_called() -> None:
    busy = Busy()
    async with served(busy) as client:
        client.get_handle("held").stream(1)
        await client.clock.settle()
    assert busy.entered == []


async def test_a_stream_that_is_empty_from_its_head_on(faked: Faked) -> None:
    replica = await faked.connect()
    items = asyncio.create_task(collect(faked.handle.stream()))
    await wait_until(lambda: replica.streams, 5, "the call")
    replica.answer(1, flags=STREAM | END)
    assert await items == []


# -- map -------------------------------------------------------------------------------------


async def collect(source: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in source]


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("max_in_flight", [1, 3, 64])
async def test_map_keeps_the_order(is_async: bool, max_in_flight: int) -> None:
    async with served() as client:
        source: Any = numbers(50) if is_async else range(50)
        results = client.get_handle("Model").map(source, max_in_flight=max_in_flight)
        assert await collect(results) == [3 * number for number in range(50)]
        assert await collect(client.get_handle("Model").map([])) == []


async def test_unordered_results_come_with_their_index_as_they_are_ready() -> None:
    app = App()
    order = [3, 0, 2, 1]
    turns: dict[int, asyncio.Event] = {}

    @app.backend
    async def in_turn(number: int) -> str:
        await turns[number].wait()
        return f"item {number}"

    async with local(app) as client:
        turns.update({number: asyncio.Event() for number in order})
        results: Any = client.get_handle("in_turn").map(iter(range(4)), ordered=False)
        for number in order:
            turns[number].set()
            assert await anext(results) == (number, f"item {number}")
        assert await collect(results) == []


@pytest.mark.parametrize("ordered", [False, True])
async def test_max_in_flight_bounds_what_is_not_handed_out(faked: Faked, ordered: bool) -> None:
    replica = await faked.connect(limit=100)
    taken = 0

    def source() -> Iterator[int]:
        nonlocal taken
        for number in range(20):
            taken += 1
            yield number

    results: Any = faked.handle.map(source(), max_in_flight=3, ordered=ordered)
    first = asyncio.create_task(anext(results))
    await faked.clock.settle()
    assert len(replica.streams) == 3
    assert taken <= 4
    for stream in (1, 2, 3):
        replica.answer(stream, stream)
    await first
    await faked.clock.settle()
    # One was handed out: one more may be under way, though all three are answered.
    assert len(replica.streams) == 4
    await anext(results)
    await faked.clock.settle()
    assert len(replica.streams) == 5
    await results.aclose()
    assert sorted(frame.stream for frame in replica.sent(FrameType.CANCEL)) == [4, 5]


async def test_results_do_not_wait_for_a_slow_source() -> None:
    more = asyncio.Event()

    async def slow() -> AsyncIterator[int]:
        yield 1
        await more.wait()
        yield 2

    async with served() as client:
        for ordered in (True, False):
            more.clear()
            results: Any = client.get_handle("echo").map(slow(), ordered=ordered)
            assert await anext(results) == (1 if ordered else (0, 1))
            more.set()
            assert await collect(results) == [2 if ordered else (1, 2)]


@pytest.mark.parametrize("ordered", [False, True])
async def test_the_first_error_cancels_the_rest(ordered: bool) -> None:
    busy = Busy()
    app = make_app(busy)

    @app.backend
    async def picky(item: int) -> int:
        if item == 0:
            raise ValueError("not zero")
        result: int = await busy.hold(item)
        return result

    async with local(app) as client:
        with pytest.raises(ValueError, match="not zero"):
            await collect(client.get_handle("picky").map(range(100), max_in_flight=5, ordered=ordered))
        await wait_until(lambda: len(busy.cancelled) == len(busy.entered), 5, "the cancellations")
        assert len(busy.entered) <= 5
        await wait_until(lambda: load_of(client, "picky") == (0, 0), 5, "free slots")


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("is_async", [False, True])
async def test_a_source_that_breaks(ordered: bool, is_async: bool) -> None:
    def plain() -> Iterator[int]:
        yield from range(3)
        raise OSError("the source broke")

    got = []
    async with served() as client:
        source: Any = numbers(9, bad=3) if is_async else plain()
        with pytest.raises(OSError, match="the source broke"):
            async for result in client.get_handle("echo").map(source, max_in_flight=2, ordered=ordered):
                got.append(result)  # noqa: PERF401  # what came before the error stays
        await wait_until(lambda: load_of(client, "echo") == (0, 0), 5, "free slots")
    if ordered:
        assert got == [0, 1, 2]


async def test_a_source_that_is_cancelled_by_itself_ends_the_map() -> None:
    async def source() -> AsyncIterator[int]:
        yield 1
        raise asyncio.CancelledError

    async with served() as client:
        with pytest.raises(asyncio.CancelledError):
            await collect(client.get_handle("echo").map(source()))


async def test_an_argument_of_map_that_does_not_pickle() -> None:
    async with served() as client:
        with pytest.raises(EncodingError, match="an argument of 'echo'"):
            await collect(client.get_handle("echo").map([1, Unpicklable(), 3]))


async def test_closing_early_cancels_what_is_under_way(caplog: pytest.LogCaptureFixture) -> None:
    busy = Busy()
    async with served(busy) as client:
        results: Any = client.get_handle("held").map(range(100), max_in_flight=6)
        first = asyncio.create_task(anext(results))
        await wait_until(lambda: len(busy.entered) == 4, 5, "full slots")
        busy.free.set()
        await first
        busy.free.clear()
        await results.aclose()
        await wait_until(lambda: load_of(client, "held") == (0, 0), 5, "free slots")
        await wait_until(lambda: busy.inside == 0, 5, "the cancellations")
    with caplog.at_level(logging.ERROR, "asyncio"):
        gc.collect()
    assert not caplog.records


async def test_a_cancelled_reader_cancels_what_is_under_way() -> None:
    busy = Busy()
    async with served(busy) as client:
        reader = asyncio.create_task(collect(client.get_handle("held").map(numbers(100), max_in_flight=2)))
        await wait_until(lambda: len(busy.entered) == 2, 5, "full slots")
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        await wait_until(lambda: len(busy.cancelled) == 2, 5, "the cancellations")


@pytest.mark.parametrize(
    ("items", "max_in_flight", "error", "text"),
    [
        ([], 0, ValueError, "max_in_flight must be ≥ 1, got 0"),
        ([], 2.5, TypeError, "max_in_flight must be an int, got 2.5"),
        ([], True, TypeError, "got True"),
        (5, 1, TypeError, "'int' object is not iterable"),
    ],
)
async def test_map_refuses_at_once(
    faked: Faked, items: Any, max_in_flight: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        faked.handle.map(items, max_in_flight=max_in_flight)


# -- traffic ---------------------------------------------------------------------------------


async def test_an_endpoint_s_handle_follows_its_traffic() -> None:
    app = App()
    shadowed: list[int] = []

    @app.backend
    async def v1(number: int) -> str:
        return "v1"

    @app.backend
    async def v2(number: int) -> str:
        return "v2"

    @app.backend
    async def v3(number: int) -> str:
        shadowed.append(number)
        raise ValueError("a shadow's failure is nobody's")

    app.add_route("/predict/<number:int>", traffic={"v1": 0.5, "v2": 0.5}, shadow={"v3": 1.0})
    async with local(app) as client:
        handle = client.get_handle("/predict/<number:int>")
        answers = [await handle.call(number) for number in range(60)]
        assert set(answers) == {"v1", "v2"}
        for key in map(str, range(10)):
            sticky = handle.options(shard_key=key)
            assert len({await sticky.call(0) for _ in range(5)}) == 1
        await wait_until(lambda: len(shadowed) == 110, 5, "the shadows")


# -- where handles belong --------------------------------------------------------------------


async def test_remote_needs_ray_and_names_call() -> None:
    async with served() as client:
        with pytest.raises(NeedsRay, match=r"'default' runs without Ray: use `await handle\.call"):
            await client.get_handle("echo").remote(1)


class FakeTasks:
    """Ray's part of a call: strings that begin with "ref:" are the ObjectRefs."""

    def __init__(self) -> None:
        self.waited: list[Any] = []
        self.ready = asyncio.Event()
        self.ready.set()
        self.given_up = 0

    async def _until_ready(self) -> None:
        try:
            await self.ready.wait()
        except asyncio.CancelledError:
            self.given_up += 1
            raise

    def are_among(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return any(str(value).startswith("ref:") for value in (*args, *kwargs.values()))

    async def fetch(self, args: Any, kwargs: Any) -> Any:
        await self._until_ready()

        def value(of: Any) -> Any:
            return str(of).removeprefix("ref:")

        return tuple(map(value, args)), {name: value(of) for name, of in kwargs.items()}

    async def wait(self, args: Any, kwargs: Any) -> None:
        self.waited += args
        await self._until_ready()
        if "ref:broken" in args:
            raise LookupError("its task failed")

    async def start(self, replica: ReplicaInfo, request_id: str, args: Any, kwargs: Any) -> Any:
        return replica.id, request_id, args, kwargs


async def heard(replica: FakeReplica, kind: FrameType) -> Frame:
    await wait_until(lambda: replica.sent(kind), 5, f"a {kind.name}")
    return replica.sent(kind)[-1]


async def test_remote_reserves_a_slot_and_starts_the_task_on_it(faked: Faked) -> None:
    faked.gateway.tasks = tasks = FakeTasks()
    replica = await faked.connect()
    remote = asyncio.ensure_future(faked.handle.options(timeout_s=5).explain.remote("ref:1", two=2))
    frame = await heard(replica, FrameType.RESERVE)
    reserve = decode_message(Reserve, frame)
    assert (reserve.target, reserve.deadline_ms) == ("explain", 5000)
    assert tasks.waited == ["ref:1"] and not remote.done()
    replica.say(FrameType.RESERVED, frame.stream, Reserved(0))
    assert await remote == ("a", reserve.request_id, ("ref:1",), {"two": 2})


async def test_remote_given_up_gives_its_slot_back(faked: Faked) -> None:
    faked.gateway.tasks = FakeTasks()
    replica = await faked.connect()
    remote = asyncio.ensure_future(faked.handle.remote(1))
    await heard(replica, FrameType.RESERVE)
    remote.cancel()
    await heard(replica, FrameType.CANCEL)
    assert remote.cancelled()


async def test_object_refs_among_the_arguments_of_a_call_are_fetched(faked: Faked) -> None:
    faked.gateway.tasks = FakeTasks()
    replica = await faked.connect()
    call = asyncio.ensure_future(faked.handle.call("ref:1", "2", three="ref:3"))
    frame = await heard(replica, FrameType.CALL)
    message = decode_message(Call, frame)
    assert load(message.sizes, frame.body) == (("1", "2"), {"three": "3"})
    call.cancel()


@pytest.mark.parametrize("use", ["call", "remote", "stream"])
async def test_object_refs_are_waited_for_until_the_deadline(faked: Faked, use: str) -> None:
    faked.gateway.tasks = tasks = FakeTasks()
    tasks.ready.clear()
    replica = await faked.connect()
    handle = faked.handle.options(timeout_s=0.5)
    waiting: asyncio.Future[Any]
    if use == "stream":
        waiting = asyncio.ensure_future(collect(handle.stream("ref:1")))
    else:
        waiting = asyncio.ensure_future(getattr(handle, use)("ref:1"))
    await faked.clock.advance(0.4)
    assert not waiting.done()
    await faked.clock.advance(0.2)
    with pytest.raises(DeadlineExceeded, match="the ObjectRefs among the arguments of 'model'") as caught:
        await waiting
    assert caught.value.executed == "no"
    assert (tasks.given_up, replica.frames) == (1, [])


async def test_what_the_wait_for_object_refs_took_is_gone(faked: Faked) -> None:
    faked.gateway.tasks = tasks = FakeTasks()
    tasks.ready.clear()
    replica = await faked.connect()
    calls = [
        asyncio.ensure_future(use("ref:1"))
        for use in (faked.handle.options(timeout_s=5).call, faked.handle.options(timeout_s=5).remote)
    ]
    await faked.clock.advance(3)
    tasks.ready.set()
    call = decode_message(Call, await heard(replica, FrameType.CALL))
    reserve = decode_message(Reserve, await heard(replica, FrameType.RESERVE))
    assert call.deadline_ms == reserve.deadline_ms == 2000
    for each in calls:
        each.cancel()


async def test_the_deadline_of_the_request_that_it_runs_for_bounds_the_wait(faked: Faked) -> None:
    faked.gateway.tasks = tasks = FakeTasks()
    tasks.ready.clear()
    await faked.connect()

    async def inside() -> None:
        enter(Context("shop", "outer", "outer#1", "r1", faked.clock.time() + 1), None)
        await faked.handle.call("ref:1")

    call = asyncio.ensure_future(inside())
    await faked.clock.advance(1.1)
    with pytest.raises(DeadlineExceeded):
        await call


async def test_who_is_cancelled_waits_for_object_refs_no_longer(faked: Faked) -> None:
    faked.gateway.tasks = tasks = FakeTasks()
    tasks.ready.clear()
    await faked.connect()
    remote = asyncio.ensure_future(faked.handle.options(timeout_s=5).remote("ref:1"))
    await faked.clock.settle()
    remote.cancel()
    await faked.clock.settle()
    assert remote.cancelled() and tasks.given_up == 1


@pytest.mark.parametrize("timeout_s", [None, 5])
async def test_a_failed_object_ref_is_raised_as_it_is(faked: Faked, timeout_s: float | None) -> None:
    faked.gateway.tasks = FakeTasks()
    await faked.connect()
    with pytest.raises(LookupError, match="its task failed"):
        await faked.handle.options(timeout_s=timeout_s).remote("ref:broken")


# -- names that come and go ------------------------------------------------------------------


def missing(client: LocalClient, **options: Any) -> Handle[..., Any]:
    return client.get_handle("later", missing_ok=True).options(**options)


async def test_a_missing_name_is_waited_for_until_the_deadline() -> None:
    async with served() as client:
        uses = [missing(client, timeout_s=5).call(1), collect(missing(client, timeout_s=5).stream(1))]
        waiting = [asyncio.ensure_future(use) for use in uses]
        await client.clock.advance(4.9)
        assert not any(each.done() for each in waiting)
        await client.clock.advance(0.2)
        for each in waiting:
            text = r"\(until its deadline\), but app 'default' has no backend or endpoint 'later': "
            with pytest.raises(DeadlineExceeded, match=text) as caught:
                await each
            assert caught.value.executed == "no"


async def test_without_a_deadline_it_is_waited_for_for_a_minute() -> None:
    async with served() as client:
        waiting = asyncio.ensure_future(missing(client).call(1))
        await client.clock.advance(59)
        assert not waiting.done()
        await client.clock.advance(2)
        with pytest.raises(DeadlineExceeded, match=r"without a deadline 60 s\), but app 'default' has no"):
            await waiting


async def test_what_was_missing_is_called_once_it_is_there(faked: Faked) -> None:
    faked.gateway.tasks = FakeTasks()
    handle: Handle[..., Any] = Handle(faked.gateway, "model", HandleOptions(missing_ok=True))
    call, remote = asyncio.ensure_future(handle.call(1)), asyncio.ensure_future(handle.remote(2))
    mapped = asyncio.ensure_future(anext(handle.map([3])))
    await faked.clock.settle()
    assert not call.done() and not remote.done()
    replica = await faked.connect()
    await wait_until(lambda: len(replica.sent(FrameType.CALL)) == 2, 5, "the calls")
    bodies = [load(decode_message(Call, frame).sizes, frame.body) for frame in replica.sent(FrameType.CALL)]
    assert sorted(bodies) == [((1,), {}), ((3,), {})]
    await heard(replica, FrameType.RESERVE)
    for each in (call, remote, mapped):
        each.cancel()
    await asyncio.wait((call, remote, mapped))


async def test_what_is_gone_is_missed_and_waited_for_by_who_may(faked: Faked) -> None:
    replica = await faked.connect()
    patient = faked.handle.options(missing_ok=True, timeout_s=1)
    await faked.directory.update(AppInfo("shop", (), (), ()))
    with pytest.raises(KeyError, match="has no backend or endpoint 'model'"):
        await faked.handle.call(1)
    waiting = asyncio.ensure_future(patient.call(1))
    await faked.clock.advance(1.1)
    with pytest.raises(DeadlineExceeded):
        await waiting
    assert replica.sent(FrameType.CALL) == []


async def test_a_repr_names_the_kind_and_what_was_set() -> None:
    async with served() as client:
        model = client.get_handle("Model").options(timeout_s=5, shard_key="k").explain
        assert repr(model) == "<Handle default/Model.explain shard_key='k' timeout_s=5>"
        assert repr(model.sync) == "<SyncHandle default/Model.explain shard_key='k' timeout_s=5>"
        assert repr(missing(client)) == "<Handle default/later missing_ok=True>"


async def test_a_handle_does_not_pickle() -> None:
    async with served() as client:
        handle = client.get_handle("echo")
        for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match=r"cannot be pickled: .* inside a backend use `app\.handle"):
                attempt(handle)
        with pytest.raises(TypeError):
            pickle.dumps(handle.sync)


async def test_a_handle_belongs_to_its_loop() -> None:
    async with served() as client:
        handle = client.get_handle("echo")

        def elsewhere() -> None:
            asyncio.run(handle.call(1))

        with pytest.raises(
            RuntimeError, match=r"belongs to another event loop.*`handle\.sync` from a thread"
        ):
            await asyncio.to_thread(elsewhere)


async def test_after_the_end_a_handle_says_so() -> None:
    async with served() as client:
        handle = client.get_handle("echo")
    with pytest.raises(NotServing, match="backend 'echo' has been shut down"):
        await handle.call(1)


# -- with a fake replica ---------------------------------------------------------------------


class Faked:
    """A handle on the backend "model", whose replica "a" is the test's."""

    def __init__(self) -> None:
        self.replicas = Replicas()
        self.clock = ManualClock()
        self.directory = Directory(
            "shop",
            default_queue=100,
            connect=self.replicas.connect,
            clock=self.clock,
            wheel=DeadlineWheel(self.clock),
            observer=NullObserver(),
        )
        portal: Any = None
        self.gateway = Gateway(self.directory, asyncio.get_running_loop(), portal)
        self.handle: Handle[..., Any] = Handle(self.gateway, "model")

    async def connect(self, limit: int = 2) -> FakeReplica:
        await self.directory.update(AppInfo("shop", (backend_info("a", limit=limit),), (), ()))
        return self.replicas["a"]


@pytest.fixture
async def faked() -> AsyncIterator[Faked]:
    faked = Faked()
    yield faked
    faked.directory.close()
    await asyncio.sleep(0)

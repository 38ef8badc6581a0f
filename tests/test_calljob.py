from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.responses import PlainTextResponse

from serveit import EncodingError, RemoteError
from serveit.exceptions import RemoteTraceback
from serveit.wire.frames import END, STREAM, Call, CallAnswer, FrameType, encode_message
from tests.callers import Caller, running


async def echo(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


async def test_arguments_arrive_as_given_and_the_result_as_returned() -> None:
    async with running(echo) as replica:
        caller = Caller(replica)
        assert await caller.result(caller.call(1, "a", b=[2])) == ((1, "a"), {"b": [2]})


async def test_arrays_travel_beside_the_pickle() -> None:
    numpy = pytest.importorskip("numpy")

    async def double(array: Any) -> Any:
        return array * 2

    async with running(double) as replica:
        caller = Caller(replica)
        stream = caller.call(numpy.arange(2_000))
        assert (await caller.result(stream)).tolist() == (numpy.arange(2_000) * 2).tolist()
        answer = caller.message(stream, CallAnswer)
        assert isinstance(answer, CallAnswer)
        assert len(answer.sizes) == 2


async def test_a_batch_is_called_with_one_item() -> None:
    async def batch(items: list[Any]) -> list[Any]:
        return items

    async with running(batch, max_batch_size=2) as replica:
        caller = Caller(replica)
        assert await caller.result(caller.call([1, 2])) == [1, 2]
        for stream in (caller.call(), caller.call(1, 2), caller.call(1, x=2)):
            failure = await caller.failure(stream)
            assert (failure.kind, failure.executed) == ("TypeError", "no")
            assert "'__call__' is called with batches: give exactly one item" in failure.text


async def test_octets_that_are_no_call_are_an_error_before_user_code() -> None:
    async with running(echo) as replica:
        caller = Caller(replica)
        for stream, (sizes, body) in enumerate([([3], b"abc"), ([2, 9], b"abc"), ([4], b"\x80\x05N.")], 1):
            caller.receive(FrameType.CALL, stream, encode_message(Call("r", "__call__", sizes)), body, END)
            assert (await caller.failure(stream)).executed == "no"


async def test_a_result_that_does_not_pickle_is_named() -> None:
    async def lock() -> Any:
        return threading.Lock()

    async with running(lock) as replica:
        caller = Caller(replica)
        with pytest.raises(EncodingError, match="the result, of type lock, cannot be pickled") as caught:
            await caller.result(caller.call())
        assert caught.value.executed == "yes"


async def test_any_value_is_whole_a_response_too() -> None:
    async def respond() -> Any:
        return PlainTextResponse("hello")

    async with running(respond) as replica:
        caller = Caller(replica)
        assert (await caller.result(caller.call())).body == b"hello"
        stream = caller.call()
        job = caller.listener._jobs[stream]
        assert repr(job) == "<CallJob r2 __call__ RUNNING>"
        with pytest.raises(AssertionError, match="unreachable"):
            await job.deliver(1)
        await caller.over(stream)


async def test_a_stream_is_a_pickle_an_item() -> None:
    async def count(to: int) -> AsyncIterator[Any]:
        for number in range(to):
            yield {"n": number}

    async with running(count) as replica:
        caller = Caller(replica)
        stream, empty = caller.call(3), caller.call(0)
        assert await caller.items(stream) == [{"n": 0}, {"n": 1}, {"n": 2}]
        assert await caller.items(empty) == []
        for opened in (stream, empty):
            assert caller.link.of(opened)[0].flags == STREAM


class Odd(Exception):
    """Does not come back from its pickle."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__("odd")

    def __reduce__(self) -> Any:
        return type(self), ()


async def test_an_exception_is_raised_as_it_was_with_the_traceback_as_its_cause() -> None:
    async def fails() -> None:
        raise LookupError("here", 1)

    async with running(fails) as replica:
        caller = Caller(replica)
        with pytest.raises(LookupError) as caught:
            await caller.result(caller.call())
        assert caught.value.args == ("here", 1)
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        assert "in fails" in str(caught.value.__cause__)
        assert caught.value.executed == "yes"  # type: ignore[attr-defined]


@pytest.mark.parametrize("error", [Odd(1, 2), SystemExit(3), StopIteration(4), StopAsyncIteration(5)])
async def test_what_cannot_be_raised_there_is_described(error: BaseException) -> None:
    def fails() -> None:
        raise error

    async def batch(items: list[int]) -> list[Any]:
        return [error]

    async with running(batch, max_batch_size=1) as replica:
        caller = Caller(replica)
        stream = caller.call(1)
        with pytest.raises(RemoteError, match=type(error).__name__):
            await caller.result(stream)
        assert (await caller.over(stream)).body == b""
    async with running(fails) as replica:
        caller = Caller(replica)
        with pytest.raises((RemoteError, RuntimeError)):
            await caller.result(caller.call())


async def test_nothing_but_debug_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def fails() -> None:
        raise LookupError("quietly")

    with caplog.at_level(logging.INFO, "serveit"):
        async with running(fails) as replica:
            caller = Caller(replica)
            await caller.over(caller.call())
    assert caplog.records == []

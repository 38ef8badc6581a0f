from __future__ import annotations

import gc
import logging
from typing import Any

import pytest

from serveit.calling.exchange import Answer, Exchange, Phase
from serveit.exceptions import ReplicaDied
from serveit.wire.frames import END, MAX_INLINE, Call, CallAnswer, Failure, FrameType, Message
from tests.fake_replicas import FakeExchange, Rig


async def test_the_size_of_a_body_counts_octets_and_not_items() -> None:
    matrix: Any = memoryview(bytearray(80)).cast("d")
    exchange = FakeExchange(body=(b"head", matrix, bytearray(3)))
    assert exchange.body_size == 4 + 80 + 3


@pytest.mark.parametrize(("size", "inline"), [(0, True), (MAX_INLINE, True), (MAX_INLINE + 1, False)])
async def test_a_body_goes_along_with_its_message_up_to_64_kib(size: int, inline: bool) -> None:
    assert FakeExchange(body=(bytes(size),)).inline is inline


async def test_its_repr_says_how_far_it_is_and_where() -> None:
    rig = Rig()
    await rig.update("a")
    exchange = FakeExchange()
    assert repr(exchange) == "<Exchange CALL WAITING>"
    rig.router.submit(exchange)
    assert repr(exchange) == "<Exchange CALL SENT on a/1>"


async def test_before_it_is_submitted_nothing_can_be_taken_back() -> None:
    exchange = FakeExchange(deadline=1.0)
    exchange.cancel()
    exchange.expire()
    assert exchange.phase == Phase.WAITING
    assert not exchange.answer.done()


async def test_the_first_end_counts() -> None:
    exchange = FakeExchange()
    answer = Answer[Message](CallAnswer(0, []), END, b"", None)
    exchange.succeed(answer)
    exchange.fail(ReplicaDied("too late"))
    exchange.succeed(Answer(CallAnswer(0, []), END, b"other", None))
    assert await exchange.answer is answer


async def test_a_failure_that_nobody_waits_for_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    exchange = FakeExchange()
    exchange.fail(ReplicaDied("nobody reads this"))
    with caplog.at_level(logging.ERROR, "asyncio"):
        del exchange
        gc.collect()
    assert not caplog.records


async def test_a_failure_reaches_whoever_waits() -> None:
    exchange = FakeExchange()
    exchange.fail(ReplicaDied("gone"))
    with pytest.raises(ReplicaDied, match="gone"):
        await exchange.answer


async def test_what_an_error_means_is_for_those_who_know_the_caller() -> None:
    exchange = Exchange(FrameType.CALL, Call("x", "f", []), (b"",), CallAnswer, None)
    with pytest.raises(NotImplementedError):
        exchange.rebuild(Failure(0, 500, "E", "", "", "yes"), b"")

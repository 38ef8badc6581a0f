from __future__ import annotations

import asyncio
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serveit.calling.connection import MAX_STREAM, Connection
from serveit.calling.exchange import Exchange, Phase
from serveit.control.snapshot import ReplicaInfo
from serveit.exceptions import ProtocolError, RemoteError, ReplicaDied
from serveit.histogram import Histogram
from serveit.wire.frames import (
    END,
    FREED,
    MAX_FRAME,
    MAX_INLINE,
    PART,
    STREAM,
    Call,
    CallAnswer,
    Failure,
    Figures,
    FrameType,
    Hello,
    Load,
)
from serveit.wire.streams import WINDOW, cost
from tests.fake_replicas import FakeExchange, FakeReplica


class FakeDispatcher:
    """A router that only takes notes."""

    def __init__(self) -> None:
        self.time = 0.0
        self.rooms = 0
        self.drained = 0
        self.answers: list[Exchange] = []
        self.refusals: list[Exchange] = []
        self.losses: list[Exchange] = []

    def room_made(self, connection: Connection) -> None:
        self.rooms += 1

    def answered(self, exchange: Exchange) -> None:
        self.answers.append(exchange)

    def refused(self, exchange: Exchange) -> None:
        self.refusals.append(exchange)

    def lost(self, connection: Connection, exchanges: list[Exchange]) -> None:
        self.losses += exchanges

    def draining(self, connection: Connection) -> None:
        self.drained += 1

    def now(self) -> float:
        return self.time


class Rig:
    def __init__(self, limit: int = 2, prefetch: int = 1) -> None:
        self.dispatcher = FakeDispatcher()
        self.connection = Connection(ReplicaInfo("r#1", "r#1"), limit, prefetch, self.dispatcher)
        self.replica = FakeReplica(self.connection)
        self.connection.link = self.replica

    def send(self, **options: object) -> FakeExchange:
        exchange = FakeExchange(**options)  # type: ignore[arg-type]
        self.connection.send(exchange)
        return exchange


@pytest.fixture
async def rig() -> Rig:
    return Rig()


# -- what is known of the load ---------------------------------------------------------------


@given(
    limit=st.integers(1, 20),
    prefetch=st.integers(1, 8),
    outstanding=st.integers(0, 40),
    others=st.integers(0, 40),
)
def test_room_is_what_is_free_and_the_prefetch(
    limit: int, prefetch: int, outstanding: int, others: int
) -> None:
    connection = Connection(ReplicaInfo("r", "r"), limit, prefetch, FakeDispatcher())
    connection.outstanding, connection.others = outstanding, others
    assert connection.has_room is (outstanding < max(0, limit - others) + prefetch)
    assert connection.has_free_slot is (outstanding + others < limit)
    assert connection.load == outstanding + others
    if connection.has_free_slot:
        assert connection.has_room


async def test_every_frame_back_tells_of_the_load(rig: Rig) -> None:
    for _ in range(4):
        rig.send()
    heard = []
    rig.replica.queued(1, others=3)
    heard.append(rig.connection.others)
    rig.replica.started(1, others=4)
    heard.append(rig.connection.others)
    rig.replica.answer(1, others=5)
    heard.append(rig.connection.others)
    rig.replica.error(2, others=6)
    heard.append(rig.connection.others)
    rig.replica.refuse(3, others=7)
    heard.append(rig.connection.others)
    assert heard == [3, 4, 5, 6, 7]
    assert rig.connection.outstanding == 1
    assert rig.dispatcher.rooms == 5


async def test_a_replica_tells_that_slots_are_free(rig: Rig) -> None:
    rig.send()
    rig.replica.started(1, others=2)
    assert not rig.connection.has_room
    rig.replica.say(FrameType.PING, 0, None)  # a heartbeat says nothing of it
    assert (rig.connection.others, rig.dispatcher.rooms) == (2, 2)
    rig.replica.say(FrameType.PING, 0, Load(0))
    assert (rig.connection.others, rig.connection.has_free_slot, rig.dispatcher.rooms) == (0, True, 3)


async def test_free_slots_lift_what_refusals_had_set() -> None:
    rig = Rig(limit=10)
    for _ in range(5):
        rig.send()
    for stream in range(2, 6):
        rig.replica.refuse(stream, others=9)
    assert not rig.connection.has_room
    rig.replica.say(FrameType.PING, 0, Load(3))
    for _ in range(6):
        assert rig.connection.has_free_slot
        rig.send()
    assert not rig.connection.has_free_slot


async def test_an_answer_that_nobody_waits_for_tells_of_the_load_too(rig: Rig) -> None:
    exchanges = [rig.send() for _ in range(3)]
    for exchange in exchanges:
        rig.connection.cancel(exchange)
    rig.replica.answer(1, others=5)
    assert rig.connection.others == 5
    rig.replica.answer(2, others=4, flags=FREED)
    assert rig.connection.others == 4
    rig.replica.say(FrameType.ANSWER, 3, None, flags=END)
    assert rig.replica.closed
    await asyncio.sleep(0)


@pytest.mark.parametrize("word", ["goaway", "refused"])
async def test_a_draining_replica_is_reported_once(rig: Rig, word: str) -> None:
    rig.send(), rig.send()
    if word == "goaway":
        rig.replica.goaway()
    for stream in 1, 2:
        rig.replica.refuse(stream, "draining")
    assert rig.dispatcher.drained == 1
    assert not rig.connection.ready


async def test_what_was_heard_of_others_counts_less_while_nothing_of_ours_is_there(rig: Rig) -> None:
    rig.connection.others = 2
    rig.send()
    rig.connection.passed_over()
    assert rig.connection.others == 2  # an answer will tell
    rig.replica.answer(1, others=2)
    for _ in range(3):
        rig.connection.passed_over()
    assert rig.connection.others == 0


async def test_a_full_replica_gets_no_more_until_one_of_its_requests_has_ended() -> None:
    rig = Rig(limit=10, prefetch=1)  # the replica's own limit is 2
    for _ in range(5):
        rig.send()
    rig.replica.refuse(4)
    rig.replica.refuse(5)
    assert (rig.connection.outstanding, rig.connection.has_room) == (3, False)
    assert not rig.connection.has_free_slot
    rig.replica.answer(1)
    assert rig.connection.has_room
    rig.send()
    rig.send()
    assert not rig.connection.has_room  # 2 for each that ended: the one and one to try
    rig.connection.adjust(11, 1)
    assert rig.connection.has_room


async def test_a_replica_that_refuses_with_nothing_of_ours_there_is_still_asked(rig: Rig) -> None:
    rig.send()
    rig.replica.refuse(1)
    assert rig.connection.has_room


async def test_repr_and_state(rig: Rig) -> None:
    connection = rig.connection
    assert repr(connection) == "<Connection r#1 open 0+0/2>"
    assert connection.ready
    rig.replica.goaway()
    assert repr(connection) == "<Connection r#1 draining 0+0/2>"
    assert not connection.ready
    connection.retire()
    assert repr(connection) == "<Connection r#1 retired 0+0/2>"
    assert connection.closed
    await asyncio.sleep(0)
    fresh = Connection(ReplicaInfo("r", "r"), 1, 1, rig.dispatcher)
    assert repr(fresh) == "<Connection r connecting 0+0/1>"
    assert not fresh.ready
    assert not fresh.closed
    fresh.close()
    with pytest.raises(ProtocolError, match="no link to r"):
        fresh.send(FakeExchange())


# -- requests --------------------------------------------------------------------------------


async def test_a_small_request_is_one_frame(rig: Rig) -> None:
    exchange = rig.send(body=(b"head", bytearray(b"tail")))
    (frame,) = rig.replica.frames
    assert (frame.type, frame.flags, frame.stream, frame.body) == (FrameType.CALL, END, 1, b"headtail")
    assert exchange.phase == Phase.SENT
    assert rig.connection.outstanding == 1


async def test_a_large_request_follows_its_message_under_credit(rig: Rig) -> None:
    body = bytes(range(256)) * 2048  # 512 KiB
    exchange = rig.send(body=(body,))
    first = rig.replica.frames[0]
    assert (first.type, first.flags, first.body) == (FrameType.CALL, 0, b"")
    while sum(len(frame.body) for frame in rig.replica.sent(FrameType.DATA)) < len(body):
        got = rig.replica.sent(FrameType.DATA)
        rig.replica.credit(1, sum(cost(len(frame.body)) for frame in got[-2:]))
        assert len(rig.replica.sent(FrameType.DATA)) > len(got)
    data = rig.replica.sent(FrameType.DATA)
    assert b"".join(frame.body for frame in data) == body
    assert [frame.flags & END for frame in data[-2:]] == [0, END]
    rig.replica.answer(1, "thanks")
    assert exchange.phase == Phase.DONE


async def test_the_deadline_on_the_wire_is_what_is_left_when_it_is_sent(rig: Rig) -> None:
    rig.dispatcher.time = 100.0
    rig.send(deadline=100.5)
    rig.dispatcher.time = 100.25
    rig.send(deadline=100.5)
    rig.dispatcher.time = 101.0
    rig.send(deadline=100.5)
    rig.send()
    assert [call.deadline_ms for call in rig.replica.calls] == [500, 250, 0, None]


async def test_what_does_not_fit_a_frame_is_not_sent(rig: Rig) -> None:
    exchange = FakeExchange("x" * MAX_FRAME)
    with pytest.raises(ProtocolError, match="over the limit"):
        rig.connection.send(exchange)
    assert (rig.connection.outstanding, rig.replica.frames) == (0, [])
    assert rig.send().stream == 1


async def test_streams_are_numbered_anew_after_the_last(rig: Rig) -> None:
    rig.connection._next_stream = MAX_STREAM
    first, second = rig.send(), rig.send()
    assert (first.stream, second.stream) == (MAX_STREAM, 1)
    rig.connection._next_stream = MAX_STREAM
    assert rig.send().stream == 2  # those in use are left out


# -- answers ---------------------------------------------------------------------------------


async def test_a_whole_answer(rig: Rig) -> None:
    exchange = rig.send()
    rig.replica.answer(1, "hello")
    answer = await exchange.answer
    assert answer.inflow is None
    assert answer.flags == END
    assert (rig.connection.outstanding, exchange.phase) == (0, Phase.DONE)
    assert rig.dispatcher.answers == [exchange]


async def test_a_large_answer_frees_its_slot_once(rig: Rig) -> None:
    exchange = rig.send()
    rig.replica.begin_large(1, 6)
    assert (rig.connection.outstanding, exchange.phase) == (0, Phase.ANSWERING)
    rig.replica.data(1, b"abc")
    rig.replica.data(1, b"def", END)
    assert (rig.connection.outstanding, exchange.phase) == (0, Phase.DONE)
    inflow = (await exchange.answer).inflow
    assert inflow is not None
    assert await inflow.read_all() == b"abcdef"
    assert rig.dispatcher.rooms == 1


async def test_a_stream_keeps_its_slot_to_its_end(rig: Rig) -> None:
    exchange = rig.send()
    rig.replica.begin_stream(1)
    inflow = (await exchange.answer).inflow
    assert inflow is not None
    rig.replica.data(1, b"one")
    assert await inflow.read() == (b"one", False)
    assert rig.connection.outstanding == 1
    rig.replica.data(1, b"", END)
    assert await inflow.read() == (b"", True)
    assert rig.connection.outstanding == 0


async def test_a_stream_that_fails_gives_its_items_first(rig: Rig) -> None:
    exchange = rig.send()
    rig.replica.begin_stream(1)
    rig.replica.data(1, b"one")
    rig.replica.error(1, "no more")
    inflow = (await exchange.answer).inflow
    assert inflow is not None
    assert await inflow.read() == (b"one", False)
    with pytest.raises(RemoteError, match="no more"):
        await inflow.read()
    assert (rig.connection.outstanding, exchange.phase) == (0, Phase.DONE)


async def test_an_error_fails_the_exchange(rig: Rig) -> None:
    exchange = rig.send()
    rig.replica.error(1, "wrong input")
    with pytest.raises(RemoteError, match="ValueError: wrong input"):
        await exchange.answer
    assert rig.dispatcher.answers == [exchange]


async def test_an_error_that_cannot_be_rebuilt_fails_it_too(rig: Rig) -> None:
    class Picky(FakeExchange):
        def rebuild(self, failure: Failure, body: bytes) -> BaseException:
            raise LookupError("no such class here")

    exchange = Picky()
    rig.connection.send(exchange)
    rig.replica.error(1, "wrong input")
    with pytest.raises(RemoteError, match="ValueError: wrong input"):
        await exchange.answer
    assert rig.connection.outstanding == 0


async def test_phases_only_go_forward(rig: Rig) -> None:
    exchange = rig.send()
    phases = []
    for say in (rig.replica.queued, rig.replica.started, rig.replica.queued):
        say(1)
        phases.append(exchange.phase)
    assert phases == [Phase.QUEUED, Phase.STARTED, Phase.STARTED]
    rig.replica.begin_stream(1)
    rig.replica.started(1)
    assert exchange.phase == Phase.ANSWERING


# -- giving up -------------------------------------------------------------------------------


async def test_a_cancelled_request_keeps_its_slot_until_the_replica_says(rig: Rig) -> None:
    exchange = rig.send()
    rig.connection.cancel(exchange)
    rig.connection.cancel(exchange)
    (frame,) = rig.replica.sent(FrameType.CANCEL)
    assert (frame.stream, rig.connection.outstanding) == (1, 1)
    rig.replica.error(1)
    assert rig.connection.outstanding == 0
    assert rig.dispatcher.answers == []


@pytest.mark.parametrize("late", ["whole", "large", "stream", "refused", "queued, started, failed"])
async def test_what_comes_late_for_a_cancelled_request_frees_its_slot_once(rig: Rig, late: str) -> None:
    exchange = rig.send()
    rig.connection.cancel(exchange)
    replica = rig.replica
    if late == "whole":
        replica.answer(1)
    elif late == "large":
        replica.begin_large(1, 6)
        assert rig.connection.outstanding == 0
        replica.data(1, b"abc")
        replica.data(1, b"def", END)
    elif late == "stream":
        replica.begin_stream(1)
        replica.data(1, b"abc")
        assert rig.connection.outstanding == 1
        replica.error(1)
    elif late == "refused":
        replica.refuse(1)
    else:
        replica.queued(1)
        replica.started(1)
        replica.credit(1, 10)
        replica.error(1)
    assert rig.connection.outstanding == 0
    assert rig.dispatcher.rooms > 0
    assert rig.dispatcher.refusals == []
    assert not exchange.answer.done()
    assert rig.send().stream == 2


async def test_a_cancelled_stream_fails_for_whoever_reads_it(rig: Rig) -> None:
    exchange = rig.send()
    rig.replica.begin_stream(1)
    inflow = (await exchange.answer).inflow
    assert inflow is not None
    rig.connection.cancel(exchange)
    with pytest.raises(ReplicaDied, match="the stream was cancelled"):
        await inflow.read()
    rig.replica.data(1, b"late")  # without credit going back
    assert rig.replica.sent(FrameType.CREDIT) == []
    assert rig.connection.outstanding == 1
    rig.replica.error(1)
    assert rig.connection.outstanding == 0


async def test_a_cancelled_large_request_sends_no_more_of_its_body(rig: Rig) -> None:
    exchange = rig.send(body=(bytes(4 * WINDOW),))
    rig.connection.cancel(exchange)
    count = len(rig.replica.sent(FrameType.DATA))
    rig.replica.credit(1, cost(MAX_INLINE))
    assert len(rig.replica.sent(FrameType.DATA)) == count
    assert rig.replica.frames[-1].type == FrameType.CANCEL


async def test_there_is_nothing_to_cancel_after_the_end_or_the_loss(rig: Rig) -> None:
    ended, lost = rig.send(), rig.send()
    rig.replica.answer(1)
    rig.connection.cancel(ended)
    rig.replica.lose()
    rig.connection.cancel(lost)
    assert rig.replica.sent(FrameType.CANCEL) == []


# -- the end of the link ---------------------------------------------------------------------


async def test_a_lost_link_takes_everything_with_it(rig: Rig) -> None:
    sent, streaming, cancelled, freed = rig.send(), rig.send(), rig.send(), rig.send()
    rig.replica.begin_stream(2)
    rig.replica.data(2, b"one")
    rig.connection.cancel(cancelled)
    rig.replica.begin_large(4, 100)
    rig.replica.lose()
    assert rig.dispatcher.losses == [sent, streaming, freed]
    assert (rig.connection.outstanding, rig.connection.ready) == (0, False)
    inflow = (await streaming.answer).inflow
    assert inflow is not None
    assert await inflow.read() == (b"one", False)
    with pytest.raises(ReplicaDied, match="replica r#1 was lost in the middle of its answer"):
        await inflow.read()


async def test_a_retired_connection_closes_with_its_last_stream(rig: Rig) -> None:
    rig.send()
    rig.send()
    rig.connection.retire()
    rig.replica.answer(1)
    assert not rig.connection.closed
    rig.replica.begin_large(2, 3)
    assert not rig.connection.closed
    rig.replica.data(2, b"abc", END)
    assert rig.connection.closed
    await asyncio.sleep(0)
    assert rig.connection.link is None


# -- replicas that break the rules -----------------------------------------------------------


def second_answer(replica: FakeReplica) -> None:
    replica.begin_stream(1)
    replica.answer(1)


def data_without_head(replica: FakeReplica) -> None:
    replica.data(1, b"x", END)


def refused_after_answer(replica: FakeReplica) -> None:
    replica.begin_stream(1)
    replica.refuse(1)


def refused_after_freed(replica: FakeReplica) -> None:
    replica.begin_large(1, 10)
    replica.refuse(1)


def malformed(replica: FakeReplica) -> None:
    replica.say(FrameType.ANSWER, 1, Failure(0, 500, "", "", "", "no"), flags=END)


def unknown_stream(replica: FakeReplica) -> None:
    replica.answer(9)


def answered_twice(replica: FakeReplica) -> None:
    replica.answer(1)
    replica.answer(1)


def from_a_caller(replica: FakeReplica) -> None:
    replica.say(FrameType.CALL, 1, Call("x", "f", []))


def too_much_credit(replica: FakeReplica) -> None:
    replica.credit(2, WINDOW + 1)


def too_much_data(replica: FakeReplica) -> None:
    replica.begin_stream(1)
    for _ in range(5):
        replica.data(1, bytes(MAX_INLINE), PART)
        replica.data(1, bytes(MAX_INLINE))


@pytest.mark.parametrize(
    "violation",
    [
        second_answer,
        data_without_head,
        refused_after_answer,
        refused_after_freed,
        malformed,
        unknown_stream,
        answered_twice,
        from_a_caller,
        too_much_credit,
        too_much_data,
    ],
)
async def test_a_broken_rule_closes_the_link(
    rig: Rig, violation: object, caplog: pytest.LogCaptureFixture
) -> None:
    exchange = rig.send()
    large = rig.send(body=(bytes(MAX_INLINE + 1),))
    with caplog.at_level(logging.WARNING, "serveit.wire"):
        violation(rig.replica)  # type: ignore[operator]
    assert rig.replica.closed
    assert "closing a link" in caplog.text
    await asyncio.sleep(0)
    assert rig.connection.link is None
    assert large in rig.dispatcher.losses
    assert exchange in rig.dispatcher.losses or exchange.answer.done()
    assert rig.connection.outstanding == 0


async def test_frames_of_no_stream_that_are_allowed(rig: Rig) -> None:
    rig.replica.credit(9, 5)
    rig.replica.say(FrameType.PING, 0, None)
    rig.replica.data(9, b"late", END)
    rig.replica.data(9, b"late")
    assert not rig.replica.closed
    rig.replica.say(FrameType.HELLO, 0, Hello(b"", (1, 1), "", []))
    assert rig.replica.closed
    await asyncio.sleep(0)


async def test_a_replica_that_frees_a_cancelled_slot_twice_frees_it_once(rig: Rig) -> None:
    exchange = rig.send()
    rig.send()
    rig.connection.cancel(exchange)
    for _ in range(2):
        rig.replica.say(FrameType.ANSWER, 1, CallAnswer(0, [6]), flags=FREED)
    assert rig.connection.outstanding == 1
    rig.replica.error(1)
    assert rig.connection.outstanding == 1


async def test_flags_tell_streams_from_values(rig: Rig) -> None:
    exchange = rig.send()
    rig.replica.answer(1, flags=STREAM | END)
    answer = await exchange.answer
    assert answer.inflow is None
    assert answer.flags & STREAM


# -- figures ---------------------------------------------------------------------------------


def figures(requests: int) -> Figures:
    return Figures(0, 0, requests, 0, {}, Histogram.of(()), Histogram.of(()), Histogram.of(()))


async def test_figures_are_asked_for_once_and_shared(rig: Rig) -> None:
    first, second = rig.connection.figures(), rig.connection.figures()
    assert len(rig.replica.sent(FrameType.METRICS)) == 1
    rig.replica.say(FrameType.METRICS, 0, figures(1))
    assert (await first) == (await second) == figures(1)
    third = rig.connection.figures()
    assert len(rig.replica.sent(FrameType.METRICS)) == 2
    rig.replica.say(FrameType.METRICS, 0, figures(2))
    assert (await third).requests == 2


async def test_figures_do_not_count_as_a_request(rig: Rig) -> None:
    asked = rig.connection.figures()
    assert (rig.connection.outstanding, rig.dispatcher.rooms) == (0, 0)
    rig.replica.say(FrameType.METRICS, 0, figures(1))
    assert (rig.connection.outstanding, rig.dispatcher.rooms) == (0, 0)
    assert asked.done()


async def test_who_waits_for_figures_hears_of_the_loss(rig: Rig) -> None:
    asked = rig.connection.figures()
    rig.replica.lose()
    assert asked.cancelled()
    with pytest.raises(ProtocolError, match="no link to r#1"):
        rig.connection.figures()


async def test_figures_that_come_again_are_dropped_and_those_never_asked_for_are_a_fault(rig: Rig) -> None:
    other = Rig()
    asked = rig.connection.figures()
    rig.replica.say(FrameType.METRICS, 0, figures(1))
    rig.replica.say(FrameType.METRICS, 0, figures(2))
    assert (await asked).requests == 1
    other.replica.say(FrameType.METRICS, 0, figures(1))
    assert other.replica.closed and not rig.replica.closed

"""Bodies under credit: everything arrives in its order, nobody runs ahead, nobody waits for ever."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serveit.exceptions import BodyTooLarge, ProtocolError
from serveit.wire.frames import END, MAX_INLINE, PART, Buffer, Credit, Frame, FrameType, decode_message
from serveit.wire.streams import FRAME_COST, WINDOW, Collector, Inflow, Outflow, cost


class Wire:
    """One end of a link that only keeps what was sent."""

    stale = False

    def __init__(self) -> None:
        self.closed = False
        self.sent: deque[Frame] = deque()

    def send(self, kind: int, stream: int, meta: bytes = b"", body: Buffer = b"", flags: int = 0) -> None:
        self.sent.append(Frame(int(kind), flags, stream, meta, bytes(body)))

    def flush(self) -> None:
        raise AssertionError("nobody flushes here")

    def close(self) -> None:
        raise AssertionError("nobody closes here")

    def credits(self) -> list[int]:
        """Takes and decodes what was sent; all of it is CREDIT."""
        taken = [self.sent.popleft() for _ in range(len(self.sent))]
        assert {frame.type for frame in taken} <= {FrameType.CREDIT}
        return [decode_message(Credit, frame).octets for frame in taken]

    def data(self) -> list[tuple[bytes, int]]:
        taken = [self.sent.popleft() for _ in range(len(self.sent))]
        assert {frame.type for frame in taken} <= {FrameType.DATA}
        return [(frame.body, frame.flags) for frame in taken]


def at_once(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as stopped:
        return stopped.value
    coroutine.close()
    raise AssertionError("it waits")


def test_the_largest_frame_costs_less_than_the_credit_that_is_given_back_at_once() -> None:
    assert cost(MAX_INLINE) <= WINDOW // 2
    assert cost(0) == FRAME_COST > 0


rarely = st.sampled_from([False] * 5 + [True])


class Stream(RuleBasedStateMachine):
    """A writer and a reader, with the frames between them delivered at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.to_reader, self.to_writer = Wire(), Wire()
        self.outflow = Outflow(self.to_reader, 5)
        self.inflow = Inflow(self.to_writer, 5)
        self.written: list[tuple[bytes, bool]] = []  # octets, and whether they are one item
        self.read: list[bytes] = []
        self.readable = 0
        self.closing = False
        self.ended = False
        self.largest_item = 0
        self.number = 0

    @initialize(first=st.lists(st.integers(0, 3 * WINDOW), max_size=3), item=st.booleans(), end=rarely)
    def begin(self, first: list[int], item: bool, end: bool) -> None:
        self._write(first, item, end)

    @precondition(lambda self: not self.closing)
    @rule(
        sizes=st.lists(
            st.one_of(st.integers(0, 100), st.integers(0, 2 * WINDOW), st.just(MAX_INLINE)), max_size=4
        ),
        item=st.booleans(),
        end=rarely,
    )
    def write(self, sizes: list[int], item: bool, end: bool) -> None:
        self._write(sizes, item, end)

    def _write(self, sizes: list[int], item: bool, end: bool) -> None:
        buffers: list[bytearray] = []
        for size in sizes:
            self.number += 1
            start = bytearray((self.number * 7 + n) % 256 for n in range(min(size, 8)))
            buffers.append(start + bytes([self.number % 256]) * (size - len(start)))
        self.written.append((b"".join(buffers), item))
        if item:
            self.largest_item = max(self.largest_item, sum(sizes))
        self.outflow.write(buffers, end=end, item=item)
        for buffer in buffers:
            buffer[:] = b"?" * len(buffer)  # its owner uses it again
        self.closing = end

    @precondition(lambda self: self.to_reader.sent)
    @rule(count=st.integers(1, 20))
    def deliver_data(self, count: int) -> None:
        self._deliver_data(count)

    def _deliver_data(self, count: int) -> None:
        for _ in range(min(count, len(self.to_reader.sent))):
            frame = self.to_reader.sent.popleft()
            assert (frame.type, frame.stream, frame.meta) == (FrameType.DATA, 5, b"")
            assert len(frame.body) <= MAX_INLINE
            self.inflow.received(frame.body, frame.flags)
            self.readable += not frame.flags & PART

    @precondition(lambda self: self.to_writer.sent)
    @rule()
    def deliver_credit(self) -> None:
        self._deliver_credit()

    def _deliver_credit(self) -> None:
        for octets in self.to_writer.credits():
            assert octets >= WINDOW // 2
            self.outflow.credited(octets)

    @rule(count=st.integers(1, 20))
    def take(self, count: int) -> None:
        self._take(count)

    def _take(self, count: int) -> None:
        for _ in range(min(count, self.readable)):
            item, self.ended = at_once(self.inflow.read())
            self.read.append(item)
            self.readable -= 1

    @invariant()
    def the_writer_is_never_further_ahead_than_a_window(self) -> None:
        under_way = sum(cost(len(frame.body)) for frame in self.to_reader.sent)
        granted = sum(decode_message(Credit, frame).octets for frame in self.to_writer.sent)
        assert under_way <= WINDOW
        # Credit is neither lost nor made.
        if not self.inflow._ended:
            assert self.outflow._credit + under_way + self.inflow._outstanding + granted == WINDOW
        unread = sum(map(len, self.inflow._items)) + sum(map(len, self.inflow._parts))
        assert unread <= WINDOW + self.largest_item

    def teardown(self) -> None:
        """However it came to be as it is: with a reader that reads it always comes to its end."""
        if not self.closing:
            self._write([], False, True)
        for _ in range(10_000):
            if self.ended:
                break
            moved = False
            if self.to_reader.sent:
                self._deliver_data(1_000)
                moved = True
            if self.readable:
                self._take(1_000)
                moved = True
            if self.to_writer.sent:
                self._deliver_credit()
                moved = True
            assert moved, f"nothing moves: {self.outflow!r} {self.inflow!r}"
        assert self.ended
        assert self.outflow.ended
        assert b"".join(self.read) == b"".join(octets for octets, _ in self.written)
        # What was written as an item arrives as one; other writes only in pieces of it.
        arrived = deque(self.read)
        for octets, item in self.written:
            together = arrived.popleft()
            while not item and len(together) < len(octets):
                together += arrived.popleft()
            assert together == octets
        assert not arrived


TestStream = Stream.TestCase


# -- the writer -----------------------------------------------------------------------------------


def test_flags_tell_parts_of_an_item_and_the_end() -> None:
    wire = Wire()
    outflow = Outflow(wire, 1)
    outflow.write([bytes(MAX_INLINE + 1)], item=True)
    outflow.write([b"ab", b"c"])
    outflow.write([b"d"], end=True)
    assert [(len(body), flags) for body, flags in wire.data()] == [
        (MAX_INLINE, PART),
        (1, 0),
        (2, 0),
        (1, 0),
        (1, END),
    ]
    assert outflow.ended
    assert repr(outflow) == f"<Outflow 1 ended credit={WINDOW - 5 * FRAME_COST - MAX_INLINE - 5} pending=0>"


def test_an_end_without_octets_waits_for_its_turn_when_the_credit_is_spent() -> None:
    wire = Wire()
    outflow = Outflow(wire, 1)
    spent = 0
    while outflow._credit >= FRAME_COST:
        size = min(MAX_INLINE, outflow._credit - FRAME_COST)
        outflow.write([bytes(size)])
        spent += cost(size)
    assert spent > WINDOW - FRAME_COST
    outflow.write([], end=True)
    assert not outflow.ended
    assert END not in {flags for _, flags in wire.data()}
    assert repr(outflow).startswith("<Outflow 1 open credit=0 pending=1")
    outflow.credited(WINDOW // 2)
    assert outflow.ended
    assert wire.data() == [(b"", END)]


def test_octets_that_are_immutable_are_not_copied_while_they_wait() -> None:
    fixed, changing = bytes(2 * WINDOW), bytearray(2 * WINDOW)
    outflow = Outflow(Wire(), 1)
    outflow.write([fixed, changing])
    kept = [part for part, _ in outflow._pending]
    assert sum(len(part) for part in kept if isinstance(part, memoryview) and part.obj is fixed) > WINDOW
    assert sum(len(part) for part in kept if isinstance(part, bytes)) == len(changing)
    changing.clear()  # nothing looks at it any more


async def test_drain_waits_until_all_is_on_its_way_whoever_asks() -> None:
    outflow = Outflow(Wire(), 1)
    outflow.write([b"small"])
    at_once(outflow.drain())
    outflow.write([bytes(2 * WINDOW)])
    waiting = [asyncio.create_task(outflow.drain()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[1].cancel()
    outflow.credited(WINDOW // 2)
    await asyncio.sleep(0)
    assert [task.done() for task in waiting] == [False, True, False]
    for _ in range(2):
        outflow.credited(WINDOW // 2)
    await asyncio.gather(waiting[0], waiting[2])
    assert waiting[1].cancelled()


async def test_abort_fails_who_waits_and_who_comes_later_and_drops_the_rest() -> None:
    wire = Wire()
    outflow = Outflow(wire, 1)
    outflow.write([bytes(2 * WINDOW)])
    waiting = [asyncio.create_task(outflow.drain()) for _ in range(2)]
    await asyncio.sleep(0)
    wire.data()
    gone = ConnectionError("gone")
    outflow.abort(gone)
    assert await asyncio.gather(*waiting, return_exceptions=True) == [gone, gone]
    outflow.credited(WINDOW // 2)
    outflow.write([b"more"], end=True)
    assert wire.data() == []
    assert not outflow.ended
    assert "aborted" in repr(outflow)
    with pytest.raises(ConnectionError, match="gone"):
        await outflow.drain()


async def test_abort_while_a_cancelled_drain_has_not_noticed_yet() -> None:
    outflow = Outflow(Wire(), 1)
    outflow.write([bytes(2 * WINDOW)])
    task = asyncio.create_task(outflow.drain())
    await asyncio.sleep(0)
    outflow.abort(ConnectionError())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_credit_beyond_the_window_is_a_protocol_error() -> None:
    outflow = Outflow(Wire(), 1)
    with pytest.raises(ProtocolError, match="credit of 262,145 octets is over the window of 262,144"):
        outflow.credited(1)


# -- the reader -----------------------------------------------------------------------------------


def test_data_beyond_the_credit_or_the_end_is_a_protocol_error() -> None:
    inflow = Inflow(Wire(), 1)
    for _ in range(WINDOW // cost(0)):
        inflow.received(b"", 0)
    with pytest.raises(ProtocolError, match="beyond the credit"):
        inflow.received(b"", 0)
    inflow = Inflow(Wire(), 1)
    inflow.received(b"x", END)
    with pytest.raises(ProtocolError, match="after the end"):
        inflow.received(b"y", 0)
    with pytest.raises(ProtocolError, match="in the middle of an item"):
        Inflow(Wire(), 1).received(b"y", END | PART)


def test_a_reader_that_does_not_read_holds_back_items_that_are_larger_than_the_window() -> None:
    to_reader, to_writer = Wire(), Wire()
    outflow, inflow = Outflow(to_reader, 1), Inflow(to_writer, 1)
    item = bytes(2 * WINDOW)

    def exchange() -> int:
        """Everything that can be delivered is; the number of octets that got through."""
        octets = 0
        while to_reader.sent or to_writer.sent:
            for body, flags in to_reader.data():
                octets += len(body)
                inflow.received(body, flags)
            for credit in to_writer.credits():
                outflow.credited(credit)
        return octets

    for _ in range(10):
        outflow.write([item], item=True)
    assert len(item) <= exchange() <= len(item) + WINDOW
    for _ in range(9):
        assert at_once(inflow.read()) == (item, False)
        assert exchange() <= len(item) + WINDOW
    outflow.write([], end=True)
    exchange()
    assert at_once(inflow.read()) == (item, False)
    exchange()
    assert at_once(inflow.read()) == (b"", True)


async def test_read_waits_for_an_item_and_says_when_it_is_the_last() -> None:
    inflow = Inflow(Wire(), 1)
    reading = asyncio.create_task(inflow.read())
    await asyncio.sleep(0)
    inflow.received(b"a", PART)
    await asyncio.sleep(0)
    assert not reading.done()
    inflow.received(b"b", 0)
    assert await reading == (b"ab", False)
    inflow.received(b"c", 0)
    inflow.received(b"d", END)
    assert await inflow.read() == (b"c", False)
    assert await inflow.read() == (b"d", True)
    with pytest.raises(EOFError, match="stream 1 has been read to its end"):
        await inflow.read()


async def test_a_cancelled_read_loses_nothing() -> None:
    inflow = Inflow(Wire(), 1)
    reading = asyncio.create_task(inflow.read())
    await asyncio.sleep(0)
    inflow.received(b"a", 0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert await inflow.read() == (b"a", False)


async def test_a_second_reader_is_refused_and_the_first_stays() -> None:
    inflow = Inflow(Wire(), 1)
    reading = asyncio.create_task(inflow.read())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="read by another task"):
        await inflow.read()
    inflow.received(b"a", 0)
    inflow.received(b"b", 0)
    assert await reading == (b"a", False)


async def test_a_reader_woken_for_an_item_that_another_took_waits_on() -> None:
    inflow = Inflow(Wire(), 1)
    reading = asyncio.create_task(inflow.read())
    await asyncio.sleep(0)
    inflow.received(b"a", 0)
    assert at_once(inflow.read()) == (b"a", False)
    await asyncio.sleep(0)
    assert not reading.done()
    inflow.received(b"b", END)
    assert await reading == (b"b", True)


async def test_a_failure_comes_after_what_came_before_it_and_only_the_first_counts() -> None:
    inflow = Inflow(Wire(), 1)
    inflow.received(b"a", 0)
    inflow.fail(ConnectionError("first"))
    inflow.fail(ConnectionError("second"))
    assert repr(inflow) == f"<Inflow 1 failed items=1 outstanding={FRAME_COST + 1}>"
    assert await inflow.read() == (b"a", False)
    for _ in range(2):
        with pytest.raises(ConnectionError, match="first"):
            await inflow.read()


async def test_a_failure_wakes_the_reader_and_is_nothing_to_a_stream_that_is_complete() -> None:
    inflow = Inflow(Wire(), 1)
    reading = asyncio.create_task(inflow.read_all())
    await asyncio.sleep(0)
    inflow.fail(ConnectionError("gone"))
    inflow.fail(ConnectionError("gone again"))
    with pytest.raises(ConnectionError, match="gone"):
        await reading
    inflow = Inflow(Wire(), 1)
    inflow.received(b"all", END)
    inflow.fail(ConnectionError())
    assert await inflow.read_all() == b"all"
    assert repr(inflow) == f"<Inflow 1 ended items=0 outstanding={FRAME_COST + 3}>"


async def test_read_all_joins_what_comes_and_gives_credit_meanwhile() -> None:
    wire = Wire()
    inflow = Inflow(wire, 1)
    reading = asyncio.create_task(inflow.read_all())
    for n in range(10):
        inflow.received(bytes([n]) * MAX_INLINE, 0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert wire.credits() == [2 * cost(MAX_INLINE)] * 5
    inflow.received(b"", END)
    octets = await reading
    assert octets == b"".join(bytes([n]) * MAX_INLINE for n in range(10))
    assert wire.credits() == []


# -- the replica's ---------------------------------------------------------------------------------


@given(st.lists(st.integers(0, MAX_INLINE), max_size=30))
def test_a_collector_gives_the_whole_with_its_last_frame(sizes: list[int]) -> None:
    wire = Wire()
    collector = Collector(wire, 3, sum(sizes))
    granted = 0
    for size in sizes:
        assert collector.received(bytes(size), 0) is None
        granted += sum(wire.credits())
        owed = sum(map(cost, sizes)) - granted
        assert owed >= 0
    assert sum(map(cost, sizes)) - granted < WINDOW // 2
    whole = collector.received(b"", END)
    assert type(whole) is bytes
    assert len(whole) == sum(sizes)
    assert wire.credits() == []


def test_a_collector_refuses_what_is_past_its_cap_and_lets_go_of_it() -> None:
    collector = Collector(Wire(), 3, 10)
    collector.received(b"0123456789", 0)
    assert repr(collector) == "<Collector 3 10/10>"
    with pytest.raises(BodyTooLarge, match="the body is larger than 10 bytes"):
        collector.received(b"x", END)
    assert repr(collector) == "<Collector 3 0/10>"
    with pytest.raises(BodyTooLarge):
        Collector(Wire(), 3, -1).received(b"", END)


def test_a_collector_keeps_single_octets_in_one_piece() -> None:
    collector = Collector(Wire(), 3, 1000)
    for n in range(100):
        collector.received(bytes([n]), 0)
    assert collector._octets == bytes(range(100))

"""What every kind of link keeps to. A new kind is one more entry in `KINDS`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serveit.exceptions import ProtocolError
from serveit.wire.channel import Channel, connect, listen
from serveit.wire.frames import HEADER, MAX_FRAME, Decoder, Frame, FrameType, encode_frame
from serveit.wire.link import Link, Receiver, deliver, lose, receive
from serveit.wire.memory import memory_pair
from tests.support import wait_until


class Recorder:
    """A receiver that keeps what it hears, and does on a stream's frame what `on` says."""

    def __init__(self) -> None:
        self.link: Link | None = None
        self.frames: list[Frame] = []
        self.losses: list[BaseException | None] = []
        self.frames_when_lost: int | None = None
        self.on: dict[int, Callable[[], object]] = {}
        self.on_loss: Callable[[], object] = lambda: None

    @property
    def streams(self) -> list[int]:
        return [frame.stream for frame in self.frames]

    def frame_received(self, frame: Frame) -> None:
        assert not self.losses, "link_lost comes last"
        if frame.type == FrameType.PING and not frame.stream:
            return  # a heartbeat
        self.frames.append(frame)
        self.on.get(frame.stream, lambda: None)()

    def link_lost(self, error: BaseException | None) -> None:
        self.losses.append(error)
        self.on_loss()


Ends = tuple[Link, Link]
Opener = Callable[[Receiver, Receiver], AbstractAsyncContextManager[Ends]]


@contextlib.asynccontextmanager
async def open_memory(one: Receiver, other: Receiver) -> AsyncIterator[Ends]:
    ends = memory_pair()
    ends[0].receiver, ends[1].receiver = one, other
    yield ends


@contextlib.asynccontextmanager
async def open_channel(address: str, one: Receiver, other: Receiver) -> AsyncIterator[Ends]:
    accepted: list[Channel] = []

    def accept(channel: Channel) -> Receiver:
        accepted.append(channel)
        return other

    listening = await listen(address, accept, role="replica", secret=b"hush")
    try:
        near = await connect(listening.address, one, role="caller", secret=b"hush")
        await wait_until(lambda: accepted, 5, "the other end is there")
        yield near, accepted[0]
    finally:
        await listening.aclose()


@contextlib.asynccontextmanager
async def open_unix(one: Receiver, other: Receiver) -> AsyncIterator[Ends]:
    with tempfile.TemporaryDirectory() as directory:
        async with open_channel(f"unix:{directory}/s", one, other) as ends:
            yield ends


def open_tcp(one: Receiver, other: Receiver) -> AbstractAsyncContextManager[Ends]:
    return open_channel("tcp:127.0.0.1:0", one, other)


KINDS: dict[str, Opener] = {"memory": open_memory, "unix": open_unix, "tcp": open_tcp}


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param}


class Pair:
    """A link under test: what its ends are and what they hear."""

    def __init__(self, one: Recorder, other: Recorder, ends: Ends) -> None:
        self.one, self.other = one, other
        self.near, self.far = ends
        one.link, other.link = ends

    async def lost(self) -> None:
        await wait_until(lambda: self.one.losses and self.other.losses, 5, "both ends hear of the loss")
        for _ in range(5):
            await asyncio.sleep(0)
        assert len(self.one.losses) == len(self.other.losses) == 1, "exactly once"
        assert self.near.closed and self.far.closed


@pytest.fixture(params=KINDS)
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    one, other = Recorder(), Recorder()
    async with KINDS[request.param](one, other) as ends:
        pair = Pair(one, other, ends)
        assert not pair.near.closed and not pair.far.closed
        assert not pair.near.stale and not pair.far.stale
        yield pair
        pair.near.close()
        pair.far.close()
        await wait_until(lambda: one.losses and other.losses, 5, "the link is closed")


def send(link: Link, *streams: int) -> None:
    for stream in streams:
        link.send(FrameType.PING, stream)


async def heard(recorder: Recorder, count: int) -> None:
    await wait_until(lambda: len(recorder.frames) >= count, 5, f"{count} frames arrive")


def raises(error: BaseException) -> Callable[[], object]:
    def do() -> None:
        raise error

    return do


# -- the contract ---------------------------------------------------------------------------------


async def test_a_frame_arrives_as_it_was_sent_both_ways(pair: Pair) -> None:
    pair.near.send(FrameType.CALL, 7, b"meta", memoryview(b"body"), 3)
    pair.far.send(FrameType.ANSWER, 8)
    await heard(pair.other, 1)
    await heard(pair.one, 1)
    assert pair.other.frames == [Frame(FrameType.CALL, 3, 7, b"meta", b"body")]
    assert pair.one.frames == [Frame(FrameType.ANSWER, 0, 8, b"", b"")]


async def test_frames_keep_their_order_over_many_ticks_and_sizes(pair: Pair) -> None:
    bodies = [bytes([n % 251]) * size for n, size in enumerate([0, 1, 70_000, 5, MAX_FRAME - 4, 2, 300_000])]
    for stream, body in enumerate(bodies):
        pair.near.send(FrameType.DATA, stream, b"", body)
        if stream % 2:
            await asyncio.sleep(0)
    await heard(pair.other, len(bodies))
    assert pair.other.streams == list(range(len(bodies)))
    assert [frame.body for frame in pair.other.frames] == bodies


async def test_a_body_may_be_changed_once_it_was_sent(pair: Pair) -> None:
    body = bytearray(b"before")
    pair.near.send(FrameType.DATA, 1, b"", memoryview(body))
    body[:] = b"after!"
    await heard(pair.other, 1)
    assert pair.other.frames[0].body == b"before"


async def test_the_frames_of_one_tick_arrive_together_and_not_within_send(pair: Pair) -> None:
    turns: list[list[int]] = []
    loop = asyncio.get_running_loop()
    pair.other.on = {1: lambda: loop.call_soon(lambda: turns.append(pair.other.streams))}
    send(pair.near, 1, 2, 3)
    assert pair.other.frames == []
    await wait_until(lambda: turns, 5, "the turn after the first frame")
    assert turns == [[1, 2, 3]]


async def test_a_reply_sent_while_frames_are_handed_over_arrives(pair: Pair) -> None:
    pair.other.on = {1: lambda: send(pair.far, 10), 2: lambda: send(pair.far, 20)}
    send(pair.near, 1, 2)
    await heard(pair.one, 2)
    assert pair.one.streams == [10, 20]


async def test_flush_may_be_called_at_any_time(pair: Pair) -> None:
    pair.near.flush()
    send(pair.near, 1)
    pair.near.flush()
    pair.near.flush()
    send(pair.near, 2)
    await heard(pair.other, 2)
    assert pair.other.streams == [1, 2]
    pair.near.close()
    pair.near.flush()
    await pair.lost()


async def test_what_was_sent_before_a_close_arrives_and_then_both_ends_hear_of_it(pair: Pair) -> None:
    pair.other.on_loss = lambda: setattr(pair.other, "frames_when_lost", len(pair.other.frames))
    pair.near.send(FrameType.DATA, 1, b"", bytes(300_000))
    send(pair.near, 2)
    pair.near.close()
    assert pair.near.closed
    assert pair.one.losses == [], "not from within close"
    await pair.lost()
    assert pair.other.streams == [1, 2]
    assert pair.other.frames_when_lost == 2
    assert pair.one.losses == [None]


async def test_send_after_close_is_silent_at_both_ends(pair: Pair) -> None:
    pair.near.close()
    send(pair.near, 1)
    await pair.lost()
    send(pair.near, 2)
    send(pair.far, 3)
    await asyncio.sleep(0)
    assert pair.one.frames == pair.other.frames == []


async def test_the_end_that_closes_hears_nothing_more(pair: Pair) -> None:
    pair.other.on = {1: lambda: pair.far.close()}
    send(pair.near, 1, 2, 3)
    await heard(pair.other, 1)
    send(pair.near, 4)
    await pair.lost()
    assert pair.other.streams == [1]


async def test_closing_twice_and_from_both_ends_and_from_within_is_one_loss(pair: Pair) -> None:
    pair.one.on_loss = pair.near.close
    pair.other.on_loss = pair.far.close
    pair.near.close()
    pair.far.close()
    pair.near.close()
    await pair.lost()
    pair.near.close()
    await pair.lost()


async def test_a_receiver_that_raises_on_a_frame_costs_the_others_nothing(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    pair.other.on = {2: raises(ZeroDivisionError("in frame 2"))}
    send(pair.near, 1, 2, 3)
    await heard(pair.other, 3)
    send(pair.near, 4)
    await heard(pair.other, 4)
    assert pair.other.streams == [1, 2, 3, 4]
    assert not pair.far.closed
    assert "a frame of type 15 could not be handled" in caplog.text
    assert "in frame 2" in caplog.text


async def test_a_protocol_error_of_a_receiver_closes_the_link(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    pair.other.on = {2: raises(ProtocolError("stream 2 is open already"))}
    send(pair.near, 1, 2, 3)
    await heard(pair.other, 2)
    send(pair.near, 4)
    await pair.lost()
    assert pair.other.streams == [1, 2]
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "closing a link: stream 2 is open already")
    ]


async def test_a_receiver_that_raises_on_the_loss_does_not_keep_the_other_from_hearing(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    pair.one.on_loss = raises(ZeroDivisionError("one"))
    pair.other.on_loss = raises(ZeroDivisionError("other"))
    pair.near.close()
    await pair.lost()
    assert caplog.text.count("the loss of a link could not be handled") == 2


async def test_a_frame_that_is_too_long_is_refused_and_the_link_goes_on(pair: Pair) -> None:
    send(pair.near, 1)
    with pytest.raises(ProtocolError, match="over the limit"):
        pair.near.send(FrameType.DATA, 2, b"", bytes(MAX_FRAME))
    send(pair.near, 3)
    await heard(pair.other, 2)
    assert pair.other.streams == [1, 3]
    assert not pair.near.closed


# -- what all kinds share -------------------------------------------------------------------------


class FakeLink:
    closed = False
    stale = False

    def send(self, *_: object, **__: object) -> None:
        raise AssertionError("nothing is sent here")

    def flush(self) -> None:
        raise AssertionError("nothing is sent here")

    def close(self) -> None:
        assert not self.closed
        self.closed = True


def frame(stream: int) -> Frame:
    return Frame(FrameType.STARTED, 0, stream, b"", b"")


def test_frames_before_a_fault_in_the_octets_are_handed_over(caplog: pytest.LogCaptureFixture) -> None:
    recorder, link, decoder = Recorder(), FakeLink(), Decoder()
    octets = encode_frame(FrameType.STARTED, 1) + HEADER.pack(2**32 - 1, 8, 0, 1)
    receive(octets, decoder, recorder, link)
    assert recorder.streams == [1]
    assert link.closed
    assert [record.message for record in caplog.records] == [
        "closing a link: a frame claims 4,294,967,295 octets; 4 to 524,288 are allowed"
    ]


def test_a_fault_in_the_first_octets_closes_the_link() -> None:
    recorder, link = Recorder(), FakeLink()
    receive(b"GET / HTTP/1.1\r\n", Decoder(), recorder, link)
    assert link.closed
    assert recorder.frames == []


def test_a_link_that_its_receiver_closed_is_not_closed_for_the_fault_behind() -> None:
    recorder, link = Recorder(), FakeLink()
    recorder.on = {1: link.close}
    receive(encode_frame(FrameType.PING, 1) + bytes(20), Decoder(), recorder, link)
    assert link.closed
    assert recorder.streams == [1]


@given(st.lists(st.sampled_from(["fine", "raises", "protocol", "closes"]), max_size=6))
def test_deliver_goes_on_until_the_link_is_closed(behaviours: list[str]) -> None:
    logging.disable()
    try:
        recorder, link = Recorder(), FakeLink()
        acts = {"raises": raises(KeyError()), "protocol": raises(ProtocolError()), "closes": link.close}
        recorder.on = {n: acts[b] for n, b in enumerate(behaviours) if b in acts}
        deliver([frame(n) for n in range(len(behaviours))], recorder, link)
    finally:
        logging.disable(logging.NOTSET)
    ends = [n for n, b in enumerate(behaviours) if b in ("protocol", "closes")]
    assert recorder.streams == list(range(ends[0] + 1 if ends else len(behaviours)))
    assert link.closed == bool(ends)


def test_lose_tells_the_receiver_why(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    error = ConnectionResetError()
    lose(recorder, error)
    assert recorder.losses == [error]
    assert caplog.records == []

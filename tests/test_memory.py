"""The in-memory link, in what a socket has not; the contract of all kinds is in `test_link.py`."""

from __future__ import annotations

import asyncio

import pytest

from serveit.exceptions import ProtocolError
from serveit.wire.frames import END, Frame, FrameType, encode_frame
from serveit.wire.memory import MemoryLink, memory_pair
from tests.test_link import Recorder


def linked() -> tuple[MemoryLink, MemoryLink, Recorder, Recorder]:
    near, far = memory_pair()
    near.receiver, far.receiver = one, other = Recorder(), Recorder()
    return near, far, one, other


async def test_frames_arrive_in_the_next_turn_of_the_loop() -> None:
    near, _, _, other = linked()
    near.send(FrameType.PING, 1)
    assert other.frames == []
    await asyncio.sleep(0)
    assert other.streams == [1]


async def test_what_travels_is_octets() -> None:
    near, far, _, other = linked()
    body = memoryview(bytearray(b"abc"))
    written: list[bytes] = []
    hand_over = far.data_received

    def watch(data: bytes) -> None:
        written.append(data)
        hand_over(data)

    far.data_received = watch  # type: ignore[method-assign]
    near.send(FrameType.CALL, 1, b"m", body, END)
    near.send(FrameType.PING, 2)
    await asyncio.sleep(0)
    near.send(FrameType.PING, 3)
    await asyncio.sleep(0)
    first = encode_frame(FrameType.CALL, 1, b"m", b"abc", END)
    assert written == [
        first + encode_frame(FrameType.PING, 2),
        encode_frame(FrameType.PING, 3),
    ]
    assert [type(frame.body) for frame in other.frames] == [bytes] * 3


async def test_octets_may_be_cut_anywhere() -> None:
    near, _, one, _ = linked()
    octets = encode_frame(FrameType.ANSWER, 4, b"meta", b"body")
    near.data_received(octets[:5])
    near.data_received(b"")
    near.data_received(octets[5:])
    assert one.frames == [Frame(FrameType.ANSWER, 0, 4, b"meta", b"body")]


async def test_octets_that_are_not_serveits_close_both_ends(caplog: pytest.LogCaptureFixture) -> None:
    near, far, one, other = linked()
    near.data_received(encode_frame(FrameType.STARTED, 1) + b"\xff" * 30)
    assert near.closed and one.streams == [1]
    near.data_received(encode_frame(FrameType.PING, 2))
    await asyncio.sleep(0)
    assert one.losses == other.losses == [None]
    assert far.closed and one.streams == [1]
    assert "closing a link: a frame claims 4,294,967,295 octets" in caplog.text


async def test_frames_under_way_to_an_end_that_gave_up_are_not_handed_over() -> None:
    near, far, one, other = linked()

    def refuse() -> None:
        # The answer is written in the next turn, before the link is shut.
        far.send(FrameType.PING, 10)
        near.close()

    other.on = {1: refuse}
    near.send(FrameType.PING, 1)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert other.streams == [1]
    assert one.frames == []
    assert one.losses == other.losses == [None]


async def test_an_end_without_a_receiver_drops_what_comes_and_closes_in_silence() -> None:
    near, far = memory_pair()
    near.send(FrameType.PING, 1)
    near.close()
    await asyncio.sleep(0)
    assert near.closed and far.closed


async def test_a_frame_that_is_too_long_does_not_keep_later_ones_from_being_written() -> None:
    near, _, _, other = linked()
    with pytest.raises(ProtocolError, match="over the limit"):
        near.send(FrameType.DATA, 1, b"", bytes(1024 * 1024))
    near.send(FrameType.PING, 2)
    await asyncio.sleep(0)
    assert other.streams == [2]

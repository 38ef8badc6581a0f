from __future__ import annotations

import asyncio

import pytest

from serveit.exceptions import ProtocolError, ReplicaDied
from serveit.running.failures import failure_of
from serveit.running.reply import Reply
from serveit.wire.frames import (
    END,
    FREED,
    MAX_FRAME,
    MAX_INLINE,
    CallAnswer,
    FrameType,
    HttpAnswer,
    Load,
    Refusal,
    decode_message,
)
from serveit.wire.streams import WINDOW, cost
from tests.callers import RecordingLink


class Owner:
    """A listener that notes which replies have ended."""

    def __init__(self) -> None:
        self.ended: list[int] = []
        self.free = True

    def others(self) -> int:
        return 3

    def is_free(self, reply: Reply) -> bool:
        return self.free

    def reply_ended(self, reply: Reply) -> None:
        self.ended.append(reply.stream)


class Fixture:
    def __init__(self) -> None:
        self.owner, self.link = Owner(), RecordingLink()
        self.reply = Reply(self.owner, self.link, 7)

    @property
    def frames(self) -> list[tuple[FrameType, int, int]]:
        return [(FrameType(frame.type), frame.flags, len(frame.body)) for frame in self.link.sent]

    def head(self) -> CallAnswer:
        return CallAnswer(self.reply.others(), [])

    def fail(self) -> None:
        self.reply.error(failure_of(KeyError("x"), others=3, in_user_code=True), b"pickled")


@pytest.fixture
def fixture() -> Fixture:
    return Fixture()


def test_queued_and_started_carry_the_load_and_started_is_flushed(fixture: Fixture) -> None:
    fixture.reply.queued()
    assert fixture.link.flushed_at == []
    fixture.reply.started()
    assert fixture.link.flushed_at == [2]
    assert [frame.type for frame in fixture.link.sent] == [FrameType.QUEUED, FrameType.STARTED]
    assert [decode_message(Load, frame).others for frame in fixture.link.sent] == [3, 3]
    assert not fixture.reply.ended


def test_refused(fixture: Fixture) -> None:
    fixture.reply.refuse("full")
    (frame,) = fixture.link.sent
    refusal = decode_message(Refusal, frame)
    assert (refusal.others, refusal.reason) == (3, "full")
    assert fixture.owner.ended == [7]


@pytest.mark.parametrize("buffers", [[b"abc"], [b"a", bytearray(b"b"), memoryview(b"c")], [b""], []])
def test_what_is_small_is_one_frame(fixture: Fixture, buffers: list[bytes]) -> None:
    body = b"".join(buffers)
    fixture.reply.whole(fixture.head(), buffers, len(body))
    assert fixture.frames == [(FrameType.ANSWER, END, len(body))]
    assert fixture.owner.ended == [7]
    assert not fixture.reply.is_sending
    fixture.fail()
    assert len(fixture.frames) == 1


def test_what_is_larger_says_that_the_slot_is_free_and_follows_under_credit(fixture: Fixture) -> None:
    size = WINDOW + MAX_INLINE
    fixture.reply.whole(fixture.head(), [bytes(size)], size)
    (head, *rest) = fixture.frames
    assert head == (FrameType.ANSWER, FREED, 0)
    assert all(kind == FrameType.DATA for kind, _, _ in rest)
    assert fixture.reply.is_sending
    assert fixture.owner.ended == []
    fixture.reply.credited(sum(cost(length) for _, _, length in rest))
    assert sum(length for _, _, length in fixture.frames) == size
    assert fixture.frames[-1][1] == END
    assert fixture.owner.ended == [7]
    fixture.reply.credited(0)
    assert fixture.owner.ended == [7]


def test_what_fits_the_window_is_over_at_once(fixture: Fixture) -> None:
    fixture.reply.whole(fixture.head(), [bytes(MAX_INLINE), b"x"], MAX_INLINE + 1)
    assert fixture.owner.ended == [7]
    assert not fixture.reply.is_sending


@pytest.mark.parametrize("size", [1, MAX_INLINE + 1])
def test_a_head_that_fits_no_frame_is_an_error_and_the_reply_is_open_still(
    fixture: Fixture, size: int
) -> None:
    head = HttpAnswer(0, 200, [(b"x-long", bytes(MAX_FRAME))])
    with pytest.raises(ProtocolError, match="over the limit"):
        fixture.reply.whole(head, [bytes(size)], size)
    with pytest.raises(ProtocolError, match="over the limit"):
        fixture.reply.begin(head)
    assert fixture.frames == []
    fixture.fail()
    assert fixture.link.kinds(7) == [FrameType.ERROR]
    assert fixture.owner.ended == [7]


async def test_a_body_in_parts(fixture: Fixture) -> None:
    fixture.reply.begin(fixture.head(), flags=8)
    await fixture.reply.push([b"a"])
    await fixture.reply.push([b"b"], item=True)
    assert fixture.reply.is_sending
    fixture.reply.finish()
    assert fixture.frames == [
        (FrameType.ANSWER, 8, 0),
        (FrameType.DATA, 0, 1),
        (FrameType.DATA, 0, 1),
        (FrameType.DATA, END, 0),
    ]
    assert fixture.owner.ended == [7]


async def test_who_pushes_is_held_back_and_an_end_without_credit_waits(fixture: Fixture) -> None:
    fixture.reply.begin(fixture.head())
    while True:
        pushing = asyncio.ensure_future(fixture.reply.push([bytes(MAX_INLINE)]))
        await asyncio.sleep(0)
        if not pushing.done():
            break
    sent = len(fixture.frames)
    fixture.reply.credited(cost(MAX_INLINE))
    await pushing
    assert len(fixture.frames) == sent + 1
    for _ in range(100):
        fixture.reply.outflow.write([b""])  # type: ignore[union-attr]
    fixture.reply.finish()
    assert fixture.owner.ended == []
    fixture.reply.credited(2 * cost(MAX_INLINE))
    assert fixture.owner.ended == [7]


async def test_an_error_cuts_the_body_off(fixture: Fixture) -> None:
    fixture.reply.begin(fixture.head())
    await fixture.reply.push([b"a"])
    fixture.fail()
    assert fixture.link.kinds(7) == [FrameType.ANSWER, FrameType.DATA, FrameType.ERROR]
    assert fixture.link.sent[-1].body == b"pickled"
    assert fixture.owner.ended == [7]
    assert not fixture.reply.is_sending


def test_an_error_after_a_complete_body_comes_too_late(fixture: Fixture) -> None:
    fixture.reply.whole(fixture.head(), [bytes(2 * WINDOW)], 2 * WINDOW)
    fixture.fail()
    assert FrameType.ERROR not in fixture.link.kinds(7)
    assert fixture.owner.ended == []
    fixture.reply.abort(ReplicaDied("gone"))
    fixture.fail()
    assert fixture.link.kinds(7)[-1] == FrameType.ERROR
    assert fixture.owner.ended == [7]


async def test_once_aborted_nothing_goes_out_but_the_error(fixture: Fixture) -> None:
    fixture.reply.begin(fixture.head())
    while True:
        pushing = asyncio.ensure_future(fixture.reply.push([bytes(MAX_INLINE)]))
        await asyncio.sleep(0)
        if not pushing.done():
            break
    sent = len(fixture.frames)
    fixture.reply.abort(ReplicaDied("gone"))
    with pytest.raises(ReplicaDied):
        await pushing
    with pytest.raises(ReplicaDied):
        await fixture.reply.push([b"a"])
    with pytest.raises(ReplicaDied):
        fixture.reply.finish()
    fixture.reply.credited(0)
    assert len(fixture.frames) == sent
    fixture.fail()
    assert fixture.owner.ended == [7]


def test_aborted_before_it_begins(fixture: Fixture) -> None:
    fixture.reply.credited(1)  # nothing to be credited yet
    fixture.reply.abort(ReplicaDied("gone"))
    with pytest.raises(ReplicaDied):
        fixture.reply.whole(fixture.head(), [b"a"], 1)
    with pytest.raises(ReplicaDied):
        fixture.reply.begin(fixture.head())
    assert fixture.frames == []


def test_a_reply_that_has_ended_ends_once(fixture: Fixture) -> None:
    fixture.fail()
    fixture.fail()
    fixture.reply.abort(ReplicaDied("gone"))
    assert fixture.link.kinds(7) == [FrameType.ERROR]
    assert fixture.owner.ended == [7]


def test_a_large_answer_whose_slot_is_kept_until_it_is_read() -> None:
    fixture = Fixture()
    fixture.owner.free = False
    size = WINDOW + 1
    fixture.reply.whole(fixture.head(), [bytes(size)], size)
    assert fixture.frames[0] == (FrameType.ANSWER, 0, 0)
    assert (fixture.reply.keeps_slot, fixture.reply.unread, fixture.reply.is_sending) == (True, size, True)
    fixture.reply.credited(sum(cost(length) for _, _, length in fixture.frames[1:]))
    assert fixture.frames[-1][:2] == (FrameType.DATA, END)
    assert not fixture.reply.keeps_slot
    fixture = Fixture()
    fixture.reply.whole(fixture.head(), [bytes(size)], size)
    assert (fixture.frames[0][1], fixture.reply.keeps_slot) == (FREED, False)

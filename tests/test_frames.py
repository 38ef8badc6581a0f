"""The wire format: what is encoded comes back however it is cut, and nothing else gets through."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serveit.exceptions import ProtocolError
from serveit.histogram import Histogram
from serveit.types import HttpRequest
from serveit.wire.frames import (
    END,
    HEADER,
    HEADER_SIZE,
    MAX_FRAME,
    MAX_INLINE,
    Call,
    CallAnswer,
    Credit,
    Decoder,
    Failure,
    Figures,
    Frame,
    FrameType,
    Hello,
    HttpAnswer,
    Load,
    Message,
    Refusal,
    Request,
    Reserve,
    Reserved,
    decode_message,
    encode_frame,
    encode_message,
    pieces,
)

MESSAGES: tuple[type[Message], ...] = (
    Hello,
    Request,
    Call,
    Reserve,
    Reserved,
    Load,
    HttpAnswer,
    CallAnswer,
    Failure,
    Refusal,
    Credit,
    Figures,
)

streams = st.integers(0, 2**32 - 1)
any_frame = st.builds(
    Frame,
    type=st.sampled_from([int(kind) for kind in FrameType]),
    flags=st.integers(0, 255),
    stream=streams,
    meta=st.binary(max_size=40),
    body=st.binary(max_size=60),
)


def octets_of(frame: Frame) -> bytes:
    return encode_frame(frame.type, frame.stream, frame.meta, frame.body, frame.flags)


def cut(octets: bytes, places: Sequence[int]) -> Iterator[bytes]:
    edges = [0, *sorted(place % (len(octets) + 1) for place in places), len(octets)]
    for start, end in zip(edges, edges[1:], strict=False):
        yield octets[start:end]


def decode_all(chunks: Iterator[bytes] | Sequence[bytes]) -> tuple[list[Frame], ProtocolError | None]:
    """All frames up to the end or the first fault."""
    decoder = Decoder()
    frames: list[Frame] = []
    try:
        for chunk in chunks:
            frames += decoder.feed(chunk)
    except ProtocolError as error:
        return frames, error
    return frames, decoder.error


def held(decoder: Decoder) -> int:
    return len(decoder._rest)


# -- octets to frames -----------------------------------------------------------------------------


def test_a_frame_looks_as_the_format_says() -> None:
    octets = encode_frame(FrameType.ANSWER, 7, b"meta", b"body!", END)
    assert octets == struct.pack("!IBBI", 4 + 4 + 5, 9, 1, 7) + struct.pack("!I", 4) + b"meta" + b"body!"
    assert Decoder().feed(octets) == [Frame(9, END, 7, b"meta", b"body!")]


@given(st.lists(any_frame, max_size=8), st.lists(st.integers(0, 2000), max_size=12))
def test_frames_come_back_however_they_are_cut(frames: list[Frame], places: list[int]) -> None:
    octets = b"".join(map(octets_of, frames))
    assert decode_all(list(cut(octets, places))) == (frames, None)


@given(st.lists(any_frame, max_size=3))
def test_frames_come_back_octet_by_octet_and_none_comes_early(frames: list[Frame]) -> None:
    octets = b"".join(map(octets_of, frames))
    ends: list[int] = []
    for frame in frames:
        ends.append((ends[-1] if ends else 0) + len(octets_of(frame)))
    decoder = Decoder()
    seen: list[Frame] = []
    for position in range(len(octets)):
        seen += decoder.feed(octets[position : position + 1])
        assert len(seen) == sum(end <= position + 1 for end in ends)
    assert seen == frames
    assert held(decoder) == 0


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_octets_may_come_in_any_buffer_which_may_be_used_again(kind: Any) -> None:
    octets = encode_frame(FrameType.CALL, 1, b"m", b"body")
    memory = bytearray(octets)
    decoder = Decoder()
    first = decoder.feed(kind(memory) if kind is not memoryview else memoryview(memory)[:9])
    rest = decoder.feed(memoryview(memory)[9:]) if kind is memoryview else []
    memory[:] = bytes(len(memory))
    assert [*first, *rest] == [Frame(4, 0, 1, b"m", b"body")]
    assert type((first + rest)[0].body) is bytes


def test_a_frame_cut_at_every_octet_is_waited_for_and_held_no_longer_than_it_is() -> None:
    octets = encode_frame(FrameType.REQUEST, 3, b"metadata", b"the body", END)
    for length in range(len(octets)):
        decoder = Decoder()
        assert decoder.feed(octets[:length]) == []
        assert held(decoder) == length
        assert decoder.feed(octets[length:] + octets[:5]) == [Frame(3, END, 3, b"metadata", b"the body")]
        assert held(decoder) == 5


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 3, MAX_FRAME + 1, 2**31, 2**32 - 1])
def test_a_header_with_a_wild_length_is_refused_at_once(length: int) -> None:
    header = HEADER.pack(length, FrameType.DATA, 0, 1)
    for octets in (header, header + b"\0\0\0\0", header + b"\0\0"):
        with pytest.raises(ProtocolError, match=f"a frame claims {length:,} octets; 4 to 524,288"):
            Decoder().feed(octets)


@pytest.mark.parametrize("kind", [0, 18, 99, 255])
def test_an_unknown_type_is_refused_at_once(kind: int) -> None:
    with pytest.raises(ProtocolError, match=f"unknown frame type {kind}"):
        Decoder().feed(HEADER.pack(4, kind, 0, 1))
    with pytest.raises(ProtocolError, match=f"unknown frame type {kind}"):
        Decoder().feed(HEADER.pack(4, kind, 0, 1) + bytes(4))


@pytest.mark.parametrize("meta_length", [1, 5, MAX_FRAME, 2**32 - 1])
def test_metadata_longer_than_its_frame_is_refused_before_the_frame_is_whole(meta_length: int) -> None:
    with pytest.raises(ProtocolError, match=f"metadata of {meta_length:,} octets in a frame of 4"):
        Decoder().feed(HEADER.pack(4, FrameType.DATA, 0, 1) + struct.pack("!I", meta_length))


def test_frames_before_a_fault_are_not_lost_and_nothing_comes_after_it() -> None:
    good = encode_frame(FrameType.STARTED, 1, b"x")
    for bad in (HEADER.pack(2**32 - 1, 8, 0, 1), HEADER.pack(4, 77, 0, 1) + bytes(9)):
        decoder = Decoder()
        assert decoder.feed(good + bad + good) == [Frame(13, 0, 1, b"x", b"")]
        assert decoder.error is not None
        for data in (b"", good):
            with pytest.raises(ProtocolError) as caught:
                decoder.feed(data)
            assert caught.value is decoder.error
        assert held(decoder) == 0


def test_the_longest_frame_passes_and_one_octet_more_does_not() -> None:
    body = bytes(MAX_FRAME - 4)
    (frame,) = Decoder().feed(encode_frame(FrameType.DATA, 1, b"", body))
    assert len(frame.body) == MAX_FRAME - 4
    with pytest.raises(ProtocolError, match="a frame of 524,289 octets is over the limit of 524,288"):
        encode_frame(FrameType.DATA, 1, b"", body + b"x")
    with pytest.raises(ProtocolError, match="over the limit"):
        encode_frame(FrameType.DATA, 1, b"m", memoryview(body))


def test_no_memory_is_taken_for_what_a_header_only_claims() -> None:
    headers = [HEADER.pack(MAX_FRAME, FrameType.DATA, 0, 1), HEADER.pack(2**32 - 1, FrameType.DATA, 0, 1)]
    tracemalloc.start()
    try:
        decoders = [Decoder() for _ in range(100)]
        for decoder in decoders:
            assert decoder.feed(headers[0]) == []
        for _ in decoders:
            with pytest.raises(ProtocolError):
                Decoder().feed(headers[1])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MAX_FRAME / 2, "one claim alone is 512 KiB, and a hundred were made"


def test_no_more_than_the_cap_is_held_however_the_octets_come() -> None:
    octets = encode_frame(FrameType.DATA, 1, b"", bytes(MAX_FRAME - 4))
    for size in (1_000, 65_536, len(octets) - 1):
        decoder = Decoder()
        tracemalloc.start()
        try:
            for start in range(0, 3 * len(octets), size):
                first = start % len(octets)
                decoder.feed((octets + octets)[first : first + size])
                assert held(decoder) < HEADER_SIZE + MAX_FRAME
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 8 * MAX_FRAME


def test_what_comes_octet_by_octet_is_copied_only_a_few_times() -> None:
    class Counting(bytearray):
        """Counts what is appended to it, and what is copied out of it."""

        copied = 0

        def __iadd__(self, other: Any) -> Counting:  # type: ignore[misc]
            self.copied += len(other)
            self.extend(other)
            return self

        def __bytes__(self) -> bytes:
            self.copied += len(self)
            return b"".join((self,))

    decoder = Decoder()
    rest = decoder._rest = Counting()
    octets = encode_frame(FrameType.DATA, 1, b"", bytes(100_000))
    frames = [frame for position in range(len(octets)) for frame in decoder.feed(octets[position:][:1])]
    assert len(frames) == 1
    assert len(octets) <= rest.copied < 3 * len(octets)


@given(st.lists(st.binary(max_size=200), max_size=5))
@example([HEADER.pack(4, 7, 0, 1) + bytes(3), b"\1"])
def test_random_octets_give_frames_or_a_protocol_error(chunks: list[bytes]) -> None:
    frames, error = decode_all(chunks)
    assert all(frame.type in set(FrameType) for frame in frames)
    taken = sum(len(octets_of(frame)) for frame in frames)
    assert taken <= sum(map(len, chunks))
    # The same octets in one piece mean the same.
    again, error_again = decode_all([b"".join(chunks)])
    assert again == frames
    assert str(error_again) == str(error)


@given(
    st.lists(any_frame, min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6),
    st.lists(st.integers(0, 2000), max_size=4),
)
def test_mutated_streams_give_frames_or_a_protocol_error(
    frames: list[Frame], changes: list[tuple[int, int]], places: list[int]
) -> None:
    octets = bytearray(b"".join(map(octets_of, frames)))
    for place, value in changes:
        octets[place % len(octets)] = value
    decoded, error = decode_all(list(cut(bytes(octets), places)))
    assert error is None or "frame" in str(error)
    assert b"".join(map(octets_of, decoded)) == bytes(octets[: sum(len(octets_of(f)) for f in decoded)])
    for frame in decoded:
        for kind in MESSAGES:
            try:
                decode_message(kind, frame)
            except ProtocolError:
                pass


# -- metadata -------------------------------------------------------------------------------------

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
small = st.integers(-(2**63), 2**64 - 1)
count = st.integers(0, 2**64 - 1)
executed = st.sampled_from(["no", "maybe", "yes"])
fields = st.lists(st.tuples(st.binary(max_size=10), st.binary(max_size=10)), max_size=4)
plain = st.recursive(
    st.none() | st.booleans() | small | st.floats(allow_nan=False) | text | st.binary(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
extra = st.dictionaries(text, plain, max_size=3)
deadline = st.none() | small
http_request = st.builds(
    HttpRequest,
    route=text,
    target=text,
    method=text,
    path=text,
    raw_path=st.binary(max_size=20),
    query=st.binary(max_size=20),
    headers=fields,
    path_values=st.lists(text, max_size=3),
    client=st.none() | st.tuples(text, small),
    server=st.none() | st.tuples(text, st.none() | small),
)
histogram = st.lists(st.tuples(st.floats(allow_nan=False), count), max_size=4).flatmap(
    lambda buckets: st.builds(
        Histogram,
        bounds=st.just(tuple(bound for bound, _ in buckets)),
        counts=st.just([0, *(number for _, number in buckets)]),
        sum=st.floats(allow_nan=False),
    )
)
any_message: st.SearchStrategy[Message] = st.one_of(
    st.builds(
        Hello,
        magic=st.binary(max_size=8),
        versions=st.tuples(small, small),
        role=text,
        features=st.lists(text),
        extra=extra,
    ),
    st.builds(Request, request_id=text, http=http_request, deadline_ms=deadline, extra=extra),
    st.builds(Call, request_id=text, target=text, sizes=st.lists(count), deadline_ms=deadline, extra=extra),
    st.builds(Reserve, request_id=text, target=text, deadline_ms=deadline, extra=extra),
    st.builds(Reserved, others=small, extra=extra),
    st.builds(Load, others=small, extra=extra),
    st.builds(HttpAnswer, others=small, status=small, headers=fields, extra=extra),
    st.builds(CallAnswer, others=small, sizes=st.lists(count), extra=extra),
    st.builds(
        Failure,
        others=small,
        status=small,
        kind=text,
        detail=text,
        text=text,
        executed=executed,
        errors=st.lists(extra, max_size=2),
        headers=fields,
        traceback=text,
        extra=extra,
    ),
    st.builds(Refusal, others=small, reason=text, extra=extra),
    st.builds(Credit, octets=count, extra=extra),
    st.builds(
        Figures,
        running=small,
        waiting=small,
        requests=small,
        errors=small,
        refusals=st.dictionaries(text, small, max_size=3),
        queued=histogram,
        processed=histogram,
        batches=histogram,
        extra=extra,
    ),
)


def carrying(meta: bytes) -> Frame:
    return Frame(FrameType.ANSWER, 0, 1, meta, b"")


def test_every_message_is_tried_here() -> None:
    assert set(MESSAGES) == set(Message.__subclasses__())


@given(any_message)
def test_every_message_comes_back(message: Message) -> None:
    (frame,) = Decoder().feed(encode_frame(FrameType.ANSWER, 1, encode_message(message)))
    assert decode_message(type(message), frame) == message


@given(st.sampled_from(MESSAGES), st.binary(max_size=60))
def test_random_metadata_is_a_message_or_a_protocol_error(kind: type[Message], meta: bytes) -> None:
    try:
        assert isinstance(decode_message(kind, carrying(meta)), kind)
    except ProtocolError as error:
        assert str(error).startswith(f"malformed {kind.__name__} metadata: ")


@given(any_message, st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4), st.data())
def test_mutated_metadata_is_a_message_or_a_protocol_error(
    message: Message, changes: list[tuple[int, int]], data: st.DataObject
) -> None:
    meta = bytearray(encode_message(message))
    for place, value in changes:
        meta[place % len(meta)] = value
    meta = meta[: data.draw(st.integers(0, len(meta)))]
    try:
        assert isinstance(decode_message(type(message), carrying(bytes(meta))), type(message))
    except ProtocolError as error:
        assert "malformed" in str(error)


def test_figures_with_a_histogram_that_contradicts_itself_are_refused() -> None:
    odd = [[0.1], [1, 2, 3], 0.5]
    meta = msgspec.msgpack.encode([0, 0, 0, 0, {}, odd, odd, odd, {}])
    with pytest.raises(ProtocolError, match="malformed Figures metadata: a histogram of 1 bounds has not 3"):
        decode_message(Figures, carrying(meta))


def _extra(octets: bytes) -> bytes:
    """Metadata of a CREDIT of one octet, with so much as the value of "a" in its map."""
    return b"\x92\x01\x81\xa1a" + octets


@pytest.mark.parametrize(
    "meta",
    [
        pytest.param(b"", id="none"),
        pytest.param(_extra(b"\x91" * 100_000 + b"\x01"), id="deep arrays"),
        pytest.param(_extra(b"\x81\xa1k" * 100_000 + b"\x01"), id="deep maps"),
        pytest.param(_extra(b"\xdd\xff\xff\xff\xff"), id="an array of 4 Gi entries"),
        pytest.param(_extra(b"\xdf\xff\xff\xff\xff"), id="a map of 4 Gi entries"),
        pytest.param(_extra(b"\xc6\xff\xff\xff\xff"), id="4 GiB of octets"),
        pytest.param(_extra(b"\xdb\xff\xff\xff\xff"), id="4 GiB of text"),
        pytest.param(_extra(b"\xc9\xff\xff\xff\xff\x05"), id="4 GiB of an extension"),
        pytest.param(b"\xdd\xff\xff\xff\xff", id="a message of 4 Gi fields"),
        pytest.param(_extra(b"\xa2\xff\xfe"), id="text that is not UTF-8"),
        pytest.param(b"\x92\x01\x81\xa1\xff\x01", id="a key that is not UTF-8"),
        pytest.param(_extra(b"\x81\x80\x01"), id="a map as key"),
        pytest.param(_extra(b"\xd7\xff" + b"\xff" * 8), id="a wild timestamp"),
        pytest.param(_extra(b"\xc1"), id="a code without meaning"),
        pytest.param(b"\x91\xff", id="a credit below 0"),
        pytest.param(b"\x91\xc0", id="a credit of nothing"),
        pytest.param(b"\x91\x01\x00", id="something after it"),
    ],
)
def test_wild_metadata_is_a_protocol_error_and_takes_no_memory(meta: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="malformed Credit metadata: "):
            decode_message(Credit, carrying(meta))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1024 * 1024


@pytest.mark.parametrize("kind", [Call, CallAnswer])
def test_sizes_below_zero_are_refused(kind: type[Message]) -> None:
    fields: list[object] = ["id", "target", [-1]] if kind is Call else [0, [-1]]
    with pytest.raises(ProtocolError, match=f"malformed {kind.__name__} metadata: .*>= 0"):
        decode_message(kind, carrying(msgspec.msgpack.encode(fields)))


def test_a_later_version_may_append_fields() -> None:
    longer = msgspec.msgpack.encode([7, {"traceparent": "00-…"}, "new", 3])
    assert decode_message(Credit, carrying(longer)) == Credit(7, {"traceparent": "00-…"})
    assert decode_message(Credit, carrying(msgspec.msgpack.encode([7]))) == Credit(7, {})


# -- pieces ---------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=50), max_size=5), st.integers(1, 20))
def test_pieces_are_the_same_octets_in_small_slices(buffers: list[bytes], size: int) -> None:
    cut_up = list(pieces(buffers, size))
    assert b"".join(cut_up) == b"".join(buffers)
    assert all(0 < len(piece) <= size for piece in cut_up)


def test_pieces_do_not_copy_and_count_octets() -> None:
    memory = bytearray(b"abcdefgh")
    (piece,) = pieces([memoryview(memory).cast("I")])
    assert piece.nbytes == len(piece) == 8
    memory[0] = ord("x")
    assert bytes(piece) == b"xbcdefgh"
    piece.release()
    assert [len(piece) for piece in pieces([bytes(MAX_INLINE + 1)])] == [MAX_INLINE, 1]

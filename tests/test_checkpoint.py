"""What is kept for the next controller: its records, its format, and that there is one writer."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serveit.control.checkpoint import (
    FORMAT,
    MAX_ATTEMPTS,
    MAX_PAUSE_S,
    AppRecord,
    Checkpoint,
    Checkpoints,
    VersionRecord,
    decode_checkpoint,
)
from serveit.control.spec import AppSpec
from serveit.testing import ManualClock
from tests.stage import FakeStore, Kept, scaled_to, spec

numbers = st.integers(0, 2**53)
names = st.text(max_size=5)
specs = st.builds(
    lambda name, b, surge, id, owner: spec(name, surge=surge, id=id, owner=owner, b=b),
    names,
    st.integers(0, 9),
    st.integers(0, 2),
    names,
    names,
)
versions = st.builds(VersionRecord, numbers, specs, st.booleans(), st.dictionaries(names, names, max_size=2))
apps = st.builds(
    AppRecord,
    st.lists(versions, min_size=1, max_size=3).map(tuple),
    numbers,
    st.none() | numbers,
    st.dictionaries(names, st.integers(1, 9).map(lambda b: spec(b=b).backend("b")), max_size=2),
    st.booleans(),
    names,
    st.booleans(),
)
checkpoints = st.builds(
    Checkpoint,
    epoch=numbers,
    token=names,
    secret=st.binary(max_size=32),
    version=numbers,
    number=numbers,
    apps=st.dictionaries(names, apps, max_size=2),
    leaving=st.lists(apps, max_size=2).map(tuple),
    http=st.none() | st.binary(max_size=9),
    ending=st.booleans(),
)
EMPTY = Checkpoint(1, "t0", b"s", 0, 0, {})


class TestFormat:
    @given(checkpoints)
    def test_what_is_kept_is_found(self, checkpoint: Checkpoint) -> None:
        assert decode_checkpoint(msgspec.msgpack.encode(checkpoint)) == checkpoint

    @pytest.mark.parametrize(
        ("octets", "text"),
        [
            (
                msgspec.msgpack.encode(msgspec.structs.replace(EMPTY, format=7)),
                f"has format 7.*reads {FORMAT}",
            ),
            (msgspec.msgpack.encode({"format": 2, "all": "else"}), f"has format 2.*reads {FORMAT}"),
            (msgspec.msgpack.encode({"format": FORMAT}), "cannot be read .*epoch"),
            (b"\xff\x00", "cannot be read"),
            (b"", "cannot be read"),
        ],
        ids=["of another version", "quite another", "incomplete", "garbage", "nothing"],
    )
    def test_what_cannot_be_taken_over_names_the_way_out(self, octets: bytes, text: str) -> None:
        with pytest.raises(ValueError, match=f"{text}.*`serveit shutdown` .* or restart the Ray cluster"):
            decode_checkpoint(octets)

    @given(checkpoints, st.data())
    def test_cut_short_it_is_refused(self, checkpoint: Checkpoint, data: st.DataObject) -> None:
        octets = msgspec.msgpack.encode(checkpoint)
        length = data.draw(st.integers(0, len(octets) - 1))
        with pytest.raises(ValueError, match="cannot be read"):
            decode_checkpoint(octets[:length])


class TestRecords:
    record = AppRecord(
        (VersionRecord(1, spec(b=2)), VersionRecord(3, spec(b=1, c=4), True, {"b": "b died", "c": "c died"})),
        target=3,
        live=1,
        failed="no",
    )

    def test_its_spec_is_the_targets(self) -> None:
        assert self.record.spec == spec(b=1, c=4)

    def test_respecified(self) -> None:
        other: AppSpec = spec(b=9)
        record = self.record.respecified(other)
        assert record.spec == other
        assert record.versions[0] == self.record.versions[0]
        assert record.versions[1].given_up == {"b": "b died", "c": "c died"}

    def test_updated_is_tried_anew(self) -> None:
        record = self.record.updated("b", scaled_to(5))
        assert record.spec == spec(b=5, c=4)
        assert (record.before, record.changing, record.failed) == (
            {"b": self.record.spec.backend("b")},
            True,
            "",
        )
        assert record.versions[1].given_up == {"c": "c died"}
        again = record.updated("b", scaled_to(7)).updated("c", scaled_to(2))
        assert again.before == {name: self.record.spec.backend(name) for name in "bc"}, "before the change"
        assert again.spec == spec(b=7, c=2)

    def test_a_change_that_is_over_does_not_count(self) -> None:
        over = msgspec.structs.replace(self.record.updated("b", scaled_to(5)), changing=False)
        assert over.updated("c", scaled_to(1)).before == {"c": self.record.spec.backend("c")}

    def test_updated_as_it_cannot_be(self) -> None:
        with pytest.raises(KeyError, match="no backend 'd'"):
            self.record.updated("d", scaled_to(1))
        with pytest.raises(ValueError, match="num_replicas must be ≥ 1, got -1"):
            self.record.updated("b", scaled_to(-1))

    def test_retargeted(self) -> None:
        version = VersionRecord(4, spec(d=1))
        record = self.record.updated("b", scaled_to(5)).retargeted(version)
        assert record.spec == version.spec
        assert (record.target, record.live, record.before, record.changing) == (4, 1, {}, True)
        assert [v.number for v in record.versions] == [1, 3, 4]


class Fixture:
    """Checkpoints of what a test says is to be kept."""

    def __init__(self) -> None:
        self.now = EMPTY
        self.clock = ManualClock()
        self.kept = Kept()
        self.store = FakeStore(self.kept)
        self.checkpoints = Checkpoints(self.store, self.clock, lambda: self.now)

    def become(self, version: int) -> None:
        self.now = msgspec.structs.replace(self.now, version=version)
        self.checkpoints.mark()

    @property
    def versions(self) -> list[int]:
        """Of all that was ever kept."""
        return [decode_checkpoint(octets).version for octets in self.kept.history]


class TestOneWriter:
    async def test_what_is_marked_is_written(self) -> None:
        here = Fixture()
        assert await here.checkpoints.load() is None
        await here.checkpoints.kept()
        here.become(1)
        assert here.versions == []
        await here.checkpoints.kept()
        assert here.versions == [1]
        assert await here.checkpoints.load() == here.now

    async def test_what_is_marked_meanwhile_is_written_after_it_and_once(self) -> None:
        here = Fixture()
        here.store.may_save.clear()
        here.become(1)
        await here.clock.settle()
        for version in (2, 3):
            here.become(version)
            await here.clock.settle()
        here.store.may_save.set()
        await here.checkpoints.kept()
        assert here.versions == [1, 3]

    async def test_a_change_waits_for_the_writer_and_has_the_last_word(self) -> None:
        here = Fixture()
        here.store.may_save.clear()
        here.become(1)
        await here.clock.settle()

        async def change() -> None:
            async with here.checkpoints.changing:
                await here.checkpoints.keep(msgspec.structs.replace(here.now, version=2))
                here.now = msgspec.structs.replace(here.now, version=2)

        changing = asyncio.ensure_future(change())
        await here.clock.settle()
        assert here.store.saves == 1, "one at a time"
        here.become(1)
        here.store.may_save.set()
        await changing
        await here.checkpoints.kept()
        assert here.versions in ([1, 2], [1, 1, 2], [1, 2, 2])

    async def test_a_store_that_fails_is_tried_until_it_does_not(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        here = Fixture()
        here.store.error = OSError("the GCS does not answer")
        here.become(1)
        kept = asyncio.ensure_future(here.checkpoints.kept())
        await here.clock.advance(60.0)
        assert here.store.saves > 60.0 / MAX_PAUSE_S
        assert "the state of the instance cannot be kept: the GCS does not answer" in caplog.text
        assert not kept.done()
        here.store.error = None
        here.become(2)
        await here.clock.advance(MAX_PAUSE_S)
        assert kept.done()
        assert here.versions == [2]

    async def test_a_change_that_cannot_be_kept_is_said_and_what_is_there_is_kept_again(self) -> None:
        here = Fixture()
        here.store.error = OSError("the GCS does not answer")
        with pytest.raises(OSError, match="does not answer"):
            async with here.checkpoints.changing:
                await here.checkpoints.keep(msgspec.structs.replace(here.now, version=9))
        here.store.error = None
        await here.clock.advance(MAX_PAUSE_S)
        assert here.versions == [0], "the store may have kept the other one"

    async def test_who_gives_up_leaves_what_is(self) -> None:
        here = Fixture()
        here.store.may_save.clear()

        async def change() -> None:
            async with here.checkpoints.changing:
                await here.checkpoints.keep(msgspec.structs.replace(here.now, version=9))

        changing = asyncio.ensure_future(change())
        await here.clock.settle()
        changing.cancel()
        here.store.may_save.set()
        await here.clock.settle()
        assert changing.cancelled()
        assert here.versions == [0]

    async def test_closed_it_leaves_nothing(self) -> None:
        here = Fixture()
        here.become(1)
        await here.checkpoints.kept()
        here.store.may_save.clear()
        here.become(2)
        await here.clock.settle()
        closing = asyncio.ensure_future(here.checkpoints.aclose())
        await here.clock.settle()
        here.store.may_save.set()
        await closing
        here.become(3)
        await here.clock.settle()
        assert here.versions == [1]
        assert await here.checkpoints.load() is None

    async def test_closed_where_the_store_fails(self, caplog: pytest.LogCaptureFixture) -> None:
        here = Fixture()
        here.store.error = OSError("gone")
        closing = asyncio.ensure_future(here.checkpoints.aclose())
        await here.clock.advance(MAX_ATTEMPTS * 10.0)
        await closing
        assert "the instance's checkpoint cannot be removed: gone" in caplog.text

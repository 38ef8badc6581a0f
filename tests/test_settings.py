from __future__ import annotations

import asyncio
import pickle
from typing import Any

import msgspec
import pytest

from serveit import App, BackendConfig
from serveit.control.orders import Settings
from serveit.running.replica import Replica
from serveit.running.settings import LiveSettings, configured
from serveit.testing import ManualClock


class Model:
    def __init__(self) -> None:
        self.given: list[Any] = []

    def reconfigure(self, user_config: Any) -> None:
        self.given.append(user_config)
        if user_config == "bad":
            raise ValueError("bad")

    def __call__(self) -> list[Any]:
        return self.given


def encoded(user_config: Any = None, **options: Any) -> bytes:
    pickled = None if user_config is None else pickle.dumps(user_config, protocol=5)
    return msgspec.msgpack.encode(Settings(BackendConfig(**options), pickled))


class Running:
    """A replica of Model, started with these settings."""

    def __init__(self, declared: Any = None, octets: bytes = b"") -> None:
        app = App()
        app.backend(Model, name="model", user_config=declared)
        record = app.backends["model"]
        self.replica = Replica(configured(record, octets), id="model#1", app="app", clock=ManualClock())
        self.settings = LiveSettings(record.config, octets)

    async def __aenter__(self) -> Running:
        await self.replica.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.replica.aclose()

    async def take_in(self, octets: bytes) -> None:
        await self.settings.take_in(self.replica, octets)

    @property
    def given(self) -> list[Any]:
        _, function = self.replica.instance.method("__call__")
        given: list[Any] = function()
        return given


async def test_started_with_what_the_code_says() -> None:
    async with Running("declared") as running:
        assert running.given == ["declared"]
        await running.take_in(encoded(num_threads=1))
        await running.take_in(encoded("declared"))
        assert running.given == ["declared"], "it is the same"
        await running.take_in(encoded("other"))
        await running.take_in(encoded())
        assert running.given == ["declared", "other", "declared"]


async def test_equal_ones_are_no_change_however_they_are_pickled() -> None:
    word = "".join(["wo", "rd"])
    shared, apart = {"a": [word, word], "b": {1, 9}}, {"a": ["word", "".join(word)], "b": {9, 1}}
    assert pickle.dumps(shared) != pickle.dumps(apart)
    async with Running(shared) as running:
        await running.take_in(encoded(apart))
        assert running.given == [shared]
        for other in ({**apart, "b": {1}}, {**apart, "a": ("word", "word")}, {"a": [1]}, {"a": [True]}):
            await running.take_in(encoded(other))
            assert running.given[-1] == other
        assert len(running.given) == 5


async def test_started_with_what_was_changed_before() -> None:
    octets = encoded("changed", max_ongoing_requests=3)
    async with Running("declared", octets) as running:
        assert running.given == ["changed"]
        assert running.replica.admission.limit == 3
        await running.take_in(octets)
        await running.take_in(encoded("changed", max_ongoing_requests=5))
        assert running.given == ["changed"]
        assert running.replica.admission.limit == 5


async def test_what_raises_leaves_the_other_options_and_may_be_gone_back_from() -> None:
    octets = encoded("first", max_ongoing_requests=3)
    async with Running(None, octets) as running:
        with pytest.raises(ValueError, match="bad"):
            await running.take_in(encoded("bad", max_ongoing_requests=5))
        assert running.settings.octets == b"", "nobody knows"
        assert running.replica.admission.limit == 3
        await running.take_in(octets)
        assert running.given == ["first", "bad", "first"]
        assert running.settings.octets == octets


async def test_without_any_before_there_is_none_to_go_back_to() -> None:
    async with Running() as running:
        with pytest.raises(ValueError, match="bad"):
            await running.take_in(encoded("bad"))
        with pytest.raises(ValueError, match="without a user_config: there is none to go back to"):
            await running.take_in(encoded())
        await running.take_in(encoded("good"))
        assert running.given == ["bad", "good"]


async def test_what_takes_none_is_left_as_it_is() -> None:
    class Fixed:
        def __call__(self) -> None: ...

    app = App()
    app.backend(Fixed, name="model")
    octets = encoded(max_ongoing_requests=3)
    record = configured(app.backends["model"], octets)
    replica = Replica(record, id="model#1", app="app", clock=ManualClock())
    settings = LiveSettings(app.backends["model"].config, octets)
    await replica.start()
    with pytest.raises(TypeError, match="backend 'model' takes no user_config"):
        await settings.take_in(replica, encoded("some", max_ongoing_requests=5))
    assert settings.octets == octets, "there is nothing to go back from"
    await settings.take_in(replica, octets)
    assert replica.admission.limit == 3
    await replica.aclose()


async def test_one_after_the_other() -> None:
    async with Running("zero") as running:
        await asyncio.gather(*(running.take_in(encoded(word)) for word in ("one", "two", "two")))
        assert running.given == ["zero", "one", "two"]


async def test_a_declared_one_that_does_not_pickle() -> None:
    declared = {"by": lambda: 1}
    async with Running(declared) as running:
        await running.take_in(encoded(request_timeout_s=5.0))
        assert running.given == [declared]
        await running.take_in(encoded("other"))
        assert running.given == [declared, "other"]


def test_what_does_not_fit_is_refused() -> None:
    app = App()

    @app.backend
    async def nothing() -> None: ...

    with pytest.raises(TypeError, match="backend 'nothing'"):
        configured(app.backends["nothing"], encoded(max_batch_size=4))

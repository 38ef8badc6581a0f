"""`open_instance`: who ends an instance that it started for nothing. What slow changes say."""

from __future__ import annotations

from typing import Any

import pytest

from serveit.cluster import instance as module
from serveit.cluster.instance import Waits, open_instance
from serveit.control.orders import Deploying


class FakeSession:
    closed = False

    def close(self) -> None:
        self.closed = True


class FakeInstance:
    """As one that has just been started."""

    def __init__(self, refuses: Exception | None) -> None:
        self.refuses = refuses
        self.looked = False

    async def http(self, options: Any, joined: Any) -> None:
        if self.refuses is not None:
            raise self.refuses

    async def end_if_empty(self) -> None:
        self.looked = True


class Stage:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, refuses: Exception | None = None) -> None:
        self.session = FakeSession()
        self.instance = FakeInstance(refuses)
        monkeypatch.setattr(module, "open_session", lambda address: self.session)
        monkeypatch.setattr(module, "start_instance", self.start)

    async def start(self, session: Any, line: Any) -> tuple[Any, Any]:
        assert session is self.session and line is None
        return self.instance, "joined"


async def test_one_that_serves_is_left_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch)
    async with open_instance("auto", start=True) as opened:
        assert opened is stage.instance  # type: ignore[comparison-overlap]
    assert not stage.instance.looked and stage.session.closed


async def test_one_without_its_port_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, OSError("cannot listen"))
    with pytest.raises(OSError, match="cannot listen"):
        async with open_instance("auto", start=True):
            pytest.fail("it does not listen")
    assert stage.instance.looked and stage.session.closed


async def test_one_whose_first_app_does_not_come_up_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch)
    with pytest.raises(ValueError, match="no model"):
        async with open_instance("auto", start=True):
            raise ValueError("no model")
    assert stage.instance.looked and stage.session.closed


def test_what_a_slow_change_waits_for_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    times = iter([0.0, 1.9, 2.0, 3.0, 4.0, 5.0])
    waits = Waits("main", lambda: next(times))
    for texts in (
        ["replica b#1 needs 4 CPU, 2 free; waiting for 1 s"],
        [
            "replica b#1 needs 4 CPU, 2 free; waiting for 2 s",
            "replica b#2 needs 4 CPU, 2 free; waiting for 2 s",
        ],
        ["replica b#1 needs 4 CPU, 2 free; waiting for 3 s"],
        [],
        ["replica b#1 needs 4 CPU, 1 free; waiting for 5 s"],
    ):
        waits(Deploying({"b": (0, 2)}, tuple(texts)))
    assert [record.getMessage() for record in caplog.records] == [
        "app 'main': replica b#1 needs 4 CPU, 2 free; waiting for 2 s",
        "app 'main': replica b#1 needs 4 CPU, 1 free; waiting for 5 s",
    ]

"""How many replicas have come and died."""

from __future__ import annotations

import pytest

from serveit.control.snapshot import AppInfo, BackendInfo
from serveit.control.tally import Tally
from tests.stage import Stage, scaled_to, spec, staged


def counts(info: AppInfo) -> dict[str, tuple[int, int]]:
    return {backend.name: (backend.num_started, backend.num_died) for backend in info.backends}


def test_what_is_told_has_the_counts() -> None:
    tally = Tally()
    info = AppInfo("app", (BackendInfo("b", (), 1), BackendInfo("c", (), 1)), (), ())
    assert tally.told(info) == info
    tally.started("b")
    tally.started("b")
    tally.died("b")
    tally.died("gone")
    assert counts(tally.told(info)) == {"b": (2, 1), "c": (0, 0)}
    assert repr(tally) == "<Tally started={'b': 2} died={'b': 1, 'gone': 1}>"


@pytest.fixture
def stage() -> Stage:
    return Stage()


@staged
class TestPublished:
    async def test_over_all_versions_of_an_app(self, stage: Stage) -> None:
        def now() -> dict[str, tuple[int, int]]:
            return counts(stage.controller.snapshot.apps[0])

        await stage.deploy(spec(b=2, c=1))
        assert now() == {"b": (2, 0), "c": (1, 0)}
        stage.launcher.of("b")[0].die()
        await stage.clock.advance(10.0)
        assert now() == {"b": (3, 1), "c": (1, 0)}
        await stage.controller.update("app", "b", scaled_to(1))
        await stage.clock.settle()
        assert now() == {"b": (3, 1), "c": (1, 0)}, "one that is ended does not die"
        await stage.deploy(spec(b=1))
        await stage.clock.advance(10.0)
        assert now() == {"b": (4, 1)}

    async def test_one_that_does_not_come_up_has_died(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        stage.launcher.eager = False
        stage.launcher.of("b")[0].die()
        await stage.clock.advance(10.0)
        stage.launcher.of("b")[0].fail(ValueError("no"))
        await stage.clock.settle()
        assert counts(stage.controller.snapshot.apps[0]) == {"b": (1, 2)}

from __future__ import annotations

import pytest

from serveit.control.orders import Deployed
from serveit.control.publisher import ACKNOWLEDGE_S
from tests.stage import (
    Stage,
    scaled_to,
    spec,
    staged,
)


@pytest.fixture
def stage() -> Stage:
    return Stage()


@staged
class TestWatching:
    async def test_whoever_is_new_gets_what_is(self, stage: Stage) -> None:
        await stage.deploy(spec(b=1))
        assert (
            await stage.result(stage.controller.publisher.watch("new", (0, 0))) is stage.controller.snapshot
        )

    async def test_what_is_known_is_not_told_again(self, stage: Stage) -> None:
        watching = stage.begin(stage.controller.publisher.watch("member", stage.controller.snapshot.version))
        await stage.clock.settle()
        assert not watching.done()
        await stage.controller.deploy(spec(b=1))
        await stage.clock.settle()
        assert watching.result() is stage.controller.snapshot

    async def test_versions_grow(self, stage: Stage) -> None:
        before = stage.controller.snapshot.version
        await stage.deploy(spec(b=1))
        await stage.controller.reroute("app", "/b", {"b": 1.0}, {})
        assert stage.controller.snapshot.version == (before[0], before[1] + 1), "nothing new, nothing said"

    async def test_who_is_forgotten_is_let_go(self, stage: Stage) -> None:
        watching = stage.begin(stage.controller.publisher.watch("member", stage.controller.snapshot.version))
        await stage.clock.settle()
        stage.controller.publisher.forget("member")
        await stage.clock.settle()
        assert watching.done()
        assert isinstance(await stage.deploy(spec(b=1)), Deployed)

    async def test_who_says_nothing_is_waited_for_once(
        self, stage: Stage, caplog: pytest.LogCaptureFixture
    ) -> None:
        stage.begin(stage.controller.publisher.watch("mute", stage.controller.snapshot.version))
        deployed = await stage.deploying(spec(b=1))
        await stage.clock.advance(ACKNOWLEDGE_S - 0.1)
        assert not deployed.done()
        await stage.clock.advance(0.2)
        assert isinstance(deployed.result(), Deployed)
        assert "no word from mute" in caplog.text
        assert isinstance(await stage.deploy(spec(b=1)), Deployed)

    async def test_a_lost_replica_goes_though_somebody_says_nothing(self, stage: Stage) -> None:
        await stage.deploy(spec(b=2))
        stage.begin(stage.controller.publisher.watch("mute", stage.controller.snapshot.version))
        await stage.clock.settle()
        await stage.controller.update("app", "b", scaled_to(1))
        await stage.clock.advance(1.0)
        assert len(stage.launcher.of("b")) == 2
        await stage.clock.advance(ACKNOWLEDGE_S)
        assert len(stage.launcher.of("b")) == 1

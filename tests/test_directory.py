from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from serveit.calling.directory import Directory
from serveit.calling.exchange import Exchange, Phase
from serveit.clock import DeadlineWheel
from serveit.control.snapshot import AppInfo, BackendInfo, EndpointInfo, ReplicaInfo
from serveit.exceptions import Draining, NotServing, QueueFull, ReplicaDied
from serveit.observe import NullObserver
from serveit.testing import ManualClock
from serveit.wire.frames import END, MAX_FRAME, PART, Credit, FrameType, decode_message
from serveit.wire.streams import WINDOW
from tests.fake_replicas import FakeExchange, FakeReplica, Replicas


class Rig:
    """A directory with fake replicas: one each for the backends given to `update`."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.replicas = Replicas()
        self.directory = Directory(
            "shop",
            default_queue=10,
            connect=self.replicas.connect,
            clock=self.clock,
            wheel=DeadlineWheel(self.clock),
            observer=NullObserver(),
            rng=random.Random(1),
        )

    async def update(
        self, *backends: str, endpoints: tuple[EndpointInfo, ...] = (), limit: int = 2, **options: Any
    ) -> None:
        infos = tuple(
            BackendInfo(name, (ReplicaInfo(f"{name}#1", ""),), limit, **options) for name in backends
        )
        await self.directory.update(AppInfo("shop", infos, endpoints, ()))

    def __getitem__(self, backend: str) -> FakeReplica:
        return self.replicas[f"{backend}#1"]

    def ask(self, name: str, shard_key: str | None = None) -> FakeExchange:
        """As a handle does: the main request, then its shadows."""
        endpoint = self.directory.endpoint(name)
        exchange = FakeExchange()
        self.directory.choose(endpoint, shard_key).submit(exchange)
        self.shadows: list[FakeExchange] = []
        self.directory.shadow(endpoint, self.copy(FakeExchange))
        return exchange

    def copy(self, make: Callable[[], FakeExchange]) -> Callable[[], Exchange]:
        def made() -> Exchange:
            self.shadows.append(make())
            return self.shadows[-1]

        return made


@pytest.fixture
async def rig() -> Rig:
    return Rig()


SHADOWED = EndpointInfo("/buy", (("main", 1.0),), (("shadow", 1.0),))


# -- names -----------------------------------------------------------------------------------


async def test_backends_and_endpoints_have_names(rig: Rig) -> None:
    await rig.update("v1", "v2", endpoints=(EndpointInfo("/buy", (("v1", 0.5), ("v2", 0.5)), (), "explain"),))
    assert rig.directory.endpoint("v1").target == "__call__"
    assert rig.directory.endpoint("v1").traffic.weights == (("v1", 1.0),)
    assert rig.directory.endpoint("/buy").target == "explain"
    assert rig.directory.choose(rig.directory.endpoint("v2")) is rig.directory.routers["v2"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("clasifier", "app 'shop' has no backend or endpoint 'clasifier': did you mean 'classifier'?"),
        ("zzz", "app 'shop' has no backend or endpoint 'zzz': there is 'classifier', 'user'"),
    ],
)
async def test_a_wrong_name_suggests_the_right_one(rig: Rig, name: str, text: str) -> None:
    await rig.update("user", "classifier")
    with pytest.raises(KeyError) as caught:
        rig.directory.endpoint(name)
    assert caught.value.args == (text,)


async def test_before_the_first_snapshot_there_is_no_name(rig: Rig) -> None:
    with pytest.raises(KeyError, match="there is none"):
        rig.directory.endpoint("user")
    assert repr(rig.directory) == "<Directory shop []>"


async def test_names_that_are_expected_are_known_and_cannot_be_called(rig: Rig) -> None:
    rig.directory.expect(["user", "/buy"])
    rig.directory.check("user")
    with pytest.raises(NotServing, match="'user' cannot be called yet: app 'shop' is still starting"):
        rig.directory.endpoint("user")
    with pytest.raises(KeyError, match="did you mean 'user'"):
        rig.directory.check("usr")
    await rig.update("user")
    rig.directory.check("user")
    with pytest.raises(KeyError, match="there is 'user'"):
        rig.directory.check("/buy")


async def test_a_name_that_is_missing_can_be_waited_for(rig: Rig) -> None:
    await rig.update("user")
    await rig.directory.wait_for("user")
    waiting = [asyncio.ensure_future(rig.directory.wait_for("later")) for _ in range(3)]
    await rig.update("user", "other")
    await asyncio.sleep(0)
    assert not any(each.done() for each in waiting)
    waiting[0].cancel()
    await rig.update("user", "later")
    await asyncio.gather(*waiting[1:])
    assert rig.directory.has("later") and not rig.directory.has("other")


async def test_so_many_wait_for_names_and_no_more(rig: Rig) -> None:
    waiting = [asyncio.ensure_future(rig.directory.wait_for(f"later {number}")) for number in range(10)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFull, match="10 calls wait already for backends and endpoints"):
        await rig.directory.wait_for("another")
    waiting[0].cancel()
    await asyncio.wait(waiting[:1])
    waiting[0] = asyncio.ensure_future(rig.directory.wait_for("another"))
    await asyncio.sleep(0)
    rig.directory.close()
    for each in waiting:
        with pytest.raises(NotServing, match="app 'shop' was ended while a call waited"):
            await each


async def test_a_drain_ends_the_wait_for_names(rig: Rig) -> None:
    waiting = asyncio.ensure_future(rig.directory.wait_for("later"))
    await asyncio.sleep(0)
    rig.directory.drain()
    with pytest.raises(Draining, match="'later' will not come any more"):
        await waiting


async def test_a_name_is_known_once_its_backend_is_connected(rig: Rig) -> None:
    gate = rig.replicas.gates["user#1"] = asyncio.Event()
    update = asyncio.create_task(rig.update("user"))
    await asyncio.sleep(0)
    with pytest.raises(KeyError):
        rig.directory.endpoint("user")
    gate.set()
    await update
    assert rig.ask("user").phase == Phase.SENT


# -- traffic ---------------------------------------------------------------------------------


async def test_requests_are_shared_out_by_weight(rig: Rig) -> None:
    await rig.update("v1", "v2", endpoints=(EndpointInfo("/buy", (("v1", 0.9), ("v2", 0.1))),))
    endpoint = rig.directory.endpoint("/buy")
    chosen = Counter(rig.directory.choose(endpoint).info.name for _ in range(1000))
    assert 870 <= chosen["v1"] <= 930


async def test_a_shard_key_sticks(rig: Rig) -> None:
    await rig.update("v1", "v2", endpoints=(EndpointInfo("/buy", (("v1", 0.5), ("v2", 0.5))),))
    endpoint = rig.directory.endpoint("/buy")
    for key in map(str, range(50)):
        assert len({rig.directory.choose(endpoint, key) for _ in range(5)}) == 1
    assert len({rig.directory.choose(endpoint, key) for key in map(str, range(50))}) == 2


# -- shadows ---------------------------------------------------------------------------------


async def test_a_shadow_gets_a_copy(rig: Rig) -> None:
    await rig.update("main", "shadow", endpoints=(SHADOWED,))
    exchange = rig.ask("/buy")
    assert len(rig["main"].calls) == len(rig["shadow"].calls) == 1
    rig["main"].answer(1, "yes")
    await exchange.answer
    rig["shadow"].error(1, "broken")
    assert rig.shadows[0].phase == Phase.DONE


async def test_shadows_are_drawn_by_their_probability(rig: Rig) -> None:
    await rig.update(
        "main", "shadow", limit=500, endpoints=(EndpointInfo("/buy", (("main", 1.0),), (("shadow", 0.25),)),)
    )
    for _ in range(400):
        rig.ask("/buy")
    assert 70 <= len(rig["shadow"].calls) <= 130


async def test_a_shadow_without_a_free_slot_is_left_out(rig: Rig) -> None:
    await rig.update("main", "shadow", limit=1, endpoints=(SHADOWED,))
    rig.ask("/buy")
    exchange = rig.ask("/buy")
    assert len(rig["shadow"].calls) == 1
    assert rig.directory.routers["shadow"].statistics().waiting == 0
    rig["main"].answer(2, "yes")
    await exchange.answer


async def test_a_shadow_of_a_backend_that_is_weighed_as_well(rig: Rig) -> None:
    """It gets copies of what it answers, too, and only where it has a slot to spare."""
    both = EndpointInfo("/buy", (("main", 1.0),), (("main", 1.0),))
    await rig.update("main", limit=2, endpoints=(both,))
    first = rig.ask("/buy")
    assert len(rig["main"].calls) == 2
    second = rig.ask("/buy")
    assert len(rig["main"].calls) == 3, "the second request is the next to run, and has no copy"
    for number in (1, 2, 3):
        rig["main"].answer(number, "yes")
    await asyncio.gather(first.answer, second.answer)


async def test_a_shadow_s_large_answer_is_cut_short(rig: Rig) -> None:
    await rig.update("main", "shadow", endpoints=(SHADOWED,))
    rig.ask("/buy")
    rig["shadow"].begin_large(1, 1_000_000)
    await asyncio.sleep(0)
    assert [frame.stream for frame in rig["shadow"].sent(FrameType.CANCEL)] == [1]
    rig["shadow"].error(1)
    assert rig.directory.routers["shadow"].statistics().outstanding == 0
    assert rig["main"].sent(FrameType.CANCEL) == []


async def test_a_shadow_s_stream_runs_to_its_end_unread(rig: Rig) -> None:
    await rig.update("main", "shadow", endpoints=(SHADOWED,))
    rig.ask("/buy")
    shadow, octets = rig["shadow"], 200_000
    shadow.begin_stream(1)
    shadow.data(1, bytes(octets // 2))
    await asyncio.sleep(0)
    for _ in range(20):
        shadow.data(1, bytes(octets // 2), PART)
        shadow.data(1, bytes(octets // 2))
    credit = sum(decode_message(Credit, frame).octets for frame in shadow.sent(FrameType.CREDIT))
    assert credit >= 20 * octets - WINDOW, "as of what is read"
    shadow.data(1, b"", END)
    assert rig.directory.routers["shadow"].statistics().outstanding == 0
    assert shadow.sent(FrameType.CANCEL) == []
    assert rig.shadows[0].phase == Phase.DONE and rig.shadows[0].bucket is None


async def test_a_shadow_s_stream_ends_some_time(rig: Rig) -> None:
    await rig.update("main", "shadow", endpoints=(SHADOWED,), request_timeout_s=60.0)
    rig.ask("/buy")
    rig["shadow"].begin_stream(1)
    await rig.clock.advance(59.0)
    rig["shadow"].data(1, b"still here")
    assert rig["shadow"].sent(FrameType.CANCEL) == []
    await rig.clock.advance(2.0)
    assert [frame.stream for frame in rig["shadow"].sent(FrameType.CANCEL)] == [1]
    rig["shadow"].error(1)
    assert rig.directory.routers["shadow"].statistics().outstanding == 0


async def test_what_is_wrong_with_a_shadow_is_only_logged(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    await rig.update("main", "shadow", endpoints=(SHADOWED,))
    endpoint = rig.directory.endpoint("/buy")
    rig.shadows = []
    with caplog.at_level(logging.ERROR, "serveit.router"):
        rig.directory.shadow(endpoint, rig.copy(lambda: FakeExchange("x" * MAX_FRAME)))
    assert "a shadow request to backend 'shadow' could not be sent" in caplog.text


async def test_a_lost_shadow_harms_nobody(rig: Rig) -> None:
    await rig.update("main", "shadow", endpoints=(SHADOWED,))
    exchange = rig.ask("/buy")
    rig["shadow"].lose()
    rig["main"].answer(1, "yes")
    await exchange.answer
    exchange = rig.ask("/buy")
    assert len(rig["main"].calls) == 2
    rig.shadows[0].cancel()
    rig["main"].answer(2)
    await exchange.answer


# -- snapshots and the end -------------------------------------------------------------------


async def test_a_backend_that_is_gone_ends_what_it_has(rig: Rig) -> None:
    await rig.update("old", "new", limit=1)
    exchange = rig.ask("old")
    router = rig.directory.routers["old"]
    await rig.update("new")
    assert list(rig.directory.routers) == ["new"]
    with pytest.raises(KeyError):
        rig.directory.endpoint("old")
    with pytest.raises(NotServing):
        router.submit(FakeExchange())
    rig["old"].answer(1, "done")
    await exchange.answer
    assert rig["old"].closed
    await asyncio.sleep(0)
    await rig.update("new")
    assert rig.directory._leaving == []


async def test_closing_ends_everything(rig: Rig) -> None:
    await rig.update("old", "new", limit=1)
    leaving = rig.ask("old")
    await rig.update("new", limit=1)
    exchanges = [rig.ask("new") for _ in range(3)]
    rig.directory.close()
    assert rig.directory.closed
    assert rig["old"].closed
    assert rig["new"].closed
    with pytest.raises(Draining):
        await exchanges[2].answer
    for exchange in (leaving, *exchanges[:2]):
        with pytest.raises(ReplicaDied):
            await exchange.answer
    await rig.update("new", "other")
    assert list(rig.directory.routers) == ["new"]
    assert repr(rig.directory) == "<Directory shop closed [<Router new waiting=0 []>]>"


async def test_it_makes_its_own_chance() -> None:
    rig = Rig()
    directory = Directory(
        "shop",
        default_queue=1,
        connect=rig.replicas.connect,
        clock=rig.clock,
        wheel=DeadlineWheel(rig.clock),
        observer=NullObserver(),
    )
    await directory.update(
        AppInfo(
            "shop",
            (BackendInfo("v1", (), 1), BackendInfo("v2", (), 1)),
            (EndpointInfo("/buy", (("v1", 0.5), ("v2", 0.5))),),
            (),
        )
    )
    endpoint = directory.endpoint("/buy")
    assert len({directory.choose(endpoint).info.name for _ in range(200)}) == 2


async def test_draining_takes_nothing_from_outside(rig: Rig) -> None:
    await rig.update("user", limit=1)
    running = rig.ask("user")
    rig.directory.drain()
    with pytest.raises(Draining):
        rig.ask("user")
    await rig.update("user", "late")  # later backends the same
    with pytest.raises(Draining):
        rig.ask("late")
    rig["user"].answer(1)
    assert running.phase == Phase.DONE
    rig.directory.close()
    await asyncio.sleep(0)

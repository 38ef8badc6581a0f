from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec
import pytest

from serveit.control.keeper import LOOK_S, MAX_PAUSE_S, STEADY_S
from serveit.control.orders import Configured, Health, ProxyOrder, ReplicaOrder, Started, StartFailed
from serveit.control.processes import Node, ProcessDied
from serveit.control.proxies import POLL_S, STRAYS_S, Proxies
from serveit.exceptions import NotServing
from serveit.testing import ManualClock

HEAD = Node("0" * 56, "127.0.0.2", True)
SECOND = Node("2" * 56, "127.0.0.3", False)
THIRD = Node("3" * 56, "127.0.0.4", False)


def proxy_order(location: str = "EveryNode", **options: Any) -> ProxyOrder:
    encoded = msgspec.json.encode({"host": "node", "port": 0, "location": location, **options})
    return ProxyOrder("proxy-t0", encoded, b"s")


class FakeProcess:
    """An HTTP server in the test's hands."""

    def __init__(self, order: ProxyOrder, pid: int) -> None:
        self.order = order
        self.pid = pid
        self.outcome: asyncio.Future[Started | StartFailed] = asyncio.get_running_loop().create_future()
        self.gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.drains: list[float] = []
        self.starts = 0

    def __repr__(self) -> str:
        return f"<FakeProcess {self.order.id}>"

    @property
    def port(self) -> int:
        asked: int = msgspec.json.decode(self.order.options)["port"]
        return asked or 1000 + self.pid

    # in the test's hands

    def ready(self) -> None:
        self.outcome.set_result(Started(self.pid, f"http://{self.order.node[:1]}:{self.port}/a:b"))

    def fail(self, text: str) -> None:
        self.outcome.set_result(StartFailed(b"", text=text))

    def die(self, how: str = "SIGKILL") -> None:
        if not self.gone.done():
            self.gone.set_result(how)
        if not self.outcome.done():
            self.outcome.set_exception(ProcessDied(how))
            self.outcome.exception()

    @property
    def alive(self) -> bool:
        return not self.gone.done()

    # what is asked of it

    async def configure(self, settings: bytes) -> Configured:
        raise AssertionError("only replicas have settings")

    async def placed(self) -> None:
        """It always is."""

    async def start(self) -> Started | StartFailed:
        self.starts += 1
        return await asyncio.shield(self.outcome)

    async def status(self) -> dict[str, Any]:
        return {}

    async def health(self, timeout_s: float) -> Health:
        raise NotImplementedError

    async def idle(self, timeout_s: float) -> None:
        """It always is."""

    async def death(self) -> str:
        return await asyncio.shield(self.gone)

    async def stop(self, drain_s: float, *, to_deadlines: bool = False) -> None:
        self.drains.append(drain_s)
        self.die("stopped")

    def kill(self) -> None:
        self.die("killed")


class FakeLauncher:
    """A cluster: its nodes and processes. With `eager` servers are ready at once."""

    def __init__(self, *nodes: Node) -> None:
        self.here = list(nodes)
        self.eager = True
        self.lost = False
        self.looks = 0
        self.made: list[FakeProcess] = []
        self.adopted: list[str] = []

    def replica(self, order: ReplicaOrder) -> FakeProcess:
        raise NotImplementedError

    def stray(self, name: str) -> FakeProcess:
        raise NotImplementedError

    async def running(self) -> list[str]:
        raise NotImplementedError

    async def lacking(self, order: ReplicaOrder) -> str:
        raise NotImplementedError

    def proxy(self, order: ProxyOrder) -> FakeProcess:
        assert order.id not in [process.order.id for process in self.made], "the name is taken"
        process = FakeProcess(order, pid=len(self.made) + 1)
        self.made.append(process)
        if self.eager:
            process.ready()
        return process

    def adopt(self, order: ReplicaOrder | ProxyOrder) -> FakeProcess:
        assert isinstance(order, ProxyOrder)
        self.adopted.append(order.id)
        for process in self.made:
            if process.order.id == order.id:
                return process
        gone = FakeProcess(order, 0)
        gone.die("it is gone")
        return gone

    async def nodes(self) -> list[Node]:
        self.looks += 1
        if self.lost:
            raise ConnectionError("no cluster")
        return list(self.here)

    def on(self, node: Node) -> list[FakeProcess]:
        """A node's servers that live."""
        return [process for process in self.made if process.alive and process.order.node == node.id]

    def remove(self, node: Node) -> None:
        """The node's processes die with it; the cluster has not noticed yet."""
        for process in self.on(node):
            process.die("the node is gone")

    @property
    def alive(self) -> list[str]:
        return [process.order.id for process in self.made if process.alive]


class Stage:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.launcher = FakeLauncher(HEAD, SECOND)
        self.ended: list[str] = []
        self.changes = 0
        self.tasks: list[asyncio.Task[Any]] = []
        self.proxies = self.make()
        self._before: set[asyncio.Task[Any]] = set()

    def make(self) -> Proxies:
        return Proxies(self.launcher, self.clock, self.ended.append, self._changed)

    def _changed(self) -> None:
        assert self.proxies.kept is not None
        self.changes += 1

    def begin(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        self._before = self._before or asyncio.all_tasks()
        task = asyncio.ensure_future(coroutine)
        self.tasks.append(task)
        return task

    async def result(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        task = self.begin(coroutine)
        await self.clock.settle()
        assert task.done(), "it waits"
        return task.result()

    async def open(self, location: str = "EveryNode", **options: Any) -> Any:
        order = proxy_order(location, **options)
        return await self.result(self.proxies.open(order.options, order))

    async def controller_dies(self) -> bytes:
        """Nothing of it goes on, and its servers know nothing of that. What it had kept."""
        kept = self.proxies.kept
        assert kept is not None
        for task in asyncio.all_tasks() - self._before:
            task.cancel()
        await self.clock.settle()
        self.proxies = self.make()
        return kept

    @property
    def states(self) -> dict[str, str]:
        """By the node's address."""
        return {server["address"]: server["state"] for server in self.proxies.status().values()}

    async def aclose(self) -> None:
        await self.proxies.aclose(0.0)
        for task in self.tasks:
            task.cancel()
        if self.tasks:
            await asyncio.wait(self.tasks)


@pytest.fixture
def stage() -> Stage:
    return Stage()


def staged(tests: type) -> type:
    """Each test closes its stage in its own time: what it leaves running is found after it."""
    for name, test in list(vars(tests).items()):
        if name.startswith("test_"):
            setattr(tests, name, _closing(test))
    return tests


def _closing(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def run(*args: Any, **fixtures: Any) -> None:
        try:
            await test(*args, **fixtures)
        finally:
            await fixtures["stage"].aclose()

    return run


@staged
class TestOpen:
    async def test_on_the_head_only(self, stage: Stage) -> None:
        stage.launcher.here.reverse()
        started = await stage.open("HeadOnly")
        assert started == Started(1, "http://0:1001/a:b")
        assert stage.launcher.alive == ["proxy-t0-00000000-1"]
        assert stage.launcher.made[0].order.node == HEAD.id
        assert stage.proxies.url == started.address
        looks = stage.launcher.looks
        await stage.clock.advance(10 * POLL_S)
        assert stage.launcher.looks == looks, "nodes that join are of no interest"

    async def test_on_every_node(self, stage: Stage) -> None:
        started = await stage.open()
        assert started == Started(1, "http://0:1001/a:b")
        assert stage.proxies.urls == {HEAD.id: "http://0:1001/a:b", SECOND.id: "http://2:1002/a:b"}
        assert stage.proxies.url == started.address
        assert stage.proxies.members == ["proxy-t0-00000000-1", "proxy-t0-22222222-1"]
        assert stage.proxies.status() == {
            HEAD.id: {"address": "127.0.0.2", "url": "http://0:1001/a:b", "state": "ready"},
            SECOND.id: {"address": "127.0.0.3", "url": "http://2:1002/a:b", "state": "ready"},
        }

    async def test_each_is_told_whether_it_is_the_heads(self, stage: Stage) -> None:
        await stage.open()
        (head,), (other,) = stage.launcher.on(HEAD), stage.launcher.on(SECOND)
        assert (head.order.is_first, other.order.is_first) == (True, False)

    async def test_waits_for_the_first_attempt_on_each_node(self, stage: Stage) -> None:
        stage.launcher.eager = False
        opening = stage.begin(stage.proxies.open(None, proxy_order()))
        await stage.clock.settle()
        assert len(stage.launcher.made) == 1, "what is wrong with the options is found on the head"
        stage.launcher.made[0].ready()
        await stage.clock.settle()
        assert stage.states == {"127.0.0.2": "ready", "127.0.0.3": "starting"}
        assert not opening.done()
        stage.launcher.made[1].ready()
        await stage.clock.settle()
        assert opening.result() == Started(1, "http://0:1001/a:b")

    async def test_none_where_the_heads_does_not_start(self, stage: Stage) -> None:
        stage.launcher.eager = False
        opening = stage.begin(stage.proxies.open(None, proxy_order()))
        await stage.clock.settle()
        stage.launcher.made[0].fail("OSError: in use")
        await stage.clock.settle()
        assert opening.result() == StartFailed(b"", text="OSError: in use")
        assert stage.launcher.alive == [] and stage.proxies.status() == {} and stage.proxies.kept is None
        assert stage.changes == 0 and stage.proxies.url is None

    async def test_another_nodes_is_tried_again(self, stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
        stage.launcher.eager = False
        opening = stage.begin(stage.proxies.open(None, proxy_order()))
        await stage.clock.settle()
        stage.launcher.made[0].ready()
        await stage.clock.settle()
        stage.launcher.made[1].fail("OSError: in use")
        await stage.clock.settle()
        assert isinstance(opening.result(), Started)
        assert stage.states["127.0.0.3"] == "failed: OSError: in use"
        assert stage.ended == ["proxy-t0-22222222-1"]
        await stage.clock.advance(LOOK_S)
        assert "HTTP server on node 127.0.0.3 failed: OSError: in use" in caplog.text
        assert len(stage.launcher.made) == 2, "not at once"
        stage.launcher.eager = True
        await stage.clock.advance(0.5)
        assert stage.states["127.0.0.3"] == "ready"
        assert stage.proxies.members[1] == "proxy-t0-22222222-2"

    async def test_joiners_have_the_same_options(self, stage: Stage) -> None:
        started = await stage.open()
        assert await stage.open() == started
        assert await stage.result(stage.proxies.open(None, None)) == started
        with pytest.raises(ValueError, match="location='EveryNode'; asked for location='HeadOnly'"):
            await stage.open("HeadOnly")

    async def test_a_caller_who_gives_up_leaves_none(self, stage: Stage) -> None:
        stage.launcher.eager = False
        opening = stage.begin(stage.proxies.open(None, proxy_order()))
        await stage.clock.settle()
        opening.cancel()
        await stage.clock.settle()
        assert stage.launcher.alive == [] and stage.proxies.status() == {}
        stage.launcher.eager = True
        other = msgspec.structs.replace(proxy_order(), id="proxy-t1")
        assert isinstance(await stage.result(stage.proxies.open(None, other)), Started)


@staged
class TestNodes:
    async def test_one_that_joins_gets_a_server(self, stage: Stage) -> None:
        await stage.open(port=8000)
        changes = stage.changes
        stage.launcher.here.append(THIRD)
        await stage.clock.advance(POLL_S)
        assert stage.proxies.urls[THIRD.id] == "http://3:8000/a:b"
        assert stage.states == {"127.0.0.2": "ready", "127.0.0.3": "ready", "127.0.0.4": "ready"}
        assert stage.changes > changes

    async def test_one_that_leaves_takes_its_server_along(self, stage: Stage) -> None:
        await stage.open()
        (process,) = stage.launcher.on(SECOND)
        stage.launcher.here.remove(SECOND)
        await stage.clock.advance(POLL_S)
        assert not process.alive
        assert stage.ended == [process.order.id], "it is waited for no more"
        assert stage.states == {"127.0.0.2": "ready"} and list(stage.proxies.urls) == [HEAD.id]
        await stage.clock.advance(60.0)
        assert len(stage.launcher.made) == 2

    async def test_a_death_that_is_the_nodes_is_nobodys_fault(
        self, stage: Stage, caplog: pytest.LogCaptureFixture
    ) -> None:
        await stage.open()
        stage.launcher.remove(SECOND)
        await stage.clock.settle()
        assert stage.ended == ["proxy-t0-22222222-1"], "at once"
        stage.launcher.here.remove(SECOND)
        await stage.clock.advance(60.0)
        assert stage.states == {"127.0.0.2": "ready"}
        assert len(stage.launcher.made) == 2
        assert not caplog.records

    async def test_one_that_is_gone_before_its_server_is_there(self, stage: Stage) -> None:
        stage.launcher.eager = False
        opening = stage.begin(stage.proxies.open(None, proxy_order()))
        await stage.clock.settle()
        stage.launcher.made[0].ready()
        await stage.clock.settle()
        stage.launcher.here.remove(SECOND)
        await stage.clock.advance(POLL_S)
        assert isinstance(opening.result(), Started)
        assert stage.launcher.alive == ["proxy-t0-00000000-1"]

    async def test_one_that_comes_back_is_a_new_one(self, stage: Stage) -> None:
        await stage.open()
        stage.launcher.here.remove(SECOND)
        await stage.clock.advance(POLL_S)
        again = Node("4" * 56, SECOND.address, False)
        stage.launcher.here.append(again)
        await stage.clock.advance(POLL_S)
        assert stage.proxies.members == ["proxy-t0-00000000-1", "proxy-t0-44444444-1"]

    async def test_a_cluster_that_does_not_answer_is_asked_again(
        self, stage: Stage, caplog: pytest.LogCaptureFixture
    ) -> None:
        await stage.open()
        stage.launcher.lost = True
        stage.launcher.here.append(THIRD)
        await stage.clock.advance(POLL_S)
        assert "which nodes there are: no cluster" in caplog.text
        assert stage.states == {"127.0.0.2": "ready", "127.0.0.3": "ready"}
        stage.launcher.lost = False
        await stage.clock.advance(POLL_S)
        assert len(stage.states) == 3

    async def test_no_nodes_at_all_is_no_answer(self, stage: Stage) -> None:
        await stage.open()
        stage.launcher.here.clear()
        await stage.clock.advance(POLL_S)
        assert len(stage.states) == 2


@staged
class TestDeaths:
    async def test_on_the_head_it_is_started_again_at_once(
        self, stage: Stage, caplog: pytest.LogCaptureFixture
    ) -> None:
        await stage.open()
        stage.launcher.made[0].die()
        await stage.clock.settle()
        assert "the HTTP server on node 127.0.0.2 failed: it died: SIGKILL" in caplog.text
        assert stage.ended == ["proxy-t0-00000000-1"]
        (again,) = stage.launcher.on(HEAD)
        assert again.order.id == "proxy-t0-00000000-2"
        assert stage.proxies.url == "http://0:1001/a:b", "where it was"

    async def test_elsewhere_once_it_is_known_that_the_node_lives(self, stage: Stage) -> None:
        await stage.open()
        stage.launcher.made[1].die()
        await stage.clock.settle()
        assert stage.states["127.0.0.3"] == "failed: it died: SIGKILL"
        assert stage.proxies.urls[SECOND.id] == "http://2:1002/a:b"
        await stage.clock.advance(LOOK_S)
        (again,) = stage.launcher.on(SECOND)
        assert again.port == 1002
        assert stage.states["127.0.0.3"] == "ready"

    async def test_one_that_keeps_dying_gets_pauses(self, stage: Stage) -> None:
        await stage.open("HeadOnly")
        starts = []
        for _ in range(8):
            stage.launcher.on(HEAD)[0].die()
            begun = stage.clock.time()
            await stage.clock.settle()
            while not stage.launcher.on(HEAD):
                await stage.clock.advance(0.5)
            starts.append(stage.clock.time() - begun)
        assert starts == [0.0, 0.5, 1.0, 2.0, 4.0, MAX_PAUSE_S, MAX_PAUSE_S, MAX_PAUSE_S]
        await stage.clock.advance(STEADY_S + 1)
        stage.launcher.on(HEAD)[0].die()
        await stage.clock.settle()
        assert stage.launcher.on(HEAD), "it had been steady"


@staged
class TestRecovery:
    async def test_what_runs_is_taken_over(self, stage: Stage) -> None:
        started = await stage.open()
        processes = list(stage.launcher.made)
        kept, running = await stage.controller_dies(), stage.launcher.alive
        await stage.result(stage.proxies.recover(kept, [*running, "controller", "proxy-app/b#1@t0"]))
        assert [process.alive for process in processes] == [True, True]
        assert stage.launcher.made == processes and stage.launcher.adopted == running
        assert [process.starts for process in processes] == [2, 2]
        assert stage.proxies.members == running
        assert stage.states == {"127.0.0.2": "ready", "127.0.0.3": "ready"}
        assert await stage.open() == started
        with pytest.raises(ValueError, match="port=0; asked for port=8000"):
            await stage.open(port=8000)

    async def test_it_is_kept_from_then_on(self, stage: Stage) -> None:
        await stage.open()
        kept, running = await stage.controller_dies(), stage.launcher.alive
        await stage.result(stage.proxies.recover(kept, running))
        stage.launcher.made[0].die()
        stage.launcher.here.append(THIRD)
        await stage.clock.advance(POLL_S)
        assert stage.proxies.members == [
            "proxy-t0-00000000-2",
            "proxy-t0-22222222-1",
            "proxy-t0-33333333-1",
        ]

    async def test_what_is_known_is_known_at_once(self, stage: Stage) -> None:
        """Before a server that was taken over has said anything: it may wait for a snapshot."""
        started = await stage.open()
        kept, running = await stage.controller_dies(), stage.launcher.alive
        for process in stage.launcher.made:
            process.outcome = asyncio.get_running_loop().create_future()
        await stage.result(stage.proxies.recover(kept, running))
        assert stage.proxies.url == started.address
        assert stage.proxies.members == running
        assert await stage.open() == started
        for process in stage.launcher.made:
            process.ready()

    async def test_what_is_missing_is_started_where_it_was(self, stage: Stage) -> None:
        await stage.open()
        kept = await stage.controller_dies()
        stage.launcher.made[1].die()
        await stage.result(stage.proxies.recover(kept, stage.launcher.alive))
        (again,) = stage.launcher.on(SECOND)
        assert (again.order.id, again.port) == ("proxy-t0-22222222-2", 1002)
        assert again.order.secret == b"s"

    async def test_what_dies_while_it_is_taken_over_is_started(self, stage: Stage) -> None:
        await stage.open()
        kept, running = await stage.controller_dies(), stage.launcher.alive
        stage.launcher.made.clear()
        await stage.result(stage.proxies.recover(kept, running))
        assert stage.states["127.0.0.2"].startswith("failed: the HTTP server: it died")
        assert stage.ended == running
        await stage.clock.advance(1.0)
        assert stage.launcher.alive == ["proxy-t0-00000000-2", "proxy-t0-22222222-2"]

    async def test_one_that_is_still_starting_is_taken_over(self, stage: Stage) -> None:
        await stage.open()
        stage.launcher.here.append(THIRD)
        stage.launcher.eager = False
        await stage.clock.advance(POLL_S)
        kept, running = await stage.controller_dies(), stage.launcher.alive
        await stage.result(stage.proxies.recover(kept, running))
        assert stage.states["127.0.0.4"] == "starting"
        assert stage.proxies.members == running[:2]
        stage.launcher.made[2].ready()
        await stage.clock.settle()
        assert stage.proxies.members == running

    async def test_a_later_one_than_was_kept_is_taken_over(self, stage: Stage) -> None:
        await stage.open()
        kept = stage.proxies.kept
        stage.launcher.made[0].die()
        await stage.clock.settle()
        await stage.controller_dies()
        await stage.result(stage.proxies.recover(kept, stage.launcher.alive))
        assert stage.proxies.members == ["proxy-t0-00000000-2", "proxy-t0-22222222-1"]
        assert len(stage.launcher.made) == 3

    async def test_what_nobody_wants_is_ended_first(self, stage: Stage) -> None:
        await stage.open()
        kept, running = await stage.controller_dies(), stage.launcher.alive
        stage.launcher.here = [HEAD, THIRD]
        await stage.result(stage.proxies.recover(kept, running))
        assert stage.launcher.alive == ["proxy-t0-00000000-1", "proxy-t0-33333333-1"]
        assert stage.states == {"127.0.0.2": "ready", "127.0.0.4": "ready"}

    async def test_of_a_controller_that_had_kept_nothing(self, stage: Stage) -> None:
        await stage.open()
        await stage.controller_dies()
        await stage.result(stage.proxies.recover(None, stage.launcher.alive))
        assert stage.launcher.alive == []
        assert stage.proxies.kept is None
        assert isinstance(await stage.open(), Started), "with names that were not there before"
        assert stage.launcher.alive == ["proxy-t0-00000000-2", "proxy-t0-22222222-2"]

    async def test_one_that_does_not_end_is_waited_for_no_longer(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        await stage.open("HeadOnly")
        await stage.controller_dies()
        monkeypatch.setattr(stage.launcher.made[0], "kill", lambda: None)
        recovery = stage.begin(stage.proxies.recover(None, stage.launcher.alive))
        await stage.clock.settle()
        assert not recovery.done()
        await stage.clock.advance(STRAYS_S)
        assert recovery.done()
        assert "proxy-t0-00000000-1, which nobody wants, does not end" in caplog.text


@staged
class TestClose:
    async def test_all_drain(self, stage: Stage) -> None:
        await stage.open()
        await stage.result(stage.proxies.aclose(7.0))
        assert [process.drains for process in stage.launcher.made] == [[7.0], [7.0]]
        assert len(stage.ended) == 2
        stage.launcher.here.append(THIRD)
        await stage.clock.advance(60.0)
        assert len(stage.launcher.made) == 2, "nothing is started any more"
        with pytest.raises(NotServing, match="shutting down"):
            await stage.proxies.open(None, proxy_order())

    async def test_while_it_opens(self, stage: Stage) -> None:
        stage.launcher.eager = False
        opening = stage.begin(stage.proxies.open(None, proxy_order()))
        await stage.clock.settle()
        stage.launcher.made[0].ready()
        await stage.clock.settle()
        await stage.result(stage.proxies.aclose(1.0))
        await stage.clock.settle()
        assert isinstance(opening.result(), Started)
        assert stage.launcher.alive == []

    async def test_one_that_fails_to_end_holds_no_other_up(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        await stage.open()

        async def stop(drain_s: float, *, to_deadlines: bool = False) -> None:
            raise RuntimeError("Ray is gone")

        monkeypatch.setattr(stage.launcher.made[0], "stop", stop)
        await stage.result(stage.proxies.aclose(1.0))
        assert "Ray is gone" in caplog.text
        assert stage.launcher.made[1].drains == [1.0]
        monkeypatch.undo()

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import ray

from serveit.cluster import refs
from serveit.cluster.refs import RayTasks
from serveit.control.orders import Place, place_text
from serveit.control.snapshot import ReplicaInfo
from serveit.exceptions import EncodingError, NotServing
from tests.support import wait_until


class FakeRef:
    """An ObjectRef whose task the test ends."""

    def __init__(self, name: str, value: Any = None) -> None:
        self.name = name
        self.value = value

    def __repr__(self) -> str:
        return self.name

    def __await__(self) -> Any:
        if isinstance(self.value, Exception):
            raise self.value
        yield from asyncio.sleep(0).__await__()
        return self.value


class FakeRay:
    """`ray.wait` that gives what has ended, and looks again at once when something does."""

    def __init__(self) -> None:
        self.moved = threading.Condition()
        self.ended: set[FakeRef] = set()
        self.asked: list[list[FakeRef]] = []
        self.options: dict[str, Any] = {}
        self.connected = True

    def end(self, *ended: FakeRef) -> None:
        with self.moved:
            self.ended.update(ended)
            self.moved.notify_all()

    def wait(self, waiting: Sequence[FakeRef], timeout: float, **options: Any) -> Any:
        with self.moved:
            self.asked.append(list(waiting))
            self.options = options
            self.moved.wait_for(lambda: self.ended & set(waiting), timeout)
            ready = [ref for ref in waiting if ref in self.ended]
            return ready, [ref for ref in waiting if ref not in self.ended]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setattr(ray, "wait", fake.wait)
    monkeypatch.setattr(ray, "is_initialized", lambda: fake.connected)
    monkeypatch.setattr(ray, "ObjectRef", FakeRef)
    return fake


@pytest.fixture
def tasks(fake: FakeRay) -> RayTasks:
    return RayTasks("app")


def waiters() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "serveit-refs"]


async def gone() -> None:
    await wait_until(lambda: not waiters(), 5.0, "the waiting thread has ended")


def test_refs_among_arguments_are_seen(tasks: RayTasks) -> None:
    ref = FakeRef("ref")
    assert tasks.are_among((1, ref), {})
    assert tasks.are_among((), {"x": ref})
    assert not tasks.are_among((1, [ref]), {"x": 2}), "as with Ray, inside a list they stay refs"
    assert not tasks.are_among((), {})


async def test_fetch_puts_values_in_their_places(tasks: RayTasks) -> None:
    one, two = FakeRef("one", 1), FakeRef("two", 2)
    assert await tasks.fetch((0, one, 5, two), {"x": two, "y": 7}) == ((0, 1, 5, 2), {"x": 2, "y": 7})


async def test_fetch_raises_what_a_task_raised(tasks: RayTasks) -> None:
    with pytest.raises(ZeroDivisionError, match="there"):
        await tasks.fetch((FakeRef("ref", ZeroDivisionError("there")),), {})


class TestWait:
    async def test_for_all_without_fetching_them(self, tasks: RayTasks, fake: FakeRay) -> None:
        one, two = FakeRef("one"), FakeRef("two")
        waiting = asyncio.ensure_future(tasks.wait((one,), {"x": two, "y": 3}))
        await wait_until(lambda: fake.asked, 5.0, "the thread looks")
        fake.end(two)
        await asyncio.sleep(0)
        assert not waiting.done()
        fake.end(one)
        await waiting
        assert fake.options == {"num_returns": 1, "fetch_local": False}
        await gone()

    async def test_for_nothing_starts_no_thread(self, tasks: RayTasks) -> None:
        await tasks.wait((1, 2), {})
        assert not waiters()

    async def test_by_many_is_done_by_one_thread(self, tasks: RayTasks, fake: FakeRay) -> None:
        shared, other = FakeRef("shared"), FakeRef("other")
        calls = [asyncio.ensure_future(tasks.wait((ref,), {})) for ref in (shared, shared, other)]
        await wait_until(lambda: fake.asked and len(fake.asked[-1]) == 2, 5.0, "both are looked at")
        assert len(waiters()) == 1
        fake.end(shared)
        await asyncio.gather(*calls[:2])
        assert not calls[2].done()
        fake.end(other)
        await calls[2]
        await gone()

    async def test_new_refs_are_taken_in_meanwhile(self, tasks: RayTasks, fake: FakeRay) -> None:
        slow, fast = FakeRef("slow"), FakeRef("fast")
        first = asyncio.ensure_future(tasks.wait((slow,), {}))
        await wait_until(lambda: fake.asked, 5.0, "the thread looks")
        fake.end(fast)
        await tasks.wait((fast,), {})
        assert not first.done()
        fake.end(slow)
        await first
        await gone()

    async def test_who_gave_up_is_no_trouble(self, tasks: RayTasks, fake: FakeRay) -> None:
        ref = FakeRef("ref")
        waiting = asyncio.ensure_future(tasks.wait((ref,), {}))
        other = asyncio.ensure_future(tasks.wait((ref,), {}))
        await wait_until(lambda: fake.asked, 5.0, "the thread looks")
        waiting.cancel()
        await asyncio.wait((waiting,))
        fake.end(ref)
        await other
        await gone()

    async def test_a_loop_that_is_closed_is_no_trouble(self, tasks: RayTasks, fake: FakeRay) -> None:
        ref = FakeRef("ref")

        def elsewhere() -> None:
            async def leave() -> None:
                waiting = asyncio.ensure_future(tasks.wait((ref,), {}))
                await wait_until(lambda: fake.asked, 5.0, "the thread looks")
                waiting.cancel()

            asyncio.run(leave())

        await asyncio.to_thread(elsewhere)
        here = asyncio.ensure_future(tasks.wait((ref,), {}))
        await asyncio.sleep(0)
        fake.end(ref)
        await here
        await gone()

    async def test_the_thread_starts_again(self, tasks: RayTasks, fake: FakeRay) -> None:
        for _ in range(3):
            ref = FakeRef("ref")
            fake.end(ref)
            await tasks.wait((ref,), {})
        await gone()
        assert refs._waiter._thread is None


async def test_the_task_of_a_slot_goes_to_its_replicas_actor(
    tasks: RayTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up: list[tuple[str, str]] = []
    sent: list[Any] = []

    class Run:
        def remote(self, *args: Any, **kwargs: Any) -> str:
            sent.append((args, kwargs))
            return "ref"

    class Actor:
        run = run_with_refs = Run()

    def get_actor(name: str, namespace: str) -> Actor:
        looked_up.append((name, namespace))
        return Actor()

    monkeypatch.setattr(ray, "get_actor", get_actor)
    place = Place("node", "unix:/s", actor="app/double#3@1a2b")
    replica = ReplicaInfo("double#3", place_text(place))
    ref = FakeRef("ref")
    assert await tasks.start(replica, "slot", (1,), {"x": 2}) == "ref"
    assert await tasks.start(replica, "slot", (ref,), {"x": 2}) == "ref"
    assert looked_up == [("app/double#3@1a2b", "serveit")], "once is enough"
    assert sent == [((["slot", [1], {"x": 2}],), {}), (("slot", ref), {"x": 2})]


async def test_arguments_that_ray_cannot_pickle(tasks: RayTasks, monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        def remote(self, *args: Any) -> None:
            raise next(errors)

    class Actor:
        run = Run()

    wordy = TypeError("many lines")
    wordy.__cause__ = TypeError("no locks")
    no_room: Any = ray.exceptions.RaySystemError
    errors = iter([wordy, ValueError("stays here"), no_room("no room")])
    monkeypatch.setattr(ray, "get_actor", lambda name, namespace: Actor())
    replica = ReplicaInfo("double#3", place_text(Place("node", "unix:/s", actor="app/double#3@1a2b")))
    for text in ("TypeError: no locks", "ValueError: stays here"):
        with pytest.raises(
            EncodingError, match=rf"^an argument for replica double#3 .* \({text}\)$"
        ) as caught:
            await tasks.start(replica, "slot", (1,), {})
        assert caught.value.executed == "no"
    with pytest.raises(ray.exceptions.RaySystemError):
        await tasks.start(replica, "slot", (1,), {})


async def test_where_ray_was_shut_down_no_task_is_started(fake: FakeRay, tasks: RayTasks) -> None:
    fake.connected = False
    with pytest.raises(NotServing, match="Ray has been shut down"):
        await tasks.start(ReplicaInfo("double#3", "there"), "slot", (), {})


async def test_who_waits_goes_on_when_ray_is_shut_down(fake: FakeRay, tasks: RayTasks) -> None:
    waiting = asyncio.ensure_future(tasks.wait((FakeRef("never"),), {}))
    await wait_until(lambda: fake.asked, 5, "the thread waits")
    fake.connected = False
    await asyncio.wait_for(waiting, 5)
    await gone()


async def test_waiting_is_stopped_before_ray_is_shut_down(fake: FakeRay, tasks: RayTasks) -> None:
    waiting = asyncio.ensure_future(tasks.wait((FakeRef("never"),), {}))
    await wait_until(lambda: fake.asked, 5, "the thread waits")
    await asyncio.to_thread(refs.stop_waiting)
    assert not waiters()
    await asyncio.wait_for(waiting, 5)

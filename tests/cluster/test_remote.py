"""`handle.remote`: ObjectRefs out, and ObjectRefs in."""

from __future__ import annotations

import asyncio
import gc
import pickle
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
import ray

import serveit
from serveit import App
from serveit.client import Client
from serveit.exceptions import DeadlineExceeded, EncodingError, QueueFull, RemoteError
from tests.cluster import apps
from tests.cluster.instance import Instance
from tests.flow.gates import Gate
from tests.support import wait_until

pytestmark = pytest.mark.cluster

LARGE = 500_000
"""Octets; Ray keeps what is this large in its object store, and small values with their owners."""

references = App()


@ray.remote(num_cpus=0)
class Greeter:
    async def greet(self) -> str:
        return "hello"


@ray.remote(num_cpus=0)
def count_up() -> Iterator[int]:
    yield from range(3)


@ray.remote(num_cpus=0)
def never(folder: str) -> None:
    Gate(folder).passed_by_thread()


def make_greeter() -> Any:
    kind: Any = Greeter
    return kind.remote()


@references.backend
class Refs:
    """Calls that carry what only Ray knows how to send."""

    async def __call__(self, refs: list[Any]) -> int:
        value: Any = await refs[0]
        return len(value)

    async def keep(self, kept: Any) -> None:
        self.kept = kept

    async def kept_size(self) -> int:
        return await self(self.kept)

    async def make(self, size: int) -> Any:
        return ray.put(b"x" * size)

    async def make_many(self, count: int) -> AsyncIterator[Any]:
        for number in range(count):
            yield [ray.put(number)]

    async def greet(self, actors: list[Any] | None = None) -> Any:
        return await (actors or self.kept)[0].greet.remote()

    async def make_actor(self) -> Any:
        return make_greeter()

    async def generators(self) -> Any:
        return [count_up.remote()]

    async def fail(self, refs: list[Any]) -> None:
        raise LookupError(refs)


@references.backend
async def pause(seconds: float) -> None:
    await asyncio.sleep(seconds)


@references.backend
def block(folder: str) -> str:
    Gate(folder).passed_by_thread()
    return "done"


@pytest.fixture(scope="module", autouse=True)
def workers(instance: Instance) -> None:
    """Ray's own workers start before the tests: what they open belongs to the session."""
    ray.get([apps.add_one.remote(number) for number in range(2)])


@pytest.fixture
async def client(instance: Instance) -> AsyncIterator[Client]:
    name = await instance.deployed(apps.tasks)
    async with serveit.connect(address=None, app=name) as client:
        yield client


async def test_it_is_an_object_ref(client: Client) -> None:
    ref = await client.get_handle("double").remote(7)
    assert isinstance(ref, ray.ObjectRef)
    assert await ref == 14
    assert await asyncio.to_thread(ray.get, ref) == 14
    assert await apps.add_one.remote(ref) == 15
    assert await (await client.get_handle("plain").remote(7)) == 8
    numbers = {1, 2, (3, 4)}
    assert await (await client.get_handle("Work").remote(numbers)) == numbers
    array = np.arange(1_000_000)
    doubled: Any = await (await client.get_handle("double").remote(array))
    assert np.array_equal(doubled, 2 * array)


async def test_many_at_once(client: Client) -> None:
    double = client.get_handle("double")
    refs = await asyncio.gather(*(double.remote(number) for number in range(200)))
    assert await asyncio.gather(*refs) == [2 * number for number in range(200)]


async def test_arguments_by_place_and_name(client: Client) -> None:
    assert await (await client.get_handle("Work").remote(1, 2, key="word")) == ((1, 2), {"key": "word"})


async def test_refs_among_the_arguments_arrive_as_their_values(client: Client) -> None:
    double, work = client.get_handle("double"), client.get_handle("Work")
    first = await double.remote(3)
    assert await (await double.remote(first)) == 12
    assert await double.call(first) == 12
    assert await work.call(first, 1, key=await double.remote(5)) == ((6, 1), {"key": 10})
    assert await (await work.remote(first, key=first)) == ((6,), {"key": 6})
    assert [item async for item in work.count.stream(first)] == list(range(6))
    array: Any = await double.call(apps.make_array.remote(1_000_000))
    assert np.array_equal(array, 2 * np.arange(1_000_000))
    assert await asyncio.to_thread(double.sync.call, first) == 12


async def test_a_failed_ref_raises_before_the_function_runs(client: Client, gate: Gate) -> None:
    work = client.get_handle("Work")
    for use in (work.noting.call, work.noting.remote):
        with pytest.raises(apps.OwnError, match="in a task of Ray's"):
            await (await use(str(gate.folder), apps.fails.remote()))
    assert gate.notes == []


async def test_what_the_function_raises_is_raised_by_the_ref(client: Client) -> None:
    work = client.get_handle("Work")
    ref = await work.fail.remote("own")
    for way in (asyncio.wrap_future(ref.future()), asyncio.to_thread(ray.get, ref)):
        with pytest.raises(apps.OwnError, match="nothing there") as caught:
            await way
        assert "apps.py" in str(caught.value) and "in fail" in str(caught.value), "the remote traceback"
    with pytest.raises(apps.WordedError, match="1 and 2") as worded:
        await (await work.fail.remote("worded"))
    assert worded.value.one == 1 and "in fail" in str(worded.value)
    with pytest.raises((RemoteError, ray.exceptions.RayError), match="OwnError: .*holds a lock") as other:
        await (await work.fail.remote("not pickled"))
    assert "in fail" in str(other.value)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        await (await work.fail.remote())


async def test_what_does_not_pickle_gives_its_slot_back(client: Client, gate: Gate) -> None:
    two, lock = client.get_handle("two"), threading.Lock()
    for args in ((lock,), (ray.put(1), lock), (lock,)):  # one more than it has slots
        with pytest.raises(EncodingError, match=r"^an argument for replica two#\d+ .*lock") as caught:
            await two.remote(*args)
        assert caught.value.executed == "no"
    gate.open()
    assert await (await two.options(timeout_s=10).remote(str(gate.folder))) == "done"


async def test_a_generator_is_refused_with_the_way_out(client: Client) -> None:
    with pytest.raises(TypeError, match=r"async for item in handle.stream"):
        await (await client.get_handle("Work").count.remote(3))


async def test_batches(client: Client) -> None:
    half = client.get_handle("half")
    refs = await asyncio.gather(*(half.remote(number) for number in (2, 4, 6, 7)))
    results: list[Any] = await asyncio.gather(*refs, return_exceptions=True)
    assert [value for value, _ in results[:3]] == [1, 2, 3]
    assert max(count for _, count in results[:3]) > 1, "they were gathered"
    assert isinstance(results[3], ValueError) and "7 is odd" in str(results[3])


async def test_a_slot_is_waited_for_and_bounds_hold(client: Client, gate: Gate) -> None:
    two, folder = client.get_handle("two"), str(gate.folder)
    refs = [await two.remote(folder) for _ in range(2)]
    await wait_until(lambda: gate.notes == ["in", "in"], 5, "two run")
    with pytest.raises(DeadlineExceeded) as caught:
        await two.options(timeout_s=0.2).remote(folder)
    assert caught.value.executed == "no"
    waiting = [asyncio.ensure_future(two.remote(folder)) for _ in range(5)]
    done, pending = await asyncio.wait(waiting, timeout=0.2)
    assert done and pending
    for each in done:
        assert isinstance(each.exception(), QueueFull)
    gate.open()
    refs += await asyncio.gather(*pending)
    assert await asyncio.gather(*refs) == ["done"] * len(refs)
    assert gate.peak == 2


async def test_calls_and_remote_share_the_bound(client: Client, gate: Gate) -> None:
    two, folder = client.get_handle("two"), str(gate.folder)
    ref = await two.remote(folder)
    call = asyncio.ensure_future(two.call(folder))
    await wait_until(lambda: gate.notes == ["in", "in"], 5, "two run")
    third = asyncio.ensure_future(two.remote(folder))
    await asyncio.wait((third,), timeout=0.1)
    assert not third.done()
    gate.open()
    assert [await ref, await call, await (await third)] == ["done"] * 3
    assert gate.peak == 2


async def test_a_remote_that_is_given_up_gives_its_slot_back(client: Client, gate: Gate) -> None:
    two, folder = client.get_handle("two"), str(gate.folder)
    refs = [await two.remote(folder) for _ in range(2)]
    given_up = asyncio.ensure_future(two.remote(folder))
    await asyncio.wait((given_up,), timeout=0.05)
    given_up.cancel()
    gate.open()
    assert await asyncio.gather(*refs) == ["done"] * 2
    assert await two.call(folder) == "done"
    assert gate.notes.count("in") == 3


async def test_blocking_from_eight_threads(client: Client) -> None:
    double = client.get_handle("double", sync=True)
    results: dict[int, Any] = {}

    def use(number: int) -> None:
        results[number] = ray.get([double.remote(10 * number + index) for index in range(10)])

    threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert results == {n: [2 * (10 * n + index) for index in range(10)] for n in range(8)}


async def test_blocking_waits_for_a_slot_and_not_for_the_result(client: Client, gate: Gate) -> None:
    submitted: list[Any] = []

    def use() -> Any:  # a thread without an event loop gets the handle itself, too
        two = client.get_handle("two", sync=True)
        submitted.extend(two.remote(str(gate.folder)) for _ in range(3))
        return ray.get(submitted)

    using = asyncio.ensure_future(asyncio.to_thread(use))
    await wait_until(lambda: gate.notes == ["in", "in"], 5, "two run")
    assert len(submitted) == 2 and not ray.wait(submitted, num_returns=2, timeout=0)[0]
    gate.open()
    assert await using == ["done"] * 3


async def test_blocking_in_a_loop_names_the_async_way(client: Client) -> None:
    with pytest.raises(RuntimeError, match=r"`await handle.remote\(\.\.\.\)`"):
        client.get_handle("double", sync=True).remote(1)


async def test_from_inside_a_replica(client: Client) -> None:
    work = client.get_handle("Work")
    assert await work.through.call(4) == 33
    assert await work.of_another_app.call((await client.status())["app"], 5) == 10


async def test_handles_travel_into_tasks_and_actors(client: Client) -> None:
    double = client.get_handle("double")
    assert await apps.use_blocking.remote(double.sync, 4) == [8, [2, 4], 8]
    assert await apps.use_async.remote(double.options(timeout_s=20), 5) == [10, 10]
    actor = apps.make_user(double)
    assert await asyncio.gather(*(actor.use.remote(number) for number in range(5))) == [0, 2, 4, 6, 8]
    ray.kill(actor)
    changed = double.options(timeout_s=20, shard_key="k").explain
    assert repr(pickle.loads(pickle.dumps(changed))) == repr(changed)
    assert repr(pickle.loads(pickle.dumps(changed.sync))) == repr(changed.sync)


# -- what only Ray can send, inside the arguments and results of calls -----------------------------


@pytest.fixture
async def referring(instance: Instance) -> AsyncIterator[Client]:
    name = await instance.deployed(references)
    async with serveit.connect(address=None, app=name) as client:
        yield client


@pytest.fixture
async def refs(referring: Client) -> Any:
    return referring.get_handle("Refs")


@pytest.mark.parametrize("size", [10, LARGE])
async def test_refs_inside_arguments_can_be_awaited(refs: Any, size: int) -> None:
    assert await refs.call([ray.put(b"x" * size)]) == size  # and nobody else holds it
    await refs.keep.call([ray.put(b"x" * size)])
    gc.collect()
    assert await refs.kept_size.call() == size


async def test_refs_inside_arguments_whose_tasks_still_run(refs: Any) -> None:
    assert await refs.call([apps.make_array.remote(1_000)]) == 1_000


@pytest.mark.parametrize("size", [10, LARGE])
async def test_refs_that_a_function_returns_can_be_awaited(refs: Any, size: int) -> None:
    ref = await refs.make.call(size)
    gc.collect()
    assert len(await ref) == size
    assert len(await asyncio.to_thread(ray.get, ref)) == size
    assert await refs.call([ref]) == size
    assert [await item[0] async for item in refs.make_many.stream(3)] == [0, 1, 2]


async def test_refs_in_exceptions(refs: Any) -> None:
    with pytest.raises(LookupError) as caught:
        await refs.fail.call([ray.put(5)])
    assert await caught.value.args[0][0] == 5


async def test_actor_handles_in_arguments_and_results(refs: Any) -> None:
    assert await refs.greet.call([make_greeter()]) == "hello"
    await refs.keep.call([make_greeter()])
    gc.collect()
    assert await refs.greet.call() == "hello"
    assert await (await refs.make_actor.call()).greet.remote() == "hello"


async def test_generators_of_refs_are_refused_with_the_way_out(refs: Any) -> None:
    with pytest.raises(
        EncodingError, match="an argument of 'Refs' cannot be sent: an ObjectRefGenerator"
    ) as no:
        await refs.call([count_up.remote()])
    assert no.value.executed == "no"
    with pytest.raises(EncodingError, match="send the ObjectRefs that it yields") as yes:
        await refs.generators.call()
    assert yes.value.executed == "yes"


# -- deadlines -------------------------------------------------------------------------------------


async def test_timeout_s_bounds_what_runs(referring: Client, gate: Gate) -> None:
    for name, argument in (("pause", 60), ("block", str(gate.folder))):
        handle = referring.get_handle(name).options(timeout_s=0.3)
        begun = time.monotonic()
        ref = await handle.remote(argument)
        with pytest.raises(DeadlineExceeded) as caught:
            await ref
        assert caught.value.executed == "maybe"
        assert time.monotonic() - begun < 5
    gate.open()


async def test_timeout_s_bounds_the_wait_for_refs(refs: Any, gate: Gate) -> None:
    pending = never.remote(str(gate.folder))
    handle = refs.options(timeout_s=0.3)
    for use in (handle.call, handle.remote):
        with pytest.raises(DeadlineExceeded, match="ObjectRefs among the arguments") as caught:
            await use(pending)
        assert caught.value.executed == "no"
    gate.open()
    await pending

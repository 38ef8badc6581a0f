from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from serveit import App
from serveit.clock import LoopClock
from serveit.cluster import hosts
from serveit.cluster.hosts import ProxyHost, ReplicaHost, start_failed
from serveit.cluster.shipping import pack
from serveit.config import HTTPOptions
from serveit.control.orders import (
    Place,
    ProxyOrder,
    ReplicaOrder,
    Started,
    StartFailed,
    parse_place,
    place_text,
)
from serveit.control.snapshot import ReplicaInfo, Snapshot
from serveit.exceptions import NotServing
from serveit.wire.channel import Channel, connect
from serveit.wire.frames import (
    END,
    Call,
    CallAnswer,
    Failure,
    Frame,
    FrameType,
    decode_message,
    encode_message,
)
from serveit.wire.pickles import dump, load
from tests.support import wait_until

app = App()


@app.backend
async def double(value: int) -> int:
    return 2 * value


@app.backend
class Broken:
    def __init__(self) -> None:
        raise ValueError("no such model")

    def __call__(self) -> None: ...


@app.backend
class Leaving:
    def __init__(self) -> None:
        raise SystemExit(3)

    def __call__(self) -> None: ...


@app.backend
async def quits() -> None:
    raise SystemExit(4)


class Ears:
    """The caller's end of a channel."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []

    def frame_received(self, frame: Frame) -> None:
        self.frames.append(frame)

    def link_lost(self, error: BaseException | None) -> None: ...

    def of(self, kind: FrameType) -> list[Frame]:
        return [frame for frame in self.frames if frame.type == kind]


@pytest.fixture
def folder() -> Iterator[str]:
    """For sockets: short, since their paths may not be long."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield f"{folder}/s"


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that becomes a host changes itself; this one is needed again."""
    monkeypatch.setattr(hosts, "settle", lambda: None)
    monkeypatch.setattr(hosts, "configure_logs", lambda level: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    here = os.getcwd()
    yield
    os.chdir(here)


def order(folder: str, backend: str = "double", *, over_tcp: bool = False) -> ReplicaOrder:
    code = msgspec.msgpack.encode(pack(app))
    return ReplicaOrder(f"{backend}#7", "main", backend, code, folder, b"secret", over_tcp, "info")


@asynccontextmanager
async def started(ordered: ReplicaOrder) -> AsyncIterator[tuple[ReplicaHost, Started]]:
    host = ReplicaHost(ordered, "node-1")
    outcome = await host.start()
    assert isinstance(outcome, Started), outcome
    try:
        yield host, outcome
    finally:
        await host.aclose(1.0)


def call(channel: Channel, *args: Any) -> None:
    sizes, buffers = dump((args, {}), "the arguments")
    message = Call("r1", "__call__", sizes)
    channel.send(FrameType.CALL, 1, encode_message(message), b"".join(buffers), END)
    channel.flush()


async def cleaned_up(host: ReplicaHost) -> None:
    """A failed start leaves its cleaning up to the end of its process."""
    if hasattr(host, "replica"):
        await host.replica.aclose()
    await host._exit.aclose()


class TestReplica:
    async def test_answers_on_its_socket(self, folder: str) -> None:
        async with started(order(folder)) as (host, outcome):
            place = parse_place(outcome.address)
            assert (outcome.pid, place.node, place.tcp) == (os.getpid(), "node-1", "")
            assert place.unix == f"unix:{folder}/7-{os.getpid()}.sock"
            await host.idle(1.0)
            assert host.status() == {"running": 0, "waiting": 0, "pid": os.getpid()}
            ears = Ears()
            channel = await connect(place.unix, ears, role="driver")
            call(channel, 21)
            await wait_until(lambda: ears.of(FrameType.ANSWER), 5.0, "an answer")
            [answer] = ears.of(FrameType.ANSWER)
            sizes = decode_message(CallAnswer, answer).sizes
            assert load(sizes, answer.body) == 42
            channel.close()
        assert os.listdir(folder) == []

    async def test_proxies_may_not_call(self, folder: str) -> None:
        async with started(order(folder)) as (_, outcome):
            ears = Ears()
            channel = await connect(parse_place(outcome.address).unix, ears, role="proxy")
            call(channel, 21)
            await wait_until(lambda: channel.closed or ears.of(FrameType.ERROR), 5.0, "a refusal")
            assert not ears.of(FrameType.ANSWER)
            channel.close()

    async def test_other_nodes_need_the_secret(self, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hosts, "node_address", lambda: "127.0.0.1")
        async with started(order(folder, over_tcp=True)) as (_, outcome):
            place = parse_place(outcome.address)
            assert place.tcp.startswith("tcp:127.0.0.1:")
            channel = await connect(place.tcp, Ears(), role="driver", secret=b"secret")
            channel.close()
            with pytest.raises(Exception, match="secret"):
                await connect(place.tcp, Ears(), role="driver", secret=b"other")

    async def test_tells_its_callers_before_it_goes(self, folder: str) -> None:
        async with started(order(folder)) as (host, outcome):
            ears = Ears()
            channel = await connect(parse_place(outcome.address).unix, ears, role="driver")
            await host.aclose(1.0)
            await wait_until(lambda: ears.of(FrameType.GOAWAY), 5.0, "word of its end")
            channel.close()

    @pytest.mark.parametrize(
        ("backend", "kind", "text"),
        [
            ("Broken", "ValueError", "no such model"),
            ("Leaving", "RuntimeError", "SystemExit"),
            ("missing", "ImportFailed", "missing"),
        ],
    )
    async def test_what_its_start_raises_is_told(
        self, backend: str, kind: str, text: str, folder: str
    ) -> None:
        host = ReplicaHost(order(folder, backend), "node-1")
        outcome = await host.start()
        assert isinstance(outcome, StartFailed)
        assert outcome.where == f"replica {backend}#7 of app 'main'"
        failure = msgspec.msgpack.decode(outcome.failure, type=Failure)
        assert failure.kind == kind
        assert text in failure.text
        await cleaned_up(host)

    async def test_a_folder_that_others_may_enter_is_refused(self, folder: str) -> None:
        os.mkdir(folder)
        os.chmod(folder, 0o777)
        host = ReplicaHost(order(folder), "node-1")
        outcome = await host.start()
        assert isinstance(outcome, StartFailed)
        assert msgspec.msgpack.decode(outcome.failure, type=Failure).kind == "PermissionError"
        await host.aclose(1.0)

    async def test_it_leaves_when_user_code_says_so(
        self, folder: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        left: list[int] = []
        monkeypatch.setattr(os, "_exit", left.append)
        async with started(order(folder, "quits")) as (_, outcome):
            ears = Ears()
            channel = await connect(parse_place(outcome.address).unix, ears, role="driver")
            call(channel)
            await wait_until(lambda: left, 5.0, "the process has left")
            assert left == [1]
            assert ears.of(FrameType.ERROR), "its caller heard of it before"
            channel.close()


class FakeWatch:
    """A watch on an instance without a controller."""

    made: list[FakeWatch] = []
    fails: Exception | None = None

    def __init__(self, controller: Any, *, on_snapshot: Any, member: str, role: str, **options: Any) -> None:
        self.clock = LoopClock()
        self.directories: dict[str, Any] = {}
        self.member, self.role = member, role
        self.on_snapshot = on_snapshot
        self.closed = False
        self.made.append(self)

    async def open(self) -> None:
        if self.fails is not None:
            raise self.fails
        self.on_snapshot(Snapshot((1, 1), ()))

    async def aclose(self) -> None:
        self.closed = True


@pytest.fixture
def watches(monkeypatch: pytest.MonkeyPatch) -> list[FakeWatch]:
    monkeypatch.setattr(hosts, "Watch", FakeWatch)
    monkeypatch.setattr(FakeWatch, "made", [])
    return FakeWatch.made


def proxy_order(**options: Any) -> ProxyOrder:
    encoded = msgspec.json.encode(HTTPOptions(port=0, **options))
    return ProxyOrder("proxy-1", encoded, b"secret", ("/some/where", sys.path[0]))


class TestProxy:
    async def test_answers_by_the_snapshots(self, watches: list[FakeWatch]) -> None:
        host = ProxyHost(proxy_order(), object())
        outcome = await host.start()
        try:
            assert isinstance(outcome, Started)
            assert outcome.address.startswith("http://127.0.0.1:")
            assert (watches[0].member, watches[0].role) == ("proxy-1", "proxy")
            assert sys.path.count("/some/where") == 1
            port = int(outcome.address.rsplit(":", 1)[1])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 503"), "nothing is published yet"
            writer.close()
            await writer.wait_closed()
        finally:
            await host.aclose(1.0)
        assert watches[0].closed

    async def test_asked_again_it_says_the_same_again(self, watches: list[FakeWatch]) -> None:
        host = ProxyHost(proxy_order(), object())
        first = asyncio.ensure_future(host.start())
        await asyncio.sleep(0)
        first.cancel()  # a controller that died
        second, third = await asyncio.gather(host.start(), host.start())
        try:
            assert isinstance(second, Started)
            assert second == third == await host.start()
            assert len(watches) == 1
        finally:
            await host.aclose(1.0)
        assert await host.start() == StartFailed(b"", where="the HTTP server: it is being stopped")

    async def test_on_its_nodes_own_address(
        self, watches: list[FakeWatch], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(hosts, "node_address", lambda: "127.0.0.1")
        host = ProxyHost(proxy_order(host="node"), object())
        outcome = await host.start()
        await host.aclose(1.0)
        assert isinstance(outcome, Started)
        assert outcome.address.startswith("http://127.0.0.1:")

    @pytest.mark.parametrize(
        ("location", "is_first", "told", "tells_of_starts"),
        [
            ("HeadOnly", True, {"b#1", "b#2"}, True),
            ("HeadOnly", False, {"b#1", "b#2"}, True),
            ("EveryNode", True, {"b#1"}, True),
            ("EveryNode", False, {"b#1"}, False),
        ],
    )
    async def test_whose_metrics_it_exposes(
        self,
        watches: list[FakeWatch],
        location: str,
        is_first: bool,
        told: set[str],
        tells_of_starts: bool,
    ) -> None:
        order = msgspec.structs.replace(proxy_order(location=location), node="n1", is_first=is_first)
        host = ProxyHost(order, object())
        places = {"b#1": Place("n1", "unix:/1"), "b#2": Place("n2", "unix:/2")}
        replicas = [ReplicaInfo(id, place_text(place)) for id, place in places.items()]
        try:
            outcome = await host.start()
            scope = host._ingress.exposes
        finally:
            await host.aclose(1.0)
        assert isinstance(outcome, Started)
        assert {replica.id for replica in replicas if scope.has(replica)} == told
        assert scope.is_first is tells_of_starts

    async def test_an_address_that_is_taken_is_told(self, watches: list[FakeWatch]) -> None:
        holding = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        port = holding.sockets[0].getsockname()[1]
        encoded = msgspec.json.encode(HTTPOptions(port=port))
        host = ProxyHost(ProxyOrder("proxy-1", encoded, b""), object())
        outcome = await host.start()
        assert isinstance(outcome, StartFailed)
        assert outcome.where == "the HTTP server"
        assert str(port) in msgspec.msgpack.decode(outcome.failure, type=Failure).text
        await host.aclose(1.0)
        holding.close()
        await holding.wait_closed()

    async def test_without_a_controller_it_does_not_start(
        self, watches: list[FakeWatch], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(FakeWatch, "fails", NotServing("the controller is gone"))
        host = ProxyHost(proxy_order(), object())
        outcome = await host.start()
        assert isinstance(outcome, StartFailed)
        assert msgspec.msgpack.decode(outcome.failure, type=Failure).executed == "no"
        await host.aclose(1.0)


def test_a_failed_start_travels_as_octets() -> None:
    failed = start_failed(ValueError("no"), "somewhere")
    failure = msgspec.msgpack.decode(failed.failure, type=Failure)
    assert (failure.kind, failure.text, failed.where) == ("ValueError", "no", "somewhere")
    assert failed.pickled


def test_settling_keeps_what_is_there_out_of_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.undo()
    monkeypatch.setattr("gc.collect", lambda: done.append("collect"))
    monkeypatch.setattr("gc.freeze", lambda: done.append("freeze"))
    hosts.settle()
    assert done == ["collect", "freeze"]

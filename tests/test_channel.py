"""Channels, in what a socket has and memory has not; the contract of all links is in `test_link.py`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from serveit.exceptions import ProtocolError
from serveit.wire import auth, sockets
from serveit.wire import channel as channels
from serveit.wire import heart as heartbeat
from serveit.wire import shaking as shaken
from serveit.wire.auth import Handshake
from serveit.wire.channel import Channel, Listening, connect, listen
from serveit.wire.frames import Decoder, Frame, FrameType, encode_frame
from serveit.wire.heart import Heart
from serveit.wire.link import Receiver
from serveit.wire.shaking import Shaking
from serveit.wire.sockets import Address
from tests.support import wait_until
from tests.test_link import Recorder, heard, send

SECRET = b"hush"
KINDS = ["unix", "tcp"]


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param}


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:  # short, unlike pytest's
        yield Path(path)


class Replica:
    """The listening end: what it accepted and what it heard."""

    def __init__(self) -> None:
        self.listening: Listening
        self.accepted: list[Channel] = []
        self.recorders: list[Recorder] = []
        self.on_accept: Callable[[Channel], object] = lambda channel: None

    def accept(self, channel: Channel) -> Receiver:
        recorder = Recorder()
        recorder.link = channel
        self.accepted.append(channel)
        self.recorders.append(recorder)
        self.on_accept(channel)
        return recorder

    @property
    def address(self) -> str:
        return self.listening.address

    async def connect(self, receiver: Receiver | None = None, **options: Any) -> Channel:
        options = {"role": "proxy", "secret": SECRET, **options}
        return await connect(self.address, receiver or Recorder(), **options)

    async def settled(self) -> None:
        """No connection is left."""
        await wait_until(lambda: not self.listening._channels, 5, "no channels")
        await wait_until(lambda: not self.listening._shaking, 5, "no handshakes")


@contextlib.asynccontextmanager
async def listening_at(address: str) -> AsyncIterator[Replica]:
    replica = Replica()
    replica.listening = await listen(address, replica.accept, role="replica-1", secret=SECRET)
    try:
        yield replica
    finally:
        await replica.listening.aclose()


def address_of(kind: str, directory: Path) -> str:
    return f"unix:{directory}/s" if kind == "unix" else "tcp:127.0.0.1:0"


@pytest.fixture(params=KINDS)
async def replica(request: pytest.FixtureRequest, directory: Path) -> AsyncIterator[Replica]:
    async with listening_at(address_of(request.param, directory)) as replica:
        yield replica


@pytest.fixture
async def unix(directory: Path) -> AsyncIterator[Replica]:
    async with listening_at(address_of("unix", directory)) as replica:
        yield replica


@pytest.fixture
async def tcp() -> AsyncIterator[Replica]:
    async with listening_at("tcp:127.0.0.1:0") as replica:
        yield replica


class Raw:
    """A caller made of a plain socket, so that it can misbehave."""

    def __init__(self, address: str) -> None:
        where = Address.parse(address, SECRET)
        self.handshake = Handshake("caller", "raw", SECRET if where.kind == "tcp" else b"")
        self.sock = socket.socket(socket.AF_UNIX if where.kind == "unix" else socket.AF_INET)
        self.sock.setblocking(False)
        self.place: Any = where.host if where.kind == "unix" else (where.host, where.port)

    async def __aenter__(self) -> Raw:
        await asyncio.get_running_loop().sock_connect(self.sock, self.place)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.sock.close()

    async def say(self, octets: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, octets)

    async def hear(self) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self.sock, 100_000)

    async def shake(self) -> Raw:
        answer = self.handshake.opening
        while answer:
            await self.say(answer)
            answer = b"" if self.handshake.done else self.handshake.feed(await self.hear())
        assert self.handshake.done
        return self

    async def closed(self) -> None:
        """The other end closed the connection, at once or after some octets."""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(5):
                while await self.hear():
                    pass

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


@contextlib.asynccontextmanager
async def server_saying(octets: bytes, directory: Path) -> AsyncIterator[str]:
    """Something that is no serveit: takes one connection, reads, says `octets`, and hangs up."""
    loop = asyncio.get_running_loop()

    async def serve() -> None:
        accepted, _ = await loop.sock_accept(sock)
        with accepted:
            await loop.sock_recv(accepted, 1000)
            await loop.sock_sendall(accepted, octets)

    with silent_server(directory) as (address, sock):
        task = asyncio.create_task(serve())
        yield address
        await task


@contextlib.contextmanager
def silent_server(directory: Path) -> Iterator[tuple[str, socket.socket]]:
    """Something that can be connected to, and that is all."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        sock.bind(f"{directory}/s")
        sock.listen()
        yield f"unix:{directory}/s", sock


def heart() -> Heart:
    return Heart._of_loops[asyncio.get_running_loop()]


def num_fds() -> int:
    """Of sockets, copies included. libuv opens another descriptor, of /dev/null, with the first stream."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the directory's own
            count += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
    return count


# -- the handshake --------------------------------------------------------------------------------


async def test_both_ends_know_who_the_other_is(replica: Replica) -> None:
    channel = await replica.connect(role="handle", extra={"instance": "x", "n": 3})
    await wait_until(lambda: replica.accepted, 5, "the channel is accepted")
    (accepted,) = replica.accepted
    assert (accepted.peer.role, accepted.peer.extra) == ("handle", {"instance": "x", "n": 3})
    assert (channel.peer.role, channel.peer.extra) == ("replica-1", {})
    assert channel.peer.versions == (1, 1)
    assert replica.listening.channels == [accepted]
    assert repr(channel) == f"<Channel {replica.address} replica-1 open>"
    assert repr(accepted) == f"<Channel {replica.address} handle open>"
    assert repr(replica.listening) == f"<Listening {replica.address} open channels=1 shaking=0>"
    channel.close()
    await replica.settled()
    assert replica.listening.channels == []
    assert repr(channel) == f"<Channel {replica.address} replica-1 closed>"


async def test_no_delay_over_tcp(tcp: Replica) -> None:
    channel = await tcp.connect()
    await wait_until(lambda: tcp.accepted, 5, "the channel is accepted")
    for end in (channel, tcp.accepted[0]):
        assert end._copy is not None
        assert end._copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_the_address_is_one_to_connect_to(directory: Path) -> None:
    async with listening_at("tcp:127.0.0.1:0") as replica:
        assert re.fullmatch(r"tcp:127\.0\.0\.1:[1-9]\d+", replica.address)
        await replica.connect()
    async with listening_at(f"unix:{directory}/sub/s") as replica:
        assert replica.address == f"unix:{directory}/sub/s"
        await replica.connect()


async def test_frames_wait_until_the_caller_has_its_channel(replica: Replica) -> None:
    def greet(channel: Channel) -> None:
        channel.send(FrameType.GOAWAY, 1)
        channel.flush()
        channel.send(FrameType.GOAWAY, 2)

    replica.on_accept = greet
    recorder = Recorder()
    await replica.connect(recorder)
    assert recorder.frames == []
    await heard(recorder, 2)
    assert recorder.streams == [1, 2]


async def test_the_callers_first_frames_may_come_with_its_last_word(tcp: Replica) -> None:
    async with Raw(tcp.address) as raw:
        await raw.say(raw.handshake.opening)
        last = raw.handshake.feed(await raw.hear())
        await raw.say(last + encode_frame(FrameType.CANCEL, 7) + encode_frame(FrameType.CANCEL, 8)[:5])
        await wait_until(lambda: tcp.recorders, 5, "accepted")
        assert tcp.recorders[0].streams == [7]
        await raw.say(encode_frame(FrameType.CANCEL, 8)[5:])
        await heard(tcp.recorders[0], 2)
        assert tcp.recorders[0].streams == [7, 8]


async def test_a_role_that_is_not_wanted_is_told_so(unix: Replica, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(channel: Channel) -> None:
        channel.send(FrameType.GOAWAY, 1)
        raise ProtocolError(f"a {channel.peer.role} is not wanted")

    unix.on_accept = refuse
    with pytest.raises(ProtocolError, match=rf"^{unix.address}: refused: a proxy is not wanted"):
        await unix.connect()
    await unix.settled()
    assert "refusing a peer" in caplog.text


async def test_a_role_that_is_not_wanted_over_tcp_is_cut(tcp: Replica) -> None:
    def refuse(channel: Channel) -> None:
        raise ProtocolError("not wanted")

    tcp.on_accept = refuse
    recorder = Recorder()
    channel = await tcp.connect(recorder)
    await wait_until(lambda: recorder.losses, 5, "the loss")
    assert channel.closed and not tcp.listening.channels


async def test_an_accept_that_breaks_costs_that_peer_only(
    unix: Replica, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(channel: Channel) -> None:
        raise ZeroDivisionError("in accept")

    good = await unix.connect()
    unix.on_accept = fail
    with pytest.raises(ProtocolError, match="refused: an error on its side"):
        await unix.connect()
    assert "in accept" in caplog.text
    assert not good.closed


async def test_accept_may_close_the_channel(replica: Replica) -> None:
    replica.on_accept = lambda channel: channel.close()
    recorder = Recorder()
    with contextlib.suppress(ConnectionError):
        await replica.connect(recorder)
        await wait_until(lambda: recorder.losses, 5, "the loss")
    await wait_until(lambda: replica.recorders and replica.recorders[0].losses, 5, "the other end's")
    assert replica.recorders[0].losses == [None]
    await replica.settled()


async def test_a_wrong_secret_is_said_to_be_one(tcp: Replica) -> None:
    with pytest.raises(ProtocolError, match=f"^{tcp.address}: wrong secret"):
        await tcp.connect(secret=b"guess")
    await tcp.settled()
    assert tcp.accepted == []


async def test_a_proof_is_good_for_one_connection(tcp: Replica) -> None:
    async with Raw(tcp.address) as first, Raw(tcp.address) as second:
        await first.say(first.handshake.opening)
        proof = first.handshake.feed(await first.hear())
        await second.say(first.handshake.opening)
        await second.hear()
        await second.say(proof)
        await second.closed()
    assert tcp.accepted == []


async def test_no_common_version_is_said_to_both(
    replica: Replica, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    octets = Handshake("caller", "raw", SECRET).opening
    monkeypatch.setattr(auth, "VERSIONS", (2, 3))
    async with Raw(replica.address) as raw:
        await raw.say(octets)
        (answer,) = Decoder().feed(await raw.hear())
        assert answer.type == FrameType.HELLO
        await raw.closed()
    assert "no common version: this end speaks 2 to 3, the other 1 to 1" in caplog.text


async def test_another_users_process_may_not_connect(unix: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    accepted = f"{unix.address.removeprefix('unix:')}"
    monkeypatch.setattr(
        sockets, "peer_uid", lambda sock: 4711 if sock.getsockname() == accepted else os.geteuid()
    )
    with pytest.raises(ConnectionResetError, match="closed the connection within the handshake"):
        await unix.connect()
    await unix.settled()
    assert unix.accepted == []


async def test_another_users_process_is_not_spoken_to(unix: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "peer_uid", lambda sock: 4711)
    with pytest.raises(PermissionError, match=f"^{unix.address}: the other end runs as uid 4711"):
        await unix.connect()
    await unix.settled()
    assert unix.accepted == []


async def test_a_caller_that_does_not_wait_for_the_answer_is_closed(replica: Replica) -> None:
    async with Raw(replica.address) as raw:
        await raw.say(raw.handshake.opening + encode_frame(FrameType.CANCEL, 1))
        await raw.closed()
    await replica.settled()
    assert replica.accepted == []


async def test_garbage_at_any_octet_harms_nobody_else(replica: Replica) -> None:
    good = await replica.connect()
    opening = Raw(replica.address)
    length = len(opening.handshake.opening)
    opening.sock.close()
    for position in range(length):
        for changed in (True, False):
            async with Raw(replica.address) as raw:
                octets = bytearray(raw.handshake.opening)
                octets[position] ^= 0xFF
                await raw.say(bytes(octets) if changed else bytes(octets[:position]))
    await wait_until(lambda: not replica.listening._shaking, 5, "all of them are gone")
    send(good, 1)
    await heard(replica.recorders[0], 1)
    assert not good.closed


async def test_a_peer_that_claims_a_long_hello_is_closed_at_once(replica: Replica) -> None:
    async with Raw(replica.address) as raw:
        await raw.say(encode_frame(FrameType.HELLO, 0, bytes(100_000))[:20])
        await raw.closed()
    await replica.settled()


@pytest.mark.parametrize("part", [0, 20, None])
async def test_a_peer_that_does_not_go_on_is_closed(
    tcp: Replica, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, part: int | None
) -> None:
    monkeypatch.setattr(shaken, "HANDSHAKE_S", 0.05)
    async with Raw(tcp.address) as raw:
        await raw.say(raw.handshake.opening[:part])
        await raw.closed()
    await tcp.settled()
    assert f"{tcp.address}: no handshake within 0.05 s" in caplog.text


async def test_a_peer_that_only_looks_is_not_worth_a_warning(
    tcp: Replica, caplog: pytest.LogCaptureFixture
) -> None:
    async with Raw(tcp.address):
        await wait_until(lambda: tcp.listening._shaking, 5, "it is there")
    await tcp.settled()
    assert caplog.records == []


async def test_handshakes_over_tcp_are_few_at_once(tcp: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "MAX_SHAKING", 2)
    async with Raw(tcp.address), Raw(tcp.address) as second, Raw(tcp.address) as third:
        await third.closed()
        await second.shake()
        await wait_until(lambda: tcp.accepted, 5, "one of them is done")
        channel = await tcp.connect()
        assert not channel.closed
    channel.close()


# -- connect --------------------------------------------------------------------------------------


async def test_nobody_there_is_said_with_the_address(directory: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"unix:{directory}/s"):
        await connect(f"unix:{directory}/s", Recorder(), role="proxy")
    sockets.bind_private(f"{directory}/s").close()
    with pytest.raises(ConnectionRefusedError, match=f"unix:{directory}/s"):
        await connect(f"unix:{directory}/s", Recorder(), role="proxy")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ConnectionRefusedError, match=f"tcp:127.0.0.1:{port}"):
        await connect(f"tcp:127.0.0.1:{port}", Recorder(), role="proxy", secret=SECRET)


async def test_who_does_not_answer_is_given_up(directory: Path) -> None:
    with silent_server(directory) as (address, _):
        before = num_fds()
        with pytest.raises(TimeoutError, match=f"^{address} did not answer within 0.05 s"):
            await connect(address, Recorder(), role="proxy", timeout_s=0.05)
        assert num_fds() == before


async def test_who_hangs_up_is_nobody(directory: Path) -> None:
    async with server_saying(b"", directory) as address:
        with pytest.raises(ConnectionResetError, match=f"{address} closed the connection within"):
            await connect(address, Recorder(), role="proxy")


async def test_who_speaks_something_else_is_named(directory: Path) -> None:
    async with server_saying(b"HTTP/1.1 400 Bad Request\r\n\r\n", directory) as address:
        with pytest.raises(ProtocolError, match=rf"{address}: HELLO was to come, but b'HTTP/1\.1 400 Ba"):
            await connect(address, Recorder(), role="proxy")


@pytest.mark.parametrize("turns", range(8))
async def test_a_connect_that_is_cancelled_leaves_nothing(directory: Path, turns: int) -> None:
    with silent_server(directory) as (address, _):
        before = num_fds()
        task = asyncio.create_task(connect(address, Recorder(), role="proxy"))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await wait_until(lambda: num_fds() == before, 5, "no socket is open")


@pytest.mark.parametrize("turns", range(12))
async def test_a_connect_that_is_cancelled_while_it_is_answered_leaves_nothing(
    replica: Replica, turns: int
) -> None:
    before = num_fds()
    task = asyncio.create_task(replica.connect())
    for _ in range(turns):
        await asyncio.sleep(0)
    if not task.done():
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        task.result().close()
    await replica.settled()
    await wait_until(lambda: num_fds() == before, 5, "no socket is open")


async def test_an_answer_that_nobody_waits_for_any_more_is_dropped() -> None:
    dial = channels._Dial()
    shaking: Any = FakeShaking()
    dial.answered.cancel()
    dial.shaken(shaking, b"proof")
    assert shaking.transport.done == ["write", "pause_reading"]


class FakeTransport:
    def __init__(self) -> None:
        self.done: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: self.done.append(name)


class FakeShaking:
    def __init__(self) -> None:
        self.transport = FakeTransport()


async def test_a_connection_that_comes_when_it_was_given_up_is_closed() -> None:
    handshake = Handshake("caller", "proxy")
    transport: Any = FakeTransport()
    shaking = Shaking(Address("unix", "/s", 0), handshake, channels._Dial())
    shaking.abort()
    shaking.connection_made(transport)
    shaking.data_received(b"late")
    assert transport.done == ["abort"]
    assert not handshake.done and handshake.rest == b""


async def test_a_channel_that_is_lost_behind_the_handshake_is_not_returned(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shaken = channels._Dial.shaken

    def lose(self: channels._Dial, shaking: Shaking, answer: bytes) -> None:
        shaken(self, shaking, answer)
        shaking.transport.abort()
        shaking.connection_lost(None)

    async with listening_at(f"unix:{directory}/s") as replica:
        monkeypatch.setattr(channels._Dial, "shaken", lose)
        with pytest.raises(ConnectionResetError):
            await replica.connect()


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("/tmp/s", "an address is unix:/path or tcp:host:port, not '/tmp/s'"),
        ("unix:", "an address is"),
        ("http://x", "an address is"),
        ("tcp:host", "an address is"),
        ("tcp::80", "an address is"),
        ("tcp:host:http", "an address is"),
        ("tcp:host:²", "an address is"),
        ("unix:/" + "x" * sockets.MAX_PATH, f"may have {sockets.MAX_PATH} bytes at most: /xxx"),
        ("unix:/" + "é" * (sockets.MAX_PATH // 2 + 1), f"may have {sockets.MAX_PATH} bytes at most"),
        ("tcp:127.0.0.1:80", "tcp:127.0.0.1:80: TCP needs a secret"),
    ],
)
async def test_a_bad_address_is_refused_before_anything_is_opened(address: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        await connect(address, Recorder(), role="proxy")
    with pytest.raises(ValueError, match=text):
        await listen(address, lambda channel: Recorder(), role="replica")


def test_addresses_are_spelled_as_they_came() -> None:
    for text in ("unix:/a:b", "tcp:host:80", "tcp:[::1]:80"):
        assert str(Address.parse(text, SECRET)) == text
    assert Address.parse("tcp:[::1]:80", SECRET) == ("tcp", "::1", 80)


def test_errors_keep_their_class_and_get_an_address() -> None:
    named = sockets.named(ConnectionRefusedError(111, "refused"), "tcp:x:1")
    assert type(named) is ConnectionRefusedError and str(named) == "[Errno 111] refused: tcp:x:1"
    assert str(sockets.named(OSError("Multiple exceptions"), "tcp:x:1")) == "tcp:x:1: Multiple exceptions"


# -- listening ------------------------------------------------------------------------------------


async def test_a_closed_listening_is_gone(replica: Replica) -> None:
    recorder = Recorder()
    channel = await replica.connect(recorder)
    await wait_until(lambda: replica.accepted, 5, "accepted")
    replica.accepted[0].send(FrameType.GOAWAY, 1)
    async with Raw(replica.address) as raw:
        await wait_until(lambda: replica.listening._shaking, 5, "one more")
        await asyncio.gather(replica.listening.aclose(), replica.listening.aclose())
        await raw.closed()
    await wait_until(lambda: recorder.losses, 5, "the loss")
    assert recorder.streams == [1], "what was sent before still arrives"
    assert channel.closed
    assert replica.recorders[0].losses == [None]
    with pytest.raises(OSError):
        await replica.connect()
    assert repr(replica.listening) == f"<Listening {replica.address} closed channels=0 shaking=0>"
    with pytest.raises(ConnectionResetError, match="is closed"):
        replica.listening.made(replica.listening.incoming())


async def test_the_socket_file_goes_and_comes_back(directory: Path) -> None:
    for _ in range(3):
        async with listening_at(f"unix:{directory}/s") as replica:
            await replica.connect()
            assert (directory / "s").is_socket()
        assert not (directory / "s").exists()


async def test_a_socket_file_that_is_another_ones_by_now_stays(directory: Path) -> None:
    async with listening_at(f"unix:{directory}/s") as first:
        (directory / "s").unlink()
        async with listening_at(f"unix:{directory}/s") as second:
            await first.listening.aclose()
            await second.connect()
            (directory / "s").unlink()


@pytest.mark.parametrize("kind", KINDS)
async def test_an_address_that_is_taken_is_named(kind: str, directory: Path) -> None:
    async with listening_at(address_of(kind, directory)) as first:
        with pytest.raises(OSError, match=f"Address already in use: {first.address}"):
            async with listening_at(first.address):
                pass
        await first.connect()


async def test_a_listening_that_does_not_start_leaves_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = num_fds()
    monkeypatch.setattr(channels, "BACKLOG", "many")
    with pytest.raises(TypeError):
        await listen(f"unix:{directory}/s", lambda channel: Recorder(), role="replica")
    assert not (directory / "s").exists()
    assert num_fds() == before


# -- heartbeat ------------------------------------------------------------------------------------


async def connected(replica: Replica) -> tuple[Channel, Recorder, Channel, Recorder]:
    recorder = Recorder()
    near = await replica.connect(recorder)
    recorder.link = near
    await wait_until(lambda: replica.accepted, 5, "accepted")
    return near, recorder, replica.accepted[0], replica.recorders[0]


class Pings(Recorder):
    """A recorder that keeps heartbeats, and whether its link was stale when it heard something."""

    def __init__(self) -> None:
        super().__init__()
        self.pings = 0
        self.stale: list[bool] = []

    def frame_received(self, frame: Frame) -> None:
        assert isinstance(self.link, Channel)
        self.stale.append(self.link.stale)
        self.pings += frame.type == FrameType.PING and not frame.stream
        super().frame_received(frame)


async def test_who_hears_nothing_for_three_ticks_becomes_stale_and_recovers(unix: Replica) -> None:
    recorder = Pings()
    near = recorder.link = await unix.connect(recorder)
    await wait_until(lambda: unix.accepted, 5, "accepted")
    stale = []
    for _ in range(5):
        near.beat()
        stale.append(near.stale)
    assert stale == [False, False, False, True, True], "the first tick had the handshake in it"
    assert repr(near) == f"<Channel {unix.address} replica-1 stale>"
    send(unix.accepted[0], 1)
    await heard(recorder, 1)
    assert recorder.stale == [False], "before the frame is handed over"
    assert not near.stale and not near.closed
    near.beat()
    near.beat()
    near.beat()
    assert not near.stale, "and counts anew"


async def test_a_quiet_end_sends_one_ping_a_tick_and_a_busy_one_none(unix: Replica) -> None:
    recorder = Pings()
    near = recorder.link = await unix.connect(recorder)
    await wait_until(lambda: unix.accepted, 5, "accepted")
    (far,) = unix.accepted
    far.beat()
    pings = recorder.pings  # the HELLO may have been sent in this tick
    far.beat()
    far.beat()
    await wait_until(lambda: recorder.pings == pings + 2, 5, "two pings")
    far.send(FrameType.GOAWAY, 1)
    far.flush()
    far.beat()
    await heard(recorder, 1)
    assert recorder.pings == pings + 2
    assert not near.stale


async def test_nobody_is_pinged_who_has_not_read_what_was_sent(unix: Replica) -> None:
    async with Raw(unix.address) as raw:
        await raw.shake()
        await wait_until(lambda: unix.accepted, 5, "accepted")
        (channel,) = unix.accepted
        for stream in range(50):
            channel.send(FrameType.DATA, stream, b"", bytes(200_000))
        channel.flush()
        size = channel._transport.get_write_buffer_size()
        assert size > 0
        channel.beat()
        channel.beat()
        channel.beat()
        assert channel._transport.get_write_buffer_size() <= size


async def test_one_timer_beats_for_all_channels(unix: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    near = [await unix.connect() for _ in range(100)]
    await wait_until(lambda: len(unix.accepted) == 100, 5, "all are accepted")
    assert list(Heart._of_loops) == [asyncio.get_running_loop()]
    assert heart().channels == {*near, *unix.accepted}
    timer = heart()._timer
    heart().beat()
    assert heart()._timer is timer
    await unix.listening.aclose()
    await wait_until(lambda: all(channel.closed for channel in near), 5, "all are closed")
    assert Heart._of_loops == {}
    assert timer.cancelled()


async def test_the_timer_beats_by_itself(unix: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 0.005)
    recorder = Pings()
    recorder.link = await unix.connect(recorder)
    await wait_until(lambda: recorder.pings >= 5, 5, "five pings")
    assert not any(recorder.stale)


async def test_an_end_that_was_blocked_itself_suspects_nobody(
    unix: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 0.02)
    near, *_ = await connected(unix)
    stale: list[bool] = []
    beat = near.beat

    def record() -> None:
        beat()
        stale.append(near.stale)

    monkeypatch.setattr(near, "beat", record)
    time.sleep(0.2)  # noqa: ASYNC251 (blocking is the point)
    await wait_until(lambda: len(stale) >= 3, 5, "it beats again")
    assert stale[:2] == [False, False]


def test_the_heart_of_a_loop_that_is_closed_is_forgotten() -> None:
    class Beating:
        def beat(self) -> None: ...

    dead, live, one = asyncio.new_event_loop(), asyncio.new_event_loop(), Beating()
    Heart.join(dead, one)
    dead.close()
    Heart.join(live, one)
    assert list(Heart._of_loops) == [live]
    Heart.leave(dead, one)
    Heart.leave(live, one)
    live.close()
    assert Heart._of_loops == {}


# -- other processes ------------------------------------------------------------------------------

PRELUDE = """
import asyncio, os, signal, sys
from serveit.wire import heart
from serveit.wire.channel import connect
from serveit.wire.frames import FrameType
class Silent:
    def frame_received(self, frame): pass
    def link_lost(self, error): os._exit(0)
async def main():
    heart.HEARTBEAT_S = 0.02
    channel = await connect(sys.argv[1], Silent(), role="child", secret=b"hush")
"""
POSTLUDE = """
if sys.argv[2] == "uvloop":
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""


@pytest.fixture
def child(
    anyio_backend: tuple[str, dict[str, bool]],
) -> Iterator[Callable[[str, str], subprocess.Popen[str]]]:
    """Starts a process that connects and then does what it is told, on the same kind of loop."""
    processes: list[subprocess.Popen[str]] = []

    def start(address: str, what: str) -> subprocess.Popen[str]:
        script = PRELUDE + "".join(f"    {line}\n" for line in what.splitlines()) + POSTLUDE
        loop = "uvloop" if anyio_backend[1]["use_uvloop"] else "asyncio"
        processes.append(subprocess.Popen([sys.executable, "-c", script, address, loop], text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


async def test_what_a_killed_peer_wrote_is_handed_over_though_a_write_fails_first(
    replica: Replica, child: Callable[[str, str], subprocess.Popen[str]]
) -> None:
    closed: list[bool] = []
    process = child(
        replica.address,
        "for n in range(200): channel.send(FrameType.DATA, n + 1, b'', bytes(100))\n"
        "channel.flush()\n"
        "os.kill(os.getpid(), signal.SIGKILL)",
    )

    def block(channel: Channel) -> None:
        process.wait()
        for _ in range(3):  # TCP hears of the death with the first
            channel.send(FrameType.CANCEL, 1)
            channel.flush()

    def accept(channel: Channel) -> None:
        replica.recorders[0].on = {200: lambda: closed.append(channel.closed)}
        asyncio.get_running_loop().call_soon(block, channel)

    replica.on_accept = accept
    await wait_until(lambda: replica.recorders and replica.recorders[0].losses, 20, "the loss")
    assert replica.recorders[0].streams == list(range(1, 201))
    assert closed == [False]
    assert replica.accepted[0].closed


async def test_what_was_flushed_is_out_though_the_process_ends_at_once(
    replica: Replica, child: Callable[[str, str], subprocess.Popen[str]]
) -> None:
    child(replica.address, "channel.send(FrameType.STARTED, 1)\nchannel.flush()\nos._exit(3)")
    await wait_until(lambda: replica.recorders and replica.recorders[0].losses, 20, "the loss")
    assert replica.recorders[0].streams == [1]


async def test_a_frozen_peer_is_stale_until_it_goes_on(
    unix: Replica, child: Callable[[str, str], subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 0.02)
    process = child(unix.address, "await asyncio.Event().wait()")
    await wait_until(lambda: unix.accepted, 20, "it is there")
    (channel,) = unix.accepted
    await wait_until(lambda: not channel.stale and channel._silent == -1, 5, "it is heard")
    process.send_signal(signal.SIGSTOP)
    await wait_until(lambda: channel.stale, 5, "it is missed")
    assert not channel.closed
    process.send_signal(signal.SIGCONT)
    await wait_until(lambda: not channel.stale, 5, "it is back")
    process.kill()
    await wait_until(lambda: channel.closed, 5, "it is gone")
    assert len(unix.recorders[0].losses) == 1


async def test_a_receiver_may_close_while_the_last_frames_are_handed_over(
    unix: Replica, child: Callable[[str, str], subprocess.Popen[str]]
) -> None:
    process = child(
        unix.address,
        "for n in range(9): channel.send(FrameType.DATA, n + 1)\n"
        "channel.flush()\n"
        "os.kill(os.getpid(), signal.SIGKILL)",
    )

    def block(channel: Channel) -> None:
        process.wait()
        unix.recorders[0].on = {3: channel.close, 2: lambda: channel.send(FrameType.CANCEL, 9)}
        channel.send(FrameType.CANCEL, 1)

    unix.on_accept = lambda channel: asyncio.get_running_loop().call_soon(block, channel)
    await wait_until(lambda: unix.recorders and unix.recorders[0].losses, 20, "the loss")
    assert unix.recorders[0].streams == [1, 2, 3]
    assert unix.recorders[0].losses == [None]


# -- closing --------------------------------------------------------------------------------------


async def test_a_peer_that_does_not_read_cannot_keep_a_channel_open(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "CLOSE_S", 0.05)
    async with Raw(replica.address) as raw:
        await raw.shake()
        await wait_until(lambda: replica.accepted, 5, "accepted")
        for stream in range(50):
            replica.accepted[0].send(FrameType.DATA, stream, b"", bytes(500_000))
        replica.accepted[0].close()
        assert replica.recorders[0].losses == []
        await wait_until(lambda: replica.recorders[0].losses, 5, "it is closed")
    assert replica.recorders[0].losses == [None]


async def test_what_is_unread_here_does_not_cost_the_other_end_what_was_sent(replica: Replica) -> None:
    near, _, far, other = await connected(replica)
    for stream in range(20):
        far.send(FrameType.DATA, stream, b"", bytes(100_000))
        near.send(FrameType.DATA, stream, b"", bytes(200_000))
    far.flush()
    near.close()
    await wait_until(lambda: other.losses, 5, "the loss")
    assert other.streams == list(range(20))


async def test_a_reset_is_told_as_what_it_was(tcp: Replica) -> None:
    async with Raw(tcp.address) as raw:
        await raw.shake()
        await wait_until(lambda: tcp.accepted, 5, "accepted")
        raw.reset()
        await wait_until(lambda: tcp.recorders[0].losses, 5, "the loss")
        assert isinstance(tcp.recorders[0].losses[0], ConnectionResetError)


async def test_closing_what_was_reset_meanwhile_is_closing(tcp: Replica) -> None:
    async with Raw(tcp.address) as raw:
        await raw.shake()
        await wait_until(lambda: tcp.accepted, 5, "accepted")
        raw.reset()
        tcp.accepted[0].close()
        await wait_until(lambda: tcp.recorders[0].losses, 5, "the loss")
        assert tcp.recorders[0].losses == [None]


async def test_closing_what_is_lost_already_is_silent(
    replica: Replica, caplog: pytest.LogCaptureFixture
) -> None:
    near, recorder, *_ = await connected(replica)
    near._transport.abort()
    for _ in range(10):
        near.send(FrameType.CANCEL, 1)
        near.flush()
    near.close()
    await wait_until(lambda: recorder.losses, 5, "the loss")
    assert recorder.losses == [None]
    assert caplog.records == []


async def test_a_channel_that_is_closed_at_once_is_closed(replica: Replica) -> None:
    recorder = Recorder()
    near = await replica.connect(recorder)
    near.send(FrameType.CANCEL, 1)
    near.close()
    await wait_until(lambda: recorder.losses, 5, "the loss")
    await replica.settled()
    assert [recorder.streams for recorder in replica.recorders] == [[1]]


async def test_a_peer_that_floods_a_broken_connection_is_not_read_for_ever(
    unix: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "READ_SIZE", 14)
    monkeypatch.setattr(channels, "MAX_DRAIN_READS", 3)
    _, _, far, other = await connected(unix)
    async with Raw(unix.address) as raw:
        await raw.shake()
        await wait_until(lambda: len(unix.accepted) == 2, 5, "accepted")
        channel, other = unix.accepted[1], unix.recorders[1]
        await raw.say(b"".join(encode_frame(FrameType.CANCEL, n) for n in range(10)))
        channel._transport.abort()
        await wait_until(lambda: other.losses, 5, "the loss")
        assert other.streams in ([0, 1, 2], list(range(10)))
    assert not far.closed


@pytest.mark.parametrize("kind", KINDS)
async def test_no_descriptor_is_left(kind: str, directory: Path) -> None:
    async with listening_at(address_of(kind, directory)) as replica:
        await replica.connect()
        await wait_until(lambda: replica.accepted, 5, "accepted")
        before = num_fds()
        for closer in ("near", "far", "both") * 3:
            near, _, _, _ = await connected(replica)
            await wait_until(lambda: len(replica.listening.channels) == 2, 5, "accepted")
            far = replica.accepted[-1]
            if closer != "far":
                near.close()
            if closer != "near":
                far.close()
            await wait_until(lambda: len(replica.listening._channels) == 1, 5, "closed")
        await wait_until(lambda: num_fds() == before, 5, f"{before} descriptors again")
        assert len(heart().channels) == 2


async def test_thousands_of_frames_go_to_and_fro(replica: Replica) -> None:
    near, recorder, far, other = await connected(replica)
    other.on = {n: partial(far.send, FrameType.ANSWER, n, b"meta", b"body") for n in range(5000)}
    for n in range(5000):
        near.send(FrameType.CALL, n, b"meta", b"body")
        if n % 100 == 0:
            await asyncio.sleep(0)
    await heard(recorder, 5000)
    assert recorder.streams == list(range(5000))

from __future__ import annotations

import asyncio
import errno
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from serveit.config import HTTPOptions
from serveit.web.proxy import Proxy, bind
from tests.rawhttp import Ingress, connected, proxied
from tests.support import wait_until


async def answer(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def make(app: Any = answer, **options: Any) -> Proxy:
    return Proxy(HTTPOptions(**{"port": 0, **options}), Ingress(app))  # type: ignore[arg-type]


def connections(proxy: Proxy) -> Any:
    assert proxy._server is not None
    return proxy._server.server_state.connections


async def test_it_answers_where_it_says() -> None:
    proxy = make(root_path="/outside")
    assert proxy.url == ""
    await proxy.start()
    url = proxy.url
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url), "whoever asks here does not come through a balancer"
    async with connected(url) as wire:
        reply = await wire.get("/")
        assert (reply.body, "server" in reply, "date" in reply) == (b"ok", False, True)
    await proxy.aclose()
    assert proxy.url == url
    with pytest.raises(ConnectionRefusedError):
        async with connected(url):
            raise AssertionError("it still listens")


async def test_ipv6_addresses_stand_in_brackets() -> None:
    try:
        sock = bind(HTTPOptions(host="::1", port=0))
    except OSError:
        pytest.skip("no IPv6 here")
    proxy = make(host="::1")
    await proxy.start(sock)
    assert proxy.url == f"http://[::1]:{sock.getsockname()[1]}"
    await proxy.aclose()


async def test_a_port_in_use_is_one_clear_error() -> None:
    async with proxied(answer) as proxy:
        port = int(proxy.url.rsplit(":", 1)[1])
        with pytest.raises(OSError, match="something listens there already.*--port") as caught:
            await make(port=port).start()
        assert caught.value.errno == errno.EADDRINUSE
        assert f"127.0.0.1:{port}" in str(caught.value)


async def test_a_port_that_is_taken_between_bind_and_listen_is_the_same_error() -> None:
    one = bind(HTTPOptions(port=0))
    port = one.getsockname()[1]
    other = bind(HTTPOptions(port=port))  # nobody listens yet
    first, second = make(port=port), make(port=port)
    await first.start(one)
    with pytest.raises(OSError, match="something listens there already"):
        await second.start(other)
    assert other.fileno() == -1
    await second.aclose()
    await first.aclose()


@pytest.mark.parametrize(
    ("host", "text"),
    [
        ("192.0.2.1", "cannot listen on 192.0.2.1:0.*choose another with --host"),
        ("no-such-host.invalid", "'no-such-host.invalid' is not an address of this machine"),
        ("a" * 70, "is not an address of this machine"),
    ],
)
def test_a_host_that_is_not_here_is_one_clear_error(host: str, text: str) -> None:
    with pytest.raises(OSError, match=text) as caught:
        bind(HTTPOptions(host=host, port=0))
    assert caught.value.errno == errno.EADDRNOTAVAIL


def test_a_privileged_port_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(sock: socket.socket, address: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(PermissionError, match="cannot listen on 127.0.0.1:80.*ports below 1024"):
        bind(HTTPOptions(port=80))


def test_other_errors_of_the_system_keep_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(sock: socket.socket, address: Any) -> None:
        raise OSError(errno.ENOBUFS, "x")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(OSError, match="cannot listen on 127.0.0.1:80: No buffer space available$"):
        bind(HTTPOptions(port=80))


async def test_a_certificate_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "cert.pem")
    with pytest.raises(OSError, match=r"HTTPS needs a certificate.*cert\.pem.*No such file"):
        await make(ssl_certfile=missing).start()
    broken = tmp_path / "broken.pem"
    broken.write_text("not a certificate")
    with pytest.raises(OSError, match="HTTPS needs a certificate"):
        await make(ssl_certfile=str(broken)).start()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_accepted_sockets_do_not_wait_to_fill_packets(loop: str) -> None:
    """The trap: asyncio leaves Nagle's algorithm on for a listening socket made with protocol 0."""
    factory = None if loop == "asyncio" else pytest.importorskip("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_check_no_delay())


async def _check_no_delay() -> None:
    theirs = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    theirs.bind(("127.0.0.1", 0))
    assert theirs.proto == 0
    for sock in (None, theirs):
        proxy = make()
        await proxy.start(sock)
        async with connected(proxy.url) as wire:
            await wire.get("/")
            (connection,) = connections(proxy)
            accepted = connection.transport.get_extra_info("socket")
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        await proxy.aclose()


async def test_answers_on_a_kept_connection_are_fast() -> None:
    async with proxied(answer) as proxy, connected(proxy.url) as wire:
        await wire.get("/")
        loop = asyncio.get_running_loop()
        took = []
        for _ in range(10):
            begun = loop.time()
            await wire.get("/")
            took.append(loop.time() - begun)
        assert min(took) < 0.02


class Held:
    """An application that waits for a gate, and then answers."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.started = 0
        self.cancelled = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.started += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        await answer(scope, receive, send)


async def test_closing_lets_running_requests_end_and_idle_connections_go() -> None:
    app = Held()
    proxy = make(app)
    await proxy.start()
    async with connected(proxy.url) as busy, connected(proxy.url) as idle:
        await busy.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await wait_until(lambda: app.started == 1, 5, "it runs")
        closing = asyncio.ensure_future(proxy.aclose())
        assert await idle.is_closed()
        assert proxy.ingress.stopping
        await proxy.aclose()  # a second time: nothing to do
        assert not closing.done()
        app.gate.set()
        assert (await busy.reply()).body == b"ok"
        await closing
        assert not connections(proxy)


async def test_what_runs_at_the_end_of_the_drain_is_cancelled() -> None:
    app = Held()
    proxy = make(app)
    await proxy.start()
    async with connected(proxy.url) as wire:
        await wire.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await wait_until(lambda: app.started == 1, 5, "it runs")
        await proxy.aclose(0.01)
        assert app.cancelled == 1
        assert not connections(proxy)


async def test_an_answer_that_nobody_takes_does_not_outlive_the_drain() -> None:
    body = b"x" * 16_000_000

    async def app(scope: Any, receive: Any, send: Any) -> None:
        fields = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": fields})
        await send({"type": "http.response.body", "body": body})

    proxy = make(app)
    await proxy.start()
    async with connected(proxy.url, receive_buffer=65_536) as wire:
        await wire.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await wire.head()
        wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await proxy.aclose(0.01)
        assert not connections(proxy)


async def test_force_ends_the_drain_at_once() -> None:
    app = Held()
    proxy = make(app)
    proxy.force()  # not started: nothing to do
    await proxy.start()
    async with connected(proxy.url) as wire:
        await wire.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await wait_until(lambda: app.started == 1, 5, "it runs")
        closing = asyncio.ensure_future(proxy.aclose())
        await asyncio.sleep(0)
        proxy.force()
        await asyncio.wait_for(closing, 5)
        assert app.cancelled == 1


async def test_closing_what_never_started() -> None:
    proxy = make()
    await proxy.aclose()
    assert proxy._server is None

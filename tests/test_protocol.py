from __future__ import annotations

import asyncio
import contextlib
import inspect
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from typing import Any

import httptools
import pytest
import uvicorn
from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.http.flow_control import FlowControl

from serveit.config import HTTPOptions
from serveit.web import protocol as protocol_module
from serveit.web.cycle import Cycle
from serveit.web.presence import EXTENSION
from serveit.web.protocol import MAX_HEADER_FIELDS, READ_SIZE, ServeitProtocol, protocol_class
from tests.rawhttp import Wire, connected, proxied
from tests.support import wait_until

GET = b"GET / HTTP/1.1\r\nHost: a\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


class App:
    """Answers each request with its body, once `gate` is open; remembers what it was asked."""

    def __init__(self) -> None:
        self.scopes: list[Any] = []
        self.bodies: list[bytes] = []
        self.gone = 0
        self.answered = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.reads_bodies = True

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        await self.gate.wait()
        body, more = b"", self.reads_bodies
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.gone += 1
                return
            body += message["body"]
            more = message["more_body"]
        self.bodies.append(body)
        text = scope["path"].encode() + b" " + body
        fields = [(b"content-length", b"%d" % len(text))]
        await send({"type": "http.response.start", "status": 200, "headers": fields})
        await send({"type": "http.response.body", "body": text})
        self.answered += 1

    @property
    def paths(self) -> list[str]:
        return [scope["path"] for scope in self.scopes]


@pytest.fixture
def app() -> App:
    return App()


@contextlib.asynccontextmanager
async def wired(app: Any, **options: Any) -> AsyncIterator[Wire]:
    async with proxied(app, **options) as proxy, connected(proxy.url) as wire:
        yield wire


# -- the contract with uvicorn -------------------------------------------------------------------

PROTOCOL_ATTRIBUTES = (
    "client connections cycle expect_100_continue flow headers loop parser pipeline scope server_state "
    "timeout_keep_alive_task transport"
).split()
PROTOCOL_METHODS = {
    "connection_made": ["transport"],
    "connection_lost": ["exc"],
    "data_received": ["data"],
    "on_message_begin": [],
    "on_url": ["url"],
    "on_header": ["name", "value"],
    "on_headers_complete": [],
    "on_body": ["body"],
    "on_response_complete": [],
    "_start_asgi_task": ["cycle", "app"],
    "_unset_keepalive_if_required": [],
}
CYCLE_ATTRIBUTES = (
    "scope transport flow default_headers message_event on_response disconnected keep_alive "
    "waiting_for_100_continue more_body response_started response_complete chunked_encoding "
    "expected_content_length"
).split()
CYCLE_METHODS = {"run_asgi": ["app"], "send": ["message"], "send_500_response": [], "receive": []}
SERVER_ATTRIBUTES = "config server_state should_exit force_exit".split()
SERVER_METHODS = {
    "startup": ["sockets"],
    "main_loop": [],
    "on_tick": ["counter"],
    "shutdown": ["sockets"],
}
STATE_ATTRIBUTES = ["connections", "tasks", "default_headers"]


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def lacking(what: str) -> str:
    return f"this uvicorn ({uvicorn.__version__}) has no {what}, which serveit.web uses"


@pytest.mark.parametrize(
    ("kind", "methods"),
    [
        (httptools_impl.HttpToolsProtocol, PROTOCOL_METHODS),
        (httptools_impl.RequestResponseCycle, CYCLE_METHODS),
        (uvicorn.Server, SERVER_METHODS),
    ],
)
def test_contract_uvicorn_has_the_methods_that_are_overridden_or_called(
    kind: type, methods: dict[str, list[str]]
) -> None:
    for name, expected in methods.items():
        method = getattr(kind, name, None)
        assert method is not None, lacking(f"{kind.__name__}.{name}")
        assert parameters(method) == expected, f"{kind.__name__}.{name} takes other arguments now"


def test_contract_every_override_is_one() -> None:
    """A method that uvicorn renames must not become one that nobody calls."""
    known = {name for name in vars(ServeitProtocol) if inspect.isfunction(vars(ServeitProtocol)[name])}
    own = {"__init__", "watch", "unwatch", "cut"}
    new = {
        "_lose",
        "_linger",
        "_count_silence",
        "_header_too_large",
        "_refuse_after_others",
        "_refuse",
    }
    assert known - own - new == PROTOCOL_METHODS.keys() - {"_unset_keepalive_if_required"}
    assert not any(hasattr(httptools_impl.HttpToolsProtocol, name) for name in new | own - {"__init__"})


async def test_contract_uvicorn_has_the_attributes_that_are_read_and_set() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    config = uvicorn.Config(app, http=protocol_class(HTTPOptions()), lifespan="off", log_config=None)
    config.load()
    server = uvicorn.Server(config)
    made = httptools_impl.HttpToolsProtocol(config, server.server_state, {})
    for name in PROTOCOL_ATTRIBUTES:
        assert hasattr(made, name), lacking(f"HttpToolsProtocol.{name}")
    for name in SERVER_ATTRIBUTES:
        assert hasattr(server, name), lacking(f"Server.{name}")
    for name in STATE_ATTRIBUTES:
        assert hasattr(server.server_state, name), lacking(f"ServerState.{name}")
    make_cycle: Any = httptools_impl.RequestResponseCycle
    cycle = make_cycle(**dict.fromkeys(parameters(make_cycle.__init__)))
    for name in CYCLE_ATTRIBUTES:
        assert hasattr(cycle, name), lacking(f"RequestResponseCycle.{name}")
    cycle.__class__ = Cycle
    assert {"pause_reading", "resume_reading", "drain"} <= set(dir(FlowControl))
    assert hasattr(FlowControl(None), "write_paused")  # type: ignore[arg-type]
    assert httptools_impl.STATUS_LINE[404] == b"HTTP/1.1 404 Not Found\r\n"
    assert config.timeout_graceful_shutdown is None
    assert hasattr(httptools, "HttpParserUpgrade")
    assert issubclass(httptools.HttpParserCallbackError, httptools.HttpParserError)


# -- what is not HTTP ----------------------------------------------------------------------------

MALFORMED = {
    "both lengths": POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "both lengths, other order": CHUNKED[:-2] + b"Content-Length: 3\r\n\r\n0\r\n\r\n",
    "two lengths": POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "a list of lengths": POST + b"Content-Length: 3, 3\r\n\r\nabc",
    "a signed length": POST + b"Content-Length: +3\r\n\r\nabc",
    "a huge length": POST + b"Content-Length: 99999999999999999999999\r\n\r\nabc",
    "gzip, chunked": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "gzip": POST + b"Transfer-Encoding: gzip\r\n\r\n0\r\n\r\n",
    "xchunked": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked twice": CHUNKED[:-2] + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks in HTTP/1.0": b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "obs-fold": GET + b"X: a\r\n b\r\n\r\n",
    "bare LF": b"GET / HTTP/1.1\nHost: a\n\n",
    "bare LF after a field": b"GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n",
    "bare CR": b"GET / HTTP/1.1\r\nHost: a\rX: y\r\n\r\n",
    "NUL": GET + b"X: a\x00b\r\n\r\n",
    "space before the colon": b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
    "space before the first field": b"GET / HTTP/1.1\r\n X: a\r\nHost: a\r\n\r\n",
    "two hosts": GET + b"Host: b\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "chunk size garbage": CHUNKED + b"zz\r\nabc\r\n0\r\n\r\n",
    "chunk size in C": CHUNKED + b"0x3\r\nabc\r\n0\r\n\r\n",
    "chunk size too large": CHUNKED + b"fffffffffffffffff\r\nabc",
    "chunk too long": CHUNKED + b"3\r\nabcd\r\n0\r\n\r\n",
    "chunk with bare LF": CHUNKED + b"3\nabc\n0\n\n",
    "unknown method": b"FOO / HTTP/1.1\r\nHost: a\r\n\r\n",
    "a method in lower case": b"get / HTTP/1.1\r\nHost: a\r\n\r\n",
    "CONNECT": b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n",
    "no path": b"GET ?a=1 HTTP/1.1\r\nHost: a\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
}


@pytest.mark.parametrize("octets", MALFORMED.values(), ids=MALFORMED)
async def test_what_is_not_http_gets_a_400_and_a_close(octets: bytes, app: App) -> None:
    async with wired(app) as wire:
        await wire.send(octets)
        reply = await wire.reply()
        assert (reply.status, reply.json["status"]) == (400, 400)
        assert reply["content-type"] == "application/problem+json"
        assert reply["x-serveit-executed"] == "no"
        assert reply["connection"] == "close"
        assert reply["x-request-id"]
        assert "date" in reply
        assert await wire.is_closed()
    assert app.answered == 0


@pytest.mark.parametrize("line", [b"GET /\r\n\r\n", b"GET / HTTP/2.0\r\nHost: a\r\n\r\n"])
async def test_other_versions_are_a_505(line: bytes, app: App) -> None:
    async with wired(app) as wire:
        await wire.send(line)
        assert (await wire.reply()).status == 505
        assert await wire.is_closed()
    assert app.scopes == []


async def test_a_refusal_takes_the_request_id_over(app: App) -> None:
    async with wired(app) as wire:
        await wire.send(GET + b"X-Request-Id: mine\r\nHost: b\r\n\r\n")
        reply = await wire.reply()
        assert (reply["x-request-id"], reply.json["detail"]) == (
            "mine",
            "a request has one Host, this one has 2",
        )


async def test_an_error_in_serveits_own_callbacks_is_a_400_too(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(version: str, headers: Any) -> None:
        raise KeyError("bug")

    monkeypatch.setattr(protocol_module, "_check", fail)
    async with wired(app) as wire:
        reply = await wire.get("/")
        assert reply.status == 400
        assert b"bug" not in reply.body


# -- limits --------------------------------------------------------------------------------------


class Counted:
    """Counts what servers read, up to their answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.octets = 0
        original = ServeitProtocol.data_received

        def data_received(protocol: ServeitProtocol, data: bytes) -> None:
            if not protocol._is_ending:
                self.octets += len(data)
            original(protocol, data)

        monkeypatch.setattr(ServeitProtocol, "data_received", data_received)


async def flood(wire: Wire, octets: bytes, limit: int) -> None:
    """Send and send, until the server has had enough."""
    with contextlib.suppress(ConnectionError):
        for _ in range(limit // len(octets)):
            await wire.send(octets)


@pytest.mark.parametrize(
    "start",
    [
        GET + b"X: ",
        b"GET /",
        GET[:-9] + b"Host: ",
        GET + b"X",
        CHUNKED + b"0\r\nX-Trailer: ",
        CHUNKED + b"1;",
    ],
    ids=["value", "url", "host", "name", "trailer", "chunk extension"],
)
async def test_an_endless_field_is_a_431_before_much_is_read(
    start: bytes, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    async with wired(app, max_header_bytes=8192) as wire:
        await wire.send(start)
        await flood(wire, b"a" * 16_384, 32 * 2**20)
        assert (await wire.reply()).status == 431
        reads = 2 if start.startswith(CHUNKED) else 1
        assert counted.octets <= 8192 + reads * READ_SIZE + len(start)
    assert app.bodies == []


async def test_header_fields_are_counted(app: App) -> None:
    async with wired(app) as wire:
        fields = [f"X-{number}: 1" for number in range(MAX_HEADER_FIELDS - 1)]
        assert (await wire.get("/", *fields)).status == 200
        reply = await wire.get("/", *fields, "X-Last: 1")
        assert (reply.status, reply.json["title"]) == (431, "Request Header Fields Too Large")
        assert await wire.is_closed()


async def test_a_long_url_and_a_long_header_are_a_431(app: App) -> None:
    async with proxied(app, max_header_bytes=1000) as proxy:
        for path, field in (("/" + "a" * 1000, "X: 1"), ("/", "X: " + "a" * 1000)):
            async with connected(proxy.url) as wire:
                assert (await wire.get(path, field)).status == 431
        async with connected(proxy.url) as wire:
            assert (await wire.get("/" + "a" * 400, "X: " + "a" * 400)).status == 200


async def test_a_header_that_begins_behind_a_large_body_is_not_mistaken_for_a_large_one(app: App) -> None:
    async with wired(app, max_header_bytes=500) as wire:
        body = b"b" * 20_000
        post = POST + b"Content-Length: 20000\r\n\r\n" + body
        await wire.send(post + GET)
        assert (await wire.reply()).body == b"/ " + body
        await wire.send(b"X: 1\r\n\r\n" + GET)
        assert (await wire.reply()).body == b"/ "
        await wire.send(b"X: 1\r\n\r\n")
        assert (await wire.reply()).body == b"/ "


async def test_many_small_chunks_are_no_endless_field(app: App) -> None:
    async with wired(app, max_header_bytes=500) as wire:
        await wire.send(CHUNKED)
        for _ in range(200):
            await wire.send(b"1")
            await wire.send(b"\r\nx\r\n")
        await wire.send(b"0\r\n\r\n")
        assert (await wire.reply()).body == b"/ " + b"x" * 200


async def test_trailers_do_not_become_headers(app: App) -> None:
    async with wired(app) as wire:
        await wire.send(CHUNKED + b"3\r\nabc\r\n0\r\nAuthorization: root\r\nHost: b\r\n\r\n")
        assert (await wire.reply()).body == b"/ abc"
        assert (await wire.get("/next")).body == b"/next "
    assert [name for name, _ in app.scopes[0]["headers"]] == [b"host", b"transfer-encoding"]


async def test_no_more_of_a_body_is_read_than_is_answered(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    app.reads_bodies = False
    counted = Counted(monkeypatch)
    async with wired(app, max_body_bytes=1000) as wire:
        await wire.send(POST + b"Content-Length: 99999999\r\n\r\n")
        assert (await wire.reply()).status == 200
        await flood(wire, b"a" * 16_384, 32 * 2**20)
        assert await wire.is_closed()
    assert counted.octets <= 1000 + READ_SIZE + 100


async def test_a_body_that_nobody_reads_yet_is_held_back(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    app.gate.clear()
    counted = Counted(monkeypatch)
    async with wired(app, max_body_bytes=1000) as wire:
        wire.writer.write(POST + b"Content-Length: 999999\r\n\r\n" + b"a" * 999_999)
        await wait_until(lambda: counted.octets > 1000, 5, "the first of the body is read")
        for _ in range(50):
            await asyncio.sleep(0)
        assert counted.octets <= 1000 + READ_SIZE + 100
        app.gate.set()
        assert len((await wire.reply()).body) == 1_000_001


async def test_too_many_connections_get_a_503(app: App) -> None:
    async with proxied(app, max_connections=1) as proxy, connected(proxy.url) as one:
        assert (await one.get("/")).status == 200
        async with connected(proxy.url) as other:
            reply = await other.reply()
            assert (reply.status, reply["retry-after"]) == (503, "1")
            assert await other.is_closed()
        assert (await one.get("/")).status == 200


# -- many requests on one connection -------------------------------------------------------------


async def test_pipelined_requests_get_their_answers_in_order(app: App) -> None:
    async with wired(app) as wire:
        await wire.send(b"".join(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % number for number in range(20)))
        assert [(await wire.reply()).body for _ in range(20)] == [b"/%d " % number for number in range(20)]


@pytest.mark.parametrize("bad", [b"BAD\r\n\r\n", CHUNKED + b"zz\r\n"], ids=["head", "body"])
async def test_a_malformed_request_is_refused_after_those_before_it_are_answered(
    bad: bytes, app: App
) -> None:
    app.gate.clear()
    async with wired(app) as wire:
        await wire.send(b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\n" + bad)
        await wait_until(lambda: app.paths == ["/1"], 5, "the first has started")
        await wire.send(b"more of it")
        app.gate.set()
        assert [(await wire.reply()).body for _ in range(2)] == [b"/1 ", b"/2 "]
        assert (await wire.reply()).status == 400
        assert await wire.is_closed()
    assert app.paths == ["/1", "/2"]


async def test_a_fault_in_the_body_of_the_running_request_is_its_answer(app: App) -> None:
    async with wired(app) as wire:
        await wire.send(CHUNKED + b"3\r\nabc\r\n")
        await wait_until(lambda: app.scopes, 5, "it has started")
        await wire.send(b"zz\r\n")
        assert (await wire.reply()).status == 400
        assert await wire.is_closed()
        await wait_until(lambda: app.gone == 1, 5, "the application hears of it")


async def test_a_fault_in_the_body_after_the_answer_began_cuts_it() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass

    async with wired(app) as wire:
        await wire.send(CHUNKED)
        assert (await wire.head()).status == 200
        assert await wire.chunk() == b"first"
        await wire.send(b"zz\r\n")
        assert await wire.is_closed()


async def test_nothing_is_lost_behind_a_request_to_upgrade(app: App) -> None:
    async with wired(app) as wire:
        upgrade = b"GET /1 HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
        await wire.send(upgrade * 3 + b"GET /2 HTTP/1.1\r\nHost: a\r\n\r\n")
        assert [(await wire.reply()).body for _ in range(4)] == [b"/1 ", b"/1 ", b"/1 ", b"/2 "]
        for octet in upgrade + GET + b"\r\n":
            await wire.send(bytes([octet]))
        assert [(await wire.reply()).body for _ in range(2)] == [b"/1 ", b"/ "]


async def test_a_request_after_connection_close_is_not_answered(app: App) -> None:
    async with wired(app) as wire:
        await wire.send(GET + b"Connection: close\r\n\r\n" + GET + b"\r\n")
        assert (await wire.reply())["connection"] == "close"
        assert await wire.is_closed()
    assert len(app.scopes) == 1


async def test_an_idle_connection_is_closed(app: App) -> None:
    async with wired(app, keep_alive_s=0.01) as wire:
        assert (await wire.get("/")).status == 200
        assert await wire.is_closed()


# -- who left ------------------------------------------------------------------------------------


async def test_the_running_request_hears_that_its_client_left() -> None:
    lost: list[str] = []
    started = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        connection = scope["extensions"][EXTENSION]
        mine, other = (lambda: lost.append("mine")), (lambda: lost.append("other's"))
        connection.watch(mine)
        connection.unwatch(other)  # of another request: changes nothing
        started.set()
        assert (await receive())["type"] == "http.request"
        assert (await receive())["type"] == "http.disconnect"
        assert connection.is_lost

    async with wired(app) as wire:
        await wire.send((GET + b"\r\n") * 2)  # the second waits for the first
        await started.wait()
        wire.reset()
        await wait_until(lambda: lost, 5, "it is called")
    assert lost == ["mine"]


async def test_unwatched_requests_hear_nothing() -> None:
    lost: list[str] = []
    started = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        connection = scope["extensions"][EXTENSION]
        mine = lambda: lost.append("mine")  # noqa: E731
        connection.watch(mine)
        connection.unwatch(mine)
        started.set()
        await receive()
        await receive()
        started.clear()

    async with wired(app) as wire:
        await wire.send(GET + b"\r\n")
        await started.wait()
        await wire.close()
        await wait_until(lambda: not started.is_set(), 5, "the application has ended")
    assert lost == []


# -- answers -------------------------------------------------------------------------------------


def streaming(*parts: bytes, cut: bool = False, headers: Any = ()) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [*headers]})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        if cut:
            scope["extensions"][EXTENSION].cut()
            await send({"type": "http.response.body", "body": b"late"})
            return
        await send({"type": "http.response.body"})

    return app


async def test_chunks_in_http_1_1() -> None:
    async with wired(streaming(b"a", b"bc")) as wire:
        assert (await wire.get("/")).chunks == [b"a", b"bc"]
        assert (await wire.get("/")).chunks == [b"a", b"bc"]


async def test_http_1_0_knows_no_chunks() -> None:
    async with wired(streaming(b"a", b"bc")) as wire:
        await wire.send(b"GET / HTTP/1.0\r\n\r\n")
        reply = await wire.reply()
        assert "transfer-encoding" not in reply
        assert (reply["connection"], reply.body) == ("close", b"abc")


async def test_http_1_0_with_a_length(app: App) -> None:
    async with proxied(app) as proxy, connected(proxy.url) as wire:
        await wire.send(b"GET /x HTTP/1.0\r\n\r\n")
        reply = await wire.reply()
        assert (reply["connection"], reply.body) == ("close", b"/x ")
        assert await wire.is_closed()
    async with wired(streaming(b"ab", headers=[(b"Content-Length", b"2")])) as wire:
        await wire.send(b"GET /x HTTP/1.0\r\n\r\n")
        assert (await wire.reply()).body == b"ab"


async def test_a_cut_answer_can_be_told_from_a_whole_one() -> None:
    async with wired(streaming(b"a", cut=True)) as wire:
        await wire.send(GET + b"\r\n")
        await wire.head()
        assert await wire.rest() == b"1\r\na\r\n"
    async with wired(streaming(b"a", cut=True)) as wire:
        await wire.send(b"GET / HTTP/1.0\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            await wire.head()
            await wire.rest()


async def test_repeated_fields_stay_apart() -> None:
    headers = [(b"set-cookie", b"a=1"), (b"set-cookie", b"b=2")]
    async with wired(streaming(b"x", headers=headers)) as wire:
        reply = await wire.get("/")
        assert [value for name, value in reply.headers if name == "set-cookie"] == ["a=1", "b=2"]


@pytest.mark.parametrize(
    ("status", "headers"), [(200, [(b"x", b"a\r\ny: b")]), (200, [(b"x y", b"a")]), (99, []), (600, [])]
)
async def test_a_head_that_cannot_be_sent_leaves_room_for_another(status: int, headers: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        with pytest.raises(ValueError, match="HTTP does not have"):
            await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.start", "status": 500})
        await send({"type": "http.response.body"})

    async with wired(app) as wire:
        assert (await wire.get("/")).status == 500


async def test_what_an_application_raises_or_leaves_undone_is_a_problem() -> None:
    async def nothing(scope: Any, receive: Any, send: Any) -> None: ...

    async def half(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def twice(scope: Any, receive: Any, send: Any) -> None:
        await half(scope, receive, send)
        await half(scope, receive, send)

    async def body_first(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.body"})

    for app in (nothing, half, twice, body_first):
        async with wired(app) as wire:
            reply = await wire.get("/", "X-Request-Id: mine")
            assert (reply.status, reply["x-request-id"]) == (500, "mine"), app
            assert reply["content-type"] == "application/problem+json"
            assert "raceback" not in reply.body.decode()


@pytest.mark.parametrize(
    "headers",
    [
        [(b"content-length", b"2"), (b"connection", b"close")],
        [(b"content-length", b"2"), (b"content-length", b"2")],
        [(b"transfer-encoding", b"chunked")],
        [],
    ],
)
async def test_answers_of_another_kind_go_uvicorns_way(headers: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok"})

    async with wired(app) as wire:
        reply = await wire.get("/")
        assert reply.body == b"ok"
        if (b"connection", b"close") in headers:
            assert await wire.is_closed()


async def test_no_answer_to_who_has_left(app: App) -> None:
    app.gate.clear()
    app.reads_bodies = False
    async with wired(app) as wire:
        await wire.send(GET + b"\r\n")
        await wait_until(lambda: app.scopes, 5, "it has started")
        wire.reset()
        await wait_until(lambda: app.scopes[0]["extensions"][EXTENSION].is_lost, 5, "the loss is noticed")
        app.gate.set()
        await wait_until(lambda: app.answered == 1, 5, "the application has ended")


async def test_what_is_sent_to_nobody_is_dropped_quietly(caplog: pytest.LogCaptureFixture) -> None:
    ended = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        await streaming(b"a", b"b")(scope, receive, send)
        ended.set()

    async with wired(app) as wire:
        await wire.send(GET + b"\r\n")
        wire.reset()
        await asyncio.wait_for(ended.wait(), 5)
    assert "Exception" not in caplog.text


async def test_a_slow_reader_holds_the_answer_back() -> None:
    sent = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        part = b"x" * 65_536
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000):
            await send({"type": "http.response.body", "body": part, "more_body": True})
            sent += 1
        await send({"type": "http.response.body"})

    async with proxied(app) as proxy, connected(proxy.url, receive_buffer=65_536) as wire:
        await wire.send(GET + b"\r\n")
        await wire.head()
        for _ in range(200):
            await asyncio.sleep(0)
        assert sent < 500
        wire.reset()


async def test_answers_wait_for_a_slow_reader_of_those_before() -> None:
    body = b"x" * 8_000_000
    answered: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        fields = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": fields})
        await send({"type": "http.response.body", "body": body})
        answered.append(scope["extensions"][EXTENSION].is_lost)

    async with proxied(app) as proxy, connected(proxy.url) as wire:
        await wire.send((GET + b"\r\n") * 2)
        await wait_until(lambda: answered, 5, "the first is written")
        for _ in range(50):
            await asyncio.sleep(0)
        assert answered == [False]
        assert [len((await wire.reply()).body) for _ in range(2)] == [len(body)] * 2
        await wire.send((GET + b"\r\n") * 2)
        await wait_until(lambda: len(answered) == 3, 5, "the third is written")
        wire.reset()
        await wait_until(lambda: answered == [False, False, False, True], 5, "the fourth hears of the end")


async def test_a_connection_without_a_request_can_be_cut() -> None:
    async with proxied(App()) as proxy, connected(proxy.url) as wire:
        assert proxy._server is not None
        state = proxy._server.server_state
        await wait_until(lambda: state.connections, 5, "it is accepted")
        connection: Any = next(iter(state.connections))
        connection.cut()
        connection._refuse(connection._header_too_large())  # too late: nothing is written
        connection._linger()
        assert await wire.is_closed()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    wanted = ["-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run(
        [openssl, "req", "-x509", *wanted, "-out", cert, "-keyout", key], check=True, capture_output=True
    )
    return cert, key


async def test_https(app: App, certificate: tuple[str, str]) -> None:
    context = ssl.create_default_context(cafile=certificate[0])
    context.check_hostname = False
    async with proxied(app, ssl_certfile=certificate[0], ssl_keyfile=certificate[1]) as proxy:
        assert proxy.url.startswith("https://127.0.0.1:")
        port = int(proxy.url.rsplit(":", 1)[1])
        wire = Wire(*await asyncio.open_connection("127.0.0.1", port, ssl=context))
        assert (await wire.get("/x")).body == b"/x "
        assert app.scopes[0]["scheme"] == "https"
        await wire.send(b"BAD\r\n\r\n")
        assert (await wire.reply()).status == 400
        assert await wire.is_closed()
        await wire.close()


def test_the_same_under_uvloop() -> None:
    uvloop = pytest.importorskip("uvloop")

    async def main() -> None:
        app = App()
        async with proxied(app, max_body_bytes=1000, max_header_bytes=8192) as proxy:
            async with connected(proxy.url) as wire:
                assert (await wire.get("/x", method="POST", body=b"y")).body == b"/x y"
                await wire.send(b"BAD\r\n\r\n")
                assert (await wire.reply()).status == 400
                assert await wire.is_closed()
            async with connected(proxy.url) as wire:
                await wire.send(GET + b"X: ")
                await flood(wire, b"a" * 16_384, 4 * 2**20)
                assert (await wire.reply()).status == 431
            app.gate.clear()
            async with connected(proxy.url) as wire:
                await wire.send(GET + b"\r\n")
                await wait_until(lambda: app.paths[-1] == "/", 5, "it has started")
                wire.reset()
                await wait_until(
                    lambda: app.scopes[-1]["extensions"][EXTENSION].is_lost, 5, "the loss is noticed"
                )
            app.gate.set()
        async with proxied(streaming(b"a", cut=True)) as proxy, connected(proxy.url) as wire:
            await wire.send(b"GET / HTTP/1.0\r\n\r\n")
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await wire.head()
                await wire.rest()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)

import serveit
from serveit import App, testing
from serveit.calling.exchange import Answer
from serveit.config import HTTPOptions
from serveit.control.snapshot import Snapshot
from serveit.exceptions import ImportFailed
from serveit.local import LocalRuntime
from serveit.web.ingress import _pass_on, route_path
from serveit.web.middlewares import with_middlewares
from serveit.web.presence import EXTENSION, AnswerBroken
from serveit.wire.frames import HttpAnswer
from tests.rawhttp import Wire, connected
from tests.support import wait_until

CANCEL_S = 0.1
"""How soon the code behind a request hears that its client left."""


@contextlib.asynccontextmanager
async def served(app: App, *, prefix: str = "", **http: Any) -> AsyncIterator[str]:
    async with serveit.serve(app, local=True, prefix=prefix, http={"port": 0, **http}) as client:
        assert client.url is not None
        yield client.url


@contextlib.asynccontextmanager
async def wired(app: App, **options: Any) -> AsyncIterator[Wire]:
    async with served(app, **options) as url, connected(url) as wire:
        yield wire


@pytest.fixture
def app() -> App:
    """With the routes that many tests use."""
    app = App()

    @app.route("/api/<user_id:int>/<number:float>")
    def numbers(request: Request) -> dict[str, Any]:
        return {name: [type(value).__name__, value] for name, value in request.path_params.items()}

    @app.route("/echo", methods=["POST"])
    async def echo(body: bytes) -> bytes:
        return body

    @app.route("/whole")
    async def whole() -> str:
        return "whole"

    @app.route("/slash/")
    async def slash() -> str:
        return "slash"

    @app.route("/query")
    async def query(limit: int) -> int:
        return limit

    @app.route("/fail")
    async def fail() -> None:
        raise ValueError("secret in /srv/app.py, pid 12345")

    return app


def is_problem(reply: Any, status: int, executed: str = "no") -> bool:
    fields = {name.lower(): value for name, value in dict(reply.headers).items()}
    body = reply.body if hasattr(reply, "body") else reply.content
    document = msgspec.json.decode(body)
    return (
        fields["content-type"] == "application/problem+json"
        and fields["x-serveit-executed"] == executed
        and bool(fields["x-request-id"])
        and document["status"] == status
        and (reply.status if hasattr(reply, "status") else reply.status_code) == status
    )


# -- paths ---------------------------------------------------------------------------------------


async def test_the_seed_pages_two_examples() -> None:
    app = App()

    @app.route("/api/{username}")
    def my_backend(request):  # type: ignore[no-untyped-def]
        username = request.path_params["username"]
        return {"username": username}

    @app.route("/api/{user_id:int}/{number:float}")
    def f(request):  # type: ignore[no-untyped-def]
        return {name: [type(value).__name__, value] for name, value in request.path_params.items()}

    async with testing.local(app) as client:
        assert (await client.http.get("/api/scaly")).json() == {"username": "scaly"}
        assert (await client.http.get("/api/123/3.14")).json() == {
            "user_id": ["int", 123],
            "number": ["float", 3.14],
        }


async def test_path_values_are_converted_or_not_found(app: App) -> None:
    async with testing.local(app) as client:
        found = await client.http.get("/api/123/3.14")
        assert found.json() == {"user_id": ["int", 123], "number": ["float", 3.14]}
        for path in ("/api/x/3.14", "/api/1/2%0A", f"/api/{'1' * 5000}/3.14", f"/api/1/{'9' * 400}"):
            reply = await client.http.get(path)
            assert is_problem(reply, 404), path
            assert len(reply.content) < 700


async def test_a_404_names_the_path_and_where_routes_are_listed(app: App) -> None:
    async with testing.local(app) as client:
        reply = await client.http.get("/nothing%0Ahere")
        assert is_problem(reply, 404)
        assert "'/nothing\\nhere'" in reply.json()["detail"]
        assert "/-/routes" in reply.json()["detail"]


async def test_405_only_if_no_later_route_takes_the_method() -> None:
    app = App()

    @app.route("/a", methods=["POST"])
    async def post() -> str:
        return "post"

    @app.route("/<x>", methods=["PUT"])
    async def put(x: str) -> str:
        return "put " + x

    async with testing.local(app) as client:
        assert (await client.http.put("/a")).text == "put a"
        reply = await client.http.get("/a")
        assert is_problem(reply, 405)
        assert reply.headers["allow"] == "POST, PUT"


async def test_a_trailing_slash_is_redirected_with_its_query(app: App) -> None:
    async with testing.local(app) as client:
        reply = await client.http.get("/slash?a=1&b=%2F")
        assert (reply.status_code, reply.headers["location"]) == (307, "/slash/?a=1&b=%2F")
        assert (await client.http.get("/whole/")).headers["location"] == "/whole"
        assert reply.headers["x-request-id"]


@pytest.mark.parametrize(
    "path", ["//evil.com/x", "/%2Fevil.com/x", "/\\evil.com/x", "/%5Cevil.com/x", "///x"]
)
async def test_a_redirect_never_leads_to_another_server(path: str) -> None:
    app = App()

    @app.route("/<rest:path>/")
    async def everything(rest: str) -> str:
        return rest

    async with wired(app) as wire:
        reply = await wire.get(path)
        assert reply.status == 307
        assert reply["location"][0] == "/"
        assert reply["location"][1] not in "/\\"


async def test_prefix_and_root_path(app: App) -> None:
    @app.route("/where/<x>")
    def where(request: Request) -> list[str]:
        return [request.url.path, request.scope["root_path"]]

    async with wired(app, prefix="/v1", root_path="/outside") as wire:
        assert (await wire.get("/v1/whole")).body == b"whole"
        assert (await wire.get("/v1/where/x")).json == ["/outside/v1/where/x", "/outside/v1"]
        assert (await wire.get("/whole")).status == 404
        assert (await wire.get("/v1/slash?q"))["location"] == "/outside/v1/slash/?q"
        assert (await wire.get("/-/healthz")).status == 200


@pytest.mark.parametrize(
    ("path", "root_path", "expected"),
    [("/a/b", "/a", "/b"), ("/a", "/a", ""), ("/ab", "/a", "/ab"), ("/b", "/a", "/b"), ("/a", "", "/a")],
)
def test_the_root_path_is_taken_off_whole_segments(path: str, root_path: str, expected: str) -> None:
    assert route_path({"path": path, "root_path": root_path}) == expected


async def test_serveits_own_paths(app: App) -> None:
    async with wired(app, prefix="/v1") as wire:
        routes = (await wire.get("/-/routes")).json
        assert routes["/v1/whole"] == ["/whole", ["GET", "HEAD"]]
        assert (await wire.get("/-/healthz")).json == {"status": "ok"}
        assert (await wire.get("/-/readyz")).json == {"status": "ready"}
        assert (await wire.get("/-/healthz", method="HEAD")).status == 200
        assert (await wire.get("/-/healthz", method="POST"))["allow"] == "GET, HEAD"
        assert is_problem(await wire.get("/-/nothing"), 404)


async def test_readyz_names_what_is_not_ready(app: App) -> None:
    async with testing.local(app) as client:
        ingress: Any = client.runtime.ingress
        ingress.ready = False
        assert is_problem(await client.http.get("/-/readyz"), 503)
        ingress.ready = True
        for connection in ingress._directories["default"].routers["echo"]._connections.values():
            connection.draining = True
        reply = await client.http.get("/-/readyz")
        assert "no replica of echo is ready" in reply.json()["detail"]
        assert (await client.http.get("/-/routes")).status_code == 200


async def test_routes_that_share_a_path_are_both_listed() -> None:
    app = App()

    @app.route("/a")
    async def get() -> str:
        return ""

    app.add_route("/a", get, methods=["DELETE"], name="remove")
    async with testing.local(app) as client:
        assert (await client.http.get("/-/routes")).json() == {
            "/a": ["/a", ["GET", "HEAD"]],
            "remove": ["remove", ["DELETE"]],
        }


# -- header fields -------------------------------------------------------------------------------


async def test_the_request_id_is_echoed_on_every_answer(app: App) -> None:
    async with wired(app) as wire:
        for path, status in (("/whole", 200), ("/nothing", 404), ("/fail", 500), ("/slash", 307)):
            reply = await wire.get(path, "X-Request-Id: mine-1")
            assert (reply.status, reply["x-request-id"]) == (status, "mine-1")
        made = [(await wire.get("/whole", f"X-Request-Id: {'x' * 200}"))["x-request-id"] for _ in range(2)]
        assert len({*made, "x" * 200}) == 3
        reply = await wire.get("/query?limit=1", "X-Request-Id: mine-2", "X-Request-Timeout-Ms: soon")
        assert is_problem(reply, 422)
        assert reply["x-request-id"] == "mine-2"
        assert reply.json["errors"][0]["loc"] == ["header", "x-request-timeout-ms"]


async def test_the_backends_own_request_id_gives_way(app: App) -> None:
    @app.route("/own")
    async def own() -> Response:
        return PlainTextResponse("x", headers={"x-request-id": "theirs", "x-other": "1"})

    async with wired(app) as wire:
        reply = await wire.get("/own", "X-Request-Id: mine")
        assert [value for name, value in reply.headers if name == "x-request-id"] == ["mine"]
        assert reply["x-other"] == "1"


async def test_inbound_serveit_fields_are_stripped(app: App) -> None:
    @app.route("/fields")
    def fields(request: Request) -> list[str]:
        return sorted(request.headers)

    async with wired(app) as wire:
        reply = await wire.get("/fields", "X-Serveit-Executed: no", "X-Serveitor: 1")
        assert reply.json == ["host", "x-serveitor"]


# -- bodies --------------------------------------------------------------------------------------


async def test_exactly_the_limit_passes_both_ways(app: App) -> None:
    limit = HTTPOptions().max_body_bytes
    assert limit == 16 * 2**20
    body = bytes(range(256)) * (limit // 256)
    async with served(app) as url:
        async with connected(url) as wire:
            reply = await wire.get("/echo", method="POST", body=body)
            assert reply.status == 200
            assert reply.body == body
        async with connected(url) as wire:
            await wire.send(b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
            await wire.send(b"%x\r\n%b\r\n0\r\n\r\n" % (limit, body))
            assert (await wire.reply()).body == body
        async with connected(url) as wire:
            reply = await wire.get("/echo", method="POST", body=body + b"x")
            assert is_problem(reply, 413)
            assert await wire.is_closed()


async def test_64_mib_both_ways_if_asked_for(app: App) -> None:
    body = bytes(range(256)) * (64 * 2**20 // 256)
    async with served(app, max_body_bytes=len(body)) as url, connected(url) as wire:
        reply = await wire.get("/echo", method="POST", body=body)
        assert reply.status == 200 and reply.body == body
        await wire.send(b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        await wire.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        assert (await wire.reply()).body == body
        assert is_problem(await wire.get("/echo", method="POST", body=body + b"x"), 413)


async def test_too_large_by_content_length_is_refused_before_any_of_it_is_read(app: App) -> None:
    async with wired(app, max_body_bytes=1000) as wire:
        await wire.send(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1001\r\n\r\n")
        reply = await wire.reply()
        assert is_problem(reply, 413)
        assert reply["connection"] == "close"
        assert await wire.is_closed()


async def test_too_large_by_count_is_refused_while_it_comes(app: App) -> None:
    async with wired(app, max_body_bytes=1000) as wire:
        await wire.send(b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        await wire.send(b"3e8\r\n" + b"a" * 1000 + b"\r\n")
        await wire.send(b"1\r\na\r\n")
        assert is_problem(await wire.reply(), 413)
        assert await wire.is_closed()


async def test_no_more_than_the_limit_and_one_part_is_taken_from_any_server(app: App) -> None:
    taken = 0

    async def receive() -> Any:
        nonlocal taken
        taken += 65_536
        return {"type": "http.request", "body": b"a" * 65_536, "more_body": True}

    async with testing.local(app, http={"max_body_bytes": 100_000}) as client:
        sent = await ask(client, "/echo", receive, method="POST")
        assert sent[0]["status"] == 413
        assert taken <= 100_000 + 65_536


async def test_expect_100_continue(app: App) -> None:
    start = b"POST %b HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    async with served(app, max_body_bytes=1000) as url:
        async with connected(url) as wire:
            await wire.send(start % (b"/echo", 2))
            assert (await wire.reply()).status == 100
            await wire.send(b"ok")
            assert (await wire.reply()).body == b"ok"
            assert (await wire.get("/whole")).body == b"whole"
        for path, length, status in ((b"/echo", 1001, 413), (b"/nothing", 2, 404), (b"/whole", 2, 405)):
            async with connected(url) as wire:
                await wire.send(start % (path, length))
                reply = await wire.reply()
                assert (reply.status, reply["connection"]) == (status, "close")
                assert await wire.is_closed()


async def test_an_early_answer_leaves_the_connection_to_the_next_request(app: App) -> None:
    async with wired(app) as wire:
        assert (await wire.get("/nothing", method="POST", body=b"x" * 100_000)).status == 404
        assert (await wire.get("/whole")).body == b"whole"


async def test_415_and_422(app: App) -> None:
    @app.route("/model", methods=["POST"])
    async def model(item: dict[str, int]) -> dict[str, int]:
        return item

    async with testing.local(app) as client:
        form = await client.http.post("/model", data={"a": "1"})
        assert is_problem(form, 415)
        assert "-H 'content-type: application/json'" in form.json()["detail"]
        bad = await client.http.get("/query?limit=x")
        assert is_problem(bad, 422)
        assert bad.json()["errors"][0]["loc"] == ["query", "limit"]
        assert is_problem(await client.http.post("/model", json={"a": "x"}), 422)


# -- waiting -------------------------------------------------------------------------------------


class Gate:
    """Async user code that a test holds up; says how it ended."""

    def __init__(self) -> None:
        self.started = 0
        self.ends: list[str] = []
        self.open = asyncio.Event()

    async def __call__(self) -> str:
        self.started += 1
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.ends.append("cancelled")
            raise
        self.ends.append("answered")
        return "done"


@pytest.fixture
def gated() -> Iterator[tuple[App, Gate]]:
    app, gate = App(), Gate()

    @app.route("/wait")
    @app.backend(max_ongoing_requests=1, max_queued_requests=0, request_timeout_s=5)
    async def wait() -> str:
        return await gate()

    @app.route("/queue")
    @app.backend(max_ongoing_requests=1, request_timeout_s=None)
    async def queue() -> str:
        return await gate()

    yield app, gate


async def test_a_full_queue_is_a_503_that_says_when_to_come_back(gated: tuple[App, Gate]) -> None:
    app, gate = gated
    async with testing.local(app) as client:
        asked = [asyncio.ensure_future(client.http.get("/wait")) for _ in range(2)]  # one runs, one is next
        await wait_until(lambda: gate.started == 1, 5, "one runs")
        await client.clock.settle()
        reply = await client.http.get("/wait")
        assert is_problem(reply, 503)
        assert reply.headers["retry-after"] == "1"
        assert "max_queued_requests=0" in reply.json()["detail"]
        gate.open.set()
        assert [(await each).text for each in asked] == ["done", "done"]


async def test_the_deadline_is_the_options_or_the_clients_if_that_is_sooner(gated: tuple[App, Gate]) -> None:
    app, gate = gated
    for path, fields, wait_s in (
        ("/wait", {}, 5.0),
        ("/wait", {"x-request-timeout-ms": "250"}, 0.25),
        ("/wait", {"x-request-timeout-ms": "60000"}, 5.0),
        ("/queue", {"x-request-timeout-ms": "60000"}, 60.0),
    ):
        async with testing.local(app) as client:
            started = gate.started
            asked = asyncio.ensure_future(client.http.get(path, headers=fields))
            await wait_until(lambda: gate.started == started + 1, 5, "it runs")  # noqa: B023
            await client.clock.advance(wait_s - 0.01)
            assert not asked.done()
            await client.clock.advance(0.05)
            assert is_problem(await asked, 504, "maybe")
            await wait_until(lambda: gate.ends.pop() == "cancelled", 5, "it is cancelled")


async def test_a_deadline_that_passes_in_the_queue_means_not_executed(gated: tuple[App, Gate]) -> None:
    app, gate = gated
    async with testing.local(app) as client:
        first = asyncio.ensure_future(client.http.get("/queue"))
        await wait_until(lambda: gate.started == 1, 5, "one runs")
        late = asyncio.ensure_future(client.http.get("/queue", headers={"x-request-timeout-ms": "100"}))
        await client.clock.advance(0.2)
        assert is_problem(await late, 504, "no")
        gate.open.set()
        assert (await first).text == "done"
        assert gate.started == 1


# -- streams -------------------------------------------------------------------------------------


async def test_the_first_chunk_is_out_before_the_last_is_made() -> None:
    app = App()
    more = asyncio.Event()

    @app.route("/stream")
    async def stream() -> AsyncIterator[str]:
        yield "first"
        await more.wait()
        yield "last"

    async with wired(app) as wire:
        await wire.send(b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n")
        head = await wire.head()
        assert (head.status, head["transfer-encoding"]) == (200, "chunked")
        assert await wire.chunk() == b"first"
        assert not more.is_set()
        more.set()
        assert (await wire.chunk(), await wire.chunk()) == (b"last", b"")
        assert (await wire.get("/-/healthz")).status == 200


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("error", [ValueError("in the middle"), HTTPException(400, "in the middle")])
async def test_a_stream_that_fails_in_the_middle_is_visibly_cut(
    version: str, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    app = App()

    @app.route("/stream")
    def stream() -> Iterator[str]:
        yield "first"
        raise error

    caplog.set_level(logging.INFO, "serveit.access")
    async with wired(app, access_log=True) as wire:
        await wire.send(f"GET /stream HTTP/{version}\r\nHost: a\r\n\r\n".encode())
        if version == "1.1":
            await wire.head()
            assert await wire.rest() == b"5\r\nfirst\r\n"
        else:
            with pytest.raises(ConnectionResetError):
                await wire.head()
                await wire.rest()
    assert "GET /stream 500" in caplog.text
    assert "in the middle" in caplog.text
    assert "Exception in ASGI application" not in caplog.text


async def test_a_stream_that_fails_at_its_start_is_a_clean_500() -> None:
    app = App()

    @app.route("/stream")
    def stream() -> Iterator[str]:
        raise ValueError("at the start")
        yield ""

    async with wired(app) as wire:
        assert is_problem(await wire.get("/stream"), 500, "yes")
        assert (await wire.get("/-/healthz")).status == 200


async def test_a_slow_reader_holds_the_generator_back() -> None:
    app = App()
    made = 0
    closed = asyncio.Event()

    @app.route("/stream")
    async def stream() -> AsyncIterator[bytes]:
        nonlocal made
        try:
            while True:
                made += 1
                yield b"x" * 65_536
        finally:
            closed.set()

    async with served(app) as url, connected(url, receive_buffer=65_536) as wire:
        await wire.send(b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n")
        await wire.head()
        seen = -1
        while made != seen:
            seen = made
            for _ in range(300):
                await asyncio.sleep(0)
        assert made < 200, "64 KiB each: the sockets' buffers, and little more"
        wire.reset()
        await asyncio.wait_for(closed.wait(), 5)


async def test_head_gets_the_fields_and_ends_the_stream() -> None:
    app = App()
    closed = asyncio.Event()

    @app.route("/stream")
    async def stream() -> AsyncIterator[str]:
        try:
            while True:
                yield "for ever"
        finally:
            closed.set()

    @app.route("/whole")
    async def whole() -> str:
        return "whole"

    @app.route("/large")
    async def large() -> bytes:
        return b"x" * 1_000_000

    async with wired(app) as wire:
        assert (await wire.get("/stream", method="HEAD")).status == 200
        await asyncio.wait_for(closed.wait(), 5)
        reply = await wire.get("/whole", method="HEAD")
        assert (reply["content-length"], reply["content-type"]) == ("5", "text/plain; charset=utf-8")
        assert (await wire.get("/large", method="HEAD"))["content-length"] == "1000000"
        assert len((await wire.get("/large")).body) == 1_000_000


# -- the client leaves ---------------------------------------------------------------------------


def leave(wire: Wire, how: str) -> None:
    wire.reset() if how == "reset" else wire.writer.close()


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_running_code_is_cancelled_when_the_client_leaves(
    how: str, gated: tuple[App, Gate], caplog: pytest.LogCaptureFixture
) -> None:
    app, gate = gated
    caplog.set_level(logging.INFO, "serveit.access")
    async with served(app, access_log=True) as url, connected(url) as wire:
        await wire.send(b"GET /wait HTTP/1.1\r\nHost: a\r\nX-Request-Id: left\r\n\r\n")
        await wait_until(lambda: gate.started == 1, 5, "it runs")
        leave(wire, how)
        await wait_until(lambda: gate.ends == ["cancelled"], CANCEL_S, "it is cancelled")
        await wait_until(lambda: "GET /wait 499" in caplog.text, 5, "it is logged")
    assert [record.levelname for record in caplog.records if record.name != "serveit.access"] == []


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_what_is_queued_never_starts_when_the_client_leaves(how: str, gated: tuple[App, Gate]) -> None:
    app, gate = gated
    async with served(app) as url, connected(url) as first:
        await first.send(b"GET /queue HTTP/1.1\r\nHost: a\r\n\r\n")
        await wait_until(lambda: gate.started == 1, 5, "one runs")
        async with contextlib.AsyncExitStack() as stack:
            others = [await stack.enter_async_context(connected(url)) for _ in range(3)]
            for other in others:
                await other.send(b"GET /queue HTTP/1.1\r\nHost: a\r\n\r\n")
                assert (await first_line_of_health(url)) == 200  # by now it is queued
            for other in others:
                leave(other, how)
        assert (await first_line_of_health(url)) == 200
        gate.open.set()
        assert (await first.reply()).body == b"done"
    assert gate.ends == ["answered"]


async def first_line_of_health(url: str) -> int:
    async with connected(url) as wire:
        return (await wire.get("/-/healthz")).status


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_generator_is_closed_when_the_client_leaves(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = App()
    closed = asyncio.Event()

    @app.route("/stream")
    async def stream() -> AsyncIterator[str]:
        try:
            yield "first"
            await asyncio.Event().wait()
        finally:
            closed.set()

    caplog.set_level(logging.INFO, "serveit.access")
    async with wired(app, access_log=True) as wire:
        await wire.send(b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n")
        await wire.head()
        await wire.chunk()
        leave(wire, how)
        await wait_until(closed.is_set, CANCEL_S, "the generator is closed")
        await wait_until(lambda: "GET /stream 499" in caplog.text, 5, "it is logged")
    assert [record.levelname for record in caplog.records if record.name != "serveit.access"] == []


async def test_a_client_that_leaves_in_its_body_runs_nothing(
    app: App, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "serveit.access")
    async with wired(app, access_log=True) as wire:
        await wire.send(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhalf")
        await wire.close()
        await wait_until(lambda: "POST /echo 499" in caplog.text, 5, "it is logged")


async def test_a_client_that_left_before_it_was_asked_for_runs_nothing(gated: tuple[App, Gate]) -> None:
    app, gate = gated
    async with served(app) as url, connected(url) as wire:
        await wire.send(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n" * 3)
        await wait_until(lambda: gate.started == 1, 5, "one runs")
        wire.reset()
        gate.open.set()
        await wait_until(lambda: len(gate.ends) == 1, 5, "it has ended")
        assert (await first_line_of_health(url)) == 200
    assert gate.started == 1


# -- under other ASGI servers --------------------------------------------------------------------


async def ask(
    client: Any,
    path: str,
    receive: Any = None,
    *,
    method: str = "GET",
    send: Any = None,
    presence: Any = None,
) -> Any:
    """One request by hand; returns the messages that were sent."""
    sent: list[Any] = []

    async def keep(message: Any) -> None:
        sent.append(message)

    async def nothing_more() -> Any:
        if not sent_body:
            sent_body.append(True)
            return {"type": "http.request", "body": b"", "more_body": False}
        await asyncio.get_running_loop().create_future()

    sent_body: list[bool] = []
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": [],
        "scheme": "http",
        "http_version": "1.1",
        "extensions": {EXTENSION: presence} if presence else {},
    }
    await client.runtime.ingress(scope, receive or nothing_more, send or keep)
    return sent


async def test_a_disconnect_message_cancels(gated: tuple[App, Gate]) -> None:
    app, gate = gated
    left = asyncio.Event()
    messages = iter([{"type": "http.request"}, {"type": "http.request"}])

    async def receive() -> Any:
        if message := next(messages, None):
            return message
        await left.wait()
        return {"type": "http.disconnect"}

    async with testing.local(app) as client:
        asked = asyncio.ensure_future(ask(client, "/wait", receive))
        await wait_until(lambda: gate.started == 1, 5, "it runs")
        left.set()
        assert await asked == []
        await wait_until(lambda: gate.ends == ["cancelled"], 5, "it is cancelled")


async def test_a_task_that_is_cancelled_cancels(gated: tuple[App, Gate]) -> None:
    app, gate = gated
    async with testing.local(app) as client:
        asked = asyncio.ensure_future(ask(client, "/wait"))
        await wait_until(lambda: gate.started == 1, 5, "it runs")
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        await wait_until(lambda: gate.ends == ["cancelled"], 5, "it is cancelled")


async def test_there_is_never_a_second_start() -> None:
    app = App()

    @app.route("/stream")
    def stream() -> Iterator[str]:
        yield "first"
        raise ValueError("in the middle")

    sent: list[str] = []

    async def send(message: Any) -> None:
        sent.append(message["type"])

    async def broken(message: Any) -> None:
        sent.append(message["type"])
        raise OSError("gone")

    async with testing.local(app) as client:
        for sender in (send, broken):
            sent.clear()
            with pytest.raises(AnswerBroken):
                await ask(client, "/stream", send=sender)
            assert sent.count("http.response.start") == 1


class Present:
    """serveit's own connection, as the ingress sees it."""

    announces_bodies = True

    def __init__(self, *, is_lost: bool = False) -> None:
        self.is_lost = is_lost
        self.cuts = 0

    def watch(self, on_lost: Any) -> None: ...

    def unwatch(self, on_lost: Any) -> None: ...

    def cut(self) -> None:
        self.cuts += 1


async def test_who_has_left_already_is_not_asked_for(gated: tuple[App, Gate]) -> None:
    app, gate = gated
    async with testing.local(app) as client:
        assert await ask(client, "/wait", presence=Present(is_lost=True)) == []
        await client.clock.settle()
        assert gate.started == 0


async def test_a_cancelled_stream_is_cut_and_stays_cancelled() -> None:
    app = App()
    closed = asyncio.Event()

    @app.route("/stream")
    async def stream() -> AsyncIterator[str]:
        try:
            yield "first"
            await asyncio.Event().wait()
        finally:
            closed.set()

    async with testing.local(app) as client:
        begun = asyncio.Event()

        async def send(message: Any) -> None:
            begun.set()

        present = Present()
        asked = asyncio.ensure_future(ask(client, "/stream", send=send, presence=present))
        await begun.wait()
        await client.clock.settle()
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert present.cuts == 1
        await asyncio.wait_for(closed.wait(), 5)


async def test_what_came_with_the_head_goes_first() -> None:
    class Inflow:
        def __init__(self) -> None:
            self.items = iter([(b"", False), (b"b", False), (b"", True)])

        async def read(self) -> tuple[bytes, bool]:
            return next(self.items)

    sent: list[tuple[bytes, bool]] = []

    async def send(message: Any) -> None:
        sent.append((message["body"], message["more_body"]))

    answer: Any = Answer(HttpAnswer(0, 200, []), 0, b"a", Inflow())  # type: ignore[arg-type]
    await _pass_on(answer, Present(), send)
    assert sent == [(b"a", True), (b"b", True), (b"", False)]


async def test_only_http(app: App) -> None:
    async with testing.local(app) as client:
        with pytest.raises(RuntimeError, match="speaks HTTP, not websocket"):
            await client.runtime.ingress({"type": "websocket"}, None, None)  # type: ignore[arg-type]


def test_through_starlettes_test_client(app: App) -> None:
    with testing.TestClient(app, follow_redirects=False, http={"max_body_bytes": 10}) as client:
        assert client.get("/api/1/2").json() == {"user_id": ["int", 1], "number": ["float", 2.0]}
        assert client.post("/echo", content=b"x" * 11).status_code == 413
        assert client.get("/slash").headers["location"] == "/slash/"


# -- errors --------------------------------------------------------------------------------------


async def test_no_error_answer_says_where_it_came_from(app: App) -> None:
    @app.route("/nan")
    async def nan() -> Any:
        return {"a": [object()]}

    @app.route("/odd")
    async def odd() -> None:
        raise HTTPException(418, "a teapot", headers={"x-tea": "yes", "x-bad": "a\nb"})

    async with wired(app) as wire:
        for path, status in (("/fail", 500), ("/nan", 500), ("/odd", 418), ("/query", 422), ("/x", 404)):
            reply = await wire.get(path)
            assert is_problem(reply, status, "yes" if path in ("/fail", "/nan", "/odd") else "no"), path
            for word in (b"Traceback", b".py", b"secret", b"12345", b"/srv", b"site-packages"):
                assert word not in reply.body, (path, word)
        assert ((await wire.get("/odd"))["x-tea"], "x-bad" in await wire.get("/odd")) == ("yes", False)


async def test_debug_shows_the_traceback(app: App) -> None:
    async with wired(app, debug=True) as wire:
        shown = (await wire.get("/fail")).json
        assert shown["exception"] == "ValueError: secret in /srv/app.py, pid 12345"
        assert "test_ingress.py" in shown["traceback"]
        assert "traceback" not in (await wire.get("/query")).json


async def test_a_bug_in_the_ingress_is_a_500_and_a_log_record(
    app: App, caplog: pytest.LogCaptureFixture
) -> None:
    async with testing.local(app, http={"debug": True}) as client:
        ingress: Any = client.runtime.ingress
        directories, ingress._directories = ingress._directories, {}
        reply = await client.http.get("/whole")
        assert is_problem(reply, 500, "maybe")
        assert "KeyError" in reply.json()["exception"]
        assert "failed in the ingress" in caplog.text
        ingress._directories = directories


async def test_what_http_lacks_is_the_backends_error(app: App, caplog: pytest.LogCaptureFixture) -> None:
    @app.route("/status/<status:int>")
    async def status(status: int) -> Response:
        return Response("x", status_code=status)

    @app.route("/split")
    async def split() -> Response:
        return Response("x", headers={"x-name": "a\r\nset-cookie: evil=1"})

    async with wired(app) as wire:
        for path in ("/status/99", "/status/600", "/status/100", "/split"):
            reply = await wire.get(path)
            assert is_problem(reply, 500, "yes"), path
            assert "set-cookie" not in reply
    assert "HTTP does not have" in caplog.text


async def test_an_answer_that_is_not_as_long_as_it_says_is_cut(
    app: App, caplog: pytest.LogCaptureFixture
) -> None:
    @app.route("/short")
    async def short() -> Response:
        return Response("x", headers={"content-length": "5"})

    async with wired(app) as wire:
        await wire.send(b"GET /short HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await wire.head())["content-length"] == "5"
        assert len(await wire.rest()) < 5
    assert "was cut off" in caplog.text


async def test_a_length_that_is_none_is_the_backends_error(
    app: App, caplog: pytest.LogCaptureFixture
) -> None:
    lengths = [["abc"], ["+1"], ["1_0"], ["9" * 5_000], ["1", "2"]]

    @app.route("/length/<number:int>")
    async def length(number: int) -> Response:
        return own_length(Response("x"), lengths[number])

    @app.route("/streamed/<number:int>")
    async def streamed(number: int) -> Response:
        return own_length(StreamingResponse(iter(["x"])), lengths[number])

    async with wired(app) as wire:
        for number in range(len(lengths)):
            for path in ("length", "streamed"):
                reply = await wire.get(f"/{path}/{number}")
                assert is_problem(reply, 500, "yes"), reply
                assert "content-length is " in reply.json["detail"]
        assert (await wire.get("/whole")).body == b"whole"
    assert "content-length is '1, 2': it must be one number" in caplog.text


def own_length(response: Response, lengths: list[str]) -> Response:
    kept = [field for field in response.raw_headers if field[0] != b"content-length"]
    response.raw_headers[:] = [*kept, *((b"content-length", length.encode()) for length in lengths)]
    return response


async def test_a_shadow_that_fails_is_nobodys(app: App, caplog: pytest.LogCaptureFixture) -> None:
    app.add_route("/shadowed", traffic={"whole": 1}, shadow={"whole": 1})
    async with testing.local(app) as client:
        assert (await client.http.get("/shadowed")).text == "whole"
        directory: Any = client.runtime.ingress._directories["default"]

        def fail(*arguments: Any) -> None:
            raise KeyError("bug")

        directory.shadow = fail
        assert (await client.http.get("/shadowed")).text == "whole"
        assert "could not be sent a request" in caplog.text


async def test_the_access_log_is_one_line_a_request(app: App, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "serveit.access")
    async with wired(app, access_log=True) as wire:
        await wire.get("/whole?token=secret", "X-Request-Id: one")
        await wire.get("/nothing")
    first, second = (record.getMessage() for record in caplog.records if record.name == "serveit.access")
    assert first.startswith("GET /whole 200 ")
    assert first.endswith(" ms one")
    assert "secret" not in first
    assert second.startswith("GET /nothing 404 ")


# -- Starlette's responses -----------------------------------------------------------------------


async def test_starlettes_responses(tmp_path: Path) -> None:
    app = App()
    ran: list[str] = []
    file = tmp_path / "page.txt"
    file.write_text("on disk " * 20_000)

    @app.route("/response")
    async def response() -> Response:
        answer = Response(b"octets", status_code=202, media_type="image/png")
        answer.set_cookie("a", "1")
        answer.set_cookie("b", "2")
        return answer

    @app.route("/json")
    async def answer_json() -> Response:
        return JSONResponse({"a": 1}, background=BackgroundTask(ran.append, "background"))

    @app.route("/redirect")
    async def redirect() -> Response:
        return RedirectResponse("/json", status_code=303)

    @app.route("/streaming")
    async def streaming() -> Response:
        return StreamingResponse(iter(["a", "b"]), media_type="text/x")

    @app.route("/file")
    async def answer_file() -> Response:
        return FileResponse(file)

    @app.route("/none/<status:int>")
    async def none(status: int) -> Response:
        return Response("not sent", status_code=status, headers={"content-length": "8"})

    async with wired(app) as wire:
        reply = await wire.get("/response")
        assert (reply.status, reply.body, reply["content-type"]) == (202, b"octets", "image/png")
        cookies = [value.split(";")[0] for name, value in reply.headers if name == "set-cookie"]
        assert cookies == ["a=1", "b=2"]
        assert (await wire.get("/json")).json == {"a": 1}
        await wait_until(lambda: ran == ["background"], 5, "the background task has run")
        reply = await wire.get("/redirect")
        assert (reply.status, reply["location"]) == (303, "/json")
        assert (await wire.get("/streaming")).body == b"ab"
        assert (await wire.get("/file")).body == file.read_bytes()
        assert (await wire.get("/file", "Range: bytes=0-6")).body == b"on disk"
        assert (await wire.get("/file", method="HEAD"))["content-length"] == "160000"
        for status in (204, 304):
            reply = await wire.get(f"/none/{status}")
            assert (reply.status, "content-length" in reply, "transfer-encoding" in reply) == (
                status,
                False,
                False,
            )
        assert (await wire.get("/-/healthz")).json == {"status": "ok"}


# -- middlewares ---------------------------------------------------------------------------------


def tagging(app: Any) -> Any:
    """A middleware factory that tests name by its import string."""

    async def tagged(scope: Any, receive: Any, send: Any) -> None:
        async def with_tag(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-tag", b"1")]
            await send(message)

        await app(scope, receive, with_tag)

    return tagged


with_options = Middleware(CORSMiddleware, allow_origins=["http://here"])


def broken(app: Any) -> Any:
    return 1 / 0


def failing(app: Any) -> Any:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/late":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"some", "more_body": True})
        raise ValueError("secret")

    return fails


async def test_middlewares_of_every_kind(app: App) -> None:
    class Named(BaseHTTPMiddleware):
        async def dispatch(self, request: Any, call_next: Any) -> Any:
            response = await call_next(request)
            response.headers["x-named"] = request.headers["x-request-id"]
            return response

    middlewares = [Middleware(CORSMiddleware, allow_origins=["*"]), "tests.test_ingress:tagging", Named]
    async with wired(app, middlewares=middlewares) as wire:
        preflight = await wire.get(
            "/nowhere", "Origin: http://x", "Access-Control-Request-Method: GET", method="OPTIONS"
        )
        assert (preflight.status, preflight["access-control-allow-origin"]) == (200, "*")
        assert preflight["x-request-id"]
        reply = await wire.get("/-/routes", "Origin: http://x")
        assert (reply["access-control-allow-origin"], reply["x-tag"]) == ("*", "1")
        reply = await wire.get("/whole", "X-Request-Id: mine")
        assert (reply.body, reply["x-named"]) == (b"whole", "mine")
        assert [value for name, value in reply.headers if name == "x-request-id"] == ["mine"]
        made = await wire.get("/whole")
        assert made["x-named"] == made["x-request-id"]


async def test_a_middleware_with_options_by_its_import_string(app: App) -> None:
    async with wired(app, middlewares=["tests.test_ingress:with_options"]) as wire:
        reply = await wire.get("/whole", "Origin: http://here")
        assert reply["access-control-allow-origin"] == "http://here"
        assert "access-control-allow-origin" not in await wire.get("/whole", "Origin: http://elsewhere")


async def test_clients_that_leave_are_noticed_through_middlewares(
    gated: tuple[App, Gate], caplog: pytest.LogCaptureFixture
) -> None:
    class Plain(BaseHTTPMiddleware):
        async def dispatch(self, request: Any, call_next: Any) -> Any:
            return await call_next(request)

    app, gate = gated
    async with served(app, middlewares=[Plain]) as url, connected(url) as wire:
        await wire.send(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
        await wait_until(lambda: gate.started == 1, 5, "it runs")
        wire.reset()
        await wait_until(lambda: gate.ends == ["cancelled"], CANCEL_S, "it is cancelled")
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_a_middleware_that_fails_is_a_problem_too(app: App, caplog: pytest.LogCaptureFixture) -> None:
    async with served(app, middlewares=[failing]) as url:
        async with connected(url) as wire:
            reply = await wire.get("/whole", "X-Request-Id: mine")
            assert is_problem(reply, 500, "maybe")
            assert reply["x-request-id"] == "mine"
            assert b"secret" not in reply.body
        async with connected(url) as wire:
            await wire.send(b"GET /late HTTP/1.1\r\nHost: a\r\n\r\n")
            await wire.head()
            assert await wire.rest() == b"4\r\nsome\r\n"
    assert "failed in a middleware (request mine)" in caplog.text


FIELD = (b"x-user", b"ada")
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "value": (
        {"headers": [FIELD, (b"x-user", "ada")]},
        "the header field b'x-user' that is no pair of bytes",
    ),
    "name": ({"headers": [("x-user", b"ada")]}, "the header field 'x-user' that is no pair of bytes"),
    "three": (
        {"headers": [(b"x-user", b"ada", b"x")]},
        "the header field b'x-user' that is no pair of bytes",
    ),
    "none": ({"headers": [None]}, "the header field None that is no pair of bytes"),
    "tuple": ({"headers": (FIELD,)}, "headers that are a tuple"),
    "path": ({"path": "/\ud800"}, "a scope whose 'path'"),
    "method": ({"method": b"GET"}, "a scope whose 'method'"),
    "query": ({"query_string": "a=1"}, "a scope whose 'query_string'"),
    "raw path": ({"raw_path": "/whole"}, "a scope whose 'raw_path'"),
    "root path": ({"root_path": b""}, "a scope whose 'root_path'"),
    "client": ({"client": ("10.0.0.1", "80")}, "a scope whose 'client'"),
    "server": ({"server": ("here",)}, "a scope whose 'server'"),
}


@pytest.mark.parametrize(("changes", "fault"), FAULTS.values(), ids=FAULTS)
async def test_what_a_middleware_spoils_costs_only_its_own_request(
    changes: dict[str, Any], fault: str, gated: tuple[App, Gate], caplog: pytest.LogCaptureFixture
) -> None:
    app, gate = gated

    def spoiling(app: Any) -> Any:
        async def spoilt(scope: Any, receive: Any, send: Any) -> None:
            is_bad = scope["query_string"] == b"bad"
            await app({**scope, **changes} if is_bad else scope, receive, send)

        return spoilt

    async with served(app, middlewares=[spoiling]) as url, connected(url) as slow, connected(url) as wire:
        await slow.send(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
        await wait_until(lambda: gate.started == 1, 5, "it runs")
        reply = await wire.get("/wait?bad")
        assert is_problem(reply, 500, "no")
        assert b"ada" not in reply.body
        gate.open.set()
        assert (await slow.reply()).body == b"done"
    assert f"a middleware passed on a request with {fault}" in caplog.text


async def test_what_middlewares_may_pass_on(app: App) -> None:
    good: list[dict[str, Any]] = [
        {"client": None, "server": ("/socket", None), "raw_path": None},
        {"client": ["10.0.0.1", 80], "headers": [[b"x-user", b"ada"]]},
        {"root_path": "/ü", "path": "/ü/whole"},
    ]
    seen: list[Any] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)

    for changes in good:

        def changing(app: Any, changes: dict[str, Any] = changes) -> Any:
            return lambda given, receive, send: app({**given, **changes}, receive, send)

        wrapped = with_middlewares(inner, HTTPOptions(middlewares=[changing]))
        scope = {"type": "http", "method": "GET", "path": "/whole", "query_string": b"", "headers": []}
        await wrapped({**scope, "scheme": "http", "http_version": "1.1"}, None, None)  # type: ignore[arg-type]
    assert len(seen) == len(good)


async def test_other_scopes_pass_through_middlewares() -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    wrapped = with_middlewares(app, HTTPOptions(middlewares=[tagging]))
    await wrapped({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
    assert seen == ["lifespan"]
    assert with_middlewares(app, HTTPOptions()) is app


def test_middlewares_that_are_none() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    with pytest.raises(ImportFailed, match="nothing_here"):
        with_middlewares(app, HTTPOptions(middlewares=["tests.test_ingress:nothing_here"]))
    with pytest.raises(TypeError, match="returned None: it must return an ASGI app"):
        with_middlewares(app, HTTPOptions(middlewares=[lambda app: None]))
    with pytest.raises(TypeError, match="'tests.test_ingress:FIELD' is .*: it must be a factory"):
        with_middlewares(app, HTTPOptions(middlewares=["tests.test_ingress:FIELD"]))
    with pytest.raises(ZeroDivisionError) as caught:
        with_middlewares(app, HTTPOptions(middlewares=["tests.test_ingress:broken"]))
    assert caught.value.__notes__ == ["(in the making of middleware 'tests.test_ingress:broken')"]


# -- stopping ------------------------------------------------------------------------------------


async def test_running_requests_end_in_a_graceful_stop(gated: tuple[App, Gate]) -> None:
    app, gate = gated
    async with contextlib.AsyncExitStack() as stack:
        serving = serveit.serve(app, local=True, http={"port": 0})
        client = await serving.__aenter__()
        wire = await stack.enter_async_context(connected(client.url))
        await wire.send(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
        await wait_until(lambda: gate.started == 1, 5, "it runs")
        stopping = asyncio.ensure_future(serving.__aexit__(None, None, None))
        await asyncio.sleep(0)
        gate.open.set()
        reply = await wire.reply()
        assert (reply.body, reply["connection"]) == (b"done", "close")
        await stopping


async def test_what_does_not_end_in_time_is_a_503_or_cut(gated: tuple[App, Gate]) -> None:
    app, gate = gated

    @app.route("/stream")
    async def stream() -> AsyncIterator[str]:
        yield "first"
        await gate.open.wait()

    runtime = LocalRuntime(app, http=HTTPOptions(port=0))
    await runtime.start()
    assert runtime.proxy is not None
    async with connected(runtime.proxy.url) as waiting, connected(runtime.proxy.url) as streaming:
        await waiting.send(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
        await streaming.send(b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n")
        await streaming.head()
        await wait_until(lambda: gate.started == 1, 5, "it runs")
        await runtime.proxy.aclose(0.01)
        reply = await waiting.reply()
        assert is_problem(reply, 503, "maybe")
        assert reply["retry-after"] == "1"
        assert await streaming.rest() == b"5\r\nfirst\r\n"
        await wait_until(lambda: gate.ends == ["cancelled"], 5, "it is cancelled")
    await runtime.aclose()


async def test_before_the_first_app_is_there_clients_are_told_to_come_again() -> None:
    async with testing.local(App()) as client:
        assert (await client.http.get("/x")).status_code == 404
        client.runtime.ingress.update(Snapshot((0, 2), ()))
        answer = await client.http.get("/x")
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert "starting or stopping" in answer.json()["detail"]

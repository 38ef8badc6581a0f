"""HTTP: paths, parameters, bodies, answers, errors."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import AsyncIterator

import pytest

from serveit import App
from tests.flow import pages as pages_module
from tests.flow.answers import problem
from tests.flow.conftest import Served
from tests.flow.gates import Gate
from tests.flow.pages import VALUES, pages
from tests.rawhttp import connected
from tests.support import wait_until

MIB = 1024 * 1024


@pytest.fixture
def app() -> App:
    return pages


# -- paths and parameters ------------------------------------------------------------------------


async def test_functions_and_their_parameters(served: Served) -> None:
    assert (await served.http.get("/hello/Ada")).text == "Hello, Ada!"
    assert (await served.http.get("/hello/Ada?shout=true")).text == "Hello, ADA!"
    assert (await served.http.get("/hello/%C3%A4%20%25")).text == "Hello, ä %!"
    assert (await served.http.get("/")).text == "root"
    reply = await served.http.get("/raw/123/3.14")
    assert reply.json() == {"user_id": ["int", 123], "number": ["float", 3.14]}


async def test_path_query_and_header_values(served: Served) -> None:
    assert (await served.http.get("/typed/7/1.5?q=b&q=a")).json() == [7, 1.5, ["b", "a"]]
    reply = await served.http.get("/agent", headers={"user-agent": "me", "trace": "t"})
    assert reply.text == "me t"
    assert (await served.http.get("/agent", headers={"user-agent": "me"})).text == "me none"


async def test_bad_values_are_named(served: Served) -> None:
    document = problem(await served.http.get("/hello/Ada?shout=maybe"), 422)
    assert document["detail"] == "query.shout: expected bool, got 'maybe'"
    assert document["errors"] == [{"loc": ["query", "shout"], "msg": "expected bool, got 'maybe'"}]
    document = problem(await served.http.post("/orders/1", json={"item": "tea", "count": "x"}), 422)
    assert document["errors"][0]["loc"] == ["body", "count"]
    document = problem(await served.http.post("/orders/1", json={}), 422)
    assert "item" in document["detail"]
    assert "body" in problem(await served.http.post("/orders/1", content=b"{"), 422)["detail"]


async def test_bodies(served: Served) -> None:
    reply = await served.http.post("/orders/7", json={"item": "tea", "count": 2})
    assert reply.json() == {"user": 7, "item": "tea", "count": 2}
    assert (await served.http.put("/orders/7", json={"item": "tea"})).json()["count"] == 1
    assert (await served.http.post("/data", content=b'{"a": [1, null]}')).json() == {"a": [1, None]}
    octets = os.urandom(100)
    fields = {"content-type": "application/octet-stream"}
    reply = await served.http.post("/octets", content=octets, headers=fields)
    assert reply.content == octets and reply.headers["content-type"] == "application/octet-stream"


async def test_what_is_not_found(served: Served) -> None:
    for path in ("/typed/x/1.5", "/typed/1/2%0A", f"/raw/{'1' * 5000}/3.14"):
        assert problem(await served.http.get(path), 404)
    detail = problem(await served.http.get("/nothing"), 404)["detail"]
    assert f"'{served.prefix}/nothing'" in detail and "/-/routes" in detail


async def test_methods(served: Served) -> None:
    reply = await served.http.get("/orders/7")
    assert "POST" in problem(reply, 405)["detail"] and reply.headers["allow"] == "POST, PUT"
    reply = await served.http.post("/hello/Ada")
    assert problem(reply, 405) and reply.headers["allow"] == "GET, HEAD"
    reply = await served.http.options("/orders/7")
    assert reply.status_code == 405 and reply.headers["allow"] == "POST, PUT"


async def test_head_gets_the_fields_alone(served: Served) -> None:
    reply = await served.http.head("/hello/Ada")
    assert (reply.status_code, reply.headers["content-length"], reply.content) == (200, "11", b"")
    reply = await served.http.head("/answer/large")
    assert reply.headers["content-length"] == str(16 * MIB)
    reply = await served.http.head("/lines/1000")
    assert reply.status_code == 200


async def test_a_slash_too_many_or_too_few_is_redirected(served: Served) -> None:
    reply = await served.http.get("/slash?a=b")
    assert (reply.status_code, reply.headers["location"]) == (307, f"{served.prefix}/slash/?a=b")
    reply = await served.http.get("/hello/Ada/?shout=true")
    assert (reply.status_code, reply.headers["location"]) == (307, f"{served.prefix}/hello/Ada?shout=true")


async def test_forms_are_a_415_that_names_the_way_out(served: Served) -> None:
    document = problem(await served.http.post("/orders/1", data={"item": "tea"}), 415)
    assert "application/json" in document["detail"]
    assert (await served.http.post("/form", data={"item": "tea"})).json() == len("item=tea")


# -- sizes ---------------------------------------------------------------------------------------


async def in_chunks(octets: bytes) -> AsyncIterator[bytes]:
    """A body whose length is not said beforehand."""
    for start in range(0, len(octets), MIB):
        yield octets[start : start + MIB]


async def test_16_mib_both_ways(served: Served) -> None:
    octets = os.urandom(MIB) * 16
    fields = {"content-type": "application/octet-stream"}
    reply = await served.http.post("/octets", content=octets, headers=fields)
    assert reply.content == octets
    reply = await served.http.post("/octets", content=in_chunks(octets), headers=fields)
    assert reply.content == octets
    assert len((await served.http.get("/answer/large")).content) == 16 * MIB


async def test_more_is_a_413(served: Served) -> None:
    fields = ("Content-Type: application/octet-stream", f"Content-Length: {16 * MIB + 1}")
    async with connected(served.url) as wire:
        reply = await wire.get(f"{served.prefix}/octets", *fields, method="POST")
    assert reply.status == 413 and reply["x-serveit-executed"] == "no"
    chunks = in_chunks(bytes(16 * MIB + 1))
    late = await served.http.post(
        "/octets", content=chunks, headers={"content-type": "application/octet-stream"}
    )
    assert problem(late, 413)["detail"] == "the body is larger than max_body_bytes=16,777,216"


async def test_large_bodies_of_many_at_once(served: Served) -> None:
    bodies = [bytes([number]) * MIB for number in range(16)]
    fields = {"content-type": "application/octet-stream"}
    posts = (served.http.post("/octets", content=body, headers=fields) for body in bodies)
    assert [reply.content for reply in await asyncio.gather(*posts)] == bodies


# -- answers -------------------------------------------------------------------------------------


async def test_answers_of_each_kind(served: Served) -> None:
    reply = await served.http.get("/answer/text")
    assert (reply.text, reply.headers["content-type"]) == ("grüß Gott", "text/plain; charset=utf-8")
    reply = await served.http.get("/answer/octets")
    assert (reply.content, reply.headers["content-type"]) == (b"\x00\xff", "application/octet-stream")
    reply = await served.http.get("/answer/none")
    assert (reply.text, reply.headers["content-type"]) == ("null", "application/json")
    assert (await served.http.get("/answer/array")).json() == {"array": [0.0, 1.0, 2.0], "scalar": 7}


JSON_VALUES = {
    "dict": '{"a":[1,2],"b":{"c":null}}',
    "list": '[1,"a",null]',
    "tuple": "[1,2.5]",
    "set": "[7]",
    "int": "7",
    "float": "2.5",
    "bool": "true",
    "numpy scalar": "0.5",
    "struct": '{"name":"m","size":null}',
    "dataclass": '{"item":"tea","count":1}',
    "datetime": '"2021-02-25T12:00:00Z"',
    "octets inside": '{"a":"AP8="}',
}


async def test_everything_else_is_compact_json(served: Served) -> None:
    assert JSON_VALUES.keys() == VALUES.keys()
    for kind, text in JSON_VALUES.items():
        reply = await served.http.get(f"/answer/{kind}")
        assert (reply.status_code, reply.headers["content-type"]) == (200, "application/json"), kind
        assert reply.text == text, kind


async def test_what_json_lacks_is_the_backends_error(served: Served) -> None:
    assert "a[1]" in problem(await served.http.get("/answer/nan"), 500, "yes")["detail"]
    assert "inf" in problem(await served.http.get("/answer/nan%20array"), 500, "yes")["detail"]
    assert "object" in problem(await served.http.get("/answer/object"), 500, "yes")["detail"]


async def test_starlettes_responses(served: Served) -> None:
    reply = await served.http.get("/answer/created")
    assert (reply.status_code, reply.json(), reply.headers["x-own"]) == (201, {"id": 7}, "yes")
    reply = await served.http.get("/answer/redirect")
    assert (reply.status_code, reply.headers["location"]) == (307, "/elsewhere?a=b")
    reply = await served.http.get("/answer/cookies")
    cookies = [value for name, value in reply.headers.multi_items() if name == "set-cookie"]
    assert [cookie.split(";")[0] for cookie in cookies] == ["one=1", "two=2"]
    reply = await served.http.get("/answer/streaming")
    assert (reply.status_code, reply.text) == (203, "ab")
    assert reply.headers["content-type"] == "text/csv; charset=utf-8"
    reply = await served.http.get("/answer/html")
    assert (reply.text, reply.headers["content-type"]) == ("<p>ü", "text/html; charset=utf-8")
    reply = await served.http.get("/answer/plain")
    assert (reply.status_code, reply.text) == (202, "ü")
    reply = await served.http.get("/answer/file")
    assert reply.text == inspect.getsource(pages_module) and reply.headers["etag"]
    assert reply.headers["content-type"].startswith("text/x-python")


# -- errors --------------------------------------------------------------------------------------


async def test_what_the_code_raises_is_not_told(served: Served) -> None:
    reply = await served.http.get("/fail/own")
    problem(reply, 500, "yes")
    assert not any(word in reply.text for word in ("secret", "ValueError", "/srv", "12345"))


async def test_an_http_exception_is_the_answer(served: Served) -> None:
    reply = await served.http.get("/fail/http")
    assert problem(reply, 418, "yes")["detail"] == "short and stout"
    assert reply.headers["x-pot"] == "tea"


async def test_serveits_own_exceptions_of_user_code_were_executed(served: Served) -> None:
    reply = await served.http.get("/fail/serveit")
    assert reply.headers["x-serveit-executed"] == "yes"


async def test_request_ids(served: Served) -> None:
    reply = await served.http.get("/fields", headers={"x-request-id": "mine"})
    assert reply.headers["x-request-id"] == "mine" and reply.json()["id"] == "mine"
    one, two = [await served.http.get("/hello/Ada") for _ in range(2)]
    assert one.headers["x-request-id"] != two.headers["x-request-id"]
    reply = await served.http.get("/nothing", headers={"x-request-id": "lost"})
    assert reply.headers["x-request-id"] == "lost"


async def test_inbound_serveit_fields_are_stripped(served: Served) -> None:
    reply = await served.http.get("/fields", headers={"x-serveit-executed": "no", "x-other": "kept"})
    assert "x-serveit-executed" not in reply.json()["headers"]
    assert reply.json()["headers"]["x-other"] == "kept"


async def test_a_deadline_of_the_client(served: Served, gate: Gate) -> None:
    fields = {"x-request-timeout-ms": "200"}
    reply = await served.http.get("/wait", params={"folder": str(gate.folder)}, headers=fields)
    problem(reply, 504, "maybe")
    await wait_until(lambda: gate.notes == ["in", "CancelledError"], 5, "it is cancelled")


async def test_serveits_own_paths(served: Served) -> None:
    async with connected(served.url) as wire:
        assert (await wire.get("/-/healthz")).status == 200
        assert (await wire.get("/-/readyz")).status == 200
        routes = (await wire.get("/-/routes")).json
    assert f"{served.prefix}/hello/<name>" in str(routes)


# -- the client leaves ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_running_code_is_cancelled_when_the_client_leaves(served: Served, gate: Gate, how: str) -> None:
    async with connected(served.url) as wire:
        path = f"{served.prefix}/wait?folder={gate.folder}"
        await wire.send(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        await wait_until(lambda: gate.notes == ["in"], 5, "it runs")
        wire.reset() if how == "reset" else wire.writer.close()
        await wait_until(lambda: gate.notes == ["in", "CancelledError"], 1, "it is cancelled")


# -- streams -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/stream", "/streamed"], ids=["generator", "response"])
async def test_chunks_come_as_they_are_made(served: Served, gate: Gate, path: str) -> None:
    async with connected(served.url) as wire:
        path = f"{served.prefix}{path}?folder={gate.folder}"
        await wire.send(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        head = await wire.head()
        assert (head.status, head["transfer-encoding"]) == (200, "chunked")
        assert await wire.chunk() == b"first"
        gate.open()
        assert (await wire.chunk(), await wire.chunk()) == (b"last", b"")
        assert (await wire.get(f"{served.prefix}/hello/Ada")).status == 200
    lines = (await served.http.get("/lines/1000")).text
    assert lines == "".join(f"{number}\n" for number in range(1000))


async def test_other_chunks_are_lines_of_json(served: Served) -> None:
    reply = await served.http.get("/records")
    assert (reply.text, reply.headers["content-type"]) == ('{"a":1}\n{"a":2}\n', "application/x-ndjson")


async def test_a_stream_that_fails(served: Served) -> None:
    async with connected(served.url) as wire:
        await wire.send(f"GET {served.prefix}/cut/2 HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        assert (await wire.head()).status == 200
        assert await wire.rest() == b"1\r\n0\r\n1\r\n1\r\n", "no last chunk: it is visibly cut"
    problem(await served.http.get("/cut/0"), 500, "yes")


async def test_a_slow_reader_holds_the_generator_back(served: Served, gate: Gate) -> None:
    async with connected(served.url, receive_buffer=65_536) as wire:
        path = f"{served.prefix}/endless?folder={gate.folder}&size=65536"
        await wire.send(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        await wire.head()
        made = -1
        while len(gate.notes) != made:
            made = len(gate.notes)
            await asyncio.sleep(0.1)
        assert made < 400, "64 KiB each: the sockets' buffers, the credit, and little more"
        wire.reset()
        await wait_until(lambda: "closed" in gate.notes, 5, "the generator is closed")


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_generator_is_closed_when_the_client_leaves(served: Served, gate: Gate, how: str) -> None:
    async with connected(served.url) as wire:
        path = f"{served.prefix}/endless?folder={gate.folder}"
        await wire.send(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        await wire.head()
        await wire.chunk()
        wire.reset() if how == "reset" else wire.writer.close()
        await wait_until(lambda: "closed" in gate.notes, 1, "the generator is closed")

from __future__ import annotations

import asyncio
import http
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import pytest
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse

from serveit import App, BackendConfig, Query
from serveit.exceptions import EncodingError, QueueFull
from serveit.running.httpjob import Bindings
from serveit.wire.frames import FREED, FrameType, HttpAnswer
from serveit.wire.streams import WINDOW
from tests.callers import Caller, running
from tests.support import wait_until


@asynccontextmanager
async def routed(
    target: Any, path: str = "/", methods: tuple[str, ...] = ("GET", "POST"), **options: Any
) -> AsyncIterator[Caller]:
    app = App()
    app.backend(target, name="served", config=BackendConfig(**options))
    app.add_route(path, "served", methods=list(methods))
    async with running(app.backends["served"]) as replica:
        yield Caller(replica)


def content_type(answer: HttpAnswer) -> bytes:
    return dict(answer.headers)[b"content-type"]


async def test_a_request_is_bound_and_the_value_answered() -> None:
    async def user(user_id: int, limit: Annotated[int, Query()] = 5) -> dict[str, int]:
        return {"id": user_id, "limit": limit}

    async with routed(user, "/api/<user_id:int>") as caller:
        answer, body = await caller.answer(caller.request("/api/<user_id:int>", values=("7",)))
        assert (answer.status, answer.others, body) == (200, 0, b'{"id":7,"limit":5}')
        assert content_type(answer) == b"application/json"
        failure = await caller.failure(caller.request("/api/<user_id:int>", values=("9" * 5_000,)))
        assert (failure.status, failure.executed) == (404, "no")


async def test_bad_values_are_a_422_before_user_code() -> None:
    async def limited(limit: int) -> int:
        return limit

    async with routed(limited) as caller:
        failure = await caller.failure(caller.request("/"))
        assert (failure.status, failure.executed) == (422, "no")
        assert failure.errors == [{"loc": ["query", "limit"], "msg": "missing"}]


@pytest.mark.parametrize(
    ("value", "kind", "octets"),
    [
        ("é", b"text/plain; charset=utf-8", "é".encode()),
        (b"abc", b"application/octet-stream", b"abc"),
        (None, b"application/json", b"null"),
        (JSONResponse([1], status_code=http.HTTPStatus.CREATED), b"application/json", b"[1]"),
    ],
)
async def test_whole_values(value: Any, kind: bytes, octets: bytes) -> None:
    async def give() -> Any:
        return value

    async with routed(give) as caller:
        answer, body = await caller.answer(caller.request())
        assert (content_type(answer), body) == (kind, octets)
        assert answer.status == getattr(value, "status_code", 200)


async def test_a_large_body_frees_the_slot_first() -> None:
    async def large() -> bytes:
        return b"x" * 100_000

    async with routed(large) as caller:
        stream = caller.request()
        _, body = await caller.answer(stream)
        assert len(body) == 100_000
        assert caller.link.of(stream)[0].flags == FREED


async def test_a_stream_begins_with_its_first_chunk() -> None:
    go_on = asyncio.Event()

    async def words() -> AsyncIterator[str]:
        yield "first "
        await go_on.wait()
        yield ""
        yield "second"

    async with routed(words) as caller:
        stream = caller.request()
        await wait_until(lambda: len(caller.link.of(stream)) == 2, 5, "head and first chunk")
        assert caller.link.of(stream)[1].body == b"first "
        go_on.set()
        answer, body = await caller.answer(stream)
        assert (content_type(answer), body) == (b"text/plain; charset=utf-8", b"first second")
        assert len(caller.link.of(stream)) == 4  # the empty chunk is not sent


async def test_other_streams() -> None:
    def lines() -> Iterator[dict[str, int]]:
        yield {"n": 1}
        yield {"n": 2}

    async def empty() -> AsyncIterator[str]:
        for word in list[str]():
            yield word

    async with routed(lines) as caller:
        answer, body = await caller.answer(caller.request())
        assert (content_type(answer), body) == (b"application/x-ndjson", b'{"n":1}\n{"n":2}\n')
    async with routed(empty) as caller:
        answer, body = await caller.answer(caller.request())
        assert (content_type(answer), body) == (b"text/plain; charset=utf-8", b"")


async def test_an_error_in_the_middle_of_a_stream_cuts_it_off(caplog: pytest.LogCaptureFixture) -> None:
    async def mixed() -> AsyncIterator[Any]:
        yield "text"
        yield {"json": 1}

    async with routed(mixed) as caller:
        stream = caller.request()
        assert "chunk 2 of the stream is a dict" in (await caller.failure(stream)).detail
        assert caller.link.kinds(stream) == [FrameType.ANSWER, FrameType.DATA, FrameType.ERROR]
    assert len(caplog.records) == 1


# Responses that run as ASGI apps


async def test_a_streaming_response() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"a"
        yield b""
        yield b"b" * 70_000

    async def respond() -> Response:
        return StreamingResponse(chunks(), status_code=202, media_type="text/x", headers={"X-A": "b"})

    async with routed(respond) as caller:
        answer, body = await caller.answer(caller.request())
        assert (answer.status, body) == (202, b"a" + b"b" * 70_000)
        assert dict(answer.headers)[b"x-a"] == b"b"


async def test_a_file_response_and_its_ranges(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(b"0123456789")

    async def respond() -> Response:
        return FileResponse(path)

    async with routed(respond) as caller:
        answer, body = await caller.answer(caller.request())
        assert (answer.status, body) == (200, b"0123456789")
        answer, body = await caller.answer(caller.request(headers=[(b"range", b"bytes=2-4")]))
        assert (answer.status, body) == (206, b"234")
        answer, body = await caller.answer(caller.request(method="HEAD"))
        assert (dict(answer.headers)[b"content-length"], body) == (b"10", b"")


async def test_a_background_task_runs_after_the_answer_and_its_failure_is_logged_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    go_on = asyncio.Event()

    async def work(fails: bool) -> None:
        await go_on.wait()
        if fails:
            raise LookupError("in the background")

    async def respond(fails: bool) -> Response:
        return Response(b"x", background=BackgroundTask(work, fails))

    async with routed(respond, "/<fails>") as caller:
        replica = caller.listener._replica
        for fails in ("false", "true"):
            go_on.clear()
            stream = caller.request("/<fails>", values=(fails,))
            assert (await caller.answer(stream))[1] == b"x"
            assert replica.statistics().running == 1
            go_on.set()
            await wait_until(lambda: not replica.statistics().running, 5, "the background task's end")
    (record,) = caplog.records
    assert record.message.endswith("LookupError: in the background")


async def test_a_background_failure_does_not_cut_off_a_body_that_still_goes_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail() -> None:
        raise LookupError("in the background")

    async def respond() -> Response:
        return Response(b"x" * 2 * WINDOW, background=BackgroundTask(fail))

    async with routed(respond) as caller:
        replica = caller.listener._replica
        stream = caller.request()
        await wait_until(lambda: caplog.records, 5, "the failure is logged")
        draining = asyncio.ensure_future(replica.drain())
        await wait_until(lambda: caller.take(stream) < 0 or caller.is_over(stream), 5, "all is read")
        assert len((await caller.answer(stream))[1]) == 2 * WINDOW
        assert await draining


class Scoped(Response):
    """Answers with what its scope says of the path."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        listening = asyncio.ensure_future(receive())
        await asyncio.sleep(0)
        assert not listening.done()
        listening.cancel()
        self.body = repr(scope["path_params"]).encode()
        self.init_headers()
        await super().__call__(scope, receive, send)


async def test_a_response_sees_the_paths_converted_values() -> None:
    async def respond(n: int, rest: str) -> Response:
        return Scoped()

    async with routed(respond, "/<n:int>/<rest:path>") as caller:
        _, body = await caller.answer(caller.request("/<n:int>/<rest:path>", values=("7", "a/b")))
        assert body == b"{'n': 7, 'rest': 'a/b'}"


class Scripted(Response):
    """Sends the ASGI messages that it is told to."""

    def __init__(self, *messages: dict[str, Any]) -> None:
        super().__init__()
        self.messages = messages

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        for message in self.messages:
            await send(message)


START = {"type": "http.response.start", "status": 200}
BODY = {"type": "http.response.body", "body": b"a"}
MORE = {**BODY, "more_body": True}


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "returned too early: 'http.response.start' should have come next"),
        ([START], "returned too early: 'http.response.body' should have come next"),
        ([START, MORE], "returned too early: 'http.response.body' should have come next"),
        ([BODY], "sent the ASGI message 'http.response.body', but 'http.response.start' comes next"),
        ([START, START], "'http.response.start', but 'http.response.body' comes next"),
        ([START, {"type": "http.response.push"}], "'http.response.push', but"),
        ([{**START, "status": "ok"}], "invalid literal"),
    ],
)
async def test_a_response_that_breaks_asgi_is_a_500_and_no_hang(
    messages: list[dict[str, Any]], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def respond() -> Response:
        return Scripted(*messages)

    async with routed(respond) as caller:
        stream = caller.request()
        failure = await caller.failure(stream)
        assert failure.status == 500
        assert said in failure.text
        assert len(caplog.records) == 1


async def test_what_a_response_sends_after_its_end_is_logged_and_not_sent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def respond() -> Response:
        return Scripted(START, MORE, BODY, BODY)

    async with routed(respond) as caller:
        stream = caller.request()
        assert (await caller.answer(stream))[1] == b"aa"
        await wait_until(lambda: caplog.records, 5, "the log record")
        assert "but its body is complete" in caplog.text


# Errors


async def test_a_500_is_logged_once_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async def fails() -> None:
        raise LookupError("secret")

    async with routed(fails) as caller:
        failure = await caller.failure(caller.request())
        assert (failure.status, failure.detail, failure.executed) == (500, "", "yes")
        assert "in fails" in failure.traceback
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.message.startswith("GET / failed (request r1)\nTraceback")
    assert record.message.endswith("LookupError: secret")
    assert "replica.py" not in record.message


async def test_other_statuses_are_the_users_business_and_cost_no_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def missing() -> None:
        raise HTTPException(404, "no such cat", {"x-cat": "0"})

    async with routed(missing) as caller:
        failure = await caller.failure(caller.request())
        assert (failure.status, failure.detail) == (404, "no such cat")
        assert (failure.headers, failure.traceback) == ([(b"x-cat", b"0")], "")
    assert caplog.records == []


async def test_a_500_before_user_code_is_logged_too(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fine() -> None: ...

    def broken(*_: Any) -> Any:
        raise LookupError("in serveit")

    async with routed(fine) as caller:
        monkeypatch.setattr(caller.listener._bindings, "find", broken)
        failure = await caller.failure(caller.request())
        assert (failure.status, failure.executed, failure.traceback) == (500, "no", "")
    assert caplog.records[0].message.endswith("LookupError: in serveit")


async def test_a_batch_that_fails_is_logged_once_and_failing_items_each(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fails(items: list[int]) -> list[Any]:
        if items[0]:
            raise LookupError("all of them")
        return [KeyError(item) for item in items]

    async with routed(fails, methods=("POST",), max_batch_size=3) as caller:
        for first, records in ((b"1", 1), (b"0", 3)):
            caplog.clear()
            streams = [caller.request("/", body, method="POST") for body in (first, b"5", b"6")]
            for stream in streams:
                assert (await caller.failure(stream)).status == 500
            assert len(caplog.records) == records


async def test_a_batch_of_requests() -> None:
    async def paths(items: list[Request]) -> list[str]:
        return [f"{request.method} {await request.body()!r}" for request in items]

    async with routed(paths, max_batch_size=2) as caller:
        one, two = caller.request("/", b"a", method="POST"), caller.request("/")
        assert (await caller.answer(one))[1] == b"POST b'a'"
        assert (await caller.answer(two))[1] == b"GET b''"


async def test_a_batch_item_must_be_whole() -> None:
    async def respond(items: list[Request]) -> list[Any]:
        return [StreamingResponse(iter(["a"])), (letter for letter in "a"), "whole"]

    async with routed(respond, max_batch_size=3) as caller:
        streams = [caller.request() for _ in range(3)]
        for stream, kind in zip(streams, ("StreamingResponse", "generator"), strict=False):
            assert (await caller.failure(stream)).detail == (
                f"a batch function's results must be whole values, got {kind}"
            )
        assert (await caller.answer(streams[2]))[1] == b"whole"


async def test_a_handler_may_ask_whether_its_client_is_there() -> None:
    async def ask(request: Request) -> list[Any]:
        before = await request.is_disconnected()
        body = await request.body()
        return [before, body.decode(), await request.is_disconnected()]

    async with routed(ask) as caller:
        _, body = await caller.answer(caller.request("/", b"abc", method="POST"))
        assert body == b'[false,"abc",false]'


# Bindings


def lazily(value: int) -> int:
    return value


def starred(*args: int) -> None: ...


def test_bindings_of_an_import_string_are_checked_when_they_are_prepared() -> None:
    app = App()
    app.backend("tests.test_httpjob:lazily", name="lazy")
    app.add_route("/<value:int>", "lazy")
    Bindings(app.backends["lazy"]).prepare()

    def other(x: int) -> int:
        return x

    app.backend(other)
    app.add_route("/other", other)
    Bindings(app.backends["lazy"]).prepare()  # the route of another backend is not its business

    bad = App()
    bad.backend("tests.test_httpjob:starred", name="lazy")
    bad.add_route("/bad", "lazy")
    with pytest.raises(TypeError, match=r"route '/bad', backend 'lazy'"):
        Bindings(bad.backends["lazy"]).prepare()


def test_a_binding_is_planned_once() -> None:
    app = App()
    app.backend(lazily, name="lazy")
    record = app.backends["lazy"]
    bindings = Bindings(record)
    method = record.method()
    assert bindings.find("/<value:int>", method) is bindings.find("/<value:int>", method)
    assert bindings.find("/<value:int>", method) is not bindings.find("/x/<value:int>", method)


# What peers would end the link over


def with_field(response: Response, *fields: Any) -> Response:
    response.raw_headers.extend(fields)
    return response


BAD_FIELDS = {
    "str": (("x-foo", "bar"), "('x-foo', a pair of str and str)"),
    "half": ((b"x-foo", "bar"), "(b'x-foo', a pair of bytes and str)"),
    "number": ((b"x-foo", 5), "(b'x-foo', a pair of bytes and int)"),
    "three": ((b"x-foo", b"a", b"b"), "(of type tuple)"),
    "none": (None, "(of type NoneType)"),
}


@pytest.mark.parametrize("make", [lambda: Response("x"), lambda: StreamingResponse(iter(["x"]))])
@pytest.mark.parametrize(("field", "shown"), BAD_FIELDS.values(), ids=BAD_FIELDS)
async def test_a_header_field_that_is_not_octets_is_the_backends_error(
    field: Any, shown: str, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def respond() -> Response:
        return with_field(make(), field)

    async with routed(respond) as caller:
        failure = await caller.failure(caller.request())
        assert (failure.status, failure.executed, failure.kind) == (500, "yes", "EncodingError")
        assert f"a header field of the response {shown} is not a pair of bytes" in failure.detail
    assert shown in caplog.text


@pytest.mark.parametrize("make", [lambda: Response("x"), lambda: StreamingResponse(iter(["x"]))])
async def test_octets_of_another_class_are_octets(make: Any) -> None:
    class Octets(bytes): ...

    async def respond() -> Response:
        return with_field(make(), [Octets(b"x-a"), bytearray(b"1")], (b"x-b", memoryview(b"2")))

    async with routed(respond) as caller:
        answer, body = await caller.answer(caller.request())
        assert {b"x-a": b"1", b"x-b": b"2"}.items() <= dict(answer.headers).items()
        assert body == b"x"


# What other backends did


async def test_a_nested_failure_keeps_its_status_and_is_logged_in_a_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def busy() -> None:
        raise QueueFull("use `handle.map(...)`")

    async with routed(busy) as caller:
        failure = await caller.failure(caller.request())
        assert (failure.status, failure.executed) == (503, "yes")
        assert failure.detail == "a backend that this one called did not take the request"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message == "GET / failed (request r1): QueueFull: use `handle.map(...)`"


async def test_a_replica_that_stops_says_so_itself(caplog: pytest.LogCaptureFixture) -> None:
    async def wait() -> None:
        await asyncio.Event().wait()

    async with routed(wait) as caller:
        stream = caller.request()
        await caller.listener._replica.aclose()
        failure = await caller.failure(stream)
        assert (failure.status, failure.detail) == (503, "the replica has been stopped")
    assert caplog.records == []


async def test_what_another_backend_could_not_send_is_not_told() -> None:
    async def asks() -> None:
        raise EncodingError("an argument of 'other' cannot be pickled (secret)", executed="no")

    async def asks_for_lines() -> AsyncIterator[int]:
        raise EncodingError("an argument of 'other' cannot be pickled (secret)", executed="no")
        yield 1

    for target in (asks, asks_for_lines):
        async with routed(target) as caller:
            failure = await caller.failure(caller.request())
            assert (failure.status, failure.detail) == (500, "")


async def test_what_it_could_not_send_itself_is_told() -> None:
    async def nan() -> Any:
        return [1, float("nan")]

    async def lines() -> AsyncIterator[Any]:
        yield [float("nan")]

    for target, place in ((nan, "$[1]"), (lines, "$[0]")):
        async with routed(target) as caller:
            assert f"{place} is nan" in (await caller.failure(caller.request())).detail


# Hints


async def test_a_tuple_that_looks_like_a_status_is_hinted_at_once(caplog: pytest.LogCaptureFixture) -> None:
    async def create(kind: str) -> Any:
        values: dict[str, Any] = {
            "made": ({"id": 1}, 201),
            "text": ("no", {}, 404),
            "pair": (5, 201),
            "true": ("x", True),
            "large": ("x", 1_000),
            "one": (201,),
            "list": ["x", 201],
        }
        return values[kind]

    async with routed(create, "/<kind>") as caller:
        for kind in ("pair", "true", "large", "one", "list"):
            assert (await caller.answer(caller.request("/<kind>", values=(kind,))))[0].status == 200
        assert caplog.records == []
        for kind in ("made", "text", "made"):
            answer, body = await caller.answer(caller.request("/<kind>", values=(kind,)))
            assert (answer.status, body[:1]) == (200, b"[")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith(
        "GET /<kind> returned a tuple, which is sent as a list in JSON: if the 201"
    )
    assert "Response(..., status_code=201)" in record.message

"""What tests of apps get: `local` with its clock, `TestClient`."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serveit import App, DeadlineExceeded, ServeitError
from serveit.testing import ManualClock, TestClient, local


def make_app() -> App:
    app = App()

    @app.route("/double/<value:int>")
    async def double(value: int) -> int:
        return 2 * value

    @app.route("/fails")
    async def fails() -> None:
        raise ValueError("in user code")

    @app.backend(max_batch_size=4, batch_wait_timeout_s=10)
    async def sizes(items: list[int]) -> list[int]:
        return [len(items)] * len(items)

    @app.route("/never")
    @app.backend(request_timeout_s=60)
    async def never() -> None:
        await asyncio.Event().wait()

    return app


def broken_app() -> App:
    app = App()

    @app.backend
    class Broken:
        def __init__(self) -> None:
            raise LookupError("no such model")

        def __call__(self) -> None: ...

    return app


# -- local -----------------------------------------------------------------------------------


async def test_batch_waits_follow_the_clock() -> None:
    async with local(make_app()) as client:
        calls = [asyncio.ensure_future(client.get_handle("sizes").call(number)) for number in range(3)]
        await client.clock.advance(9.9)
        assert not any(call.done() for call in calls)
        await client.clock.advance(0.2)
        assert await asyncio.gather(*calls) == [3, 3, 3]


async def test_timeouts_follow_the_clock() -> None:
    async with local(make_app()) as client:
        call = asyncio.ensure_future(client.get_handle("never").options(timeout_s=5).call())
        answer = asyncio.ensure_future(client.http.get("/never"))
        await client.clock.advance(4.9)
        assert not call.done()
        await client.clock.advance(0.2)
        with pytest.raises(DeadlineExceeded):
            await call
        assert not answer.done()
        await client.clock.advance(60)
        assert (await answer).status_code == 504


async def test_http_without_a_socket() -> None:
    async with local(make_app(), prefix="/v1", name="mine", http={"debug": True}) as client:
        assert (await client.http.get("/v1/double/2")).json() == 4
        assert (await client.http.get("/v1/double/x")).status_code == 404
        failed = await client.http.get("/v1/fails")
        assert failed.status_code == 500 and "in user code" in failed.text
        assert client.url is None and (await client.status())["app"] == "mine"


async def test_a_local_start_that_fails() -> None:
    with pytest.raises(LookupError, match="no such model"):
        async with local(broken_app()):
            pass


async def test_timers_fire_in_their_order() -> None:
    clock, fired = ManualClock(start=5.0), []
    clock.call_later(3, lambda: fired.append((clock.time(), "late")))
    clock.call_later(1, lambda: clock.call_later(1, fired.append, (7.0, "nested")))
    clock.call_later(2, fired.append, "cancelled").cancel()
    await clock.advance(2.5)
    assert fired == [(7.0, "nested")] and clock.time() == 7.5
    await clock.advance(2.5)
    assert fired[1:] == [(8.0, "late")] and clock.time() == 10.0


# -- TestClient ------------------------------------------------------------------------------


def test_the_test_client() -> None:
    app = make_app()
    with TestClient(app, headers={"x-request-id": "abc"}) as client:
        answer = client.get("/double/21")
        assert answer.json() == 42 and answer.headers["x-request-id"] == "abc"
        assert client.get_handle("double").call(4) == 8
        assert client.get("/fails").status_code == 500
    with TestClient(app, http={"debug": True}) as client:  # and again
        assert "in user code" in client.get("/fails").text


def test_the_test_client_needs_with() -> None:
    client = TestClient(make_app())
    with pytest.raises(RuntimeError, match=r"with TestClient\(app\) as client"):
        client.get("/double/2")
    with pytest.raises(RuntimeError, match="not running"):
        client.get_handle("double")


def test_a_start_that_fails_raises_its_error() -> None:
    client = TestClient(broken_app())
    with pytest.raises(LookupError, match="no such model"), client:
        pass


def test_options_are_checked_at_once() -> None:
    with pytest.raises(TypeError, match="did you mean 'debug'?"):
        TestClient(make_app(), http={"debg": True})


def test_httpx2_is_asked_for(tmp_path: Path) -> None:
    program = "import sys\nsys.modules['httpx2'] = None\nimport serveit\nserveit.testing"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "ImportError: serveit.testing needs httpx2" in result.stderr
    assert "pip install 'serveit[testing]'" in result.stderr


class Marking:
    """A middleware that marks every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"x-marked", b"yes"))
            await send(message)

        await self._app(scope, receive, marked)


async def test_middlewares_hold_in_tests_too() -> None:
    http = {"middlewares": ["tests.test_testing:Marking"]}
    async with local(App(), http=http) as client:
        assert (await client.http.get("/-/healthz")).headers["x-marked"] == "yes"


def test_middlewares_hold_for_the_test_client_too() -> None:
    with TestClient(App(), http={"middlewares": [Marking]}) as client:
        assert client.get("/-/healthz").headers["x-marked"] == "yes"


async def test_a_request_that_never_ends_does_not_keep_a_test() -> None:
    app = App()
    begun, ended = asyncio.Event(), asyncio.Event()

    @app.backend
    async def endless() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with local(app) as client:
        call = asyncio.ensure_future(client.get_handle("endless").call())
        await begun.wait()
    assert ended.is_set()
    with pytest.raises(ServeitError):
        await call

"""One app in one process: start, stop, and what is left where either goes wrong."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from serveit import App, Draining, HTTPOptions, local
from serveit.local import LocalRuntime
from serveit.observe import NullObserver
from serveit.testing import ManualClock
from serveit.web.proxy import bind
from tests.support import wait_until

QUIET = HTTPOptions(location=None)


class Events(NullObserver):
    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def replica_event(self, backend: str, replica: str, event: str) -> None:
        self.seen.append((replica, event))


def waiting_app() -> tuple[App, asyncio.Event, asyncio.Event]:
    app, entered, leave = App(), asyncio.Event(), asyncio.Event()

    @app.backend(graceful_shutdown_timeout_s=5)
    async def wait() -> str:
        entered.set()
        await leave.wait()
        return "done"

    return app, entered, leave


async def test_replicas_start_and_stop() -> None:
    app, events = App(), Events()

    @app.backend(num_replicas=2)
    async def one() -> int:
        return 1

    runtime = LocalRuntime(app, http=QUIET, observer=events)
    await runtime.start()
    assert await runtime.get_handle("one").call() == 1
    await runtime.aclose()
    started = {(f"one#{number}", "started") for number in (1, 2)}
    assert set(events.seen[:2]) == started and len(events.seen) == 6
    await runtime.aclose()  # once is enough
    assert len(events.seen) == 6


async def test_an_empty_app() -> None:
    runtime = LocalRuntime(App(), http=QUIET)
    await runtime.start()
    assert runtime.status() == {"app": "default", "url": None, "backends": {}}
    await runtime.aclose()


async def test_closing_what_has_not_started() -> None:
    await LocalRuntime(App(), http=QUIET).aclose()


async def test_two_who_close_wait_for_the_same_end() -> None:
    app, entered, leave = waiting_app()
    runtime = LocalRuntime(app, http=QUIET)
    await runtime.start()
    call = asyncio.ensure_future(runtime.get_handle("wait").call())
    await entered.wait()
    closing = [asyncio.ensure_future(runtime.aclose()) for _ in range(2)]
    done, _ = await asyncio.wait(closing, timeout=0.02)
    assert not done
    leave.set()
    await asyncio.gather(*closing)
    assert await call == "done"  # what ran was let end


async def test_what_does_not_end_in_time() -> None:
    app, entered, leave = waiting_app()
    clock = ManualClock()
    runtime = LocalRuntime(app, http=QUIET, clock=clock)
    await runtime.start()
    call = asyncio.ensure_future(runtime.get_handle("wait").call())
    await entered.wait()
    closing = asyncio.ensure_future(runtime.aclose())
    await clock.advance(4.5)
    assert not closing.done()
    await clock.advance(1)
    await closing
    with pytest.raises(Exception) as caught:
        await call
    assert getattr(caught.value, "executed", None) == "maybe"
    leave.set()


async def test_what_waits_is_refused_when_it_stops() -> None:
    app, entered, leave = waiting_app()
    app.backends["wait"].config = app.backends["wait"].config.merge(max_ongoing_requests=1)
    runtime = LocalRuntime(app, http=QUIET)
    await runtime.start()
    handle = runtime.get_handle("wait")
    calls = [asyncio.ensure_future(handle.call()) for _ in range(3)]
    await entered.wait()
    closing = asyncio.ensure_future(runtime.aclose())
    await asyncio.sleep(0)
    leave.set()
    await closing
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert results[0] == "done" and all(isinstance(result, Draining) for result in results[1:])


async def test_http_requests_end_within_the_same_time() -> None:
    app, leave = App(), asyncio.Event()
    entered = threading.Event()

    @app.route("/wait")
    async def wait() -> str:
        entered.set()
        await leave.wait()
        return "done"

    runtime = LocalRuntime(app, http=HTTPOptions(port=0))
    await runtime.start()
    assert runtime.proxy is not None
    port = int(runtime.proxy.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /wait HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    await wait_until(entered.is_set, 5, "the request to run")
    closing = asyncio.ensure_future(runtime.aclose())
    await wait_until(lambda: not runtime.ingress.ready, 5, "the end to begin")
    leave.set()
    assert (await reader.read()).endswith(b"done")
    await closing
    writer.close()
    await writer.wait_closed()


# -- starts that fail ------------------------------------------------------------------------


async def test_an_address_in_use_is_found_before_replicas_start() -> None:
    app = App()
    made = []

    @app.backend
    class Model:
        def __init__(self) -> None:
            made.append(True)

        def __call__(self) -> None: ...

    with bind(HTTPOptions(port=0)) as taken:
        taken.listen()
        runtime = LocalRuntime(app, http=HTTPOptions(port=taken.getsockname()[1]))
        with pytest.raises(OSError, match="something listens there already.*--port"):
            await runtime.start()
    assert made == []


async def test_one_that_fails_closes_the_others() -> None:
    app, log = App(), []

    @app.backend
    class Good:
        async def __call__(self) -> None: ...

        def close(self) -> None:
            log.append("closed")

    @app.backend(num_replicas=2)
    class Bad:
        def __init__(self) -> None:
            raise ValueError("bad model")

        def __call__(self) -> None: ...

    runtime = LocalRuntime(app, http=HTTPOptions(port=0), name="mine")
    with pytest.raises(ValueError, match="bad model") as caught:
        await runtime.start()
    assert log == ["closed"]
    assert caught.value.__notes__ == ["(while replica Bad#1 of app 'mine' started)"]
    with pytest.raises(Exception, match="not being served"):
        app.handle("Good")
    await runtime.aclose()


async def test_one_fails_while_another_constructs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(local, "SLOW_STOP_S", 0.01)
    app, go_on, entered = App(), threading.Event(), threading.Event()
    log: list[str] = []

    @app.backend
    class Slow:
        def __init__(self) -> None:
            entered.set()
            go_on.wait(10)
            log.append("made")

        def __call__(self) -> None: ...

    @app.backend
    class Bad:
        async def __call__(self) -> None: ...

        async def setup(self) -> None:
            await asyncio.to_thread(entered.wait, 10)
            raise ValueError("bad model")

    starting = asyncio.ensure_future(LocalRuntime(app, http=QUIET).start())
    await wait_until(lambda: caplog.records, 5, "a word about why it waits")
    assert caplog.messages == ["ValueError: bad model; waiting for constructors that still run"]
    assert not starting.done()
    go_on.set()
    with pytest.raises(ValueError, match="bad model"):
        await starting
    assert log == ["made"]


async def test_a_start_that_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    app, entered = App(), asyncio.Event()

    @app.backend
    class Endless:
        async def __call__(self) -> None: ...

        async def setup(self) -> None:
            entered.set()
            await asyncio.Event().wait()

    starting = asyncio.ensure_future(LocalRuntime(app, http=HTTPOptions(port=0)).start())
    await entered.wait()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not caplog.records


async def test_a_start_that_is_given_up_at_its_first_step() -> None:
    starting = asyncio.ensure_future(LocalRuntime(App(), http=HTTPOptions(port=0)).start())
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting


def lead_nowhere(app: App) -> None:
    app.backend("serveit.config:nothing", name="late")


def do_not_fit(app: App) -> None:
    app.backend("serveit.local:LocalRuntime", name="late", init_args=(1, 2))


def do_not_bind(app: App) -> None:
    app.backend("serveit.config:did_you_mean", name="late")
    app.add_route("/late", "late")


@pytest.mark.parametrize(
    ("declare", "text"),
    [
        (lead_nowhere, "no attribute 'nothing'"),
        (do_not_fit, "backend 'late': .*cannot be constructed"),
        (do_not_bind, "route '/late', backend 'late': did_you_mean.*'known'"),
    ],
)
async def test_import_strings_are_checked_when_they_are_loaded(
    declare: Callable[[App], Any], text: str
) -> None:
    app = App()
    declare(app)
    with pytest.raises((TypeError, ImportError), match=text) as caught:
        await LocalRuntime(app, http=QUIET).start()
    assert caught.value.__notes__ == ["(while replica late#1 of app 'default' started)"]


async def test_an_import_string_is_served() -> None:
    app = App()
    app.backend("serveit.config:did_you_mean", name="late")
    runtime = LocalRuntime(app, http=QUIET)
    await runtime.start()
    assert await app.handle("late").call("x", ["y"]) == "there is 'y'"
    await runtime.aclose()

"""One app in one process: start, stop, and what is left where either goes wrong."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import anyio
import httpx2
import pytest

import serveit
from serveit import App, Draining, HTTPOptions, NotServing, local_replicas
from serveit.local import LocalRuntime
from serveit.observe import NullObserver
from serveit.running.replica import Replica
from serveit.testing import ManualClock
from serveit.web.proxy import bind
from tests.stage import scaled_to
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
    status = await runtime.status()
    assert (status["url"], status["state"], status["backends"]) == (None, "RUNNING", {})
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
    with pytest.raises(Draining, match="the replica has been stopped") as caught:  # and not: has died
        await call
    assert caught.value.executed == "yes"
    leave.set()


async def test_what_waits_is_refused_when_it_stops() -> None:
    app, entered, leave = waiting_app()
    app.backends["wait"].config = app.backends["wait"].config.merge(max_ongoing_requests=1)
    runtime = LocalRuntime(app, http=QUIET)
    await runtime.start()
    handle = runtime.get_handle("wait")
    calls = [asyncio.ensure_future(handle.call()) for _ in range(4)]
    await entered.wait()
    closing = asyncio.ensure_future(runtime.aclose())
    refused = await asyncio.gather(*calls[2:], return_exceptions=True)  # at once: nothing has ended yet
    assert all(isinstance(result, Draining) for result in refused)
    with pytest.raises(Draining):
        await handle.call()
    leave.set()
    await closing
    assert await asyncio.gather(*calls[:2]) == ["done", "done"]  # the second was with the replica already


@pytest.mark.parametrize("kind", ["async", "def", "batch"])
async def test_what_runs_may_call_others_while_it_stops(kind: str) -> None:
    app, entered, leave = App(), threading.Event(), asyncio.Event()
    go_on = threading.Event()

    @app.backend
    async def inner(x: int) -> int:
        return x + 1

    if kind == "async":

        @app.backend(name="outer")
        async def outer(x: int) -> int:
            entered.set()
            await leave.wait()
            return await inner.call(x)

    elif kind == "def":

        @app.backend(name="outer")
        def outer_def(x: int) -> int:
            entered.set()
            go_on.wait(10)
            result: int = app.handle("inner", sync=True).call(x)
            return result

    else:

        @app.backend(name="outer", max_batch_size=4)
        async def outer_batch(items: list[int]) -> list[int]:
            entered.set()
            await leave.wait()
            return [await inner.call(x) for x in items]

    runtime = LocalRuntime(app, http=QUIET)
    await runtime.start()
    call = asyncio.ensure_future(runtime.get_handle("outer").call(1))
    await wait_until(entered.is_set, 5, "the outer one to run")
    closing = asyncio.ensure_future(runtime.aclose())
    await asyncio.sleep(0)
    with pytest.raises(Draining):
        await runtime.get_handle("inner").call(1)
    leave.set()
    go_on.set()
    assert await call == 2
    await asyncio.wait_for(closing, 5)


# -- changes ---------------------------------------------------------------------------------


class Made:
    """What constructors and `close` do, in the test's hands: each constructor waits for its `go_on`."""

    def __init__(self) -> None:
        self.app = App()
        self.begun: list[int] = []
        self.closed: list[int] = []
        self.go_on = [threading.Event() for _ in range(10)]
        self.bad: set[int] = set()
        made = self

        @self.app.backend(graceful_shutdown_timeout_s=5)
        class Model:
            def __init__(self) -> None:
                self.number = len(made.begun)
                made.begun.append(self.number)
                assert made.go_on[self.number].wait(10)
                if self.number in made.bad:
                    raise ValueError(f"bad model {self.number}")

            def __call__(self) -> int:
                return self.number

            def close(self) -> None:
                made.closed.append(self.number)

    def let(self, *numbers: int) -> None:
        for number in numbers:
            self.go_on[number].set()

    async def begins(self, count: int) -> None:
        await wait_until(lambda: len(self.begun) == count, 5, f"{count} constructors to run")

    async def serve(self) -> LocalRuntime:
        self.let(0)
        runtime = LocalRuntime(self.app, http=QUIET)
        await runtime.start()
        return runtime


async def states(runtime: LocalRuntime) -> list[str]:
    return [replica["state"] for replica in (await runtime.status())["backends"]["Model"].values()]


async def count(runtime: LocalRuntime) -> int:
    return (await runtime.spec()).backends[0].num_replicas


async def test_one_change_at_a_time() -> None:
    made = Made()
    runtime = await made.serve()
    changes = [asyncio.ensure_future(runtime.update("Model", scaled_to(2))) for _ in range(2)]
    await made.begins(2)
    assert await states(runtime) == ["ready", "starting"]
    assert not changes[1].done(), "what it asks for is not there yet"
    assert await runtime.get_handle("Model").call() == 0, "what starts is not published"
    made.let(1)
    await asyncio.gather(*changes)
    assert await states(runtime) == ["ready", "ready"]
    assert made.begun == [0, 1]
    await runtime.aclose()
    assert sorted(made.closed) == [0, 1]


async def test_what_one_change_fails_at_the_next_tries_anew() -> None:
    made = Made()
    made.bad = {1}
    runtime = await made.serve()
    made.let(1, 2)
    failed, fine = await asyncio.gather(
        *(runtime.update("Model", scaled_to(2)) for _ in range(2)), return_exceptions=True
    )
    assert str(failed) == "bad model 1" and fine is None
    assert await states(runtime) == ["ready", "ready"] and await count(runtime) == 2
    await runtime.aclose()
    assert sorted(made.closed) == [0, 2]


async def test_a_failed_change_leaves_nothing_of_itself() -> None:
    made = Made()
    made.bad = {1}
    runtime = await made.serve()
    made.let(1, 2)
    with pytest.raises(ValueError, match="bad model 1"):
        await runtime.update("Model", scaled_to(3))
    assert await states(runtime) == ["ready"] and await count(runtime) == 1
    assert made.closed == [2], "it had been made"
    with pytest.raises(ValueError, match="num_replicas must be ≥ 1"):
        await runtime.update("Model", scaled_to(-1))
    await runtime.aclose()


async def test_down_while_up() -> None:
    made = Made()
    runtime = await made.serve()
    up = asyncio.ensure_future(runtime.update("Model", scaled_to(3)))
    await made.begins(3)
    down = asyncio.ensure_future(runtime.update("Model", scaled_to(1)))
    made.let(1, 2)
    await asyncio.gather(up, down)
    assert await states(runtime) == ["ready"] and await count(runtime) == 1
    assert sorted(made.closed) == [1, 2]
    await runtime.aclose()
    assert sorted(made.closed) == [0, 1, 2]


async def test_traffic_does_not_wait_for_constructors() -> None:
    made = Made()
    made.app.add_route("/model", "Model")
    runtime = await made.serve()
    up = asyncio.ensure_future(runtime.update("Model", scaled_to(2)))
    await made.begins(2)
    await runtime.reroute("/model", {"Model": 1.0}, {"Model": 0.5})
    made.let(1)
    await up
    spec = await runtime.spec()
    assert spec.endpoints[0].shadows == (("Model", 0.5),) and spec.backends[0].num_replicas == 2
    await runtime.aclose()


@pytest.mark.parametrize("begun", [False, True])
async def test_an_end_gives_up_a_change(begun: bool) -> None:
    made = Made()
    runtime = await made.serve()
    up = asyncio.ensure_future(runtime.update("Model", scaled_to(2)))
    waits = asyncio.ensure_future(runtime.update("Model", scaled_to(3)))
    if begun:
        await made.begins(2)
    else:
        await asyncio.sleep(0)
    closing = asyncio.ensure_future(runtime.aclose())
    await asyncio.sleep(0)
    late = asyncio.ensure_future(runtime.update("Model", scaled_to(2)))
    with pytest.raises(NotServing, match="app 'default' is shutting down"):
        await runtime.reroute("/model", {}, {})
    made.let(1)
    await asyncio.wait_for(closing, 5)
    for change in (up, waits, late):
        with pytest.raises(NotServing, match="app 'default' is shutting down"):
            await change
    assert sorted(made.closed) == made.begun, "whatever was made is closed"


async def test_a_change_that_is_cancelled_before_it_is_in_force() -> None:
    made = Made()
    runtime = await made.serve()
    up = asyncio.ensure_future(runtime.update("Model", scaled_to(2)))
    await made.begins(2)
    up.cancel()
    made.let(1)
    with pytest.raises(asyncio.CancelledError):
        await up
    await runtime.aclose()
    assert sorted(made.closed) == [0, 1]


async def test_a_change_that_is_cancelled_is_seen_through_once_it_is_in_force() -> None:
    app, entered, leave = waiting_app()
    app.backends["wait"].config = app.backends["wait"].config.merge(max_ongoing_requests=1, num_replicas=2)
    runtime = LocalRuntime(app, http=QUIET)
    await runtime.start()
    calls = [asyncio.ensure_future(runtime.get_handle("wait").call()) for _ in range(2)]
    await entered.wait()
    down = asyncio.ensure_future(runtime.update("wait", scaled_to(1)))
    for _ in range(5):
        await asyncio.sleep(0)
    assert (await runtime.status())["backends"]["wait"]["wait#2"]["state"] == "stopping"
    down.cancel()
    with pytest.raises(asyncio.CancelledError):
        await down
    closing = asyncio.ensure_future(runtime.aclose())
    await asyncio.sleep(0)
    leave.set()
    assert await asyncio.gather(*calls) == ["done", "done"]
    await closing
    assert (await runtime.status())["backends"] == {"wait": {}}


async def test_a_replica_that_was_ended_does_not_start() -> None:
    made = Made()
    record = made.app.backends["Model"]
    replica = Replica(record, id="Model#1", app="default", clock=ManualClock())
    await replica.aclose()
    with pytest.raises(Draining, match="has been stopped"):
        await replica.start()
    assert made.begun == []


async def test_an_end_while_it_starts() -> None:
    made = Made()
    runtime = LocalRuntime(made.app, http=QUIET)
    starting = asyncio.ensure_future(runtime.start())
    await made.begins(1)
    await runtime.aclose()
    made.let(0)
    with pytest.raises(NotServing, match="shutting down"):
        await starting
    assert made.closed == [0]


# -- stops that are cut short ----------------------------------------------------------------


async def test_a_cancelled_stop_stops_everything_all_the_same() -> None:
    app, events, log, entered = App(), Events(), list[str](), asyncio.Event()

    @app.backend
    class Model:
        async def __call__(self) -> None:
            entered.set()
            await asyncio.Event().wait()

        async def aclose(self) -> None:
            await asyncio.sleep(0)
            log.append("cleaned up")

    @app.backend
    def plain() -> None: ...

    runtime = LocalRuntime(app, http=QUIET, observer=events)
    await runtime.start()
    await runtime.get_handle("plain").call()  # it has a thread now
    call = asyncio.ensure_future(runtime.get_handle("Model").call())
    await entered.wait()
    closing = asyncio.ensure_future(runtime.aclose())
    for _ in range(3):
        await asyncio.sleep(0)
        closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    with pytest.raises(Draining):
        await call
    assert log == ["cleaned up"]
    assert {replica for replica, event in events.seen if event == "stopped"} == {"Model#1", "plain#1"}
    await runtime.aclose()


async def test_a_stop_in_a_cancelled_scope_stops_everything() -> None:
    app, log = App(), list[str]()

    @app.backend
    class Model:
        async def __call__(self) -> None: ...

        async def aclose(self) -> None:
            await asyncio.sleep(0.01)
            log.append("cleaned up")

    runtime = LocalRuntime(app, http=QUIET)
    await runtime.start()
    with anyio.CancelScope() as scope:
        scope.cancel()
        await runtime.aclose()
    assert log == ["cleaned up"]


async def test_a_stop_cancelled_while_http_requests_end() -> None:
    app, entered = App(), threading.Event()

    @app.route("/wait")
    async def wait() -> str:
        entered.set()
        await asyncio.Event().wait()
        return "never"

    runtime = LocalRuntime(app, http=HTTPOptions(port=0))
    await runtime.start()
    assert runtime.proxy is not None
    port = int(runtime.proxy.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /wait HTTP/1.1\r\nhost: x\r\n\r\n")
    await wait_until(entered.is_set, 5, "the request to run")
    closing = asyncio.ensure_future(runtime.aclose())
    await wait_until(lambda: not runtime.ingress.ready, 5, "the end to begin")
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(closing, 5)
    assert (await reader.read()).startswith(b"HTTP/1.1 503 ")
    writer.close()
    await writer.wait_closed()


async def test_a_nodes_own_address_needs_ray() -> None:
    runtime = LocalRuntime(App(), http=HTTPOptions(host="node"))
    with pytest.raises(ValueError, match="host='node' is a node's address in Ray"):
        await runtime.start()


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
    monkeypatch.setattr(local_replicas, "SLOW_STOP_S", 0.01)
    app, go_on, entered = App(), threading.Event(), threading.Event()
    log: list[str] = []

    @app.backend
    class Slow:
        def __init__(self) -> None:
            entered.set()
            go_on.wait(10)
            log.append("made")

        def __call__(self) -> None: ...

        def close(self) -> None:
            log.append("closed")

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
    assert log == ["made", "closed"]


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


async def test_traffic_to_an_import_string_is_found_not_to_fit_by_requests(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What it needs nobody knows but the replica; of such a request nothing is executed."""
    app = App()

    @app.backend
    async def model(text: str) -> str:
        return text

    app.backend("serveit.config:did_you_mean", name="late")
    app.add_route("/model/<text>", model, name="asked")
    async with serveit.serve(app, local=True, http={"port": 0}) as client:
        await client.set_traffic("asked", {"late": 1.0})
        async with httpx2.AsyncClient(base_url=str(client.url)) as http:
            reply = await http.get("/model/a")
    assert (reply.status_code, reply.headers["x-serveit-executed"]) == (500, "no")
    assert "route '/model/<text>', backend 'late': did_you_mean(): parameter " in caplog.text


async def test_names_are_known_while_it_starts_and_calls_have_to_wait() -> None:
    app = App()

    @app.backend
    async def double(x: int) -> int:
        return 2 * x

    @app.backend
    class Model:
        def __init__(self) -> None:
            self.double = app.handle("double")
            with pytest.raises(KeyError, match="did you mean 'double'"):
                app.handle("duoble")

        async def setup(self) -> None:
            with pytest.raises(NotServing, match="'double' cannot be called yet: app 'default' is still"):
                await self.double.call(1)

        async def __call__(self, x: int) -> int:
            result: int = await self.double.call(x)
            return result

    runtime = LocalRuntime(app, http=QUIET)
    await runtime.start()
    assert await runtime.get_handle("Model").call(2) == 4
    await runtime.aclose()

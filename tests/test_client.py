"""`serve`, `run` and the clients that they give."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from serveit import App, HTTPOptions, NotServing, SyncHandle, run, serve
from serveit.client import Client, SyncClient
from serveit.serving import _settled, say_what_is_waited_for
from serveit.signals import StopSignals
from serveit.web.proxy import bind


def make_app() -> App:
    app = App()

    @app.route("/double/<value:int>")
    async def double(value: int) -> int:
        return 2 * value

    @app.backend
    def slow(seconds: float) -> str:
        time.sleep(seconds)
        return "slept"

    return app


def broken_app() -> App:
    app = App()

    @app.backend
    class Broken:
        def __call__(self) -> None: ...

        def setup(self) -> None:
            raise LookupError("no such model")

    return app


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        body: bytes = answer.read()
    return body


# -- async with ------------------------------------------------------------------------------


@pytest.mark.parametrize("http", [{"port": 0}, HTTPOptions(port=0)])
async def test_serving_from_a_loop(http: Any) -> None:
    async with serve(make_app(), local=True, http=http) as client:
        assert isinstance(client, Client) and client.url is not None
        assert await asyncio.to_thread(fetch, f"{client.url}/double/4") == b"8"
        handle = client.get_handle("double")
        assert await handle.call(4) == 8
        assert await client.get_handle("/double/<value:int>").call(4) == 8
        blocking = client.get_handle("double", sync=True)
        assert isinstance(blocking, SyncHandle) and await asyncio.to_thread(blocking.call, 4) == 8
        assert repr(client) == f"<Client {client.url}>"
        with pytest.raises(KeyError, match="no backend or endpoint 'duoble': did you mean 'double'?"):
            client.get_handle("duoble")
        for missing_ok in (False, True):
            with pytest.raises(TypeError, match=r"takes the name of a backend or of a route, a str; got \["):
                client.get_handle(["double"], missing_ok=missing_ok)  # type: ignore[call-overload]
    with pytest.raises(NotServing, match="'double' has been shut down"):
        await handle.call(4)


async def test_status() -> None:
    async with serve(make_app(), local=True, http={"location": None}, name="mine") as client:
        idle = {"state": "ready", "running": 0, "waiting": 0}
        assert await client.status() == {
            "app": "mine",
            "url": None,
            "state": "RUNNING",
            "message": "",
            "version": 1,
            "num_replicas": {"double": 1, "slow": 1},
            "backends": {"double": {"double#1": idle}, "slow": {"slow#1": idle}},
            "failed": {},
        }
        call = asyncio.ensure_future(client.get_handle("slow").call(0.05))
        for _ in range(5):  # the call is in its replica after as many turns of the loop
            await asyncio.sleep(0)
        assert (await client.status())["backends"]["slow"]["slow#1"]["running"] == 1
        assert await call == "slept"
    assert client.url is None and repr(client) == "<Client without HTTP>"


async def test_clients_stay_where_they_are() -> None:
    async with serve(make_app(), local=True, http={"location": None}) as client:
        with pytest.raises(
            TypeError, match=r"a Client cannot be pickled.* client.get_handle\(...\), or call"
        ):
            pickle.dumps(client)


async def test_a_client_that_has_been_left_says_so() -> None:
    async with serve(make_app(), local=True, http={"port": 0}) as client:
        url = client.url
    said = r"this client has been shut down, with the serve\(...\) that it came from: enter serveit.serve"
    for ask in (client.status, client.routes, client.delete, lambda: client.deploy(make_app())):
        with pytest.raises(NotServing, match=said):
            await ask()
    with pytest.raises(NotServing, match=said):
        client.get_handle("double")
    assert client.url == url, "where it was"


def test_a_blocking_client_that_has_been_left_says_so() -> None:
    with serve(make_app(), local=True, http={"location": None}) as client:
        pass
    for ask in (client.status, client.routes, client.delete, lambda: client.get_handle("double")):
        with pytest.raises(NotServing, match="this client has been shut down"):
            ask()


async def test_how_long_a_deploy_may_wait() -> None:
    with pytest.raises(ValueError, match="deploy_timeout_s must be ≥ 0 and finite, got -1"):
        serve(make_app(), deploy_timeout_s=-1)
    async with serve(make_app(), local=True, http={"location": None}) as client:
        with pytest.raises(TypeError, match="deploy_timeout_s must be a number of seconds, got '9'"):
            await client.deploy(make_app(), deploy_timeout_s="9")  # type: ignore[arg-type]
        with pytest.raises(NotServing, match="without Ray a process serves one app"):
            await client.deploy(make_app(), deploy_timeout_s=9)


async def test_a_prefix_and_a_socket_of_one_s_own() -> None:
    sock = bind(HTTPOptions(port=0))
    port = sock.getsockname()[1]
    async with serve(make_app(), local=True, prefix="/v1", sock=sock) as client:
        assert client.url == f"http://127.0.0.1:{port}"
        assert await asyncio.to_thread(fetch, f"{client.url}/v1/double/2") == b"4"


async def test_one_serving_is_for_one_time() -> None:
    serving = serve(make_app(), local=True, http={"location": None})
    async with serving:
        with pytest.raises(RuntimeError, match="entered already"):
            await serving.__aenter__()
    async with serving as client:  # again, one after the other
        assert await client.get_handle("double").call(1) == 2


async def test_a_start_that_fails_says_why() -> None:
    serving = serve(broken_app(), local=True, http={"port": 0})
    for _ in range(2):
        with pytest.raises(LookupError, match="no such model") as caught:
            await serving.__aenter__()
        assert caught.value.__notes__ == ["(while replica Broken#1 of app 'default' started)"]
    await serving.__aexit__(None, None, None)


def test_what_is_refused() -> None:
    app, wrong = make_app(), object()
    with pytest.raises(TypeError, match="expected a serveit.App, got object"):
        serve(wrong, local=True)  # type: ignore[arg-type]
    for prefix in ("v1", "/v1/"):
        with pytest.raises(ValueError, match="prefix must start with '/'"):
            serve(app, local=True, prefix=prefix)
    with pytest.raises(ValueError, match="address is for Ray, and local=True does without"):
        serve(app, local=True, address="auto")
    with socket.socket() as sock, pytest.raises(ValueError, match="sock is for local=True"):
        serve(app, sock=sock)
    with pytest.raises(TypeError, match="did you mean 'port'?"):
        serve(app, local=True, http={"prot": 1})


# -- with ------------------------------------------------------------------------------------


def test_serving_without_a_loop() -> None:
    with serve(make_app(), local=True, http={"port": 0}) as client:
        with pytest.raises(TypeError, match="a SyncClient cannot be pickled"):
            pickle.dumps(client)
        assert isinstance(client, SyncClient) and repr(client) == f"<SyncClient {client.url}>"
        assert client.get_handle("double").call(4) == 8
        assert fetch(f"{client.url}/double/5") == b"10"
        assert client.status()["backends"].keys() == {"double", "slow"}


def test_traffic_without_a_loop() -> None:
    app = App()
    app.backend(lambda: "v1", name="v1")
    app.backend(lambda: "v2", name="v2")
    app.add_route("/predict", traffic={"v1": 1.0, "v2": 0.0}, name="predict")
    with serve(app, local=True, http={"location": None}) as client:
        predict = client.get_handle("predict")
        client.set_traffic("predict", {"v1": 0.0, "v2": 1.0})
        assert {predict.call() for _ in range(10)} == {"v2"}
        for wrong, text in (
            ({"v1": 0.3}, "sum to 1, got 0.3"),
            ({"v1": -1.0, "v2": 2.0}, "≥ 0"),
            ({}, "no back"),
        ):
            with pytest.raises(ValueError, match=text):
                client.set_traffic("predict", wrong)
        with pytest.raises(ValueError, match="unknown backend 'v3'"):
            client.shadow_traffic("predict", "v3", 0.5)
        with pytest.raises(KeyError, match="no endpoint 'predct': did you mean 'predict'"):
            client.set_traffic("predct", {"v1": 1.0})
        assert {predict.call() for _ in range(10)} == {"v2"}
        client.set_traffic("predict", {"v1": 1.0})
        assert {predict.call() for _ in range(10)} == {"v1"}


def test_an_error_inside_ends_it() -> None:
    with contextlib.suppress(ZeroDivisionError), serve(make_app(), local=True, http={"port": 0}) as client:
        _ = 1 / 0
    assert client.url is not None
    with pytest.raises(NotServing, match="has been shut down"):
        client.get_handle("double").call(1)


def test_a_start_that_fails_without_a_loop() -> None:
    with pytest.raises(LookupError, match="no such model"), serve(broken_app(), local=True, http={"port": 0}):
        pass


async def test_a_loop_needs_async_with() -> None:
    with pytest.raises(RuntimeError, match=r"an event loop is running.*async with serveit\.serve"):
        serve(make_app(), local=True).__enter__()
    with pytest.raises(RuntimeError, match=r"async with serveit\.serve"):
        run(make_app(), local=True)


# -- run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_until_a_signal(number: int) -> None:
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    answers = []

    def on_ready(client: Client) -> None:
        def ask() -> None:
            answers.append(fetch(f"{client.url}/double/3"))
            signal.pthread_kill(threading.main_thread().ident or 0, number)

        threading.Thread(target=ask, daemon=True).start()

    run(make_app(), local=True, http={"port": 0}, on_ready=on_ready)
    assert answers == [b"6"]
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)] == handlers
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_run_raises_what_the_start_raises() -> None:
    with pytest.raises(LookupError, match="no such model"):
        run(broken_app(), local=True, http={"port": 0})


def test_run_ends_with_what_on_ready_raises() -> None:
    def on_ready(client: Client) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(make_app(), local=True, http={"port": 0}, on_ready=on_ready)


@pytest.mark.parametrize("answer", ["is cancelled", "raises", "goes on"])
def test_a_signal_while_it_starts(answer: str) -> None:
    app = App()
    closed = []

    @app.backend
    class Starting:
        async def __call__(self) -> None: ...

        async def setup(self) -> None:
            signal.raise_signal(signal.SIGINT)
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if answer == "raises":
                    raise ValueError("stopped") from None
                if answer == "is cancelled":
                    raise

        def close(self) -> None:
            closed.append(True)

    run(app, local=True, http={"port": 0})
    assert closed == [True]


def test_a_signal_before_the_loop_runs() -> None:
    with StopSignals(1.0) as signals:
        signal.raise_signal(signal.SIGTERM)

        async def main() -> bool:
            return signals.attach().is_set()

        assert asyncio.run(main())
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0


def test_a_signal_after_the_loop_has_ended() -> None:
    async def main(signals: StopSignals) -> None:
        signals.attach()

    with StopSignals(1.0) as signals:
        asyncio.run(main(signals))
        signal.raise_signal(signal.SIGTERM)


class Exit(BaseException):
    """What `os._exit` is in this process."""


def test_the_second_signal_and_the_end_of_patience(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def leave(code: int) -> None:
        raise Exit(code)

    monkeypatch.setattr(os, "_exit", leave)
    with StopSignals(1.0) as signals:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Exit, match="143"):
            signal.raise_signal(signal.SIGTERM)
        for _ in range(2):
            with pytest.raises(Exit, match="0"):
                signal.raise_signal(signal.SIGALRM)
            signals.started()
    assert capfd.readouterr().err.splitlines() == [
        "stopped at once, by a second signal",
        "stopped while the app was starting, without waiting for what had begun",
        "stopped, without waiting for code that still runs",
    ]


def test_handlers_of_another_language_become_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    signals = StopSignals(1.0)
    with signals:
        signals._previous[signal.SIGTERM] = None  # as for a handler that Python did not set
    assert signal.signal(signal.SIGTERM, before) == signal.SIG_DFL


def test_run_without_uvloop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    app, kinds = App(), []

    @app.backend
    class Model:
        async def __call__(self) -> None: ...

        async def setup(self) -> None:
            kinds.append(type(asyncio.get_running_loop()).__module__)
            asyncio.get_running_loop().call_later(0.01, signal.raise_signal, signal.SIGINT)

    run(app, local=True, http={"port": 0})
    assert kinds[0].startswith("asyncio.")


def test_run_is_for_the_main_thread() -> None:
    caught: list[BaseException] = []

    def elsewhere() -> None:
        try:
            run(make_app(), local=True)
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "`with serveit.serve(...)`" in str(caught[0])


PROGRAM = """
import sys, time
from serveit import App, run

app = App()

@app.backend
class Slow:
    {kind} __call__(self): ...
    def __init__(self):
        print("constructing", flush=True)
        time.sleep(60)

run(app, local=True, http={{"location": None}})
"""


@pytest.mark.parametrize("kind", ["def", "async def"])  # in a thread, and on the loop
def test_a_constructor_does_not_hold_up_the_end(kind: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(kind=kind))
    with subprocess.Popen(
        [sys.executable, str(program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "constructing\n"
        asked = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 0 and "without waiting" in errors
    assert time.monotonic() - asked < 5


def test_the_second_signal_ends_at_once(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import time\nfrom serveit import App, run\napp = App()\n"
        "@app.route('/')\nasync def ready() -> str: return 'yes'\n"
        "@app.route('/slow')\ndef slow() -> None:\n    print('slow', flush=True); time.sleep(60)\n"
        "run(app, local=True, http={'port': 0}, on_ready=lambda client: print(client.url, flush=True))\n"
    )
    with subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        host, _, port = process.stdout.readline().strip().removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n")
            assert process.stdout.readline() == "slow\n"
            process.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):  # it waits for the request
                process.wait(0.5)
            process.send_signal(signal.SIGINT)
            assert process.wait(5) == 130


def test_what_is_there_when_serving_begins_is_left_out_of_garbage_collection() -> None:
    before = gc.get_freeze_count()
    with _settled():
        assert gc.get_freeze_count() > before + 1_000
    assert gc.get_freeze_count() == 0


async def test_a_stop_says_what_it_waits_for(caplog: pytest.LogCaptureFixture) -> None:
    app = App()
    begun, gate = asyncio.Event(), asyncio.Event()

    @app.backend
    async def slow() -> None:
        begun.set()
        await gate.wait()

    caplog.set_level("INFO", "serveit.client")
    async with serve(app, local=True, http={"location": None}) as client:
        await say_what_is_waited_for(client)
        assert not caplog.messages
        call = asyncio.ensure_future(client.get_handle("slow").call())
        await begun.wait()
        await say_what_is_waited_for(client)
        assert caplog.messages == ["stopping once 1 running request has ended; Ctrl-C again stops at once"]
        gate.set()
        await call


def test_an_app_that_is_not_entered_has_no_handles() -> None:
    with pytest.raises(AttributeError, match=r"has no 'get_handle'; it has to be entered: `with serve"):
        serve(App(), local=True).get_handle("x")

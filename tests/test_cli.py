"""The command: what it serves, what it says, and how it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from serveit import App, HTTPOptions
from serveit.command import cli, running
from serveit.web.proxy import bind
from tests.commands import fetch, serveit

ROOT = Path(__file__).parent.parent
LOCAL = ("--local", "--port", "0")
HELLO = (ROOT / "examples" / "hello" / "app.py").read_text()

FILES = {
    "hello_app.py": HELLO,
    "missing.py": "import nothing_like_it\n",
    "broken.py": "def make():\n    return 1 / 0\n\nmake()\n",
    "syntax.py": "def (:\n",
    "misused.py": "from serveit import App\napp = App()\n\n@app.backend(num_replica=2)\ndef f(): ...\n",
    "two.py": "from serveit import App\none, two = App(), App()\n",
    "empty.py": "from serveit import App\napp = App()\n",
    "constructor.py": (
        "from serveit import App\napp = App()\n\n@app.backend\nclass Model:\n"
        "    def __init__(self):\n        self.load()\n\n"
        "    def load(self):\n        raise ValueError('no such model')\n\n"
        "    def __call__(self): ...\n"
    ),
    "refusing.py": (
        "from serveit import App, NotServing\napp = App()\n\n@app.backend\nclass Model:\n"
        "    def __init__(self):\n        raise NotServing('from user code')\n\n"
        "    def __call__(self): ...\n"
    ),
    "reading.py": (
        "from serveit import App\napp = App()\n\n@app.backend\nclass Model:\n"
        "    def __init__(self):\n        open('no-such-file')\n\n"
        "    def __call__(self): ...\n"
    ),
    "late.py": "from serveit import App\napp = App()\napp.backend('nowhere:model', name='late')\n",
    "quitting.py": (
        "from serveit import App\napp = App()\n\n@app.backend\nclass Model:\n"
        "    def __init__(self):\n        raise SystemExit(3)\n\n    def __call__(self): ...\n"
    ),
    "waiting.py": (
        "import asyncio\nfrom pathlib import Path\nfrom serveit import App\napp = App()\n\n"
        "@app.route('/')\nasync def wait() -> str:\n    Path('asked').touch()\n"
        "    while not Path('go').exists():\n        await asyncio.sleep(0.01)\n    return 'done'\n"
    ),
    "importing.py": "import time\nprint('importing', flush=True)\ntime.sleep(60)\n",
    "constructing.py": (
        "import time\nfrom serveit import App\napp = App()\n\n@app.backend\nclass Model:\n"
        "    def __init__(self):\n        print('constructing', flush=True)\n        time.sleep(60)\n\n"
        "    def __call__(self): ...\n"
    ),
    "stuck.py": (
        "import time\nfrom serveit import App\napp = App()\n\n@app.route('/')\n"
        "@app.backend(graceful_shutdown_timeout_s=0.2)\n"
        "def stuck():\n    print('stuck', flush=True)\n    time.sleep(60)\n"
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("apps")
    for name, text in FILES.items():
        (made / name).write_text(text)
    return made


def until(predicate: Callable[[], object], timeout_s: float = 10.0) -> bool:
    """Whether it became true in time. (Other processes make it true: there is no event to wait for.)"""
    deadline = time.monotonic() + timeout_s
    while not predicate():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def refused(folder: Path, *arguments: str, code: int = 1) -> str:
    with serveit("run", *arguments, folder=folder) as command:
        assert command.end() == code, command.text
        return command.text


# -- serving ---------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["hello_app:app", "hello_app", "hello_app.py", "./hello_app.py:app"])
def test_what_can_be_served(folder: Path, target: str) -> None:
    with serveit("run", target, *LOCAL, folder=folder) as command:
        url = command.url()
        assert fetch(f"{url}/hello/you?shout=true") == "HELLO, YOU!"
        assert command.stop() == 0
    assert command.lines[0] == f"serving {url}  (1 backend, 1 replica)"
    assert command.lines[1:] == ["  /hello/<name>  GET,HEAD  hello"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_shell_s_background_command(folder: Path, number: int) -> None:
    def as_bash_does() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    with serveit("run", "hello_app", *LOCAL, folder=folder, preexec=as_bash_does) as command:
        assert fetch(f"{command.url()}/hello/you") == "Hello, you!"
        assert command.stop(number) == 0


def test_a_name_and_a_prefix(folder: Path) -> None:
    named = ("--name", "greeting", "--prefix", "/api")
    with serveit("run", "hello_app", *LOCAL, *named, folder=folder) as command:
        assert fetch(f"{command.url()}/api/hello/you") == "Hello, you!"
        assert command.stop() == 0
    assert command.lines[1:] == ["  /api/hello/<name>  GET,HEAD  hello"]
    assert "prefix must start with '/'" in refused(folder, "hello_app", *LOCAL, "--prefix", "api", code=2)


def test_without_http(folder: Path) -> None:
    for option in (("--http-location", "NoServer"), ("--no-http",)):
        with serveit("run", "hello_app", "--local", *option, folder=folder) as command:
            command.wait_for("^serving without HTTP")
            assert command.stop() == 0


def test_the_access_log_and_debug(folder: Path) -> None:
    with serveit("run", "hello_app", *LOCAL, "--access-log", "--debug", folder=folder) as command:
        fetch(f"{command.url()}/hello/you")
        command.wait_for("/hello/you")
        assert command.stop() == 0


@pytest.mark.slow
def test_it_answers_within_a_second() -> None:
    """The figure to reach: a median of at most 1 s from the command to its first answer."""
    seconds = []
    for _ in range(5):
        with serveit("run", "app:app", *LOCAL, folder=ROOT / "examples" / "hello") as command:
            assert fetch(f"{command.url()}/hello/you") == "Hello, you!"
            seconds.append(time.monotonic() - command.started)
            assert command.stop() == 0
    assert statistics.median(seconds) <= 1.0, seconds


# -- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("hello_app:ap", "Error: module 'hello_app' has no attribute 'ap': there is hello_app:app"),
        ("hello_app:hello", "Error: 'hello_app:hello' is of type Backend, not App: there is hello_app:app"),
        ("two", "Error: 'two' does not say which App: there is two:one, two:two"),
        ("nowhere:app", "Error: there is no module 'nowhere' (looked in "),
        ("hello_app.app", "Error: there is no module 'hello_app.app' (looked in "),
        ("hello_app/app", "Error: there is no file 'hello_app/app' (looked in "),
        ("nowhere.py", "Error: there is no file 'nowhere.py'"),
        ("empty:app", "Error: the app in empty:app has nothing to serve: put @app.route"),
        ("late", "Error: there is no module 'nowhere'"),
    ],
)
def test_a_mistake_in_the_target(folder: Path, target: str, said: str) -> None:
    text = refused(folder, target, *LOCAL)
    assert text.startswith(said) and len(text.splitlines()) == 1


def test_what_is_for_ray_and_what_for_one_process(folder: Path) -> None:
    text = refused(folder, "hello_app", "--local", "--address", "auto", code=2)
    assert text.splitlines()[-1].startswith("Error: --address is for Ray, and --local does without")


def test_the_help_lists_commands_and_exit_codes() -> None:
    shown = " ".join(CliRunner().invoke(cli.main, ["--help"]).output.split())
    for name in ("run", "deploy", "status", "routes", "scale", "traffic", "delete", "shutdown"):
        assert f" {name} " in shown
    assert "Exit codes: 0 done; 1 what was asked failed" in shown and "130 Ctrl-C" in shown


def test_the_command_is_light() -> None:
    """What all commands wait for, and `--help` with them."""
    code = "import serveit.command.cli, sys; print(*sys.modules, sep='\\n')"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {*loaded.stdout.split()} & {"ray", "rich", "uvicorn", "anyio", "watchfiles", "serveit.cluster"}


def test_usage(folder: Path) -> None:
    assert "Missing argument 'TARGET'" in refused(folder, code=2)
    assert "host must be" in refused(folder, "hello_app", "--local", "--host", "", code=2)
    assert "No such option" in refused(folder, "hello_app", "--loca", code=2)


@pytest.mark.parametrize(
    ("target", "last", "shown"),
    [
        (
            "missing",
            "missing cannot be imported",
            ["import nothing_like_it", "ModuleNotFoundError: No module"],
        ),
        ("broken", "broken cannot be imported", ["make()", "return 1 / 0", "ZeroDivisionError"]),
        ("syntax.py", "syntax.py cannot be imported", ["def (:", "SyntaxError"]),
        (
            "misused",
            "misused cannot be imported",
            ["@app.backend(num_replica=2)", "did you mean 'num_replicas'?"],
        ),
        (
            "constructor",
            "the app cannot be started",
            ["self.load()", "ValueError: no such model", "replica Model#1"],
        ),
        ("refusing", "the app cannot be started", ["NotServing: from user code", "replica Model#1"]),
        (
            "reading",
            "the app cannot be started",
            ["open('no-such-file')", "FileNotFoundError", "replica Model#1"],
        ),
    ],
)
def test_the_user_s_own_errors(folder: Path, target: str, last: str, shown: list[str]) -> None:
    text = refused(folder, target, *LOCAL)
    assert text.splitlines()[-1] == f"Error: {last}"
    for part in shown:
        assert part in text
    files = [line.split('"')[1] for line in text.splitlines() if line.startswith('  File "')]
    assert files and all(str(folder) in os.path.abspath(folder / file) for file in files), text


def test_an_address_in_use(folder: Path) -> None:
    with bind(HTTPOptions(port=0)) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        text = refused(folder, "constructor", "--local", "--port", port)
    assert f"Error: cannot listen on 127.0.0.1:{port}" in text and "--port" in text
    assert "no such model" not in text  # found before any replica starts


def test_a_constructor_that_exits(folder: Path) -> None:
    with serveit("run", "quitting", *LOCAL, folder=folder) as command:
        assert command.end() in (1, 3)


# -- ends ------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["importing", "constructing"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_it_serves(folder: Path, target: str, number: int) -> None:
    with serveit("run", target, *LOCAL, folder=folder) as command:
        command.wait_for(f"^{target}$")
        asked = time.monotonic()
        assert command.stop(number) == 0
        assert time.monotonic() - asked < 5


def test_a_signal_before_a_deploy(folder: Path) -> None:
    with serveit("deploy", "importing", folder=folder) as command:
        command.wait_for("^importing$")
        assert command.stop() == 130
        assert command.lines == ["importing"]


def ask_without_waiting(url: str) -> Any:
    import socket

    host, _, port = url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)))
    connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    return connection


@pytest.mark.parametrize(("signals", "code"), [(1, 0), (2, 130)])
def test_a_function_that_does_not_return(folder: Path, signals: int, code: int) -> None:
    with serveit("run", "stuck", *LOCAL, folder=folder) as command:
        with ask_without_waiting(command.url()):
            command.wait_for("^stuck$")
            command.process.send_signal(signal.SIGINT)
            if signals == 2:
                time.sleep(0.05)  # two that are pending at once are one
                command.process.send_signal(signal.SIGINT)
            assert command.end(10) == code


# -- on Ray ----------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, for Ray's token; what runs with it was started by the test."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("RAY_")]:  # of the Ray in this process
        monkeypatch.delenv(name)
    return tmp_path


def processes_of(home: Path) -> list[str]:
    """The command lines of all that run with this home; none where there is no /proc."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"HOME={home}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


@pytest.mark.cluster
def test_on_ray_it_serves_and_leaves_nothing(folder: Path, home: Path) -> None:
    for name in ("asked", "go"):
        (folder / name).unlink(missing_ok=True)
    with serveit("run", "waiting", "--port", "0", folder=folder) as command:
        url = command.url()
        command.wait_for("^  /  GET,HEAD  wait$")
        assert any("ReplicaActor" in line for line in processes_of(home)) or not Path("/proc").exists()
        with ThreadPoolExecutor() as threads:
            answer = threads.submit(fetch, url)
            assert until((folder / "asked").exists)
            command.process.send_signal(signal.SIGINT)
            command.wait_for("stopping once 1 running")
            (folder / "go").touch()
            assert answer.result() == "done"
        assert command.end() == 0, command.text
    assert until(lambda: not processes_of(home)), processes_of(home)
    token = home / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600


@pytest.mark.cluster
def test_a_constructor_that_raises_on_ray(folder: Path, home: Path) -> None:
    text = refused(folder, "constructor", "--port", "0")
    shown = text[text.index("Traceback (most recent call last):\n") :].splitlines()
    files = [line.split('"')[1] for line in shown if line.startswith('  File "')]
    assert files == [str(folder / "constructor.py")] * 2, text
    assert [line.strip() for line in shown if not line.startswith('  File "')] == [
        "Traceback (most recent call last):",
        "self.load()",
        "raise ValueError('no such model')",
        "ValueError: no such model",
        "(while replica Model#1 of app 'default' started)",
        "Error: the app cannot be started",
    ]
    assert until(lambda: not processes_of(home)), processes_of(home)


@pytest.mark.cluster
def test_an_address_in_use_is_found_before_ray_starts(folder: Path, home: Path) -> None:
    with bind(HTTPOptions(port=0)) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        text = refused(folder, "constructor", "--port", port)
    assert text.splitlines()[-1].startswith(f"Error: cannot listen on 127.0.0.1:{port}") and "--port" in text
    assert "Ray is up" not in text and not (home / ".ray").exists()


@pytest.mark.cluster
@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:no-port", "127.0.0.1:1"])
def test_no_cluster_at_the_address(folder: Path, home: Path, address: str) -> None:
    text = refused(folder, "constructor", "--address", address)
    assert text.startswith(f"Error: no Ray cluster at {address!r}: ") and len(text.splitlines()) == 1
    assert "ray start --head" in text


# -- in this process -------------------------------------------------------------------------


@pytest.fixture
def asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("serveit.logs.configure", lambda level: None)
    monkeypatch.setattr("sys.path", [str(folder), *__import__("sys").path])

    def ask(*arguments: str) -> Result:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        result = CliRunner().invoke(cli.main, ["run", *arguments])
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
        return result

    return ask


def test_a_mistake_of_serveit_s_own_keeps_its_traceback(
    asked: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr("serveit.serving.run", fail)
    assert isinstance(asked("hello_app", *LOCAL).exception, AssertionError)


def test_a_signal_while_importing(asked: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(target: str, name: str, prefix: str) -> App:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("it went on")

    monkeypatch.setattr(cli, "load", interrupted)
    result = asked("hello_app", *LOCAL)
    assert result.exit_code == 0 and not isinstance(result.exception, AssertionError)


def test_a_thread_that_is_left_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[int] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    running.leave()
    assert ends == []
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    running.leave()
    release.set()
    thread.join()
    assert ends == [0]

"""The commands as processes, against a running instance; what they say is tested in tests/test_operating.py.

Each takes some 2 s, nearly all of it to load Ray: a test asks for several things.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serveit import HTTPOptions
from serveit.web.proxy import bind
from tests.cluster.instance import Instance
from tests.commands import fetch, serveit

pytestmark = pytest.mark.cluster

VERSIONS = """
from serveit import App

app = App()


@app.backend(name="v1")
class Model:
    def __init__(self, version: int = 1) -> None:
        print("constructing")
        self.version = version

    async def __call__(self) -> int:
        return self.version


app.backend(Model, name="v2", init_args=(2,))
app.add_route("/predict", traffic={"v1": 1.0, "v2": 0.0}, name="predict")
"""
BROKEN = """
from serveit import App

app = App()


@app.route("/broken")
@app.backend
class Model:
    def __init__(self) -> None:
        raise LookupError("no such model")

    async def __call__(self) -> None: ...
"""
SLOW = """
import time

from serveit import App

app = App()


@app.backend
class Model:
    def __init__(self) -> None:
        time.sleep(60)

    async def __call__(self) -> None: ...
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in (("versions.py", VERSIONS), ("broken.py", BROKEN), ("slow.py", SLOW)):
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def run(instance: Instance, folder: Path) -> Run:
    """A command, ended; what it was told by the environment is the instance's address."""

    def run(*arguments: str, code: int | None = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        ended = subprocess.run(
            [sys.executable, "-m", "serveit", *arguments],
            cwd=folder,
            env={**instance.environment, "RAY_ADDRESS": instance.address, **environment},
            capture_output=True,
            text=True,
            timeout=50,
        )
        assert code is None or ended.returncode == code, ended.stdout + ended.stderr
        return ended

    return run


def until(predicate: Callable[[], object], timeout_s: float = 30.0) -> bool:
    """Whether it became true in time; it takes a while each time."""
    deadline = time.monotonic() + timeout_s
    while not (found := predicate()) and time.monotonic() < deadline:
        pass
    return bool(found)


def last_line(ended: subprocess.CompletedProcess[str]) -> str:
    assert ended.stdout == ""
    return ended.stderr.splitlines()[-1]


def test_an_app_from_its_deploy_to_its_end(run: Run, instance: Instance) -> None:
    deploy = ("deploy", "versions:app", "--name", "shop", "--prefix", "/shop")
    shown = run(*deploy).stdout.splitlines()
    assert shown[0] == f"serving {instance.url}  (2 backends, 2 replicas)"
    assert shown[1].split() == ["/shop/predict", "GET,HEAD", "v1", "100%,", "v2", "0%"]
    assert fetch(f"{instance.url}/shop/predict") == "1"

    assert run("scale", "v2=2", "--app", "shop").stdout == "v2: 2 of 2 ready\n"
    run("traffic", "/shop/predict", "v1=0", "v2=1", "--app", "shop")
    assert fetch(f"{instance.url}/shop/predict") == "2"

    told: dict[str, Any] = json.loads(run("status", "shop", "--json").stdout)
    assert len(told["apps"]["shop"]["backends"]["v2"]) == 2
    paths = {route["path"]: route["weights"] for route in json.loads(run("routes", "--json").stdout)}
    assert paths["/shop/predict"] == {"v1": 0.0, "v2": 1.0}

    again = json.loads(run(*deploy, "--json").stdout)  # the constructor's print is no part of it
    assert again["backends"] == {"v1": 1, "v2": 1}
    assert fetch(f"{instance.url}/shop/predict") == "1"

    assert run("delete", "shop").stdout == "shop is deleted\n"
    assert last_line(run("status", "shop", code=1)).startswith("Error: no app 'shop' runs: ")


def test_a_deploy_that_fails_shows_the_user_s_traceback(run: Run, folder: Path) -> None:
    ended = run("deploy", "broken", "--name", "broken", code=1)
    assert ended.stdout == ""
    lines = ended.stderr.splitlines()
    files = [line.split('"')[1] for line in lines if line.startswith('  File "')]
    assert files == [str(folder / "broken.py")], ended.stderr
    assert lines[-3] == "LookupError: no such model" and "replica Model#" in lines[-2]
    assert lines[-1] == "Error: the app cannot be deployed"


def test_run_beside_other_apps(run: Run, instance: Instance, folder: Path) -> None:
    command = ("run", "versions", "--name", "brief", "--prefix", "/brief")
    environment = {**instance.environment, "RAY_ADDRESS": ""}
    with serveit(*command, "--address", instance.address, folder=folder, environment=environment) as running:
        assert running.url() == instance.url
        assert fetch(f"{instance.url}/brief/predict") == "1"
        clash = run("deploy", "versions", "--name", "late", "--prefix", "/brief", code=1)
        assert "/brief/predict of app 'late' is taken by app 'brief'" in last_line(clash)
        with bind(HTTPOptions(port=0)) as taken:
            other = run("deploy", "versions", "--port", str(taken.getsockname()[1]), code=1)
        assert "serves HTTP already" in last_line(other)
        assert running.stop() == 0
    assert "brief" not in json.loads(run("status", "--json").stdout)["apps"]


def test_ctrl_c_leaves_a_deploy_to_itself(run: Run, instance: Instance, folder: Path) -> None:
    environment = {**instance.environment, "RAY_ADDRESS": instance.address}
    with serveit("deploy", "slow", "--name", "slow", folder=folder, environment=environment) as deploying:
        assert until(lambda: "slow" in json.loads(run("status", "--json", code=None).stdout)["apps"])
        assert deploying.stop(signal.SIGINT) == 130
        assert deploying.lines[-1].startswith("interrupted: the deploy may go on")
    run("delete", "slow")


def test_a_cluster_with_another_token(run: Run, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("0" * 64)
    begun = time.monotonic()
    ended = run("status", code=1, HOME=str(home), RAY_AUTH_MODE="token")
    assert "takes only those who have its token: RAY_AUTH_TOKEN" in last_line(ended)
    assert len(ended.stderr.splitlines()) == 1 and time.monotonic() - begun < 15

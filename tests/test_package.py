"""The package itself: what it exports, and what importing it costs."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import serveit

ROOT = Path(__file__).parent.parent
NAMES = """
    App Backend BackendConfig BatchError Body BodyTooLarge Client Context DeadlineExceeded Draining
    EncodingError HTTPOptions Handle Header ImportFailed InvalidRequest ItemErrors NeedsRay NoReplica
    NotServing PathNotFound ProtocolError Query QueueFull Rejected RemoteError ReplicaDied Request
Response
    ServeitError SyncClient SyncHandle UnsupportedMediaType connect context run serve testing
"""


def test_what_is_exported() -> None:
    assert serveit.__all__ == NAMES.split()
    assert dir(serveit) == sorted([*NAMES.split(), "__version__"])


@pytest.mark.parametrize("name", NAMES.split())
def test_every_name_is_there(name: str) -> None:
    assert getattr(serveit, name).__name__.rpartition(".")[2] == name


def test_what_is_not_exported() -> None:
    with pytest.raises(AttributeError, match="module 'serveit' has no attribute 'nothing'"):
        _ = serveit.nothing


def test_the_version() -> None:
    written = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert serveit.__version__ == written == importlib.metadata.version("serveit")


def loaded_by(code: str) -> set[str]:
    program = f"{code}\nimport sys\nprint(*sys.modules, sep='\\n')"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines())


def test_importing_is_light() -> None:
    modules = loaded_by("import serveit")
    assert not modules & {"ray", "uvicorn", "uvloop", "anyio", "numpy", "pydantic", "httpx2", "watchfiles"}
    assert {name for name in modules if name.startswith("starlette.")} <= {"starlette.convertors"}


def test_one_process_does_without_ray() -> None:
    served = "from serveit import *\nserve(App(), local=True)"
    assert not loaded_by(served) & {"uvicorn", "ray"}
    called = """
from serveit import *
app = App()
app.backend(lambda: 1, name="one")
with serve(app, local=True, http={"port": 0}) as client:
    assert client.get_handle("one").call() == 1
"""
    assert {name for name in loaded_by(called) if name.partition(".")[0] == "ray"} == set()


def test_the_module_is_the_command() -> None:
    for command in ([sys.executable, "-m", "serveit"], [str(Path(sys.executable).parent / "serveit")]):
        result = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert result.stdout == f"serveit, version {serveit.__version__}\n"

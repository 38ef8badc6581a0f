"""docs/handles.md: its programs run against its app, and print what is shown."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import urlopen

import pytest

import serveit
from tests.cluster.instance import Instance
from tests.commands import Talking

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/handles.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
APP, *PYTHON = [text for language, text in BLOCKS if language == "python"]
OUTPUTS = [text for language, text in BLOCKS if language == "text"]
SCRIPTS = [text for text in PYTHON if "asyncio.run(main())" in text]
(FASTAPI,) = [text for text in PYTHON if "import FastAPI" in text]
(AIOHTTP,) = [text for text in PYTHON if "import web\n" in text]

pytestmark = pytest.mark.cluster


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With the page's app as app.py, which can be imported."""
    (tmp_path / "app.py").write_text(APP, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "app", raising=False)
    monkeypatch.setitem(sys.modules, "app", importlib.import_module("app"))
    return tmp_path


@contextlib.contextmanager
def web_server(folder: Path, *command: str, environment: Mapping[str, str]) -> Iterator[str]:
    """Its URL; it ends in order."""
    running = Talking(
        subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env={**environment, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    )
    try:
        yield running.wait_for(r"[Rr]unning on (http://127\.0\.0\.1:\d+)")[1]
        running.process.terminate()
        assert running.process.wait(20) in (0, -15), running.text
    finally:
        running.process.kill()
        running.process.wait()
        running._reader.join()
        assert running.process.stdout is not None
        running.process.stdout.close()


def asked(url: str, text: str) -> object:
    with urlopen(f"{url}?text={quote(text)}", timeout=20) as answer:
        return json.load(answer)


def test_every_block_is_run() -> None:
    assert len(SCRIPTS) == len(OUTPUTS) == len(PYTHON) - 2
    assert {language for language, _ in BLOCKS} == {"python", "text"}


def test_programs_print_what_is_shown(instance: Instance, folder: Path) -> None:
    with serveit.serve(sys.modules["app"].app):
        environment = {**instance.environment, "RAY_ADDRESS": instance.address}
        for script, expected in zip(SCRIPTS, OUTPUTS, strict=True):
            (folder / "program.py").write_text(script, encoding="utf-8")
            ended = subprocess.run(
                [sys.executable, "program.py"],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=50,
            )
            shown = re.sub(r"^.*\(raylet\).*\n", "", ended.stdout, flags=re.MULTILINE)  # of this cluster
            assert (ended.returncode, shown) == (0, expected), ended.stderr


def test_handles_in_an_aiohttp_program(instance: Instance, folder: Path) -> None:
    site = AIOHTTP.replace("port=8002", "port=0")
    assert site != AIOHTTP
    (folder / "front.py").write_text(site, encoding="utf-8")
    with serveit.serve(sys.modules["app"].app, http={"location": "NoServer"}):
        environment = {**instance.environment, "RAY_ADDRESS": instance.address}
        with web_server(folder, "front.py", environment=environment) as url:
            assert asked(f"{url}/score", "a good day") == 1.0
            assert asked(f"{url}/twice", "a bad day") == [-1.0, -1.0]
    with pytest.raises(HTTPError, match="404"):
        asked(f"{instance.url}/score", "its routes are not served by the instance")


def test_a_fastapi_program_serves_and_calls(folder: Path, instance: Instance) -> None:
    """In a Ray of its own, with no HTTP server of serveit's."""
    (folder / "shop.py").write_text(FASTAPI, encoding="utf-8")
    home = folder / "home"
    home.mkdir()
    ours = {name: value for name, value in instance.environment.items() if not name.startswith("RAY_")}
    command = ("-m", "uvicorn", "shop:web", "--port", "0")
    with web_server(folder, *command, environment={**ours, "HOME": str(home)}) as url:
        assert asked(f"{url}/score", "a good day") == 1.0
        assert asked(f"{url}/twice", "a great good day") == [2.0, 2.0]

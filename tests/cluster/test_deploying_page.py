"""docs/deploying.md: its app runs, its program deploys, and what it quotes is said."""

from __future__ import annotations

import asyncio
import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray._private import worker

import serveit
from serveit import App
from serveit.cluster.rooms import Room, lacking
from serveit.command import cli
from tests.cluster.instance import KEEPER, Instance
from tests.commands import fetch
from tests.support import wait_until

PAGE = (Path(__file__).parent.parent.parent / "docs" / "deploying.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n# ([\w/.]+)[^\n]*\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [shlex.split(line) for line in re.findall(r"^\$ serveit (.*)$", PAGE, re.MULTILINE)]
(REFUSED,) = re.findall(r"^>>> (.*)\n(\w+): (.*)$", PAGE, re.MULTILINE)


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The page's, in its folder."""
    for name, code in BLOCKS:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "app", raising=False)
    yield importlib.import_module("app")
    del sys.modules["app"]


@pytest.mark.cluster
def test_the_app_and_the_program(instance: Instance, app: Any, tmp_path: Path) -> None:
    with serveit.connect(None, app=KEEPER) as keeper:
        keeper.deploy(App(), name="default")
        try:
            runpy.run_path(str(tmp_path / "deploy.py"))
            assert fetch(f"{instance.url}/labels/label/why%3F") == "question"
            (asked,) = re.findall(r"curl http://127.0.0.1:8000(\S+)\n(.*)", PAGE)
            assert fetch(f"{instance.url}/labels{asked[0]}") == asked[1]
        finally:
            for name in ("labels", "default"):
                with serveit.connect(None, app=name) as client:
                    client.delete()


TALKATIVE = """
import logging

from serveit import App

app = App()
logging.basicConfig(level="INFO")


@app.route("/<word>")
async def talk(word: str) -> None:
    print(word, "printed", flush=True)
    logging.getLogger("talkative").info("%s logged", word)
    raise ValueError(f"{word} raised")
"""


@pytest.mark.cluster
async def test_where_output_goes(instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node: Any = worker._global_node
    logs = Path(node.get_session_dir_path()) / "logs"
    patterns = re.findall(r"/session_latest/logs/(worker-\*-)\d+(\.\w+)", PAGE)
    (tmp_path / "talkative.py").write_text(TALKATIVE)
    monkeypatch.syspath_prepend(str(tmp_path))
    app = importlib.import_module("talkative").app
    async with serveit.serve(app, name="talkative", prefix="/talkative") as client:
        assert '"status":500' in await asyncio.to_thread(fetch, f"{instance.url}/talkative/heard")
        ((_, replica),) = (await client.status())["backends"]["talk"].items()

        def has(number: int, *texts: str) -> bool:
            begin, end = patterns[number]
            said = "".join(path.read_text() for path in logs.glob(f"{begin}{replica['pid']}{end}"))
            return all(text in said for text in texts)

        await wait_until(lambda: has(0, "heard printed"), 10, "what it prints is there")
        errors = "INFO:talkative:heard logged", "Traceback", "ValueError: heard raised"
        await wait_until(lambda: has(1, *errors), 10, "what it logs and raises is there")


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_can_be_typed(words: list[str]) -> None:
    name, *arguments = words
    cli.main.commands[name].make_context(name, arguments).close()


def test_what_is_refused(app: Any) -> None:
    code, kind, text = REFUSED
    with pytest.raises(Exception, match=re.escape(text)) as caught:
        exec(code, vars(app))
    assert type(caught.value).__name__ == kind


@pytest.mark.parametrize(
    ("options", "total"),
    [({"num_cpus": 4}, 8), ({"num_cpus": 64}, 8), ({"label_selector": {"zone": "b"}}, 8)],
)
def test_what_is_waited_for(options: dict[str, Any], total: float) -> None:
    told = lacking(options, [Room({}, {"CPU": total}, {"CPU": 2})])
    assert f"\nreplica big#3 {told}; waiting for 12 s\n" in PAGE

"""The examples run, in one process and on Ray: hello, digits with its client and compose, on real scans."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import serveit
from serveit import App, testing
from serveit.testing import TestClient

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS_SKLEARN = "this example needs scikit-learn (group `examples`)"


def load(path: str) -> ModuleType:
    """An example's module, under a name of its own: several are called `app`."""
    name = "example_" + re.sub(r"\W", "_", path)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    pytest.importorskip("sklearn", reason=NEEDS_SKLEARN)
    return load("digits/app.py")


@pytest.fixture(scope="module")
def page(digits: ModuleType) -> Iterator[TestClient]:
    with TestClient(digits.app) as client:
        yield client


def test_every_example_is_tested() -> None:
    names = {path.name for path in EXAMPLES.iterdir() if (path / "app.py").is_file()}
    in_test_examples_readmes = {"canary", "shadow", "batching", "reconfigure"}
    assert names == {"hello", "digits", "compose"} | in_test_examples_readmes


# -- hello -----------------------------------------------------------------------------------


def test_hello_greets() -> None:
    app: App = load("hello/app.py").app
    with TestClient(app) as client:
        assert client.get("/hello/Ada").text == "Hello, Ada!"
        assert client.get("/hello/Ada?shout=true").text == "HELLO, ADA!"


def test_hello_is_ten_lines() -> None:
    assert len((EXAMPLES / "hello/app.py").read_text().splitlines()) <= 10


# -- digits ----------------------------------------------------------------------------------


async def test_digits_are_recognised_in_batches(digits: ModuleType) -> None:
    _, scans = digits.load_scans()
    async with testing.local(digits.app) as client:
        handle = client.get_handle("Digits")
        first = [prediction async for prediction in handle.map(scan.image for scan in scans[:64])]
    assert {prediction.batch_size for prediction in first} == {32}
    right = [prediction.digit == scan.digit for prediction, scan in zip(first, scans[:64], strict=True)]
    assert sum(right) >= 0.95 * 64
    assert all(sum(prediction.probabilities) == pytest.approx(1) for prediction in first)
    assert all(prediction.confidence == max(prediction.probabilities) for prediction in first)


def test_a_drawing_is_answered_over_http(page: TestClient) -> None:
    scan = page.get("/samples?start=3&count=1").json()[0]
    answer = page.post("/predict", json=scan["image"])
    assert answer.status_code == 200
    assert answer.json()["digit"] == scan["digit"]
    assert answer.json()["batch_size"] == 1


@pytest.mark.parametrize(
    ("pixels", "fault"),
    [
        ([[0] * 8] * 7, "length >= 8"),
        ([[0] * 9] * 8, "length <= 8"),
        ([[17] * 8] * 8, "<= 16"),
    ],
    ids=["7 rows", "9 columns", "a block of 17"],
)
def test_what_is_no_scan_is_refused(page: TestClient, pixels: list[list[int]], fault: str) -> None:
    answer = page.post("/predict", json={"pixels": pixels})
    assert answer.status_code == 422
    assert fault in answer.json()["detail"]


def test_samples_are_of_the_test_set(digits: ModuleType, page: TestClient) -> None:
    train, test = digits.load_scans()
    assert len(train) + len(test) == 1797
    samples = page.get("/samples").json()
    assert [sample["digit"] for sample in samples] == [scan.digit for scan in test[:10]]


def test_the_page_needs_nothing_from_elsewhere(page: TestClient) -> None:
    answer = page.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert re.findall(r"""(?:src|href)=["'](?!data:)|url\(|@import|https?://""", answer.text) == []


@pytest.mark.parametrize(
    "ways",
    [
        ["HTTP", "call", "threads"],
        pytest.param(["HTTP", "call", "remote", "threads"], marks=pytest.mark.cluster),
    ],
    ids=["local", "ray"],
)
def test_the_client_reports_all_ways(
    ways: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn", reason=NEEDS_SKLEARN)
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps a token there
    command = [sys.executable, str(EXAMPLES / "digits/client.py")]
    if "remote" not in ways:
        command.append("--local")
    finished = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert finished.returncode == 0, finished.stderr
    assert ("remote   left out" in finished.stdout) == ("remote" not in ways)
    reports = re.findall(r"^(\w+) +accuracy (\S+) .* mean batch +(\S+)", finished.stdout, re.MULTILINE)
    assert [way for way, _, _ in reports] == ways
    assert all(float(accuracy) >= 0.95 for _, accuracy, _ in reports)
    assert len({accuracy for _, accuracy, _ in reports}) == 1
    # 64 in flight, or 8 threads, over two replicas.
    assert all(float(batch) >= (2 if way == "threads" else 8) for way, _, batch in reports), reports


async def test_the_client_asks_a_running_server(
    digits: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "app", digits)
    client = load("digits/client.py")
    _, scans = digits.load_scans()
    async with serveit.serve(digits.app, local=True, http={"port": 0}) as running:
        await client.ask_running(running.url, scans[:128])
    assert re.match(r"HTTP +accuracy (0\.9|1\.0)", capsys.readouterr().out)


# -- compose ---------------------------------------------------------------------------------


@pytest.fixture
def compose(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Under the name that it has for who runs it: on Ray replicas import it."""
    pytest.importorskip("sklearn", reason=NEEDS_SKLEARN)
    monkeypatch.syspath_prepend(EXAMPLES / "compose")
    monkeypatch.delitem(sys.modules, "app", raising=False)
    monkeypatch.setitem(sys.modules, "app", importlib.import_module("app"))
    return sys.modules["app"]


async def check_compose(client: serveit.Client, scans: Any, digits: Any) -> None:
    """The vote is right more often than either of those that it asks is alone."""
    vote = client.get_handle("Vote")
    verdicts = [verdict async for verdict in vote.map([scan.tolist() for scan in scans])]
    right = {"both": 0, "neighbours": 0, "forest": 0}
    for verdict, digit in zip(verdicts, digits, strict=True):
        for name, said in {"both": verdict["digit"], **verdict["opinions"]}.items():
            right[name] += said == digit
        assert verdict["agreed"] == (len({*verdict["opinions"].values()}) == 1)
    assert right["both"] >= max(right.values()) - 1 and right["both"] >= 0.95 * len(digits)
    disagreements = await vote.disagreements.call(len(scans))
    assert disagreements == {i: verdict for i, verdict in enumerate(verdicts) if not verdict["agreed"]}
    assert disagreements


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.cluster)], scope="session")
def local(request: pytest.FixtureRequest) -> bool:
    """Whether it runs in this process; else on the Ray of this session."""
    if request.param == "ray":
        request.getfixturevalue("instance")
    return bool(request.param == "local")


async def test_compose_votes(local: bool, compose: ModuleType) -> None:
    _, scans, _, digits = compose.load_scans()
    http = {"port": 0} if local else None
    async with serveit.serve(compose.app, local=local, name="compose", prefix="/c", http=http) as client:
        await check_compose(client, scans[:200], digits[:200])
        backends = (await client.status())["backends"]
        counts = {name: len(replicas) for name, replicas in backends.items()}
        assert counts == {"Neighbours": 1, "Forest": 2, "Vote": 1}


def test_compose_answers_over_http_what_its_readme_shows(compose: ModuleType) -> None:
    readme = (EXAMPLES / "compose/README.md").read_text(encoding="utf-8")
    shown = re.search(r"\$ curl 'localhost:8000(\S+)'\n(.+)", readme)
    assert shown is not None
    with TestClient(compose.app) as client:
        assert client.get(shown[1]).text == shown[2]
        answer = client.post("/vote", json=[0] * 63)
        assert answer.status_code == 422 and "length >= 64" in answer.json()["detail"]


def test_compose_s_own_client(
    compose: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program in its README prints what the answer above it holds."""
    readme = (EXAMPLES / "compose/README.md").read_text(encoding="utf-8")
    shown = re.search(r"^(\{.*\})$", readme, re.MULTILINE)
    program = re.search(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert shown is not None and program is not None
    monkeypatch.setattr(serveit, "connect", lambda: serveit.serve(compose.app, local=True, http={"port": 0}))
    exec(compile(program[1], "README.md", "exec"), {})
    verdicts = json.loads(shown[1])
    assert capsys.readouterr().out == "".join(f"{index} {verdict}\n" for index, verdict in verdicts.items())


async def test_compose_asks_for_a_second_opinion_only_where_it_is_needed(compose: ModuleType) -> None:
    _, scans, _, digits = compose.load_scans()
    async with testing.local(compose.app) as client:
        second_opinion = client.get_handle("Vote").second_opinion
        said = [digit async for digit in second_opinion.map(scan.tolist() for scan in scans[:200])]
        sure = [p async for p in client.get_handle("Neighbours").map(scan.tolist() for scan in scans[:200])]
    assert sum(found == digit for found, digit in zip(said, digits, strict=False)) >= 0.95 * len(said)
    changed = [p.max() for found, p in zip(said, sure, strict=True) if found != p.argmax()]
    assert changed and max(changed) < 0.8


def test_compose_is_short() -> None:
    assert len((EXAMPLES / "compose/app.py").read_text().splitlines()) < 90

"""The examples run: hello, and digits with its client, on real scans."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from serveit import App
from serveit.testing import TestClient, local

EXAMPLES = Path(__file__).parent.parent / "examples"


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
    pytest.importorskip("sklearn", reason="the digits example needs scikit-learn (group `examples`)")
    return load("digits/app.py")


@pytest.fixture(scope="module")
def page(digits: ModuleType) -> Iterator[TestClient]:
    with TestClient(digits.app) as client:
        yield client


def test_every_example_is_tested_here() -> None:
    names = {path.name for path in EXAMPLES.iterdir() if (path / "app.py").is_file()}
    assert names == {"hello", "digits"}


def test_hello_greets() -> None:
    app: App = load("hello/app.py").app
    with TestClient(app) as client:
        assert client.get("/hello/Ada").text == "Hello, Ada!"
        assert client.get("/hello/Ada?shout=true").text == "HELLO, ADA!"


def test_hello_is_ten_lines() -> None:
    assert len((EXAMPLES / "hello/app.py").read_text().splitlines()) <= 10


async def test_digits_are_recognised_in_batches(digits: ModuleType) -> None:
    _, scans = digits.load_scans()
    async with local(digits.app) as client:
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


def test_the_client_reports_both_ways() -> None:
    pytest.importorskip("sklearn", reason="the digits example needs scikit-learn (group `examples`)")
    command = [sys.executable, str(EXAMPLES / "digits/client.py")]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert finished.returncode == 0, finished.stderr
    reports = re.findall(r"^(\w+) +accuracy (\S+) .* mean batch +(\S+)", finished.stdout, re.MULTILINE)
    assert [way for way, _, _ in reports] == ["handle", "HTTP"]
    assert all(float(accuracy) >= 0.95 for _, accuracy, _ in reports)
    assert len({accuracy for _, accuracy, _ in reports}) == 1
    assert all(float(batch) >= 8 for _, _, batch in reports)


async def test_the_client_asks_a_running_server(
    digits: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import serveit

    monkeypatch.setitem(sys.modules, "app", digits)
    client = load("digits/client.py")
    _, scans = digits.load_scans()
    async with serveit.serve(digits.app, local=True, http={"port": 0}) as running:
        await client.ask_running(running.url, scans[:128])
    assert re.match(r"HTTP +accuracy (0\.9|1\.0)", capsys.readouterr().out)

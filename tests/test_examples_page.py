"""The digits page in a real browser: digits drawn with the mouse are recognised. Needs chromium."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

import serveit
from tests.test_examples import NEEDS_SKLEARN, load

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
START_S = 20.0
STEP_S = 10.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: the page is not looked at"),
]

Point = tuple[float, float]


def arc(x: float, y: float, radius_x: float, radius_y: float, begin: int, end: int) -> list[Point]:
    """Points of an ellipse, from `begin` to `end` degrees (clockwise: y points down)."""
    angles = [math.radians(begin + (end - begin) * step / 24) for step in range(25)]
    return [(x + radius_x * math.cos(angle), y + radius_y * math.sin(angle)) for angle in angles]


STROKES: dict[int, list[list[Point]]] = {
    0: [arc(0.5, 0.5, 0.22, 0.35, -90, 270)],
    1: [[(0.38, 0.3), (0.52, 0.15), (0.52, 0.5), (0.52, 0.85)]],
    3: [arc(0.48, 0.32, 0.2, 0.17, -150, 90) + arc(0.48, 0.67, 0.22, 0.18, -90, 150)],
    7: [[(0.28, 0.17), (0.72, 0.17), (0.58, 0.5), (0.45, 0.85)]],
}


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[int]:
    """A headless chromium; the port of its DevTools."""
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += ["--disable-background-networking", "--remote-debugging-port=0", "--window-size=1100,900"]
    process = subprocess.Popen(
        [CHROMIUM, *flags, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    written = profile / "DevToolsActivePort"
    try:
        if not until(lambda: written.is_file() and len(written.read_text().split()) == 2, START_S):
            pytest.skip(f"{CHROMIUM} does not start here: the page is not looked at")
        yield int(written.read_text().split()[0])
    finally:
        process.terminate()
        try:
            process.wait(STEP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Browser:
    """A page of a running chromium, driven over the DevTools protocol."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self.faults: list[Any] = []
        for domain in ("Page", "Runtime", "Log"):
            self.do(f"{domain}.enable")

    def do(self, method: str, **params: Any) -> Any:
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=STEP_S))
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.faults.append(message["params"])
            if message.get("id") == number:
                return message.get("result", {})

    def evaluate(self, expression: str) -> Any:
        return (
            self.do("Runtime.evaluate", expression=expression, returnByValue=True)
            .get("result", {})
            .get("value")
        )

    def text(self, element: str) -> str:
        return str(self.evaluate(f"document.getElementById({element!r}).textContent"))

    def click(self, selector: str) -> None:
        self.evaluate(f"document.querySelector({selector!r}).click()")

    def draw(self, strokes: list[list[Point]]) -> None:
        """With the mouse; points are in units of the drawing area's side."""
        box = "document.getElementById('pad').getBoundingClientRect()"
        left, top, side = self.evaluate(f"[{box}.left, {box}.top, {box}.width]")
        for stroke in strokes:
            points = [{"x": left + x * side, "y": top + y * side} for x, y in stroke]
            self._mouse("mousePressed", points[0], buttons=1)
            for point in points[1:]:
                self._mouse("mouseMoved", point, buttons=1)
            self._mouse("mouseReleased", points[-1], buttons=0)

    def _mouse(self, event: str, point: dict[str, float], buttons: int) -> None:
        more = {"button": "left", "buttons": buttons, "clickCount": 1}
        self.do("Input.dispatchMouseEvent", type=event, **point, **more)


def until(predicate: Callable[[], object], timeout_s: float = STEP_S) -> bool:
    """Whether it became true in time. (The browser is another process: there is no event to wait for.)"""
    deadline = time.monotonic() + timeout_s
    while not predicate():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    pytest.importorskip("sklearn", reason=NEEDS_SKLEARN)
    connect = pytest.importorskip("websockets.sync.client", reason="a browser is driven by one").connect
    app = load("digits/app.py").app
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(serveit.serve(app, local=True, http={"port": 0}))
        port = stack.enter_context(chromium(tmp_path))
        with urlopen(f"http://127.0.0.1:{port}/json", timeout=STEP_S) as listed:
            pages = [target for target in json.load(listed) if target["type"] == "page"]
        address = pages[0]["webSocketDebuggerUrl"]
        browser = Browser(stack.enter_context(connect(address, max_size=None, proxy=None)))
        browser.do("Page.navigate", url=client.url)
        assert until(lambda: browser.evaluate("document.querySelectorAll('#samples button').length"))
        yield browser


def test_drawn_digits_and_real_scans_are_recognised(browser: Browser) -> None:
    for digit, strokes in STROKES.items():
        browser.click("#clear")
        assert browser.text("digit") == ""
        browser.draw(strokes)
        assert until(lambda: not browser.evaluate("asking || Boolean(wanted)"))
        assert browser.text("digit") == str(digit)
        assert browser.text("batch") == "1"
        assert browser.text("latency").endswith(" ms")
        assert browser.text("spoken").startswith(f"The model says {digit}, ")
        assert browser.evaluate("document.querySelectorAll('#bars .top').length") == 1

    browser.click("#samples button")
    assert until(lambda: browser.text("truth").startswith("Right: it is a "))
    assert browser.faults == []

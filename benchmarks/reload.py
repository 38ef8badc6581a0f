"""How long does saved code take to answer? And does a request fail meanwhile?

`serveit run --reload` of the example `hello` on an embedded Ray, saved again and again under 50 requests/s.
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar
from urllib.request import urlopen

from report import Report, command_line, command_of

Found = TypeVar("Found")
APP = Path(__file__).parents[1] / "examples" / "hello" / "app.py"
PER_SECOND, CLIENTS = 50, 8
LONGEST_S = 30.0
NOTES = (
    "Each round saves the file once, as editors do: a file beside it is renamed to it. *Noticed* is when the "
    "command says that the file changed; then it starts a process that imports the app and says what it is "
    "to be. New code answers when a replica with it is up; the old one then ends its requests, and stops.",
    f"Requests come at a fixed {PER_SECOND}/s, each on a connection of its own. One has failed if it got no "
    "answer, or another one than what the app said before or after a save.",
)


@dataclass(frozen=True)
class Save:
    """One save, in seconds from it on."""

    noticed_s: float
    first_new_s: float
    last_old_s: float


@dataclass(frozen=True)
class Answer:
    """What a request got; a text of ours or an error's."""

    at: float
    text: str


class Client:
    """Asks at a fixed rate, whatever the answers take."""

    def __init__(self, url: str) -> None:
        self.answers: list[Answer] = []
        self._url = url
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(CLIENTS)
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Client:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._pool.shutdown()

    def _run(self) -> None:
        begun = time.monotonic()
        for number in range(sys.maxsize):
            if self._stop.wait(max(0.0, begun + number / PER_SECOND - time.monotonic())):
                return
            self._pool.submit(self._ask)

    def _ask(self) -> None:
        try:
            with urlopen(self._url, timeout=10) as answer:
                text = answer.read().decode()
        except OSError as error:
            text = f"failed: {error!r}"
        self.answers.append(Answer(time.monotonic(), text))


class Command:
    """The running command, and when it said what."""

    def __init__(self, folder: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "serveit", "run", "app.py", "--reload", "--port", "0"],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        self.lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append((time.monotonic(), line.rstrip()))

    def find(self, pattern: str, since: float = 0.0) -> tuple[float, re.Match[str]] | None:
        """The first line that it is found in, and when that was said."""
        found = ((at, re.search(pattern, line)) for at, line in list(self.lines) if at >= since)
        return next(((at, match) for at, match in found if match is not None), None)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)
        self._reader.join()
        self._process.wait()


@contextmanager
def running(folder: Path) -> Iterator[Command]:
    command = Command(folder)
    try:
        yield command
    finally:
        command.stop()


def main() -> None:
    options = command_line(__doc__, seconds=2, rounds=10).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, "Hello")
        with running(folder) as command:
            _, serving = wait_for(lambda: command.find(r"^serving (\S+)"), "the first code to answer")
            with Client(f"{serving[1]}/hello/Ada") as client:
                measured = []
                for number in range(options.rounds):
                    time.sleep(options.seconds)
                    measured.append(save(folder, command, client, number))
                time.sleep(options.seconds)
            failed = sum(
                not re.fullmatch(r"(Hello|Saved\d+), Ada!", answer.text) for answer in client.answers
            )
    report = Report(
        "From a save to the new code's answer",
        command_of("reload.py", options),
        NOTES,
        ["from a save to", "median s", "max s"],
        [*summarise(measured), ["requests that failed", f"{failed} of {len(client.answers):,}", ""]],
        {"saves": [asdict(one) for one in measured], "requests": len(client.answers), "failed": failed},
    )
    report.publish("reload", options)


def write(folder: Path, greeting: str) -> float:
    """Save the app with another greeting; when that was."""
    written = folder / "app.tmp"
    written.write_text(APP.read_text(encoding="utf-8").replace("Hello", greeting), encoding="utf-8")
    saved = time.monotonic()
    written.rename(folder / "app.py")
    return saved


def save(folder: Path, command: Command, client: Client, number: int) -> Save:
    """Save once, and see who answers what from then on."""
    new = f"Saved{number}, Ada!"
    saved = write(folder, f"Saved{number}")

    def first_new() -> Answer | None:
        return next((answer for answer in client.answers if answer.text == new), None)

    first = wait_for(first_new, "the new code to answer")
    noticed, _ = wait_for(lambda: command.find("changed: starting", saved), "the change to be noticed")
    wait_for(lambda: command.find("^serving", saved), "the new code to be in force")
    time.sleep(0.5)
    last_old = max((answer.at for answer in client.answers if answer.text != new), default=saved)
    return Save(noticed - saved, first.at - saved, last_old - saved)


def summarise(measured: list[Save]) -> Iterator[list[str]]:
    named = {
        "noticed": [one.noticed_s for one in measured],
        "first answer of the new code": [one.first_new_s for one in measured],
        "last answer of the old code": [one.last_old_s for one in measured],
    }
    for name, values in named.items():
        yield [name, f"{statistics.median(values):.2f}", f"{max(values):.2f}"]


def wait_for(look: Callable[[], Found | None], what: str) -> Found:
    """What `look` finds, as soon as it finds something."""
    deadline = time.monotonic() + LONGEST_S
    while (found := look()) is None:
        if time.monotonic() > deadline:
            sys.exit(f"reload.py: not within {LONGEST_S:g} s: {what}")
        time.sleep(0.005)
    return found


if __name__ == "__main__":
    main()

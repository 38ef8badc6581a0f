"""How soon does everybody go by a change of traffic? Three Ray nodes, a server on each, handles on two.

Each asks on and on while `set_traffic` sends all requests from one backend to the other and back. A change is
seen by a caller when the first of its requests begins of which, and after which, none goes the old way.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import ray
from ray.cluster_utils import Cluster
from report import Report, command_line, command_of

import serveit

NODES = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
PAUSE_S = 0.005
"""Between two requests of one caller."""
QUIET_S = 0.3
"""After a change has returned, at least."""
ELSEWHERE = "elsewhere"
"""The resource that only the nodes without the driver have."""

NOTES = (
    "Milliseconds since the call of `set_traffic`, over all changes. The nodes are on one machine, each on "
    "an address of its own; the driver, which makes the changes, is on the first. Every caller asks again "
    f"{1e3 * PAUSE_S:g} ms after each answer, so that a figure is too long by up to that and a request. "
    "*returned*: `set_traffic` came back, which it does when all have the change.",
)

app = serveit.App()


@app.backend(name="blue")
async def blue() -> str:
    return "blue"


@app.backend(name="green")
async def green() -> str:
    return "green"


app.add_route("/ask", traffic={"blue": 1.0, "green": 0.0}, name="ask")


class Answer(NamedTuple):
    """Times are of `time.monotonic`, the same clock in all processes of a machine."""

    begun: float
    ended: float
    backend: str


@dataclass
class Caller:
    """Asks on and on, and notes when, and which backend answered."""

    ask: Callable[[], str]
    answers: list[Answer] = field(default_factory=list)
    ends: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while not self.ends.wait(PAUSE_S):
            begun = time.monotonic()
            backend = self.ask()
            self.answers.append(Answer(begun, time.monotonic(), backend))


class Far:
    """A caller in an actor on another node, with a handle that was pickled into it."""

    def __init__(self, handle: serveit.SyncHandle[[], str]) -> None:
        self._caller = Caller(handle.call)

    def run(self) -> list[Answer]:
        self._caller.run()
        return self._caller.answers

    def num_answers(self) -> int:
        return len(self._caller.answers)

    def end(self) -> None:
        self._caller.ends.set()


@dataclass(frozen=True)
class Change:
    """One change, in seconds since `set_traffic` was called.

    Attributes:
        returned_s: when it returned.
        seen_s: by caller, when it went by it.
    """

    returned_s: float
    seen_s: dict[str, float]


def main() -> None:
    if sys.platform != "linux":
        sys.exit("traffic_change.py: nodes on 127.0.0.2 and further need Linux")
    options = command_line(__doc__, seconds=1, rounds=50).parse_args()
    changes = measure(options.rounds)
    report = Report(
        f"From `set_traffic` to everybody's next request: {options.rounds} changes",
        command_of("traffic_change.py", options),
        NOTES,
        ["caller", "median ms", "longest ms"],
        list(summarise(changes)),
        [asdict(change) for change in changes],
    )
    report.publish("traffic_change", options)


def summarise(changes: Sequence[Change]) -> Iterator[list[str]]:
    columns = {name: [change.seen_s[name] for change in changes] for name in changes[0].seen_s}
    columns["the last of all"] = [max(change.seen_s.values()) for change in changes]
    columns["returned"] = [change.returned_s for change in changes]
    for name, column in columns.items():
        yield [name, f"{1e3 * statistics.median(column):.0f}", f"{1e3 * max(column):.0f}"]


def measure(rounds: int) -> list[Change]:
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # Ray's workers start twice as fast with bytecode
    with three_nodes():
        http_options = {"location": "EveryNode", "host": "node", "port": free_port()}
        with serveit.serve(app, http=http_options, log_level="warning") as client:
            return change_on(client, http_options["port"], rounds)


def change_on(client: serveit.SyncClient, port: int, rounds: int) -> list[Change]:
    """Make the changes, while everybody asks."""
    callers = {f"server on {node}": Caller(over_http(node, port)) for node in NODES}
    callers["handle in the driver"] = Caller(client.get_handle("ask").call)
    threads = [threading.Thread(target=caller.run) for caller in callers.values()]
    handle = client.get_handle("ask")
    far = ray.remote(num_cpus=0, max_concurrency=3, resources={ELSEWHERE: 1})(Far).remote(handle)
    far_answers = far.run.remote()
    for thread in threads:
        thread.start()

    def num_answers() -> list[int]:
        return [*(len(caller.answers) for caller in callers.values()), ray.get(far.num_answers.remote())]

    def wait_for_all() -> None:
        """Until everybody has begun a request, and got its answer."""
        before = num_answers()
        while any(now < then + 2 for now, then in zip(num_answers(), before, strict=True)):
            time.sleep(PAUSE_S)

    made = []
    try:
        wait_for_all()
        for number in range(rounds):
            old, new = ("green", "blue") if number % 2 else ("blue", "green")
            begun = time.monotonic()
            client.set_traffic("ask", {old: 0.0, new: 1.0})
            returned = time.monotonic()
            time.sleep(QUIET_S)
            wait_for_all()
            made.append((begun, returned, time.monotonic(), new))
    finally:
        ray.get(far.end.remote())
        for caller in callers.values():
            caller.ends.set()
        for thread in threads:
            thread.join()
    answers = {name: caller.answers for name, caller in callers.items()}
    answers["handle on another node"] = ray.get(far_answers)
    return [
        Change(
            returned - begun,
            {name: seen(noted, begun, end, new) - begun for name, noted in answers.items()},
        )
        for begun, returned, end, new in made
    ]


def seen(answers: Sequence[Answer], begun: float, end: float, new: str) -> float:
    """When the first request began after which all went the new way, of those between `begun` and `end`."""
    since = [answer for answer in answers if begun <= answer.begun and answer.ended <= end]
    old = [index for index, answer in enumerate(since) if answer.backend != new]
    first = old[-1] + 1 if old else 0
    if first == len(since):
        raise RuntimeError(f"a caller still went the old way {end - begun:.1f} s after the change")
    return since[first].begun


def over_http(node: str, port: int) -> Callable[[], str]:
    connection = http.client.HTTPConnection(node, port, timeout=5)

    def ask() -> str:
        connection.request("GET", "/ask")
        return connection.getresponse().read().decode()

    return ask


@contextlib.contextmanager
def three_nodes() -> Iterator[None]:
    def options(address: str) -> dict[str, object]:
        return {"node_ip_address": address, "num_cpus": 2, "object_store_memory": 80_000_000}

    head, *others = NODES
    cluster = Cluster(initialize_head=True, head_node_args={**options(head), "include_dashboard": False})
    try:
        for address in others:
            cluster.add_node(**options(address), resources={ELSEWHERE: 1})
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def free_port() -> int:
    """One that is free at each of the nodes."""
    while True:
        with contextlib.ExitStack() as stack:
            port = 0
            try:
                for node in NODES:
                    taken = stack.enter_context(socket.socket())
                    taken.bind((node, port))
                    port = taken.getsockname()[1]
            except OSError:
                continue
            return port


if __name__ == "__main__":
    main()

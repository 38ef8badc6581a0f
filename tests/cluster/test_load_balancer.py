"""EveryNode behind a real load balancer that loses one of three nodes under load."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.balancers import ROOT, Balancer, haproxy, needs_haproxy, needs_nginx, nginx
from tests.cluster.drivers import Driver, driver
from tests.cluster.nodes import free_port, listens, nodes_environment
from tests.commands import fetch
from tests.ledger import Ledger
from tests.support import wait_until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(180),
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.0.1 is the only address on loopback"),
]

NODES = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
LOST = NODES[1]
START_S = 120.0
RATE = 100.0
WORK_S = 0.05
SOME = 100
"""Requests: a second's worth."""
BACK_S = 30.0
"""What a node's server gets to be there again, and in use, on a busy machine."""
LATE_S = 1.0
"""By how much what is noted here may be late, on a busy machine."""
GAP_S = 5.0
"""The longest time without an answer, while a node is lost."""

APP = """
    import ray
    import serveit
    from tests.account import Echo, recorded

    app = serveit.App()

    @app.route("/ask")
    @app.backend(num_replicas=3, ray_actor_options={"num_cpus": 1})
    class Ask:
        def __init__(self) -> None:
            self.node = ray.util.get_node_ip_address()

        async def __call__(self, log: str, id: str) -> Echo:
            return await recorded(log, id, self.node, WORK_S)
"""

SCRIPT = """
    import shutil
    import sys

    import ray
    import serveit
    from ray.cluster_utils import Cluster
    from serveit.cluster.session import Session

    from app import app

    port, head, *others = sys.argv[1:]

    def start(address):
        return dict(node_ip_address=address, num_cpus=1, object_store_memory=80_000_000)

    def say(*words):
        sys.stdout.write(" ".join(map(str, words)) + "\\n")
        sys.stdout.flush()

    cluster = Cluster(initialize_head=True, head_node_args=dict(start(head), include_dashboard=False))
    try:
        nodes = {address: cluster.add_node(**start(address)) for address in others}
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        folder = Session().folder
        http = {"location": "EveryNode", "host": "node", "port": int(port)}
        with serveit.serve(app, name="balanced", http=http) as client:
            say("serving", client.url)
            while command := input().split():
                verb, address = command
                if verb == "lose":
                    cluster.remove_node(nodes.pop(address), allow_graceful=False)
                else:
                    nodes[address] = cluster.add_node(**start(address))
                say("done", verb, address)
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    say("ended", "well")
"""


class Nodes:
    """Three nodes with a server and a replica each."""

    def __init__(self, running: Driver, port: int) -> None:
        self._running = running
        self._port = port

    @property
    def servers(self) -> list[str]:
        return [f"{address}:{self._port}" for address in NODES]

    async def lose(self, address: str) -> None:
        """Its raylet is killed; what it had started notices after a while, and ends."""
        await self._do(f"lose {address}")

    async def add(self, address: str) -> None:
        await self._do(f"add {address}")
        await self.until_ready(address)

    def kill_server(self, address: str) -> None:
        """The process that listens there is killed."""
        pid = listener(address, self._port)
        os.kill(pid, signal.SIGKILL)

    async def until_ready(self, address: str) -> None:
        url = f"http://{address}:{self._port}/-/readyz"
        deadline = asyncio.get_running_loop().time() + BACK_S
        while True:
            with contextlib.suppress(OSError):
                if '"status":"ready"' in await asyncio.to_thread(fetch, url):
                    return
            assert asyncio.get_running_loop().time() < deadline, f"{url} does not answer"
            await asyncio.sleep(0.05)

    def listens(self, address: str) -> bool:
        return listens(address, self._port)

    async def _do(self, command: str) -> None:
        self._running.go_on(command)
        assert await asyncio.to_thread(self._running.says, "done") == command


def listener(address: str, port: int) -> int:
    """The process that listens at an address."""
    host = struct.unpack("=I", socket.inet_aton(address))[0]
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1] == f"{host:08X}:{port:04X}" and fields[3] == "0A":
            wanted = f"socket:[{fields[9]}]"
            for link in Path("/proc").glob("[0-9]*/fd/*"):
                with contextlib.suppress(OSError):
                    if os.readlink(link) == wanted:
                        return int(link.parts[2])
    raise AssertionError(f"nobody listens at {address}:{port}")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    folder = tmp_path_factory.mktemp("balanced")
    port = free_port(*NODES)
    (folder / "app.py").write_text(textwrap.dedent(APP).replace("WORK_S", str(WORK_S)))
    with nodes_environment() as environment:
        paths = [str(ROOT), environment.get("PYTHONPATH")]  # replicas import `tests.account`
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        with driver(folder, SCRIPT, str(port), *NODES, environment=environment) as running:
            running.wait_for("^serving ", START_S)
            yield Nodes(running, port)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path, for the sake of the socket in it."""
    with tempfile.TemporaryDirectory(prefix="balancer") as path:
        yield Path(path)


def started_on(log: Path) -> dict[str, str]:
    """By request, the node that it began to run on."""
    lines = (line.split() for line in log.read_text().splitlines())
    return {fields[1]: fields[3] for fields in lines if fields[0] == "start"}


def used_now(balancer: Balancer, server: str) -> int:
    """How many of HAProxy's connections to a server are in use, as the page tells to look it up."""
    head, *rows = (line.split() for line in balancer.command("show servers conn ready").splitlines() if line)
    (row,) = (row for row in rows if row[0] == f"ready/{server}")
    return int(row[head.index("used_cur") - 1])  # the head begins with a "#"


async def in_use_again(load: Ledger) -> None:
    """The node that was lost answers: its replica, at least."""
    back = load.mark
    for _ in range(20):
        await load.more(SOME)
        if LOST in load.versions(since=back):
            return
    raise AssertionError(f"the replica of {LOST} is not asked any more: {load.report(back)}")


@needs_haproxy
async def test_haproxy_drains_a_server_and_loses_it(nodes: Nodes, folder: Path) -> None:
    """One request per connection: then HAProxy writes down, for each that fails, where it had been sent."""
    log = folder / "ledger"
    with haproxy(folder, nodes.servers) as balancer:
        async with Ledger(
            balancer.url, path=f"/ask?log={log}", rate=RATE, log=log, fields={"connection": "close"}
        ) as load:
            await load.more(SOME)
            assert load.versions() == {*NODES}
            for group in "ready", "alive":
                balancer.command(f"set server {group}/node2 state drain")
            await wait_until(lambda: used_now(balancer, "node2") == 0, BACK_S, "nothing runs there")
            drained = load.mark
            await load.more(SOME)
            ready = load.mark
            for group in "ready", "alive":
                balancer.command(f"set server {group}/node2 state ready")
            await load.more(SOME)

            nodes.kill_server(LOST)
            killed = asyncio.get_running_loop().time()
            await load.more(2 * SOME)
            await nodes.until_ready(LOST)
            await wait_until(
                lambda: "ready/node2 is UP, reason" in balancer.log.read_text(), BACK_S, "it is back"
            )
            back = load.mark
            await load.more(SOME)
        sent_to = balancer.sent_to()
    load.report(until=ready).check()
    load.report(since=back).check()
    load.report().check(max_failed=SOME, max_gap_s=GAP_S)
    sent = [
        [sent_to[entry.id] for entry in part] for part in (load.entries[drained:ready], load.entries[back:])
    ]
    assert "node2" not in sent[0], "it was drained"
    assert {*sent[1]} == {"node1", "node2", "node3"}
    for entry in load.entries:
        if not entry.is_ok:  # HAProxy's own 502
            assert (entry.outcome, sent_to[entry.id]) == ("502", "node2"), entry
            assert entry.due < killed + LATE_S, entry


@needs_haproxy
async def test_haproxy_loses_a_node(nodes: Nodes, folder: Path) -> None:
    log = folder / "ledger"
    with haproxy(folder, nodes.servers) as balancer:
        async with Ledger(balancer.url, path=f"/ask?log={log}", rate=RATE, log=log) as load:
            await load.more(SOME)
            assert load.versions() == {*NODES}
            await nodes.lose(LOST)
            await wait_until(lambda: not nodes.listens(LOST), BACK_S, "its server is gone")
            ended = asyncio.get_running_loop().time()
            await load.more(2 * SOME)
            gone = load.mark
            await load.more(SOME)
            assert load.versions(since=gone) == {NODES[0], NODES[2]}
            added = load.mark
            await nodes.add(LOST)
            await in_use_again(load)
        sent_to = balancer.sent_to()
    load.report(since=gone, until=added).check()
    load.report(since=added).check()
    load.report().check(max_failed=gone, max_gap_s=GAP_S)
    ran_on = started_on(log)
    for entry in load.entries:
        if entry.outcome == "502, executed: maybe":
            assert ran_on.get(entry.id, LOST) == LOST, entry
        elif not entry.is_ok:  # HAProxy's own 502, or, where the connection had been used before, its end
            assert entry.status in (502, None) and entry.due < ended + LATE_S, entry
            assert sent_to.get(entry.id, "node2") == "node2", entry


@needs_nginx
async def test_nginx_loses_a_server(nodes: Nodes, folder: Path) -> None:
    log = folder / "ledger"
    with nginx(folder, nodes.servers) as balancer:
        async with Ledger(balancer.url, path=f"/ask?log={log}", rate=RATE, log=log) as load:
            await load.more(SOME)
            assert load.versions() == {*NODES}
            nodes.kill_server(LOST)
            await load.more(SOME)
            await nodes.until_ready(LOST)
            await load.more(2 * SOME)
            back = load.mark
            await load.more(SOME)
    load.report(since=back).check()
    report = load.report().check(max_failed=SOME, max_gap_s=GAP_S)
    assert report.failed.keys() <= {"502"}, report

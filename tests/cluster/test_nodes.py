"""Several nodes: an HTTP server on each, that comes and goes with it; and what is taken over of a
controller that died."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import pytest

from serveit import HTTPOptions
from serveit.clock import LoopClock
from serveit.cluster.contact import find_controller, join
from serveit.cluster.launching import RayLauncher
from serveit.control.keeper import names_prefix
from serveit.control.orders import ProxyOrder, Started
from serveit.control.processes import ProcessDied
from serveit.control.proxies import KeptProxies, KeptServer, Proxies
from tests.cluster.drivers import driver
from tests.cluster.instance import KEEPER, Instance
from tests.cluster.nodes import free_port, listens, nodes_environment
from tests.commands import fetch
from tests.scrapes import Scrape
from tests.support import wait_until

pytestmark = pytest.mark.cluster

HEAD, SECOND, THIRD, FOURTH = "127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5"
"""The head may not be on 127.0.0.1: Ray takes that for the machine's address on the network."""
START_S, JOIN_S, LEAVE_S = 80.0, 10.0, 5.0
BOTH = {HEAD, SECOND}

APP = """
    import ray
    import serveit

    app = serveit.App()

    @app.route("/where")
    @app.backend
    async def where() -> str:
        return ray.util.get_node_ip_address()
"""

SCRIPT = """
    import asyncio
    import shutil
    import sys
    import time

    import ray
    import serveit
    from ray.cluster_utils import Cluster
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    from serveit.cluster.instance import open_instance
    from serveit.cluster.session import Session

    from app import app

    head, second, third, fourth, port = sys.argv[1:]

    @ray.remote(num_cpus=1)
    class Occupant:
        async def is_there(self):
            return True

    def occupy(node):
        there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        occupant = Occupant.options(scheduling_strategy=there).remote()
        ray.get(occupant.is_there.remote())
        return occupant

    def start(address):
        return dict(node_ip_address=address, num_cpus=1, object_store_memory=80_000_000)

    async def servers():
        async with open_instance(None) as instance:
            proxies = (await instance.status())["proxies"].values()
        return sorted(proxy["address"] for proxy in proxies if proxy["state"] == "ready")

    def follow_nodes(client):
        say("url", client.url, *asyncio.run(servers()))
        ray.kill(on_head)  # there is room for a replica now, and none on the second node
        on_second = occupy(nodes[second])
        client.update("where", num_replicas=2)
        say("updated", 2)
        cluster.remove_node(nodes.pop(second))
        say("removed", second)
        nodes[third] = cluster.add_node(**start(third))
        say("added", third)
        nodes[fourth] = cluster.add_node(**start(fourth))
        while len(there := asyncio.run(servers())) < 3:
            time.sleep(0.1)
        say("three", *there)
        cluster.remove_node(nodes.pop(third), allow_graceful=False)
        say("lost", third)
        while sum(node["Alive"] for node in ray.nodes()) > 2:
            time.sleep(0.1)
        say("missed", third)
        while len(there := asyncio.run(servers())) > 2:
            time.sleep(0.1)
        say("left", *there)

    def say(*words):
        sys.stdout.write(" ".join(map(str, words)) + "\\n")  # at once: Ray prints in between
        sys.stdout.flush()
        input()

    cluster = Cluster(initialize_head=True, head_node_args=dict(start(head), include_dashboard=False))
    try:
        nodes = {second: cluster.add_node(**start(second))}
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        folder = Session().folder
        on_head = occupy(cluster.head_node)  # so that the replica comes to the second node
        http = {"location": "EveryNode", "host": "node", "port": int(port)}
        with serveit.serve(app, name="nodes", http=http) as client:
            follow_nodes(client)
        silent = {"location": "NoServer", "port": int(port)}
        began = time.monotonic()
        with serveit.serve(app, name="nodes", http=silent) as client:
            took = time.monotonic() - began
            say("silent", client.url, client.get_handle("where").call(), int(took), *asyncio.run(servers()))
        with serveit.serve(app, name="nodes", http={"host": "node", "port": int(port)}) as client:
            say("alone", *asyncio.run(servers()))
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    print("ended", "well", flush=True)
"""


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    with nodes_environment() as environment:
        yield environment


def answers(address: str, port: int) -> str:
    """Which node's replica answers; what the server says if none does."""
    try:
        return fetch(f"http://{address}:{port}/where")
    except OSError as error:
        return str(error)


def wait_for_answers(address: str, port: int, wanted: set[str], timeout_s: float) -> None:
    begun = time.monotonic()
    seen: set[str] = set()
    while not seen >= wanted:
        assert time.monotonic() < begun + timeout_s, f"{address} has answered only {seen}"
        seen.add(answers(address, port))
        time.sleep(0.02)


def wait_for_the_rest(address: str, port: int, gone: str) -> None:
    """Only what runs on a node when it goes is lost with it; all else is answered, by the rest."""
    begun = time.monotonic()
    in_a_row = 0
    while in_a_row < 50:
        assert time.monotonic() < begun + LEAVE_S, f"{gone} is still asked"
        answer = answers(address, port)
        assert answer in (address, gone) or "was lost with the request on it" in answer
        in_a_row = in_a_row + 1 if answer == address else 0


def check_that_metrics_count_once(port: int) -> None:
    """Both servers together tell of everything, and neither of what the other tells of."""

    def scrapes() -> list[Scrape]:
        return [Scrape(fetch(f"http://{address}:{port}/-/metrics"), "nodes") for address in (HEAD, SECOND)]

    before = scrapes()
    for _ in range(10):
        answers(HEAD, port)
    for _ in range(5):
        answers(SECOND, port)
    after = scrapes()
    pairs = list(zip(after, before, strict=True))
    told = [new.since(old, "serveit_http_requests_total", "route", "status") for new, old in pairs]
    assert told == [{("/where", "200"): 10}, {("/where", "200"): 5}]
    ran = [new.since(old, "serveit_replica_requests_total", "replica") for new, old in pairs]
    assert sum(sum(each.values()) for each in ran) == 15
    up = [new.values("serveit_replica_up", "replica") for new in after]
    assert [list(each.values()) for each in up] == [[1], [1]] and up[0].keys() != up[1].keys()
    starts = [new.values("serveit_replica_starts_total", "backend") for new in after]
    assert starts == [{("where",): 2}, {}], "the head's tells what the controller counts"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.0.1 is the only address on loopback")
@pytest.mark.timeout(180)
def test_a_server_on_every_node_on_none_and_on_the_head(environment: dict[str, str], tmp_path: Path) -> None:
    port = free_port(HEAD, SECOND, THIRD, FOURTH)
    (tmp_path / "app.py").write_text(textwrap.dedent(APP))
    with driver(tmp_path, SCRIPT, HEAD, SECOND, THIRD, FOURTH, str(port), environment=environment) as running:
        assert running.wait_for("^url (.*)", START_S)[1] == f"http://{HEAD}:{port} {HEAD} {SECOND}"
        assert not listens("127.0.0.1", port) and not listens(THIRD, port)
        assert answers(SECOND, port) == SECOND
        assert answers(HEAD, port) == SECOND, "from node to node"

        running.go_on()
        assert running.says("updated") == "2"
        for address in BOTH:
            wait_for_answers(address, port, BOTH, LEAVE_S)
        check_that_metrics_count_once(port)

        running.go_on()
        assert running.says("removed") == SECOND
        wait_for_the_rest(HEAD, port, SECOND)
        assert not listens(SECOND, port)

        running.go_on()
        assert running.says("added") == THIRD
        wait_for_answers(THIRD, port, {HEAD}, JOIN_S)

        running.go_on()
        assert running.says("three") == f"{HEAD} {THIRD} {FOURTH}"
        for address in (HEAD, THIRD, FOURTH):
            wait_for_answers(address, port, {HEAD}, JOIN_S)

        running.go_on()
        assert running.says("lost") == THIRD
        assert [answers(HEAD, port) for _ in range(50)] == [HEAD] * 50, "none of its requests ran there"

        running.go_on()
        assert running.says("missed") == THIRD
        assert answers(HEAD, port) == HEAD
        running.go_on()
        assert running.says("left") == f"{HEAD} {FOURTH}"

        running.go_on()
        url, where, took, *servers = running.says("silent").split()
        assert url == "None" and where in (HEAD, FOURTH), "the two nodes that are left"
        assert servers == [] and int(took) < START_S / 2, "its route waits for no server"
        assert not any(listens(address, port) for address in (HEAD, SECOND, THIRD, FOURTH))

        running.go_on()
        assert running.says("alone") == HEAD, "HeadOnly is the default"
        assert answers(HEAD, port) in (HEAD, FOURTH) and not listens(FOURTH, port)
        running.go_on()
        assert running.says("ended") == "well" and running.end() == 0


async def test_a_server_outlives_who_started_it(instance: Instance) -> None:
    """Another controller finds it by name; who is connected to it notices nothing."""
    launcher = RayLauncher()
    (node,) = await launcher.nodes()
    options = msgspec.json.encode(HTTPOptions(port=0, location="EveryNode"))
    controller = find_controller()
    order = ProxyOrder(f"proxy-{secrets.token_hex(4)}", options, (await join(controller)).secret)
    names = [f"{names_prefix(order, node)}{number}" for number in (1, 2)]
    first = msgspec.structs.replace(order, id=names[0], node=node.id)
    started = await launcher.proxy(first).start()
    assert isinstance(started, Started)
    kept = msgspec.msgpack.encode(KeptProxies(order, {node.id: KeptServer(1, started)}))

    proxies = Proxies(launcher, LoopClock(), controller.forget.remote)
    try:
        await proxies.recover(kept, [names[0], "controller"])
        assert proxies.members == [names[0]] and proxies.url == started.address
        assert await proxies.open(options, None) == started
        assert await launcher.adopt(first).start() == started
        assert await asyncio.to_thread(fetch, f"{started.address}/{KEEPER}/nowhere")

        os.kill(started.pid, signal.SIGKILL)
        await wait_until(lambda: proxies.members == [names[1]], LEAVE_S, "another in its place")
        assert proxies.url == started.address
        assert await asyncio.to_thread(fetch, f"{started.address}/{KEEPER}/nowhere")
        with pytest.raises(ProcessDied, match=f"{names[0]} is gone"):
            await launcher.adopt(first).start()
    finally:
        await proxies.aclose(0.0)
    assert not listens("127.0.0.1", urlsplit(started.address).port or 0)

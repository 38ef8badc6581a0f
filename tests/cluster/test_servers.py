"""HTTP servers on Ray: their options in processes of their own, what they cost, and when they are ready."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import re
import secrets
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import msgspec
import pytest
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

import serveit
from serveit import App, HTTPOptions
from serveit.cluster.contact import find_controller, join
from serveit.cluster.launching import RayLauncher
from serveit.control.keeper import names_prefix
from serveit.control.orders import ProxyOrder, Started, StartFailed
from tests.cluster.instance import KEEPER, Instance
from tests.flow.gates import Gate
from tests.flow.pages import pages
from tests.support import wait_until

pytestmark = pytest.mark.cluster

MIB = 1024 * 1024
LARGE = 64 * MIB
NUM_GETS = 300
ROUNDS = 3
NEW_S = 10.0


def open_to_all(app: Any) -> Any:
    """A middleware's factory; servers import it."""
    return CORSMiddleware(app, allow_origins=["*"])


cors_with_options = Middleware(CORSMiddleware, allow_origins=["*"])


@contextlib.asynccontextmanager
async def starting(options: HTTPOptions) -> AsyncIterator[Started | StartFailed]:
    """Another server of the session's instance, in an actor of its own, with options of its own."""
    launcher = RayLauncher()
    (node,) = await launcher.nodes()
    secret = (await join(find_controller())).secret
    order = ProxyOrder(f"proxy-{secrets.token_hex(4)}", msgspec.json.encode(options), secret, tuple(sys.path))
    process = launcher.proxy(msgspec.structs.replace(order, id=f"{names_prefix(order, node)}1", node=node.id))
    try:
        outcome = await process.start()
        assert isinstance(outcome, Started | StartFailed)
        yield outcome
    finally:
        process.kill()
        await process.death()


@contextlib.asynccontextmanager
async def started(**options: Any) -> AsyncIterator[tuple[Started, httpx2.AsyncClient]]:
    async with starting(HTTPOptions(port=0, **options)) as outcome:
        assert isinstance(outcome, Started), outcome
        async with httpx2.AsyncClient(base_url=outcome.address, timeout=40) as http:
            yield outcome, http


def peak_bytes(pid: int) -> int:
    """The most memory that a process has held."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


# -- bodies ----------------------------------------------------------------------------------------


async def test_64_mib_both_ways_if_asked_for(instance: Instance) -> None:
    name = await instance.deployed(pages)
    body = os.urandom(MIB) * 64

    async def in_chunks() -> AsyncIterator[bytes]:
        for start in range(0, LARGE, 3 * MIB):
            yield body[start : start + 3 * MIB]

    fields = {"content-type": "application/octet-stream"}
    async with started(max_body_bytes=LARGE) as (server, http):
        assert (await http.get(f"/{name}/hello/Ada")).status_code == 200
        before = peak_bytes(server.pid)
        for content in (body, in_chunks()):
            reply = await http.post(f"/{name}/octets", content=content, headers=fields)
            assert reply.status_code == 200 and reply.content == body
        reply = await http.post(f"/{name}/octets", content=body + b"x", headers=fields)
        assert reply.status_code == 413 and "max_body_bytes=67,108,864" in reply.json()["detail"]
        assert peak_bytes(server.pid) - before < 3 * LARGE, "a body, and what joins its parts"


# -- middlewares -----------------------------------------------------------------------------------


@pytest.mark.parametrize("middleware", ["open_to_all", "cors_with_options"])
async def test_a_server_imports_its_middlewares(instance: Instance, middleware: str) -> None:
    name = await instance.deployed(pages)
    asked = {"origin": "http://elsewhere", "access-control-request-method": "GET"}
    async with started(middlewares=[f"{__name__}:{middleware}"]) as (_, http):
        replies = [
            await http.options("/nowhere", headers=asked),
            await http.get("/-/routes", headers=asked),
            await http.get(f"/{name}/hello/Ada", headers=asked),
        ]
    assert [reply.status_code for reply in replies] == [200, 200, 200]
    assert [reply.headers["access-control-allow-origin"] for reply in replies] == ["*"] * 3


@pytest.mark.parametrize(
    ("middleware", "text"),
    [
        (f"{__name__}:nothing_here", "ImportFailed: .*nothing_here"),
        ("no.such.module:factory", "ImportFailed: .*no.such.module"),
        (f"{__name__}:ROUNDS", f"TypeError: middleware '{__name__}:ROUNDS' is 3: it must be a factory"),
    ],
)
async def test_a_middleware_that_is_none_is_told_to_who_starts(
    instance: Instance, middleware: str, text: str
) -> None:
    async with starting(HTTPOptions(port=0, middlewares=[middleware])) as outcome:
        assert isinstance(outcome, StartFailed)
        assert re.match(text, outcome.text)


async def test_a_middleware_that_cannot_travel_is_refused(instance: Instance) -> None:
    cors = Middleware(CORSMiddleware, allow_origins=["*"])
    with pytest.raises(TypeError, match="on Ray middlewares are import strings.*'package.module:cors'"):
        async with serveit.serve(App(), name="with-cors", http=HTTPOptions(middlewares=[cors])):
            raise AssertionError("it was started")


# -- time ------------------------------------------------------------------------------------------


def p50_s(url: str) -> float:
    """Of GETs one after the other on one connection, as a plain client sends them."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=20)
    took = []
    try:
        for _ in range(NUM_GETS):
            begun = time.perf_counter()
            connection.request("GET", parts.path)
            with connection.getresponse() as reply:
                assert reply.read() == b"Hello, Ada!"
            took.append(time.perf_counter() - begun)
    finally:
        connection.close()
    return statistics.median(took)


async def test_an_answer_on_a_kept_connection_takes_no_millisecond(instance: Instance) -> None:
    """The original took 48 ms: Nagle's algorithm, and a client that acknowledges late."""
    name = await instance.deployed(pages)
    best = 1.0
    for _ in range(ROUNDS):
        best = min(best, await asyncio.to_thread(p50_s, f"{instance.url}/{name}/hello/Ada"))
        if best <= 0.001:
            break
    assert best <= 0.001, f"p50 {best * 1000:.2f} ms"


# -- readiness -------------------------------------------------------------------------------------


def slow_again(folder: Path) -> App:
    """Backends whose first replica starts at once, and each later one when the gate is open."""
    app, path = App(), str(folder)

    class Slow:
        def __init__(self) -> None:
            gate, name = Gate(path), type(self).__name__
            if name in gate.notes:
                gate.note(f"{name} again")
                gate.passed_by_thread()
            gate.note(name)

        async def __call__(self) -> int:
            return os.getpid()

    @app.backend
    class Headless(Slow):
        pass

    @app.route("/routed")
    @app.backend
    class Routed(Slow):
        pass

    return app


async def test_ready_is_who_has_a_replica_for_every_route(instance: Instance, gate: Gate) -> None:
    async with (
        serveit.connect(address=None, app=KEEPER) as keeper,
        httpx2.AsyncClient(base_url=instance.url, timeout=20) as http,
    ):
        await keeper.deploy(slow_again(gate.folder), name="slow-again", prefix="/slow-again")
        async with serveit.connect(address=None, app="slow-again") as client:
            try:
                await until_says(http, {"status": "ready"})
                headless, routed = client.get_handle("Headless"), client.get_handle("Routed")
                os.kill(await headless.call(), signal.SIGKILL)
                await wait_until(lambda: gate.notes.count("Headless again") == 1, NEW_S, "it is missed")
                assert (await http.get("/-/readyz")).status_code == 200, "no route leads there"
                os.kill(await routed.call(), signal.SIGKILL)
                reply = await until_says(http, {"detail": "no replica of Routed is ready"})
                assert reply.status_code == 503 and reply.headers["retry-after"]
                gate.open()
                await until_says(http, {"status": "ready"})
                update = keeper.deploy(slow_again(gate.folder), name="slow-again", prefix="/slow-again")
                updating = asyncio.ensure_future(update)
                while not updating.done():
                    reply = await http.get("/-/readyz")
                    assert reply.status_code == 200, f"the old ones serve meanwhile: {reply.text}"
                await updating
            finally:
                gate.open()
                await client.delete()


async def until_says(http: httpx2.AsyncClient, wanted: dict[str, str]) -> httpx2.Response:
    """What /-/readyz answers, once that has these members."""
    async with asyncio.timeout(NEW_S):
        while True:
            reply = await http.get("/-/readyz")
            if reply.json().items() >= wanted.items():
                return reply
            await asyncio.sleep(0.02)

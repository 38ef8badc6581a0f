"""docs/load-balancer.md: its configurations are valid and do what is said of them, its Python runs."""

from __future__ import annotations

import asyncio
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx2
import msgspec
import pytest

import serveit
from serveit import App
from serveit.command import cli
from serveit.config import HTTPOptions
from serveit.web.proxy import Proxy
from tests.balancers import HAPROXY, NODES, PAGE, ROOT, blocks, haproxy, needs_haproxy, needs_nginx, nginx
from tests.rawhttp import Ingress

CHECKED_S = 30.0
"""What health checks get to have their say: twice, each within a second."""


class Server:
    """A node's server, as a load balancer sees it: says who it is, and what it was asked.

    Attributes:
        is_ready: what /-/readyz says.
        name: what it answers.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_ready = True
        self.proxy = Proxy(HTTPOptions(port=0), Ingress(self))  # type: ignore[arg-type]

    @property
    def address(self) -> str:
        return self.proxy.url.removeprefix("http://")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        status = 503 if scope["path"] == "/-/readyz" and not self.is_ready else 200
        fields = {name.decode(): value.decode() for name, value in scope["headers"]}
        body = msgspec.json.encode({"name": self.name, "path": scope["path"], "fields": fields})
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture
async def servers() -> AsyncIterator[list[Server]]:
    three = [Server(name) for name in ("one", "two", "three")]
    for server in three:
        await server.proxy.start()
    yield three
    for server in three:
        await server.proxy.aclose(0)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path, for the sake of the socket in it."""
    with tempfile.TemporaryDirectory(prefix="balancer") as path:
        yield Path(path)


async def names(url: str, count: int = 30) -> set[str]:
    """Who answers, on a connection for each request."""
    found = set()
    for _ in range(count):
        async with httpx2.AsyncClient() as http:
            found.add((await http.get(url)).json()["name"])
    return found


async def eventually(check: Callable[[], Any], wanted: Any) -> None:
    deadline = time.monotonic() + CHECKED_S
    while (found := await check()) != wanted:
        assert time.monotonic() < deadline, f"{found} in place of {wanted}"
        await asyncio.sleep(0.05)


# -- HAProxy ---------------------------------------------------------------------------------------


@needs_haproxy
async def test_haproxy_asks_who_is_ready_and_if_nobody_is_who_lives(
    servers: list[Server], folder: Path
) -> None:
    one, two, three = servers
    with haproxy(folder, [server.address for server in servers]) as balancer:
        await eventually(lambda: names(balancer.url), {"one", "two", "three"})
        two.is_ready = three.is_ready = False
        await eventually(lambda: names(balancer.url), {"one"})
        one.is_ready = False
        await eventually(lambda: names(balancer.url), {"one", "two", "three"})
        two.is_ready = True
        await eventually(lambda: names(balancer.url), {"two"})


@needs_haproxy
async def test_haproxy_says_who_the_client_is(servers: list[Server], folder: Path) -> None:
    claimed = {"x-forwarded-for": "1.2.3.4", "x-forwarded-proto": "gopher"}
    with haproxy(folder, [server.address for server in servers]) as balancer:
        async with httpx2.AsyncClient(base_url=balancer.url, headers=claimed) as http:
            fields = (await http.get("/")).json()["fields"]
    assert (fields["x-forwarded-for"], fields["x-forwarded-proto"]) == ("127.0.0.1", "http")


@needs_haproxy
async def test_a_prefix_is_taken_off(servers: list[Server], folder: Path) -> None:
    (line,) = [block for block in blocks("text") if "replace-path" in block]
    addresses = [server.address for server in servers]
    with haproxy(
        folder, addresses, {"    default_backend ready\n": f"{line}    default_backend ready\n"}
    ) as one:
        async with httpx2.AsyncClient(base_url=one.url) as http:
            assert (await http.get("/models/hello/Ada?a=b")).json()["path"] == "/hello/Ada"
            assert (await http.get("/models/")).json()["path"] == "/"
            assert (await http.get("/modelsx")).json()["path"] == "/modelsx"


@needs_haproxy
def test_haproxy_has_nothing_to_say_against_the_page(tmp_path: Path) -> None:
    file = tmp_path / "haproxy.cfg"
    file.write_text(blocks("haproxy")[0])
    checked = subprocess.run([HAPROXY or "", "-c", "-f", str(file)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert "WARNING" not in checked.stdout + checked.stderr


@needs_haproxy
def test_commands_for_haproxy_are_known(folder: Path) -> None:
    commands = re.findall(r'echo "([^"]+)" \| socat', PAGE) + re.findall(r"`(set server [^`]+)`", PAGE)
    assert len(commands) == 3
    with haproxy(folder, ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"]) as balancer:
        answers = {command: balancer.command(command) for command in commands}
    shown = answers.pop("show servers conn ready")
    assert "used_cur" in shown and "ready/node2" in shown
    assert {answer.strip() for answer in answers.values()} == {""}, answers


# -- nginx -----------------------------------------------------------------------------------------


@needs_nginx
async def test_nginx_passes_on_and_takes_bodies_as_serveit_does(
    servers: list[Server], tmp_path: Path
) -> None:
    with nginx(tmp_path, [server.address for server in servers]) as balancer:
        assert await names(balancer.url) == {"one", "two", "three"}
        async with httpx2.AsyncClient(base_url=balancer.url) as http:
            fields = (await http.get("/", headers={"x-forwarded-for": "1.2.3.4"})).json()["fields"]
            assert (fields["x-forwarded-for"], fields["x-forwarded-proto"]) == ("127.0.0.1", "http")
            limit = HTTPOptions().max_body_bytes
            assert (await http.post("/", content=b"x" * limit)).status_code == 200
            assert (await http.post("/", content=b"x" * (limit + 1))).status_code == 413


@needs_nginx
async def test_nginx_sends_nothing_twice(servers: list[Server], tmp_path: Path) -> None:
    """A server that ends the connection without an answer: what it was sent may have run."""
    seen: list[str] = []

    async def silent(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["path"])
        scope["extensions"]["serveit"].transport.abort()

    for server in servers:
        server.proxy.ingress.app = silent  # type: ignore[attr-defined]
    with nginx(tmp_path, [server.address for server in servers]) as balancer:
        async with httpx2.AsyncClient(base_url=balancer.url) as http:
            assert (await http.get("/once")).status_code == 502
    assert seen == ["/once"]


# -- the page itself -------------------------------------------------------------------------------


def test_python_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    serving, forwarded = blocks("python")
    started: list[HTTPOptions] = []

    def run(app: App, *, http: HTTPOptions, address: str) -> None:
        started.append(http)

    app = ModuleType("app")
    app.app = App()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "app", app)
    monkeypatch.setattr(serveit, "run", run)
    exec(compile(serving, "docs/load-balancer.md", "exec"), {})
    assert started == [HTTPOptions(location="EveryNode", host="node", port=8000)]
    module = ModuleType("forwarded")
    exec(compile(forwarded, "docs/load-balancer.md", "exec"), vars(module))
    monkeypatch.setitem(sys.modules, "forwarded", module)
    shown = re.findall(r"`HTTPOptions\((middlewares=.*?), \.\.\.\)`", PAGE)
    assert shown == ['middlewares=["forwarded:from_load_balancer"]']


async def test_the_middleware_believes_the_load_balancer(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("forwarded")
    exec(compile(blocks("python")[1], "docs/load-balancer.md", "exec"), vars(module))
    monkeypatch.setitem(sys.modules, "forwarded", module)
    app = App()

    @app.route("/who")
    async def who(request: serveit.Request) -> list[Any]:
        return [request.client and request.client.host, request.url.scheme]

    http = {"port": 0, "middlewares": ["forwarded:from_load_balancer"]}
    fields = {"x-forwarded-for": "192.0.2.7", "x-forwarded-proto": "https"}
    async with serveit.serve(app, local=True, http=http) as client:
        async with httpx2.AsyncClient(base_url=client.url or "") as asking:
            assert (await asking.get("/who", headers=fields)).json() == ["192.0.2.7", "https"]
    async with serveit.serve(app, local=True, http={"port": 0}) as client:
        async with httpx2.AsyncClient(base_url=client.url or "") as asking:
            assert (await asking.get("/who", headers=fields)).json() == ["127.0.0.1", "http"]


def test_commands_can_be_typed() -> None:
    shown = re.findall(r"serveit (deploy app:app[^`\n]*)", PAGE)
    assert len(shown) == 2
    for line in shown:
        name, *arguments = shlex.split(line)
        cli.main.commands[name].make_context(name, arguments).close()


def test_links_and_addresses() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert [link for link in links if "://" not in link and not (ROOT / "docs" / link).exists()] == []
    for language in "haproxy", "nginx":
        assert all(node in blocks(language)[0] for node in NODES)

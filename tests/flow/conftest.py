"""The same tests for both kinds of runtime: in this process, and on Ray."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

import serveit
from serveit import App, Handle, SyncHandle
from serveit.client import Client
from tests.cluster.instance import Instance
from tests.flow.gates import Gate

TIMEOUT_S = 20.0


class Served:
    """A running app, whatever runs it.

    Attributes:
        client: of the running event loop.
        app_name: its name; its prefix is that with a slash.
        url: where its routes begin.
        http: asks there.
    """

    def __init__(self, client: Client, app_name: str, http: httpx2.AsyncClient) -> None:
        self.client = client
        self.app_name = app_name
        self.prefix = f"/{app_name}"
        self.url = f"{client.url}{self.prefix}"
        self.http = http

    def handle(self, name: str) -> Handle[..., Any]:
        return self.client.get_handle(name)

    def sync_handle(self, name: str) -> SyncHandle[..., Any]:
        return self.client.get_handle(name, sync=True)


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.cluster)], scope="session")
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="session")
def ray_or_none(kind: str, request: pytest.FixtureRequest) -> Instance | None:
    return request.getfixturevalue("instance") if kind == "ray" else None


Serve = Callable[[App], contextlib.AbstractAsyncContextManager[Served]]


@pytest.fixture
def serve(ray_or_none: Instance | None) -> Serve:
    """`async with serve(app) as served`: for tests that change what runs, or end it. On Ray it stays."""

    @contextlib.asynccontextmanager
    async def serve(app: App) -> AsyncIterator[Served]:
        if ray_or_none is None:
            name = "local"
            running = serveit.serve(app, local=True, name=name, prefix=f"/{name}", http={"port": 0})
        else:
            name = await ray_or_none.deployed(app)
            running = serveit.connect(address=None, app=name)
        async with running as client:
            async with httpx2.AsyncClient(base_url=f"{client.url}/{name}", timeout=TIMEOUT_S) as http:
                yield Served(client, name, http)

    return serve


@pytest.fixture
async def served(app: App, serve: Serve) -> AsyncIterator[Served]:
    """The module's `app`, running until the test ends. On Ray all tests share it."""
    async with serve(app) as served:
        yield served


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)

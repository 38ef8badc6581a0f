"""Apps that come in versions, and what tests see of them: for those that change what runs under load.

The apps are made by functions, so they travel by value; what they call is imported.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import ray

import serveit
from serveit import App
from serveit.client import Client
from serveit.control.orders import CONTROLLER, NAMESPACE
from serveit.exceptions import NotServing
from tests.account import Echo, recorded
from tests.cluster.apps import OwnError
from tests.cluster.instance import KEEPER
from tests.ledger import Ledger

SETTLED_S = 20.0
PAUSE_S = 0.02


def versioned(
    version: str,
    log: Path,
    *,
    fails: str = "",
    starts_s: float = 0.0,
    work_s: float = 0.0,
    also: str = "",
    **options: Any,
) -> App:
    """An app with a backend `Ask` behind "/ask", which does what the ledger wants of a handler.

    Args:
        version: what it answers.
        log: the ledger's.
        fails: "__init__" or "check_health", which then raises OwnError.
        starts_s: what its constructor takes.
        work_s: what a request takes.
        also: a further route to it.
        options: of the backend.
    """
    app, file = App(), str(log)

    @app.route("/ask")
    @app.backend(**options)
    class Ask:
        def __init__(self) -> None:
            time.sleep(starts_s)
            self._check("__init__")

        def check_health(self) -> None:
            self._check("check_health")

        async def __call__(self, id: str) -> Echo:
            return await recorded(file, id, version, work_s)

        def _check(self, where: str) -> None:
            if where == fails:
                raise OwnError(f"{version} fails in {where}")

    if also:
        app.add_route(also, Ask)
    return app


def split(log: Path) -> App:
    """An app with the backends `one` and `two`, whose names are their versions; "/ask" leads to `one`."""
    app, file = App(), str(log)

    @app.backend
    async def one(id: str) -> Echo:
        return await recorded(file, id, "one")

    @app.backend
    async def two(id: str) -> Echo:
        return await recorded(file, id, "two")

    app.add_route("/ask", traffic={"one": 1.0})
    return app


@contextlib.asynccontextmanager
async def deployed(app: App, name: str) -> AsyncIterator[Client]:
    """The client of an app that runs until the end of this; its prefix is its name with a slash."""
    async with serveit.connect(address=None, app=KEEPER) as keeper:
        await keeper.deploy(app, name=name, prefix=f"/{name}")
    async with serveit.connect(address=None, app=name) as client:
        try:
            yield client
        finally:
            await client.delete()


def load(client: Client, name: str, log: Path, rate: float = 200.0) -> Ledger:
    """Requests to the "/ask" of an app."""
    assert client.url is not None
    return Ledger(client.url, path=f"/{name}/ask", rate=rate, log=log)


# -- what is seen ----------------------------------------------------------------------------------


async def processes(client: Client, backend: str = "Ask") -> set[int]:
    """Of the replicas that are ready; one that has just died says nothing any more."""
    replicas = (await client.status())["backends"][backend].values()
    return {told["pid"] for told in replicas if told["state"] == "ready" and "pid" in told}


async def standing(client: Client) -> dict[str, Any]:
    """What of an app's status stays the same while nobody changes it."""
    status = await client.status()
    replicas = {
        id: (told["state"], told.get("pid"))
        for backend in status["backends"].values()
        for id, told in backend.items()
    }
    return {"state": status.get("state"), "url": status["url"], "replicas": replicas}


async def eventually(predicate: Callable[[], Awaitable[object]], timeout_s: float, what: str) -> float:
    """Ask until it is true; seconds that took. Where nothing can be asked just now, it is asked again.

    Raises:
        AssertionError: it is still false after `timeout_s`.
    """
    begun, last = time.monotonic(), ""
    while True:
        try:
            if await predicate():
                return time.monotonic() - begun
        except NotServing as error:
            last = f" ({error})"
        took_s = time.monotonic() - begun
        assert took_s < timeout_s, f"not within {timeout_s} s: {what}{last}"
        await asyncio.sleep(PAUSE_S)


# -- what is done to it ----------------------------------------------------------------------------


def controller_process() -> int:
    """The controller's pid, as Ray has it; 0 while there is none."""
    for told in ray._private.state.actors().values():
        if (told["Name"], told["State"]) == (CONTROLLER, "ALIVE"):
            return int(told["Pid"])
    return 0


def kill_controller() -> int:
    """Kill its process, once there is one; its pid."""
    deadline = time.monotonic() + SETTLED_S
    while time.monotonic() < deadline:
        with contextlib.suppress(ProcessLookupError):  # Ray has not noticed yet that it is gone
            if pid := controller_process():
                os.kill(pid, signal.SIGKILL)
                return pid
        time.sleep(PAUSE_S)
    raise AssertionError(f"no controller to kill within {SETTLED_S} s")


def actors(app: str) -> set[str]:
    """The names of an app's replicas' actors that live or are about to."""
    named: Any = ray.util.list_named_actors(all_namespaces=True)
    names = {actor["name"] for actor in named if actor["namespace"] == NAMESPACE}
    return {name for name in names if name.startswith(f"{app}/")}

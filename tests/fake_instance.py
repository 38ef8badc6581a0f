"""An instance for tests of what asks one: it keeps apps' specs, and changes them as it is told."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

from serveit import App
from serveit.config import HTTPOptions
from serveit.control.apps import no_app
from serveit.control.orders import BackendChange, Deploying
from serveit.control.spec import AppSpec, app_spec

URL = "http://127.0.0.1:8000"


class FakeInstance:
    """Answers as `cluster.instance.Instance` does.

    Attributes:
        known: apps' specs, by name.
        opened: what `open` was given.
        ended: whether it was shut down.
        refuses: raised instead of deploying.
        failures: why first deploys have failed, by name.
    """

    def __init__(self) -> None:
        self.known: dict[str, AppSpec] = {}
        self.opened: list[dict[str, Any]] = []
        self.ended = False
        self.refuses: Exception | None = None
        self.failures: dict[str, str] = {}

    def add(self, name: str, app: App, prefix: str = "") -> None:
        self.known[name] = app_spec(app, name=name, prefix=prefix, code=b"")

    @contextlib.asynccontextmanager
    async def open(self, address: str, **options: Any) -> AsyncIterator[FakeInstance]:
        http: HTTPOptions | None = options.get("http")
        self.opened.append({"address": address, **options, "http": http})
        yield self

    async def status(self) -> dict[str, Any]:
        apps = {name: _status(spec) for name, spec in self.known.items()}
        return {"url": URL, "controller": {}, "proxies": {}, "apps": apps}

    async def specs(self) -> dict[str, AppSpec]:
        return self.known

    async def shutdown(self) -> None:
        self.ended = True

    async def url(self) -> str:
        return URL

    async def deploy(self, spec: AppSpec, on_progress: Callable[[Deploying], None]) -> None:
        sys.stdout.write("what a replica prints\n")
        for ready in (0, 1):
            on_progress(Deploying({b.name: (ready, b.num_replicas) for b in spec.backends}))
        if self.refuses is not None:
            raise self.refuses
        self.known[spec.name] = spec

    def app(self, name: str) -> FakeInstanceApp:
        return FakeInstanceApp(self.known, name, self.failures)


class FakeInstanceApp:
    def __init__(self, known: dict[str, AppSpec], name: str, failures: dict[str, str]) -> None:
        self._known = known
        self._failures = failures
        self._name = name

    async def status(self) -> dict[str, Any]:
        if self._name in self._failures:
            return no_app(self._failures[self._name])
        return _status(self._known[self._name])

    async def spec(self) -> AppSpec:
        return self._known[self._name]

    async def update(self, backend: str, wanted: BackendChange, *, wait: bool = True) -> None:
        self._known[self._name] = self._known[self._name].changed(backend, wanted)

    async def reroute(self, endpoint: str, weights: Any, shadows: Any, *, wait: bool = True) -> None:
        self._known[self._name] = self._known[self._name].rerouted(endpoint, weights, shadows)

    async def delete(self) -> None:
        del self._known[self._name]


def _status(spec: AppSpec) -> dict[str, Any]:
    idle = {"state": "ready", "running": 0, "waiting": 0}
    numbers = {backend.name: backend.num_replicas for backend in spec.backends}
    backends = {name: {f"{name}#{n}": idle for n in range(number)} for name, number in numbers.items()}
    return {"state": "RUNNING", "version": 1, "num_replicas": numbers, "backends": backends, "failed": {}}

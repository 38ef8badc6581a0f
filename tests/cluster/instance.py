"""One Ray for all tests that need one, and a serveit instance in it that no app's end ends."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import serveit
from serveit import App

KEEPER = "keeper"
"""An app without an owner: it keeps the instance."""


class Instance:
    """A running instance, which this process is connected to.

    Attributes:
        url: where it answers HTTP.
        address: of the cluster, for drivers of their own.
        environment: for processes of their own: they find the cluster's token.
    """

    def __init__(self, url: str, address: str, home: Path) -> None:
        self.url = url
        self.address = address
        self.environment = {**os.environ, "HOME": str(home)}
        self._deployed: list[App] = []

    async def deployed(self, app: App) -> str:
        """The name of an app that all tests share; its prefix is that with a slash. The first who asks
        deploys it."""
        if app not in self._deployed:
            async with serveit.connect(address=None, app=KEEPER) as keeper:
                name = f"shared-{len(self._deployed)}"
                await keeper.deploy(app, name=name, prefix=f"/{name}")
            self._deployed.append(app)
        return f"shared-{self._deployed.index(app)}"


@contextlib.contextmanager
def open_instance(home: Path) -> Iterator[Instance]:
    """Start Ray with `home` as the home directory: its token is a file there."""
    with _environment(HOME=str(home), RAY_USAGE_STATS_ENABLED="0", PYTHONDONTWRITEBYTECODE=None):
        ray = _init()
    try:
        # Ray has processes that it forgets to wait for; that is no warning of ours.
        with serveit.serve(App(), name="first", http={"port": 0}) as client:
            client.deploy(App(), name=KEEPER)
            url = client.url
        assert url is not None
        yield Instance(url, ray.get_runtime_context().gcs_address, home)
    finally:
        folder = _sockets()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _init() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray

        ray.init(
            address="local",
            num_cpus=8,
            num_gpus=1,  # Ray believes it
            resources={"license": 2},
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    return ray


def _sockets() -> str:
    from serveit.cluster.session import Session

    return Session().folder


@contextlib.contextmanager
def _environment(**changes: str | None) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    _set_environment(changes)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value

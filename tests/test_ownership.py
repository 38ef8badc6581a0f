"""An app that is a driver's own: what is deployed is the driver's, and it is what ends."""

from __future__ import annotations

from typing import Any

import pytest

from serveit.cluster.ownership import OwnedApp
from serveit.control.snapshot import RouteInfo
from serveit.control.spec import AppSpec
from serveit.exceptions import NotServing

ROUTE = RouteInfo("/a", "/a", ("GET",), "a")
SPEC = AppSpec("whatever", (), (), (ROUTE,), b"code")


class FakeInstance:
    """Takes every deploy; what it is asked to end is in `ended`."""

    def __init__(self, *, gone: bool = False) -> None:
        self.deployed: list[AppSpec] = []
        self.ended: list[str] = []
        self._gone = gone

    def app(self, name: str) -> FakeApp:
        return FakeApp(self, name)

    async def deploy(self, spec: AppSpec, on_progress: None) -> None:
        self.deployed.append(spec)

    async def shutdown(self) -> None:
        self.end("everything")

    def end(self, what: str) -> None:
        self.ended.append(what)
        if self._gone:
            raise NotServing("the controller is gone")


class FakeApp:
    def __init__(self, instance: FakeInstance, name: str) -> None:
        self._instance = instance
        self._name = name

    async def status(self) -> dict[str, Any]:
        if not self._instance.deployed:
            raise KeyError("there is no app")
        return {"backends": {"a": {}}}

    async def delete(self, owner: str) -> None:
        self._instance.end(f"{self._name} of {owner}")


class FakeSession:
    def __init__(self, *, is_last: bool) -> None:
        self.is_last = is_last


def owned(instance: Any, *, has_routes: bool = True) -> OwnedApp:
    return OwnedApp(instance, "default", "me", has_routes=has_routes)


async def end(app: OwnedApp, *, is_last: bool) -> None:
    session: Any = FakeSession(is_last=is_last)
    await app.end(session)


@pytest.mark.parametrize(("has_routes", "routes"), [(True, (ROUTE,)), (False, ())])
async def test_what_is_deployed_is_the_owners(has_routes: bool, routes: tuple[RouteInfo, ...]) -> None:
    instance = FakeInstance()
    await owned(instance, has_routes=has_routes).deploy(SPEC)
    assert instance.deployed == [AppSpec("default", (), (), routes, b"code", owner="me")]


async def test_its_status_before_and_after_the_first_deploy() -> None:
    app = owned(FakeInstance())
    assert await app.status() == {"backends": {}}
    await app.deploy(SPEC)
    assert await app.status() == {"backends": {"a": {}}}


@pytest.mark.parametrize(("is_last", "ended"), [(True, "everything"), (False, "default of me")])
@pytest.mark.parametrize("gone", [True, False])
async def test_its_end(is_last: bool, ended: str, gone: bool) -> None:
    instance = FakeInstance(gone=gone)
    await end(owned(instance), is_last=is_last)
    assert instance.ended == [ended]

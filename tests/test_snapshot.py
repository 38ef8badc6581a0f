from __future__ import annotations

import msgspec
import pytest

from serveit import App
from serveit.control.snapshot import (
    AppInfo,
    BackendInfo,
    EndpointInfo,
    ReplicaInfo,
    RouteInfo,
    Snapshot,
    app_info,
)


@pytest.fixture
def app() -> App:
    app = App()

    @app.route("/api/<user_id:int>", methods=["GET", "POST"])
    @app.backend(num_replicas=2)
    async def user(user_id: int) -> int:
        return user_id

    @app.backend(num_threads=3, max_queued_requests=5, request_timeout_s=2.5)
    def plain(word: str) -> str:
        return word

    @app.backend(max_batch_size=8)
    def batched(items: list[int]) -> list[int]:
        return items

    class Model:
        def __call__(self, word: str) -> str:
            return word

        async def explain(self, word: str) -> str:
            return word

    app.backend(Model, name="v1")
    app.backend(Model, name="v2")
    app.add_route("/predict", traffic={"v1": 0.9, "v2": 0.1}, shadow={"v2": 0.05})
    app.add_route("/explain", Model.explain, name="explain")
    return app


def test_what_is_told_of_backends(app: App) -> None:
    replicas = {"user": [ReplicaInfo("user#1", "a"), ReplicaInfo("user#2", "b")]}
    info = app_info(app, "shop", "", replicas)
    backends = {backend.name: backend for backend in info.backends}
    assert backends["user"] == BackendInfo(
        "user", tuple(replicas["user"]), max_ongoing_requests=100, request_timeout_s=60
    )
    assert backends["plain"] == BackendInfo(
        "plain",
        (),
        max_ongoing_requests=3,
        max_queued_requests=5,
        request_timeout_s=2.5,
        num_threads=3,
    )
    batched = backends["batched"]
    assert (batched.max_ongoing_requests, batched.prefetch) == (16, 8)
    assert batched.num_threads is None  # what waits for a batch does not wait for a thread


def test_what_is_told_of_endpoints_and_routes(app: App) -> None:
    info = app_info(app, "shop", "/shop", {})
    endpoints = {endpoint.name: endpoint for endpoint in info.endpoints}
    assert endpoints["/predict"] == EndpointInfo("/predict", (("v1", 0.9), ("v2", 0.1)), (("v2", 0.05),))
    assert endpoints["explain"].target == "explain"
    user, predict, _ = info.routes
    assert (user.pattern, user.methods, user.prefix) == (
        "/api/<user_id:int>",
        ("GET", "HEAD", "POST"),
        "/shop",
    )
    assert not user.is_literal
    assert predict == RouteInfo(
        "/predict", predict.regex, ("GET", "HEAD"), "/predict", "/shop", is_literal=True
    )


def test_a_snapshot_travels_as_msgpack(app: App) -> None:
    snapshot = Snapshot((3, 7), (app_info(app, "shop", "", {"user": [ReplicaInfo("user#1", "x")]}),))
    octets = msgspec.msgpack.encode(snapshot)
    assert msgspec.msgpack.decode(octets, type=Snapshot) == snapshot


def test_newer_snapshots_compare_as_greater() -> None:
    versions = [Snapshot(version, ()).version for version in ((1, 9), (2, 1), (2, 2))]
    assert versions == sorted(versions)


def test_an_empty_app() -> None:
    assert app_info(App(), "empty", "", {}) == AppInfo("empty", (), (), ())

from __future__ import annotations

import msgspec
import pytest

from serveit import App
from serveit.control.snapshot import EndpointInfo, ReplicaInfo, RouteInfo
from serveit.control.spec import AppSpec, app_spec
from tests.stage import scaled_to


@pytest.fixture
def spec() -> AppSpec:
    app = App()

    @app.route("/double/<value:int>")
    @app.backend(
        num_replicas=2, graceful_shutdown_timeout_s=5, max_surge=0, ray_actor_options={"num_gpus": 0.5}
    )
    async def double(value: int) -> int:
        return 2 * value

    @app.backend
    def plain(word: str) -> str:
        return word

    return app_spec(app, name="main", prefix="/v1", code=b"code", owner="driver", deploy_timeout_s=9.0)


def test_says_what_the_user_declared(spec: AppSpec) -> None:
    assert (spec.name, spec.code, spec.owner, spec.deploy_timeout_s) == ("main", b"code", "driver", 9.0)
    assert [(b.name, b.num_replicas, b.drain_s, b.max_surge, b.ray_actor_options) for b in spec.backends] == [
        ("double", 2, 5.0, 0, {"num_gpus": 0.5}),
        ("plain", 1, 30.0, 1, {}),
    ]
    assert [(route.prefix, route.pattern) for route in spec.routes] == [("/v1", "/double/<value:int>")]


def test_travels_as_octets(spec: AppSpec) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=AppSpec) == spec


def test_stays_and_waits_a_minute_by_itself() -> None:
    spec = app_spec(App(), name="empty", code=b"")
    assert (spec.owner, spec.deploy_timeout_s, spec.backends, spec.routes) == ("", 60.0, (), ())


def test_each_deploy_has_an_id() -> None:
    assert app_spec(App(), name="app", code=b"").id != app_spec(App(), name="app", code=b"").id != ""


def make_spec(**routes: str) -> AppSpec:
    """Routes by name: "GET /pattern backend.method", "+" before further backends, "~" before shadows."""
    endpoints, infos = [], []
    for name, text in routes.items():
        methods, pattern, leads = text.split()
        leads, _, shadow = leads.partition("~")
        leads, _, target = leads.partition(".")
        weights = tuple((backend, 1.0) for backend in leads.split("+"))
        shadows = ((shadow, 1.0),) if shadow else ()
        endpoints.append(EndpointInfo(name, weights, shadows, target or "__call__"))
        infos.append(RouteInfo(pattern, pattern, tuple(methods.split(",")), name))
    return AppSpec("main", (), tuple(endpoints), tuple(infos), b"")


@pytest.mark.parametrize(
    ("new", "old", "stands_in"),
    [
        ({"x": "GET /b b"}, {"x": "GET /b b"}, True),
        ({"x": "GET /b b"}, {"other": "GET /b b"}, True),
        ({"x": "GET /b b", "y": "GET /more b"}, {"x": "GET /b b"}, True),
        ({"x": "GET,POST /b b"}, {"x": "GET /b b"}, True),
        ({}, {"x": "GET /c c"}, True),
        ({"x": "GET /b b"}, {"x": "GET /b b", "y": "GET /more b"}, False),
        ({"x": "GET /b b"}, {"x": "GET,POST /b b"}, False),
        ({"x": "GET /b b"}, {"x": "GET /b b.other"}, False),
        ({"x": "GET /b c"}, {"x": "GET /b b"}, False),
        ({"x": "GET /b c+b"}, {"x": "GET /b b"}, True),
        ({"x": "GET /b c~b"}, {"x": "GET /b b"}, True),
        ({"x": "GET /b c"}, {"x": "GET /b c~b"}, False),
    ],
    ids=[
        "the same",
        "by another name",
        "one more route",
        "one more method",
        "nothing is asked of it",
        "one route less",
        "one method less",
        "another method of the backend",
        "it leads elsewhere",
        "to both",
        "as a shadow",
        "as a shadow no more",
    ],
)
def test_stands_in_for(new: dict[str, str], old: dict[str, str], stands_in: bool) -> None:
    assert make_spec(**new).stands_in_for(make_spec(**old), "b") is stands_in


def test_changed(spec: AppSpec) -> None:
    changed = spec.changed("double", scaled_to(5))
    assert [b.num_replicas for b in changed.backends] == [5, 1]
    assert spec.backend("double").num_replicas == 2
    assert changed.changed("double", scaled_to(2)) == spec
    with pytest.raises(ValueError, match="num_replicas must be ≥ 1, got -1"):
        spec.changed("double", scaled_to(-1))
    with pytest.raises(KeyError, match="app 'main' has no backend 'dubble': did you mean 'double'?"):
        spec.changed("dubble", scaled_to(1))


def test_rerouted(spec: AppSpec) -> None:
    name = spec.endpoints[0].name
    # As they come from the wire, where there are no tuples.
    rerouted = spec.rerouted(name, [["double", 0.5], ["plain", 0.5]], [["plain", 0.1]])  # type: ignore[list-item]
    assert rerouted.endpoints == (
        EndpointInfo(name, (("double", 0.5), ("plain", 0.5)), (("plain", 0.1),), spec.endpoints[0].target),
    )
    assert rerouted.rerouted(name, [("double", 1.0)], []) == spec
    with pytest.raises(KeyError, match="no endpoint '/nowhere'"):
        spec.rerouted("/nowhere", [("double", 1.0)], [])
    with pytest.raises(KeyError, match="no backend 'other'"):
        spec.rerouted(name, [("double", 0.5)], [("other", 0.5)])


def test_the_other_endpoints_stay(spec: AppSpec) -> None:
    more = msgspec.structs.replace(
        spec, endpoints=(*spec.endpoints, EndpointInfo("/more", (("plain", 1.0),)))
    )
    assert more.rerouted("/more", [("double", 1.0)], []).endpoints[0] == spec.endpoints[0]


def test_published_names_the_ready_replicas(spec: AppSpec) -> None:
    info = spec.published({"double": [ReplicaInfo("double#1", "there")]})
    assert [backend.replicas for backend in info.backends] == [(ReplicaInfo("double#1", "there"),), ()]
    assert (info.name, info.routes, info.endpoints) == ("main", spec.routes, spec.endpoints)

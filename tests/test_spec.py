from __future__ import annotations

from typing import Any

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


def test_rerouted() -> None:
    spec = app_spec(split(), name="main", code=b"")
    name = "predict"
    rerouted = spec.rerouted(name, {"v2": 0.5, "v1": 0.5}, {"v2": 0.1})
    assert rerouted.endpoint(name) == EndpointInfo(
        name, (("v1", 0.5), ("v2", 0.5)), (("v2", 0.1),), "__call__"
    )
    assert rerouted.rerouted(name, {"v1": 1.0}, {"v2": 0}) == spec
    with pytest.raises(KeyError, match="app 'main' has no endpoint '/nowhere': there is 'predict'"):
        spec.rerouted("/nowhere", {"v1": 1.0}, {})


def test_two_who_change_traffic_do_not_undo_each_other() -> None:
    spec = app_spec(split(), name="main", code=b"").rerouted("predict", None, {"v1": 0.5})
    one = spec.rerouted("predict", {"v1": 0.9, "v2": 0.1}, {}).rerouted("predict", None, {"v2": 0.1})
    other = spec.rerouted("predict", None, {"v2": 0.1}).rerouted("predict", {"v1": 0.9, "v2": 0.1}, {})
    assert one == other
    assert one.endpoint("predict").shadows == (("v1", 0.5), ("v2", 0.1))


@pytest.mark.parametrize(
    ("weights", "shadows", "error", "text"),
    [
        ({}, {}, ValueError, "endpoint 'predict': no backend in the traffic"),
        ({"v1": 0.5, "v2": 0.4}, {}, ValueError, "the weights must sum to 1, got 0.9 "),
        ({"v1": 1.1, "v2": -0.1}, {}, ValueError, "the weight of 'v2' must be ≥ 0"),
        ({"v9": 1.0}, {}, ValueError, "unknown backend 'v9'"),
        (None, {"v9": 0}, ValueError, "unknown backend 'v9'"),
        (None, {"v1": 2}, ValueError, r"the shadow of 'v1' must be in \[0, 1\], got 2"),
        (None, {"v1": "all"}, TypeError, "the shadow of 'v1' must be a number"),
        ([("v1", 1.0)], {}, TypeError, "weights must be a dict"),
        (None, 0.5, TypeError, "shadows must be a dict"),
    ],
)
def test_traffic_that_is_none(weights: Any, shadows: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        app_spec(split(), name="main", code=b"").rerouted("predict", weights, shadows)


def test_an_endpoint_does_not_lead_to_a_backend_that_does_not_fit_its_route() -> None:
    """Whoever only connected has no user code to see it by, and neither has the controller."""
    spec = app_spec(split(), name="main", code=b"")
    spec = msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=AppSpec)
    for weights, shadows in ({"v1": 0.5, "other": 0.5}, {}), (None, {"other": 0.1}), ({"other": 1.0}, {}):
        with pytest.raises(ValueError, match=r"^endpoint 'predict' cannot lead to backend 'other': .*'word'"):
            spec.rerouted("predict", weights, shadows)
    assert spec.rerouted("predict", None, {"other": 0}) == spec


def split() -> App:
    """Two versions behind one endpoint, and a backend that does not fit it."""
    app = App()

    async def model(text: str) -> str:
        return text

    async def other(word: str) -> str:
        return word

    for name, function in (("v1", model), ("v2", model), ("other", other)):
        app.backend(function, name=name)
    app.add_route("/predict/<text>", traffic={"v1": 1.0}, name="predict")
    return app


def test_the_other_endpoints_stay(spec: AppSpec) -> None:
    more = msgspec.structs.replace(
        spec, endpoints=(*spec.endpoints, EndpointInfo("/more", (("plain", 1.0),)))
    )
    assert more.rerouted("/more", {"double": 1.0}, {}).endpoints[0] == spec.endpoints[0]


def test_published_names_the_ready_replicas(spec: AppSpec) -> None:
    info = spec.published({"double": [ReplicaInfo("double#1", "there")]})
    assert [backend.replicas for backend in info.backends] == [(ReplicaInfo("double#1", "there"),), ()]
    assert (info.name, info.routes, info.endpoints) == ("main", spec.routes, spec.endpoints)

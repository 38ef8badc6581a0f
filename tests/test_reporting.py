"""What is shown of an instance."""

from __future__ import annotations

from typing import Any

import pytest

from serveit import App
from serveit.command.reporting import (
    Route,
    columns,
    is_whole,
    routes_lines,
    routes_of,
    serving_lines,
    status_lines,
)
from serveit.control.snapshot import app_info


def make_app() -> App:
    app = App()

    @app.backend(num_replicas=3)
    def one() -> int:
        return 1

    app.backend(one.__wrapped__, name="two")  # type: ignore[attr-defined]
    app.add_route("/both", traffic={"one": 0.75, "two": 0.25}, shadow={"two": 0.005}, name="both")
    app.add_route("/only", "two", methods=["DELETE"])
    return app


ROUTES = routes_of([app_info(make_app(), "shop", "/shop", {})])


def test_routes_in_their_order() -> None:
    both, only = ROUTES
    assert both == Route(
        "/shop/both", ("GET", "HEAD"), "shop", "both", (("one", 0.75), ("two", 0.25)), (("two", 0.005),)
    )
    assert both.as_data() == {
        "path": "/shop/both",
        "methods": ["GET", "HEAD"],
        "app": "shop",
        "endpoint": "both",
        "weights": {"one": 0.75, "two": 0.25},
        "shadows": {"two": 0.005},
    }
    assert (only.endpoint, only.leads_to) == ("/only", "two")


def test_shares_are_percents_without_the_float_s_rest() -> None:
    route = Route("/", (), "", "", (("a", 0.1 + 0.2), ("b", 0.7)), ())
    assert route.leads_to == "a 30%, b 70%"


def test_what_a_start_ends_with() -> None:
    assert serving_lines("http://x", {"one": 3, "two": 1}, ROUTES) == [
        "serving http://x  (2 backends, 4 replicas)",
        "  /shop/both  GET,HEAD  one 75%, two 25% (copies: two 0.5%)",
        "  /shop/only  DELETE    two",
    ]
    assert serving_lines(None, {"one": 1}, []) == ["serving without HTTP  (1 backend, 1 replica)"]


def test_a_table_of_routes() -> None:
    assert routes_lines(ROUTES[1:]) == [
        "PATH        METHODS  APP   LEADS TO",
        "/shop/only  DELETE   shop  two",
    ]
    assert routes_lines([]) == ["no routes"]


def test_columns_end_where_their_last_cell_does() -> None:
    assert columns([("a", "b"), ("long", "")]) == ["a     b", "long"]


# -- status --------------------------------------------------------------------------------------

READY = {"state": "ready", "version": 2, "pid": 7, "running": 2, "waiting": 1}
STARTING = {"state": "starting", "version": 2}


def make_status(**changes: Any) -> dict[str, Any]:
    app = {
        "state": "RUNNING",
        "message": "",
        "version": 2,
        "num_replicas": {"one": 1, "two": 1},
        "backends": {"one": {"one#1": READY}, "two": {"two#2": READY}},
        "failed": {},
        **changes,
    }
    servers = {"abc": {"address": "10.0.0.1", "url": "http://10.0.0.1:8000", "state": "ready"}}
    return {"url": "http://10.0.0.1:8000", "controller": {}, "proxies": servers, "apps": {"shop": app}}


def test_all_is_well() -> None:
    assert is_whole(make_status())
    assert status_lines(make_status()) == [
        "serving http://10.0.0.1:8000",
        "",
        "APP   STATE    VERSION  BACKEND  READY  RUNNING  WAITING",
        "shop  RUNNING  2        one      1/1    2        1",
        "                        two      1/1    2        1",
        "",
        "NODE      HTTP SERVER  URL",
        "10.0.0.1  ready        http://10.0.0.1:8000",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"state": "DEPLOYING"},
        {"state": "FAILED", "message": "no"},
        {"failed": {"one": "it died"}},
        {"num_replicas": {"one": 2, "two": 1}},
        {"backends": {"one": {"one#1": STARTING}, "two": {"two#2": READY}}},
    ],
)
def test_what_is_not_well(changes: dict[str, Any]) -> None:
    assert not is_whole(make_status(**changes))


def test_more_replicas_than_wanted_are_no_fault() -> None:
    many = {"one": {"one#1": READY, "one#3": READY}, "two": {"two#2": READY}}
    assert is_whole(make_status(backends=many))


def test_a_server_that_is_missing() -> None:
    status = make_status()
    status["proxies"]["abc"] = {"address": "10.0.0.1", "url": None, "state": "failed: port in use"}
    assert not is_whole(status)
    assert status_lines(status)[-1] == "10.0.0.1  failed: port in use"


def test_why_it_failed() -> None:
    status = make_status(state="FAILED", message="ValueError: no\nmodel", failed={"one": "5 deaths"})
    lines = status_lines(status)
    assert "shop: ValueError: no" in lines and "shop: model" in lines
    assert "shop: one was given up: 5 deaths" in lines


def test_what_is_wrong_with_a_replica() -> None:
    ill = {**READY, "state": "unhealthy", "illness": "no GPU"}
    status = make_status(backends={"one": {"one#1": ill, "one#3": READY}, "two": {"two#2": READY}})
    assert "shop: replica one#1 is being replaced: no GPU" in status_lines(status)


def test_a_reason_is_said_once() -> None:
    lines = status_lines(make_status(state="FAILED", message="5 deaths", failed={"one": "5 deaths"}))
    assert [line for line in lines if "5 deaths" in line] == ["shop: 5 deaths"]


def test_an_app_without_backends_and_an_instance_without_apps() -> None:
    status = make_status(backends={}, num_replicas={})
    assert is_whole(status) and "shop  RUNNING  2" in status_lines(status)
    empty: dict[str, Any] = {"url": None, "apps": {}}
    assert is_whole(empty)
    assert status_lines(empty) == [
        "serving without HTTP",
        "no apps: `serveit deploy module:app` adds one",
    ]

"""What an ingress counts, route by route."""

from __future__ import annotations

from serveit.control.snapshot import AppInfo, RouteInfo
from serveit.declare.routing import compile_pattern
from serveit.web.metering import RouteMeter, RouteMeters
from serveit.web.table import Found, RouteTable


def info(*patterns: str, prefix: str = "", methods: tuple[str, ...] = ("GET",)) -> tuple[RouteInfo, ...]:
    return tuple(
        RouteInfo(p, compile_pattern(p).regex, methods, p, prefix, compile_pattern(p).is_literal)
        for p in patterns
    )


def table(*routes: RouteInfo, app: str = "app") -> RouteTable:
    return RouteTable([AppInfo(app, (), (), routes)])


def of(meters: RouteMeters, routes: RouteTable, method: str, path: str) -> RouteMeter:
    """As an ingress finds it."""
    found = routes.match(method, path)
    return meters.by_order[found.entry.order] if isinstance(found, Found) else meters.unmatched


def names(meters: RouteMeters) -> list[tuple[str, str]]:
    return [(meter.app, meter.route) for meter in meters]


def test_a_route_counts_under_its_pattern() -> None:
    meters, routes = RouteMeters(), table(*info("/<x>", "/a/b", prefix="/p"))
    meters.follow(routes.entries)
    meter = of(meters, routes, "GET", "/p/one")
    assert of(meters, routes, "GET", "/p/two") is meter
    meter.in_flight += 1
    meter.in_flight += 1
    assert meter.in_flight == 2
    meter.end("GET", 200, 0.25)
    meter.end("GET", 404, 0.75)
    meter.in_flight += 1
    meter.end("GET", 200, 0.5)
    assert (meter.in_flight, meter.answers) == (0, {("GET", 200): 2, ("GET", 404): 1})
    assert (meter.durations.sum, sum(meter.durations.counts)) == (1.5, 3)
    assert names(meters) == [("app", "/p/<x>"), ("app", "/p/a/b"), ("", "")]


def test_what_no_route_takes_is_one_series() -> None:
    meters, routes = RouteMeters(), table(*info("/a"))
    meters.follow(routes.entries)
    for method, path in (("GET", "/b"), ("BREW", "/c"), ("POST", "/a"), ("GET", "/a/")):
        meter = of(meters, routes, method, path)
        assert meter is meters.unmatched
        meter.in_flight += 1
        meter.end(method, 404, 0.0)
    assert meters.unmatched.answers == {("", 404): 4}


def test_routes_of_one_path_share_a_meter() -> None:
    meters = RouteMeters()
    routes = table(*info("/a"), *info("/a", methods=("POST",)))
    meters.follow(routes.entries)
    assert of(meters, routes, "GET", "/a") is of(meters, routes, "POST", "/a")
    assert names(meters) == [("app", "/a"), ("", "")]


def test_counts_outlive_a_new_table_with_their_route_only() -> None:
    meters, before = RouteMeters(), table(*info("/a", "/b"))
    meters.follow(before.entries)
    stays, goes = (of(meters, before, "GET", path) for path in ("/a", "/b"))
    goes.in_flight += 1
    after = table(*info("/c", "/a"))
    meters.follow(after.entries)
    goes.end("GET", 200, 0.0)
    assert of(meters, after, "GET", "/a") is stays
    assert names(meters) == [("app", "/c"), ("app", "/a"), ("", "")]
    meters.follow(table(*info("/a"), app="other").entries)
    assert names(meters) == [("other", "/a"), ("", "")]
    assert all(meter.answers == {} for meter in meters)


def test_it_says_what_it_is() -> None:
    assert repr(RouteMeter("app", "/a")) == "<RouteMeter app /a in_flight=0>"

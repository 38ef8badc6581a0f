"""What an ingress counts, route by route."""

from __future__ import annotations

from serveit.control.snapshot import AppInfo, RouteInfo
from serveit.declare.routing import compile_pattern
from serveit.web.metering import RouteMeter, RouteMeters
from serveit.web.table import RouteTable


def info(*patterns: str, prefix: str = "", methods: tuple[str, ...] = ("GET",)) -> tuple[RouteInfo, ...]:
    return tuple(
        RouteInfo(p, compile_pattern(p).regex, methods, p, prefix, compile_pattern(p).is_literal)
        for p in patterns
    )


def table(*routes: RouteInfo, app: str = "app") -> RouteTable:
    return RouteTable([AppInfo(app, (), (), routes)])


def names(meters: RouteMeters) -> list[tuple[str, str]]:
    return [(meter.app, meter.route) for meter in meters]


def test_a_route_counts_under_its_pattern() -> None:
    meters, routes = RouteMeters(), table(*info("/<x>", "/a/b", prefix="/p"))
    meters.follow(routes.entries)
    meter = meters.of(routes.match("GET", "/p/one"))
    assert meters.of(routes.match("GET", "/p/two")) is meter
    meter.begin()
    meter.begin()
    assert meter.in_flight == 2
    meter.end("GET", 200, 0.25)
    meter.end("GET", 404, 0.75)
    meter.begin()
    meter.end("GET", 200, 0.5)
    assert (meter.in_flight, meter.answers) == (0, {("GET", 200): 2, ("GET", 404): 1})
    assert (meter.durations.sum, sum(meter.durations.counts)) == (1.5, 3)
    assert names(meters) == [("app", "/p/<x>"), ("app", "/p/a/b"), ("", "")]


def test_what_no_route_takes_is_one_series() -> None:
    meters, routes = RouteMeters(), table(*info("/a"))
    meters.follow(routes.entries)
    for method, path in (("GET", "/b"), ("BREW", "/c"), ("POST", "/a"), ("GET", "/a/")):
        meter = meters.of(routes.match(method, path))
        assert meter is meters.unmatched
        meter.begin()
        meter.end(method, 404, 0.0)
    assert meters.unmatched.answers == {("", 404): 4}


def test_routes_of_one_path_share_a_meter() -> None:
    meters = RouteMeters()
    routes = table(*info("/a"), *info("/a", methods=("POST",)))
    meters.follow(routes.entries)
    assert meters.of(routes.match("GET", "/a")) is meters.of(routes.match("POST", "/a"))
    assert names(meters) == [("app", "/a"), ("", "")]


def test_counts_outlive_a_new_table_with_their_route_only() -> None:
    meters, before = RouteMeters(), table(*info("/a", "/b"))
    meters.follow(before.entries)
    stays, goes = (meters.of(before.match("GET", path)) for path in ("/a", "/b"))
    goes.begin()
    after = table(*info("/c", "/a"))
    meters.follow(after.entries)
    goes.end("GET", 200, 0.0)
    assert meters.of(after.match("GET", "/a")) is stays
    assert names(meters) == [("app", "/c"), ("app", "/a"), ("", "")]
    meters.follow(table(*info("/a"), app="other").entries)
    assert names(meters) == [("other", "/a"), ("", "")]
    assert all(meter.answers == {} for meter in meters)


def test_it_says_what_it_is() -> None:
    assert repr(RouteMeter("app", "/a")) == "<RouteMeter app /a in_flight=0>"

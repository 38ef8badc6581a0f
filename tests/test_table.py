from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serveit.control.snapshot import AppInfo, RouteInfo
from serveit.declare.routing import compile_pattern
from serveit.web.table import Found, Redirect, RouteTable, WrongMethod


def route(text: str, *methods: str, prefix: str = "", endpoint: str = "") -> RouteInfo:
    pattern = compile_pattern(text)
    return RouteInfo(
        text, pattern.regex, methods or ("GET", "HEAD"), endpoint or text, prefix, pattern.is_literal
    )


def table(*routes: RouteInfo | str) -> RouteTable:
    infos = tuple(route(each) if isinstance(each, str) else each for each in routes)
    return RouteTable([AppInfo("default", (), (), infos)])


def outcome(found: Any) -> Any:
    return (found.entry.route.pattern, found.values) if isinstance(found, Found) else found


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/api/123/3.14", ("/api/<user_id:int>/<number:float>", ["123", "3.14"])),
        ("/api/x/3.14", None),
        ("/api/1/2\n", None),
        ("/api/１/2", None),
        ("/api/1/2/", Redirect("/api/1/2")),
        ("/api/1", None),
    ],
)
def test_values_are_found_as_text(path: str, expected: Any) -> None:
    assert outcome(table("/api/<user_id:int>/<number:float>").match("GET", path)) == expected


def test_the_first_registered_wins_across_literals_and_patterns() -> None:
    routes = table("/a/<x>", "/a/b", "/<y>/c", "/a/c", "/<rest:path>")
    assert outcome(routes.match("GET", "/a/b")) == ("/a/<x>", ["b"])
    assert outcome(routes.match("GET", "/a/c")) == ("/a/<x>", ["c"])
    assert outcome(routes.match("GET", "/z/c")) == ("/<y>/c", ["z"])
    assert outcome(routes.match("GET", "/z/d")) == ("/<rest:path>", ["z/d"])
    literal_first = table("/a/b", "/a/<x>")
    assert outcome(literal_first.match("GET", "/a/b")) == ("/a/b", [])


def test_a_later_route_may_take_the_method() -> None:
    routes = table(route("/a/b", "POST"), route("/a/<x>", "PUT"), route("/<y>/b", "DELETE", "PUT"))
    assert outcome(routes.match("PUT", "/a/b")) == ("/a/<x>", ["b"])
    assert outcome(routes.match("DELETE", "/a/b")) == ("/<y>/b", ["a"])
    assert routes.match("GET", "/a/b") == WrongMethod(("DELETE", "POST", "PUT"))
    assert routes.match("PATCH", "/a/z") == WrongMethod(("PUT",))


def test_redirects_add_or_take_away_one_slash() -> None:
    routes = table("/with/", "/without", "/<x:int>/")
    assert routes.match("GET", "/with") == Redirect("/with/")
    assert routes.match("GET", "/without/") == Redirect("/without")
    assert routes.match("GET", "/7") == Redirect("/7/")
    assert routes.match("GET", "/without//") is None
    assert table("/").match("GET", "") == Redirect("/")
    assert table("/").match("GET", "//") == Redirect("/")
    assert table().match("GET", "/") is None


def test_prefixes_are_literal_and_apps_keep_their_order() -> None:
    one = AppInfo("one", (), (), (route("/<x>", prefix="/v1.0"),))
    other = AppInfo("other", (), (), (route("/a", prefix="/v1.0"), route("/b", prefix="/v<2>")))
    routes = RouteTable([one, other])
    found = routes.match("GET", "/v1.0/a")
    assert isinstance(found, Found)
    assert (found.entry.app, found.values) == ("one", ["a"])
    assert routes.match("GET", "/v1x0/a") is None
    assert isinstance(routes.match("GET", "/v<2>/b"), Found)
    assert [entry.path for entry in routes.entries] == ["/v1.0/<x>", "/v1.0/a", "/v<2>/b"]


def test_only_patterns_with_the_same_literal_segments_are_tried() -> None:
    routes = table(*(f"/api/v1/r{number}/<x>" for number in range(500)), "/api/<y>/z")
    assert len(routes._candidates("/api/v1/r7/1")) == 2
    assert outcome(routes.match("GET", "/api/v1/r499/1")) == ("/api/v1/r499/<x>", ["1"])
    assert outcome(routes.match("GET", "/api/v1/z")) == ("/api/<y>/z", ["v1"])


SEGMENTS = st.sampled_from(["a", "b", "<p>", "<p:int>", "<p:path>", "a<p>", "1", ""])
PATTERNS = st.lists(SEGMENTS, min_size=1, max_size=4).map(
    lambda segments: "/" + "/".join(each.replace("<p", f"<p{i}") for i, each in enumerate(segments))
)
METHODS = st.lists(st.sampled_from(["GET", "POST", "PUT"]), min_size=1, max_size=3, unique=True)
PATHS = st.lists(st.sampled_from(["a", "b", "ab", "1", "22", "", "a\n"]), max_size=4).map(
    lambda segments: "/" + "/".join(segments)
)


def naive(routes: list[RouteInfo], method: str, path: str) -> Any:
    """The model: every route in turn."""
    takers = [(each, re.fullmatch(re.escape(each.prefix) + each.regex, path)) for each in routes]
    taking = [(each, match) for each, match in takers if match]
    for each, match in taking:
        if method in each.methods:
            return each.pattern, list(match.groups())
    if taking:
        return WrongMethod(tuple(sorted({name for each, _ in taking for name in each.methods})))
    other = path[:-1] if path.endswith("/") else path + "/"
    if path != "/" and any(re.fullmatch(re.escape(each.prefix) + each.regex, other) for each in routes):
        return Redirect(other)
    return None


@given(
    st.lists(st.tuples(PATTERNS, METHODS, st.sampled_from(["", "/a", "/v1"])), max_size=10),
    st.sampled_from(["GET", "POST", "PUT", "PATCH"]),
    st.lists(PATHS, min_size=1, max_size=5),
    st.sampled_from(["", "/a", "/v1"]),
)
def test_it_decides_as_trying_all_routes_in_turn(
    declared: list[tuple[str, list[str], str]], method: str, paths: list[str], prefix: str
) -> None:
    routes = [route(text, *methods, prefix=prefix) for text, methods, prefix in declared]
    decided = table(*routes)
    for path in paths:
        path = prefix + path
        assert outcome(decided.match(method, path)) == naive(routes, method, path), path

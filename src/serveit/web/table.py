"""The route table: which endpoint a method and path lead to. Pure; both HTTP paths decide by it.

Hot path: `match` once per request.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from serveit.control.snapshot import AppInfo, RouteInfo


class Entry(NamedTuple):
    """A route in its place: earlier ones win."""

    order: int
    app: str
    route: RouteInfo
    regex: re.Pattern[str]
    methods: frozenset[str]

    @property
    def path(self) -> str:
        """The pattern as declared, with the app's prefix."""
        return self.route.prefix + self.route.pattern


class Found(NamedTuple):
    """The route, and the path's parameters as text, in the pattern's order."""

    entry: Entry
    values: list[str]


class WrongMethod(NamedTuple):
    """Routes take the path, none takes the method: a 405 with these in `Allow`, sorted."""

    allow: tuple[str, ...]


class Redirect(NamedTuple):
    """The path with or without its last slash is taken: a 307 to it."""

    path: str


class RouteTable:
    """All routes of an instance, in the order of registration.

    A request's cost does not grow with the routes beside its own: what takes a literal path, patterns
    included, is found out when the table is made; other paths are tried only on the patterns that
    start with the same literal segments.
    """

    def __init__(self, apps: Iterable[AppInfo] = ()) -> None:
        self.entries = list(_number(apps))
        self._patterns = _by_segments(entry for entry in self.entries if not entry.route.is_literal)
        """By literal segments in front ("/", "/api/", "/api/users/"), each with those of its parents."""
        literals: dict[str, list[Found]] = {
            entry.path: [] for entry in self.entries if entry.route.is_literal
        }
        for path, found in literals.items():
            found.extend(self._by_pattern(path))
        for entry in self.entries:
            if entry.route.is_literal:
                literals[entry.path].append(Found(entry, []))
        self._literals = {
            path: sorted(found, key=lambda each: each.entry.order) for path, found in literals.items()
        }

    def match(self, method: str, path: str) -> Found | WrongMethod | Redirect | None:
        """Where a request leads.

        Args:
            method: in upper case.
            path: percent-decoded, without the server's root path.
        """
        allow: set[str] = set()
        for found in self._literals.get(path) or self._by_pattern(path):
            if method in found.entry.methods:
                return found
            allow |= found.entry.methods
        if allow:
            return WrongMethod(tuple(sorted(allow)))
        if path != "/":
            other = path[:-1] if path.endswith("/") else f"{path}/"
            if other in self._literals or next(self._by_pattern(other), None) is not None:
                return Redirect(other)
        return None

    def _by_pattern(self, path: str) -> Iterator[Found]:
        """Patterns that take the path, first registered first."""
        for entry in self._candidates(path):
            match = entry.regex.fullmatch(path)
            if match is not None:
                yield Found(entry, list(match.groups("")))

    def _candidates(self, path: str) -> list[Entry]:
        patterns = self._patterns
        candidates = patterns["/"]
        if len(patterns) > 1:
            slash = path.find("/", 1)
            while slash > 0:
                deeper = patterns.get(path[: slash + 1])
                if deeper is None:
                    break
                candidates = deeper
                slash = path.find("/", slash + 1)
        return candidates


def _number(apps: Iterable[AppInfo]) -> Iterator[Entry]:
    order = 0
    for app in apps:
        for route in app.routes:
            regex = re.compile(re.escape(route.prefix) + route.regex)
            yield Entry(order, app.name, route, regex, frozenset(route.methods))
            order += 1


def _by_segments(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    own: dict[str, list[Entry]] = {"/": []}
    for entry in entries:
        segments = _literal_segments(entry.path)
        for segment in segments:
            own.setdefault(segment, [])
        own[segments[-1]].append(entry)
    whole: dict[str, list[Entry]] = {}
    for segment in sorted(own, key=len):  # parents first
        parent = segment[: segment.rfind("/", 0, -1) + 1]
        whole[segment] = sorted([*whole.get(parent, ()), *own[segment]], key=lambda entry: entry.order)
    return whole


def _literal_segments(pattern: str) -> list[str]:
    """What every path of the pattern starts with: "/api/users/<id>" → "/", "/api/", "/api/users/"."""
    bracket = re.search("[<{]", pattern)
    literal = pattern[: bracket.start()] if bracket else pattern
    return [literal[: index + 1] for index, char in enumerate(literal) if char == "/"]

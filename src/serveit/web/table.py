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

    Literal paths are found by a dictionary, patterns by their first segment where that is literal, so
    that a request's cost does not grow with the routes beside its own.
    """

    def __init__(self, apps: Iterable[AppInfo] = ()) -> None:
        self.entries = list(_number(apps))
        self._literals: dict[str, list[Entry]] = {}
        self._by_segment: dict[str, list[Entry]] = {}
        self._anywhere: list[Entry] = []
        patterns = [entry for entry in self.entries if not entry.route.is_literal]
        for entry in self.entries:
            if entry.route.is_literal:
                self._literals.setdefault(entry.path, []).append(entry)
        segments = {_literal_segment(entry.path) for entry in patterns} - {None}
        for entry in patterns:
            segment = _literal_segment(entry.path)
            for known in segments if segment is None else (segment,):
                self._by_segment.setdefault(known or "", []).append(entry)
            if segment is None:
                self._anywhere.append(entry)

    def match(self, method: str, path: str) -> Found | WrongMethod | Redirect | None:
        """Where a request leads.

        Args:
            method: in upper case.
            path: percent-decoded, without the server's root path.
        """
        allow: set[str] = set()
        for entry, values in self._matches(path):
            if method in entry.methods:
                return Found(entry, values)
            allow |= entry.methods
        if allow:
            return WrongMethod(tuple(sorted(allow)))
        if path != "/":
            other = path[:-1] if path.endswith("/") else f"{path}/"
            if next(self._matches(other), None) is not None:
                return Redirect(other)
        return None

    def _matches(self, path: str) -> Iterator[tuple[Entry, list[str]]]:
        """Routes that take the path, first registered first."""
        literals = self._literals.get(path, ())
        patterns = self._by_segment.get(_first_segment(path), self._anywhere)
        following = iter(literals)
        literal = next(following, None)
        for entry in patterns:
            while literal is not None and literal.order < entry.order:
                yield literal, []
                literal = next(following, None)
            found = entry.regex.fullmatch(path)
            if found is not None:
                yield entry, list(found.groups(""))
        while literal is not None:
            yield literal, []
            literal = next(following, None)


def _number(apps: Iterable[AppInfo]) -> Iterator[Entry]:
    order = 0
    for app in apps:
        for route in app.routes:
            regex = re.compile(re.escape(route.prefix) + route.regex)
            yield Entry(order, app.name, route, regex, frozenset(route.methods))
            order += 1


def _first_segment(path: str) -> str:
    return path[1:].partition("/")[0]


def _literal_segment(pattern: str) -> str | None:
    """The first segment of a pattern, if it is whole and has no parameter in it."""
    segment, slash, _ = pattern[1:].partition("/")
    return segment if slash and "<" not in segment and "{" not in segment else None

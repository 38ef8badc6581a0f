"""A route as the app records it: a pattern and methods that lead to an endpoint."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serveit.declare.routing import Pattern
    from serveit.declare.traffic import Traffic

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


@dataclass(frozen=True)
class Route:
    """A pattern and methods that lead to an endpoint.

    Attributes:
        name: of the endpoint; unique in the app.
        pattern: the compiled path.
        methods: in upper case, HEAD included where GET is.
        traffic: the backends and shadows behind it.
        target: the method of these backends that is called.
    """

    name: str
    pattern: Pattern
    methods: tuple[str, ...]
    traffic: Traffic
    target: str


def check_methods(methods: Collection[str], where: str) -> tuple[str, ...]:
    """The methods in upper case, sorted, with HEAD where GET is.

    Raises:
        TypeError: not a collection of strings, or empty.
        ValueError: none of HTTP's methods.
    """
    if isinstance(methods, str) or not methods or not all(isinstance(method, str) for method in methods):
        raise TypeError(f'{where}: methods must be a list like ["GET", "POST"], got {methods!r}')
    upper = {method.upper() for method in methods}
    unknown = sorted(upper - METHODS)
    if unknown:
        raise ValueError(f"{where}: unknown method {unknown[0]!r}; there are {', '.join(sorted(METHODS))}")
    if "GET" in upper:
        upper.add("HEAD")
    return tuple(sorted(upper))


def refuse_equal(pattern: Pattern, methods: tuple[str, ...], routes: Sequence[Route], where: str) -> None:
    """ValueError if a route takes the same paths (names of parameters aside) and one of the methods."""
    for route in routes:
        shared = [method for method in route.methods if method in methods]
        if route.pattern.shape == pattern.shape and shared:
            raise ValueError(
                f"{where} is equal to {route.pattern.text!r}, which takes {', '.join(shared)} already: "
                "give it other methods= or another path, or lead one route to both with traffic="
            )


def endpoint_name(
    name: str | None, pattern: Pattern, methods: tuple[str, ...], taken: Collection[str], where: str
) -> str:
    """The endpoint's name: as given, else the path, with the methods where the path is taken.

    Raises:
        TypeError: it is no str, or empty.
        ValueError: it is taken.
    """
    if name is None:
        # A second route on the same path has other methods: they tell the two apart.
        name = pattern.text if pattern.text not in taken else f"{','.join(methods)} {pattern.text}"
    if not isinstance(name, str) or not name:
        raise TypeError(f"{where}: name must be a non-empty str, got {name!r}")
    if name in taken:
        raise ValueError(f"{where}: the name {name!r} is taken by a route or backend: choose another name=")
    return name

"""A route as the app records it: a pattern and methods that lead to an endpoint."""

from __future__ import annotations

from collections.abc import Collection
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

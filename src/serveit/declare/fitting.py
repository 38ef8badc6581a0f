"""Whether a backend's function can answer the requests of a route: asked when the route is declared, and,
for the backends that traffic may be sent to later, when the app is handed over (`control/spec`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serveit.declare.binding import plan_binding
from serveit.declare.conversion import shorten

if TYPE_CHECKING:
    from collections.abc import Collection

    from serveit.declare.app import App
    from serveit.declare.backend import BackendRecord
    from serveit.declare.routing import Pattern

MAX_PAIRS = 500
"""Of a route and a backend that are looked at for later: some 0.1 ms, and a line of text, each."""
MAX_TEXT = 400


def check_fit(
    backend: BackendRecord, method_name: str, pattern: Pattern, methods: Collection[str], where: str
) -> None:
    """TypeError if the backend's method cannot be called with the requests of a route; the text says which
    parameter and why. A backend given by import string is not known before a replica has imported it.

    Args:
        backend: that the route may lead to.
        method_name: of its methods the one that is called.
        pattern: the route's.
        methods: the route's HTTP methods.
        where: what errors start with.
    """
    if isinstance(backend.target, str):
        return
    try:
        method = backend.method(method_name)
    except AttributeError as error:
        raise TypeError(f"{where}: {error}") from None
    plan_binding(
        method.function,
        pattern=pattern,
        methods=methods,
        batch=method.is_batch,
        drop_first=method.of_class,
        where=where,
    )


def misfits(app: App) -> dict[str, dict[str, str]]:
    """The backends that an app's endpoints cannot lead to: by endpoint and backend, why not.

    Who changes traffic has no user code to look at; of an app with very many routes and backends only the
    first `MAX_PAIRS` are looked at, and what was not is found out by requests.
    """
    found: dict[str, dict[str, str]] = {}
    pairs = (
        (route, backend)
        for route in app.routes
        for backend in app.backends.values()
        if backend.name not in dict(route.traffic.weights)
    )
    for (route, backend), _ in zip(pairs, range(MAX_PAIRS), strict=False):
        where = f"endpoint {route.name!r} cannot lead to backend {backend.name!r}"
        try:
            check_fit(backend, route.target, route.pattern, route.methods, where)
        except Exception as error:  # whatever it is, nothing leads there: no reason to refuse the app
            found.setdefault(route.name, {})[backend.name] = shorten(str(error), MAX_TEXT)
    return found

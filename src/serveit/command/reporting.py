"""What the command shows of an instance: text for people, plain data for `--json`. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from serveit.control.snapshot import EndpointInfo, RouteInfo


class Routed(Protocol):
    """Whatever has routes: an app's spec, or what callers are told of it."""

    @property
    def name(self) -> str: ...

    @property
    def routes(self) -> tuple[RouteInfo, ...]: ...

    @property
    def endpoints(self) -> tuple[EndpointInfo, ...]: ...


class Route(NamedTuple):
    """A path, and where it leads."""

    path: str
    methods: tuple[str, ...]
    app: str
    endpoint: str
    weights: tuple[tuple[str, float], ...]
    shadows: tuple[tuple[str, float], ...]

    @property
    def leads_to(self) -> str:
        """The backend; where there are several, with their shares."""
        if len(self.weights) == 1:
            text = self.weights[0][0]
        else:
            text = ", ".join(f"{name} {_share(weight)}" for name, weight in self.weights)
        if self.shadows:
            text += f" (copies: {', '.join(f'{name} {_share(share)}' for name, share in self.shadows)})"
        return text

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        data = self._asdict()
        return {
            **data,
            "methods": list(self.methods),
            "weights": dict(self.weights),
            "shadows": dict(self.shadows),
        }


def routes_of(apps: Iterable[Routed]) -> list[Route]:
    """All routes, in the order in which they are matched."""
    found = []
    for app in apps:
        endpoints = {endpoint.name: endpoint for endpoint in app.endpoints}
        for route in app.routes:
            end = endpoints[route.endpoint]
            path = route.prefix + route.pattern
            found.append(Route(path, route.methods, app.name, end.name, end.weights, end.shadows))
    return found


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines, each column as wide as what is in it."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def serving_lines(url: str | None, counts: Mapping[str, int], routes: Sequence[Route]) -> list[str]:
    """What a start ends with.

    Args:
        url: where it answers HTTP.
        counts: replicas by backend.
        routes: of the app.
    """
    replicas = _count(sum(counts.values()), "replica")
    head = f"serving {url or 'without HTTP'}  ({_count(len(counts), 'backend')}, {replicas})"
    rows = [(route.path, ",".join(route.methods), route.leads_to) for route in routes]
    return [head, *(f"  {line}" for line in columns(rows))]


def routes_lines(routes: Sequence[Route]) -> list[str]:
    """A table of routes."""
    if not routes:
        return ["no routes"]
    head = ("PATH", "METHODS", "APP", "LEADS TO")
    return columns([head, *((r.path, ",".join(r.methods), r.app, r.leads_to) for r in routes)])


# -- status --------------------------------------------------------------------------------------


def is_whole(status: Mapping[str, Any]) -> bool:
    """Whether every app is RUNNING with all its replicas, and every HTTP server is there.

    Args:
        status: what `Instance.status` tells.
    """
    apps = all(map(_app_is_whole, status.get("apps", {}).values()))
    return apps and all(server.get("state", "ready") == "ready" for server in _servers(status).values())


def _app_is_whole(app: Mapping[str, Any]) -> bool:
    strengths = (_strength(app, name) for name in app.get("backends", {}))
    return _state(app) == "RUNNING" and not app.get("failed") and all(r >= w for r, w in strengths)


def _state(app: Mapping[str, Any]) -> str:
    return str(app.get("state") or ("FAILED" if app.get("failed") else "RUNNING"))


def _strength(app: Mapping[str, Any], backend: str) -> tuple[int, int]:
    """Replicas that are ready, and how many there are to be."""
    replicas = app["backends"][backend].values()
    ready = sum(replica.get("state") == "ready" for replica in replicas)
    return ready, app.get("num_replicas", {}).get(backend, len(replicas))


def _servers(status: Mapping[str, Any]) -> dict[str, Any]:
    return status.get("proxies") or {}


def status_lines(status: Mapping[str, Any]) -> list[str]:
    """What runs, and how it is.

    Args:
        status: what `Instance.status` tells, or a part of it.
    """
    apps = status.get("apps", {})
    lines = [f"serving {status.get('url') or 'without HTTP'}"]
    if apps:
        head = ("APP", "STATE", "VERSION", "BACKEND", "READY", "RUNNING", "WAITING")
        rows = [row for name, app in sorted(apps.items()) for row in _app_rows(name, app)]
        lines += ["", *columns([head, *rows])]
    else:
        lines += ["no apps: `serveit deploy module:app` adds one"]
    messages = [line for name, app in sorted(apps.items()) for line in _messages(name, app)]
    if messages:
        lines += ["", *messages]
    if servers := _servers(status):
        rows = [_server_row(node, server) for node, server in servers.items()]
        lines += ["", *columns([("NODE", "HTTP SERVER", "URL"), *rows])]
    return lines


def _app_rows(name: str, app: Mapping[str, Any]) -> list[tuple[str, ...]]:
    start = (name, _state(app), str(app.get("version", "")))
    rows: list[tuple[str, ...]] = []
    for backend, replicas in app.get("backends", {}).items():
        ready, wanted = _strength(app, backend)
        running, waiting = (sum(r.get(key, 0) for r in replicas.values()) for key in ("running", "waiting"))
        rows.append((*start, backend, f"{ready}/{wanted}", str(running), str(waiting)))
        start = ("", "", "")
    return rows or [(*start, "", "", "", "")]


def _messages(name: str, app: Mapping[str, Any]) -> list[str]:
    """Why it is not as it should be, each line behind the app's name."""
    told = [app["message"]] if app.get("message") else []
    told += [
        f"{backend} was given up: {why}"
        for backend, why in app.get("failed", {}).items()
        if why not in told and f"{backend}: {why}" not in told
    ]
    told += [
        f"replica {id} is being replaced: {replica['illness']}"
        for replicas in app.get("backends", {}).values()
        for id, replica in replicas.items()
        if replica.get("illness")
    ]
    return [f"{name}: {line}" for text in told for line in text.splitlines()]


def _server_row(node: str, server: Mapping[str, Any]) -> tuple[str, ...]:
    state = str(server.get("state", "ready"))
    return (str(server.get("address") or node), state, str(server.get("url") or ""))


def _share(weight: float) -> str:
    """Percents, without what a float adds to them."""
    return f"{round(100 * weight, 4):g}%"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"

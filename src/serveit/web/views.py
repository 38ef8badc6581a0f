"""The instance's own paths under /-/, for people, load balancers and orchestrators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from serveit.web.problems import Problem, problem

if TYPE_CHECKING:
    from collections.abc import Mapping

    from serveit.calling.directory import Directory
    from serveit.types import HeaderList
    from serveit.web.exposition import Exposition
    from serveit.web.table import RouteTable


METRICS = "/-/metrics"


class Views:
    """Answers from what this process knows; only for its metrics are replicas asked."""

    def __init__(self, directories: Mapping[str, Directory], exposition: Exposition) -> None:
        self._directories = directories
        self._exposition = exposition
        self._views = {"/-/routes": _routes, "/-/healthz": _healthz, "/-/readyz": self._readyz}
        self._paths = sorted((*self._views, METRICS))

    async def answer(
        self, method: str, path: str, headers: HeaderList, table: RouteTable, ready: bool
    ) -> Problem:
        """The answer for a path under /-/.

        Args:
            method: of the request.
            path: the whole of it.
            headers: the request's.
            table: the routes.
            ready: whether the instance as a whole takes requests.
        """
        if path not in self._paths:
            return problem(404, f"no such path; under /-/ there are {', '.join(self._paths)}")
        if method not in ("GET", "HEAD"):
            return problem(405, f"{path} takes GET and HEAD", headers=[(b"allow", b"GET, HEAD")])
        if path == METRICS:
            content_type, body = await self._exposition.page(headers)
            return _whole(content_type, body)
        return self._views[path](table, ready)

    def _readyz(self, table: RouteTable, ready: bool) -> Problem:
        """Ready: every backend that a route leads to has a replica that takes requests."""
        if not ready:
            return _unready("starting or stopping")
        missing = set()
        for entry in table.entries:
            directory = self._directories[entry.app]
            endpoint = directory.endpoint(entry.route.endpoint)
            for backend, weight in endpoint.traffic.weights:
                if weight and not directory.routers[backend].statistics().replicas_ready:
                    missing.add(backend)
        if missing:
            return _unready(f"no replica of {', '.join(sorted(missing))} is ready")
        return _json({"status": "ready"})


def _routes(table: RouteTable, ready: bool) -> Problem:
    """Path → [endpoint, methods]; routes that share a path are told apart by their endpoints' names."""
    listed: dict[str, Any] = {}
    for entry in table.entries:
        key = entry.path if entry.path not in listed else entry.route.endpoint
        listed[key] = [entry.route.endpoint, list(entry.route.methods)]
    return _json(listed)


def _healthz(table: RouteTable, ready: bool) -> Problem:
    """Healthy: this process answers."""
    return _json({"status": "ok"})


def _unready(why: str) -> Problem:
    return problem(503, why, headers=[(b"retry-after", b"1")])


def _json(value: Any) -> Problem:
    return _whole(b"application/json", msgspec.json.encode(value))


def _whole(content_type: bytes, body: bytes) -> Problem:
    headers = [(b"content-type", content_type), (b"content-length", b"%d" % len(body))]
    return Problem(200, headers, body)

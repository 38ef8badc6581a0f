"""What an instance tells its proxies and callers: who serves what, where. Plain data, msgpack-able.

Snapshots are whole: whoever gets one replaces what it knew, if the version is newer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from serveit.types import DEFAULT_METHOD

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from serveit.config import BackendConfig
    from serveit.declare.app import App


class ReplicaInfo(msgspec.Struct, frozen=True):
    """A replica that may be sent requests."""

    id: str
    address: str
    """What the process's connector understands: a replica's id in one process, a socket elsewhere."""


class BackendInfo(msgspec.Struct, frozen=True):
    """What a router needs to know of a backend."""

    name: str
    replicas: tuple[ReplicaInfo, ...]
    max_ongoing_requests: int
    prefetch: int = 1
    max_queued_requests: int | None = None
    request_timeout_s: float | None = None
    given_up: str = ""
    """Why no replica is to come any more."""
    num_threads: int | None = None
    """Set where a long queue waits for threads: `def` functions that are not called with batches."""
    idempotent: bool = False
    """Whether a request that may have run may run again."""
    num_started: int = 0
    """Replicas that have become ready, ever."""
    num_died: int = 0
    """Replicas that ended though nobody ended them, ever."""


class EndpointInfo(msgspec.Struct, frozen=True):
    """What a route leads to."""

    name: str
    weights: tuple[tuple[str, float], ...]
    shadows: tuple[tuple[str, float], ...] = ()
    target: str = DEFAULT_METHOD


class RouteInfo(msgspec.Struct, frozen=True):
    """A pattern and its methods, as regex text: proxies have no user code."""

    pattern: str
    """As declared; what the replica knows the route by."""
    regex: str
    """For `re.fullmatch` on the percent-decoded path; one group a parameter, in order."""
    methods: tuple[str, ...]
    endpoint: str
    prefix: str = ""
    is_literal: bool = False


class AppInfo(msgspec.Struct, frozen=True):
    """One app of the instance."""

    name: str
    backends: tuple[BackendInfo, ...]
    endpoints: tuple[EndpointInfo, ...]
    routes: tuple[RouteInfo, ...]


class Snapshot(msgspec.Struct, frozen=True):
    """Everything, at one moment; versions compare as (epoch, counter)."""

    version: tuple[int, int]
    apps: tuple[AppInfo, ...]


def backend_info(
    name: str, config: BackendConfig, *, is_async: bool, replicas: Sequence[ReplicaInfo] = ()
) -> BackendInfo:
    """What routers are told of a backend.

    Args:
        name: of it.
        config: its options.
        is_async: whether it runs on the event loop.
        replicas: the ready ones.
    """
    is_threaded = not is_async and config.max_batch_size is None
    return BackendInfo(
        name=name,
        replicas=tuple(replicas),
        max_ongoing_requests=config.ongoing_limit(is_async=is_async),
        prefetch=config.prefetch,
        max_queued_requests=config.max_queued_requests,
        request_timeout_s=config.request_timeout_s,
        num_threads=config.num_threads if is_threaded else None,
        idempotent=config.idempotent,
    )


def app_info(app: App, name: str, prefix: str, replicas: Mapping[str, Sequence[ReplicaInfo]]) -> AppInfo:
    """An app as its proxies and callers are told of it.

    Args:
        app: what the user declared.
        name: of the app in its instance.
        prefix: in front of all its paths; "" or "/like/this".
        replicas: the ready ones, by backend name.
    """
    backends = tuple(
        backend_info(
            backend.name,
            backend.config,
            is_async=not backend.is_loaded or backend.is_async,
            replicas=replicas.get(backend.name, ()),
        )
        for backend in app.backends.values()
    )
    endpoints = [
        EndpointInfo(route.name, route.traffic.weights, route.traffic.shadows, route.target)
        for route in app.routes
    ]
    routes = [
        RouteInfo(
            pattern=route.pattern.text,
            regex=route.pattern.regex,
            methods=route.methods,
            endpoint=route.name,
            prefix=prefix,
            is_literal=route.pattern.is_literal,
        )
        for route in app.routes
    ]
    return AppInfo(name, backends, tuple(endpoints), tuple(routes))

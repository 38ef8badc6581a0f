"""What an app is to be: the desired state, as a driver hands it to the controller. Plain data.

The controller needs no user code: what only replicas understand travels in `code` as octets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from serveit.config import did_you_mean
from serveit.control.snapshot import AppInfo, BackendInfo, EndpointInfo, ReplicaInfo, RouteInfo, app_info

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from serveit.declare.app import App


class BackendSpec(msgspec.Struct, frozen=True):
    """One backend, as it is to be."""

    info: BackendInfo
    """What routers are told; its `replicas` are filled in when it is published."""
    num_replicas: int
    drain_s: float
    """What a drain waits for running requests."""

    @property
    def name(self) -> str:
        return self.info.name


class AppSpec(msgspec.Struct, frozen=True):
    """One app, as it is to be."""

    name: str
    backends: tuple[BackendSpec, ...]
    endpoints: tuple[EndpointInfo, ...]
    routes: tuple[RouteInfo, ...]
    code: bytes
    """Where replicas find the app: an encoded `Shipment`."""
    owner: str = ""
    """Whose end is the app's; empty for one that stays until it is deleted."""
    deploy_timeout_s: float = 60.0
    """How long one of its replicas may wait for its place in the cluster."""

    def backend(self, name: str) -> BackendSpec:
        """KeyError names the nearest, if there is none."""
        for backend in self.backends:
            if backend.name == name:
                return backend
        known = [backend.name for backend in self.backends]
        raise KeyError(f"app {self.name!r} has no backend {name!r}: {did_you_mean(name, known)}")

    def scaled(self, name: str, num_replicas: int) -> AppSpec:
        """The same with another number of replicas.

        Raises:
            KeyError: no such backend.
            ValueError: a negative number.
        """
        if num_replicas < 0:
            raise ValueError(f"num_replicas must not be negative, got {num_replicas}")
        changed = msgspec.structs.replace(self.backend(name), num_replicas=num_replicas)
        backends = tuple(changed if b.name == name else b for b in self.backends)
        return msgspec.structs.replace(self, backends=backends)

    def rerouted(
        self,
        name: str,
        weights: Sequence[tuple[str, float]],
        shadows: Sequence[tuple[str, float]],
    ) -> AppSpec:
        """The same with other traffic at an endpoint.

        Raises:
            KeyError: no such endpoint, or no such backend.
        """
        known = [endpoint.name for endpoint in self.endpoints]
        if name not in known:
            raise KeyError(f"app {self.name!r} has no endpoint {name!r}: {did_you_mean(name, known)}")
        for backend, _ in (*weights, *shadows):
            self.backend(backend)
        changes = {"weights": tuple(map(tuple, weights)), "shadows": tuple(map(tuple, shadows))}
        endpoints = tuple(
            msgspec.structs.replace(e, **changes) if e.name == name else e for e in self.endpoints
        )
        return msgspec.structs.replace(self, endpoints=endpoints)

    def published(self, replicas: Mapping[str, Sequence[ReplicaInfo]]) -> AppInfo:
        """What proxies and callers are told of it.

        Args:
            replicas: the ready ones, by backend.
        """
        backends = tuple(
            msgspec.structs.replace(b.info, replicas=tuple(replicas.get(b.name, ()))) for b in self.backends
        )
        return AppInfo(self.name, backends, self.endpoints, self.routes)


def app_spec(
    app: App, *, name: str, prefix: str = "", code: bytes, owner: str = "", deploy_timeout_s: float = 60.0
) -> AppSpec:
    """The spec of an app that a user declared.

    Args:
        app: what the user declared.
        name: of the app in its instance.
        prefix: in front of all its paths; "" or "/like/this".
        code: an encoded `Shipment`.
        owner: id of the driver whose end is the app's; "" for none.
        deploy_timeout_s: how long its replicas may wait for resources.
    """
    info = app_info(app, name, prefix, {})
    backends = []
    for backend in info.backends:
        config = app.backends[backend.name].config
        backends.append(BackendSpec(backend, config.num_replicas, config.graceful_shutdown_timeout_s))
    return AppSpec(name, tuple(backends), info.endpoints, info.routes, code, owner, deploy_timeout_s)

"""What an app is to be: the desired state, as a driver hands it to the controller. Plain data.

The controller needs no user code: what only replicas understand travels in `code` as octets.
"""

from __future__ import annotations

import re
import secrets
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec

from serveit.config import BackendConfig, did_you_mean
from serveit.control.orders import Settings, encode
from serveit.control.snapshot import AppInfo, EndpointInfo, RouteInfo, app_info, backend_info
from serveit.declare.backend import no_reconfigure
from serveit.declare.fitting import misfits
from serveit.declare.traffic import parse_shares, parse_traffic

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from serveit.control.orders import BackendChange
    from serveit.control.snapshot import BackendInfo, ReplicaInfo
    from serveit.declare.app import App


class BackendSpec(msgspec.Struct, frozen=True, dict=True):  # a dict for what is worked out once
    """One backend, as it is to be."""

    name: str
    num_replicas: int
    config: BackendConfig = BackendConfig()
    """Its options, `plain`: but for `num_replicas`, which is here, and `user_config`, the user's own."""
    user_config: bytes | None = None
    """Pickled, if it was changed while it ran; None for what the code says."""
    is_async: bool = True
    takes_user_config: bool | None = None
    """Whether it has a method `reconfigure`; None where only replicas know."""
    since: int = 0
    """The version of the app in which its replicas were last made anew; 0 for the one that this is of."""

    @property
    def drain_s(self) -> float:
        """What a drain waits for running requests."""
        return self.config.graceful_shutdown_timeout_s

    @property
    def max_surge(self) -> int:
        """Replicas beyond `num_replicas` that an update may start."""
        return self.config.max_surge

    @property
    def ray_actor_options(self) -> Mapping[str, Any]:
        """What its processes ask of the cluster."""
        return self.config.ray_actor_options or {}

    @cached_property
    def settings(self) -> bytes:
        """What its replicas are configured by: encoded `Settings`."""
        # What does not concern a process is left out: it need not be told when that changes.
        config = self.config.merge(max_surge=1, ray_actor_options=None, idempotent=False)
        return encode(Settings(config, self.user_config))

    def published(self, replicas: Sequence[ReplicaInfo]) -> BackendInfo:
        """What routers are told of it.

        Args:
            replicas: the ready ones.
        """
        return backend_info(self.name, self.config, is_async=self.is_async, replicas=replicas)

    def changed(self, wanted: BackendChange) -> BackendSpec:
        """The same with other options.

        Raises:
            TypeError: an unknown option, a value of the wrong type, or nothing to give a `user_config` to.
            ValueError: a value is out of range, or does not go with another.
        """
        user_config = wanted.user_config
        if user_config is None:
            user_config = self.user_config
        elif self.takes_user_config is False:
            raise TypeError(no_reconfigure(self.name))
        config = self.config.merge(**{"num_replicas": max(1, self.num_replicas), **wanted.options})
        self._check_kind(config)
        return msgspec.structs.replace(
            self, num_replicas=config.num_replicas, config=plain(config), user_config=user_config
        )

    def _check_kind(self, config: BackendConfig) -> None:
        """ValueError where its functions would begin, or end, to be called with lists."""
        is_batched = self.config.max_batch_size is not None
        if is_batched != (config.max_batch_size is not None):
            what = "lists of items, max_batch_size" if is_batched else "single requests, no max_batch_size"
        elif self.config.batch_methods != config.batch_methods:
            what = f"batch_methods={self.config.batch_methods!r}"
        else:
            return
        raise ValueError(
            f"backend {self.name!r}: its code is written for {what}: that changes with a deploy of other code"
        )


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
    id: str = ""
    """Of this deploy: who asks again whether it has arrived asks for the same."""
    deploy_timeout_s: float = 60.0
    """How long one of its replicas may wait for its place in the cluster."""
    misfits: dict[str, dict[str, str]] = {}
    """By endpoint and backend, why the endpoint cannot lead there: see `declare/fitting`."""

    def find(self, name: str) -> BackendSpec | None:
        """A backend of it, if there is one of that name."""
        return next((backend for backend in self.backends if backend.name == name), None)

    def backend(self, name: str) -> BackendSpec:
        """KeyError names the nearest, if there is none."""
        if (found := self.find(name)) is not None:
            return found
        known = [backend.name for backend in self.backends]
        raise KeyError(f"app {self.name!r} has no backend {name!r}: {did_you_mean(name, known)}")

    def stands_in_for(self, other: AppSpec, backend: str) -> bool:
        """Whether a backend's replicas of this version can answer all that callers of the other one ask
        of it: whether each route that leads there in the other does so here, too."""
        return other._asked_of(backend) <= self._asked_of(backend)

    def _asked_of(self, backend: str) -> set[tuple[str, str, str]]:
        """By pattern, HTTP method and the backend's method."""
        leading = {
            endpoint.name: endpoint.target
            for endpoint in self.endpoints
            if backend in {*dict(endpoint.weights), *dict(endpoint.shadows)}
        }
        return {
            (route.pattern, method, leading[route.endpoint])
            for route in self.routes
            if route.endpoint in leading
            for method in route.methods
        }

    def check_routes(self, others: Iterable[AppSpec]) -> None:
        """ValueError for a route that another app has.

        Args:
            others: what runs; specs of this app itself do not matter.
        """
        taken = {
            place: other.name for other in others if other.name != self.name for place in other._places()
        }
        for place, route in self._places().items():
            if place in taken:
                raise ValueError(
                    f"{place[1]} {route} of app {self.name!r} is taken by app {taken[place]!r}: "
                    "give one of them a prefix"
                )

    def _places(self) -> dict[tuple[str, str], str]:
        """Where its routes are, once the parameters' names are taken out: (regex, method) to pattern."""
        return {
            (re.escape(route.prefix) + route.regex, method): route.prefix + route.pattern
            for route in self.routes
            for method in route.methods
        }

    def with_backend(self, backend: BackendSpec) -> AppSpec:
        """The same with this backend in the place of the one of its name."""
        backends = tuple(backend if b.name == backend.name else b for b in self.backends)
        return msgspec.structs.replace(self, backends=backends)

    def changed(self, name: str, wanted: BackendChange) -> AppSpec:
        """The same with other options of a backend.

        Raises:
            KeyError: no such backend.
            TypeError, ValueError: as `BackendSpec.changed`.
        """
        changed = self.with_backend(self.backend(name).changed(wanted))
        if wanted.deploy_timeout_s is None:
            return changed
        return msgspec.structs.replace(changed, deploy_timeout_s=wanted.deploy_timeout_s)

    def as_next(self, number: int, name: str) -> AppSpec:
        """The same as another version, in which all backends but one run on as they are.

        Args:
            number: of this version.
            name: of the backend whose replicas are made anew.
        """
        backends = tuple(
            msgspec.structs.replace(b, since=0 if b.name == name else b.since or number)
            for b in self.backends
        )
        return msgspec.structs.replace(self, backends=backends, id="")

    def endpoint(self, name: str) -> EndpointInfo:
        """KeyError names the nearest, if there is none."""
        for endpoint in self.endpoints:
            if endpoint.name == name:
                return endpoint
        known = [endpoint.name for endpoint in self.endpoints]
        raise KeyError(f"app {self.name!r} has no endpoint {name!r}: {did_you_mean(str(name), known)}")

    def rerouted(
        self, name: str, weights: Mapping[str, float] | None, shadows: Mapping[str, float]
    ) -> AppSpec:
        """The same with other traffic at an endpoint.

        Two who change it at once do not undo each other: each says what changes.

        Args:
            name: of the endpoint.
            weights: all of them; None to leave them.
            shadows: those that change; 0 ends one.

        Raises:
            KeyError: no such endpoint.
            TypeError: what is given is no numbers by backend.
            ValueError: no such backend, or it does not fit the endpoint's route; numbers out of range, or
                weights that do not sum to 1.
        """
        found = self.endpoint(name)
        known = [backend.name for backend in self.backends]
        where = f"endpoint {name!r}"
        given = parse_shares(shadows, "shadow", known, where)
        table = parse_traffic(
            dict(found.weights) if weights is None else weights,
            {**dict(found.shadows), **dict(given)},
            known,
            where,
        )
        for backend in sorted({*dict(table.weights), *dict(table.shadows)}):
            if why := self.misfits.get(name, {}).get(backend):
                raise ValueError(why)
        changed = msgspec.structs.replace(found, weights=table.weights, shadows=table.shadows)
        endpoints = tuple(changed if endpoint is found else endpoint for endpoint in self.endpoints)
        return msgspec.structs.replace(self, endpoints=endpoints)

    def published(self, replicas: Mapping[str, Sequence[ReplicaInfo]]) -> AppInfo:
        """What proxies and callers are told of it.

        Args:
            replicas: the ready ones, by backend.
        """
        backends = tuple(b.published(replicas.get(b.name, ())) for b in self.backends)
        return AppInfo(self.name, backends, self.endpoints, self.routes)


def plain(config: BackendConfig) -> BackendConfig:
    """A configuration without what a `BackendSpec` has besides."""
    return config.merge(num_replicas=1, user_config=None)


def check_app_name(name: str) -> None:
    """ValueError for one that cannot be part of the names of actors."""
    if not name or "/" in name or not name.isprintable():
        raise ValueError(f"an app's name has at least one character, all printable and no '/', got {name!r}")


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
    check_app_name(name)
    info = app_info(app, name, prefix, {})
    backends = tuple(
        BackendSpec(
            record.name,
            record.config.num_replicas,
            plain(record.config),
            is_async=not record.is_loaded or record.is_async,
            takes_user_config=record.takes_user_config,
        )
        for record in app.backends.values()
    )
    return AppSpec(
        name,
        backends,
        info.endpoints,
        info.routes,
        code,
        owner=owner,
        id=secrets.token_hex(8),
        deploy_timeout_s=deploy_timeout_s,
        misfits=misfits(app),
    )

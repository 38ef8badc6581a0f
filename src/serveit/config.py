"""The two records of options: of a backend and of the HTTP servers. An option is spelled here, once."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from serveit.nearest import did_you_mean as did_you_mean  # most ask for it here
from serveit.resources import check_actor_options, plain
from serveit.types import DEFAULT_METHOD

Location = Literal["HeadOnly", "EveryNode", "NoServer"]

NODE_HOST = "node"
"""The `host` that stands for each node's own address."""
HTTP_QUEUE = 1_000
"""`max_queued_requests` of a proxy's router where the backend names none."""
HANDLE_QUEUE = 10_000
"""`max_queued_requests` of a handle's router where the backend names none."""
ASYNC_ONGOING = 100
"""`max_ongoing_requests` of an `async def` backend where none is named."""
FOREIGN_OPTIONS: Mapping[str, str] = {
    "max_concurrent_queries": "here it is max_ongoing_requests",
    "accept_batch": "here it is max_batch_size",
    "batch_wait_timeout": "here it is batch_wait_timeout_s",
    "experimental_graceful_shutdown_timeout_s": "here it is graceful_shutdown_timeout_s",
    "graceful_shutdown_wait_loop_s": "nothing polls here: leave it out",
    "autoscaling_config": "there is no scaling by load yet: set num_replicas, and change it while it serves",
    "num_cpus": 'write ray_actor_options={"num_cpus": ...}',
    "num_gpus": 'write ray_actor_options={"num_gpus": ...}',
    "runtime_env": 'write ray_actor_options={"runtime_env": {...}}',
    "route_prefix": "routes are @app.route's; a prefix for all of them is prefix= of serve and deploy",
}
"""What those ask for who come from Ray Serve, and what to write: see docs/from-ray-serve.md."""
MAX_SECONDS = 365 * 24 * 3600.0
"""The longest time that an option can ask for: what is longer is meant as "never", and has its own word."""
MAX_COUNT = sys.maxsize
"""The largest number that an option can ask for: larger ones do not travel."""
MAX_REPLICAS = 10_000
"""Of one backend. A controller that was asked for millions would be busy with them for good."""


@dataclass(frozen=True, kw_only=True)
class BackendConfig:
    """How one backend is run. `@app.backend` takes this record or its fields.

    Attributes:
        num_replicas: copies of the backend; at least 1, at most 10,000.
        max_batch_size: None: not a batch function. An int (1 included): `batch_methods` are always
            called with a list of up to so many items and return a sequence of as many results.
        batch_wait_timeout_s: how long an incomplete batch waits for more, counted from its first
            item. 0: nothing waits while a batch could run.
        max_concurrent_batches: batches that one replica runs at once.
        batch_methods: the methods that `max_batch_size` holds for.
        max_ongoing_requests: requests that one replica runs (and gathers for batches) at once,
            whoever sends them. None: 100 for `async def`, `num_threads` for `def`,
            2 x `max_batch_size` x `max_concurrent_batches` for batches.
        max_queued_requests: requests that wait in one router (a proxy, a process with handles)
            before it refuses more. None: 1,000 over HTTP and 10,000 through handles.
        num_threads: threads that run `def` functions, per replica. 1, since models are seldom
            thread-safe.
        user_config: handed to the class's `reconfigure` at start and at each change.
        request_timeout_s: seconds over HTTP until the first byte of the answer; None for no limit.
            Handles inherit their caller's deadline or have none.
        graceful_shutdown_timeout_s: how long a drain waits for running requests.
        health_check_period_s: so often is a replica looked after: its `check_health`, if its class has
            that method, is run, and the controller asks whether the process is still well. A replica
            whose `check_health` raises three times in a row gets no more requests, ends what it runs,
            and another takes its place.
        health_check_timeout_s: a replica whose event loop is blocked, whose process does not answer or
            whose `check_health` does not return for so long is killed and replaced. What waits for a
            thread does not count: a `def` check may stand behind a long `def` request.
        idempotent: running a request twice does no harm. Only then is one whose replica was lost with
            it on it sent again: once, to another replica, within its deadline, unless its answer had
            begun; at most 20 % of the requests and 10 a second. False: such requests fail with
            `ReplicaDied`, `executed="maybe"`.
        max_surge: replicas beyond `num_replicas` that an update may start at once; as many of the old
            ones stop when they are ready. 0: each old one stops first, for a cluster without room.
        ray_actor_options: what each replica's actor asks of the cluster, as Ray spells it:
            {"num_gpus": 0.5, "resources": {"license": 1}, "runtime_env": {...}}; `resources.py` has all of
            them. None: nothing; it then needs one CPU free to be placed, and holds none.
    """

    num_replicas: int = 1
    max_batch_size: int | None = None
    batch_wait_timeout_s: float = 0.0
    max_concurrent_batches: int = 1
    batch_methods: tuple[str, ...] = (DEFAULT_METHOD,)
    max_ongoing_requests: int | None = None
    max_queued_requests: int | None = None
    num_threads: int = 1
    user_config: Any = None
    request_timeout_s: float | None = 60.0
    graceful_shutdown_timeout_s: float = 30.0
    health_check_period_s: float = 5.0
    health_check_timeout_s: float = 30.0
    idempotent: bool = False
    max_surge: int = 1
    ray_actor_options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _check_count("num_replicas", self.num_replicas, least=1, most=MAX_REPLICAS)
        for name in ("max_concurrent_batches", "num_threads"):
            _check_count(name, getattr(self, name), least=1)
        for name in ("max_batch_size", "max_ongoing_requests"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), least=1)
        _check_count("max_surge", self.max_surge, least=0)
        if self.max_queued_requests is not None:
            _check_count("max_queued_requests", self.max_queued_requests, least=0)
        for name in ("batch_wait_timeout_s", "graceful_shutdown_timeout_s"):
            check_seconds(name, getattr(self, name))
        for name in ("health_check_period_s", "health_check_timeout_s"):
            check_seconds(name, getattr(self, name), positive=True)
        if not isinstance(self.idempotent, bool):
            raise TypeError(f"idempotent must be True or False, got {self.idempotent!r}")
        if self.request_timeout_s is not None:
            check_seconds("request_timeout_s", self.request_timeout_s, positive=True)
        if self.ray_actor_options is not None:
            check_actor_options(self.ray_actor_options)
        self._check_batching()
        self._make_plain()

    def _make_plain(self) -> None:
        for field in dataclasses.fields(self):
            if field.name != "user_config":
                object.__setattr__(self, field.name, plain(getattr(self, field.name)))

    def _check_batching(self) -> None:
        methods: Any = self.batch_methods
        is_many = isinstance(methods, Collection) and not isinstance(methods, str)
        if not is_many or not all(isinstance(name, str) for name in methods):
            raise TypeError(f"batch_methods must be a sequence of method names, got {methods!r}")
        if not methods:
            raise ValueError("batch_methods is empty: leave max_batch_size out for a backend without batches")
        object.__setattr__(self, "batch_methods", tuple(methods))
        if self.max_batch_size is None:
            for name, default in (
                ("batch_wait_timeout_s", 0.0),
                ("max_concurrent_batches", 1),
                ("batch_methods", (DEFAULT_METHOD,)),
            ):
                if getattr(self, name) != default:
                    raise ValueError(f"{name} needs max_batch_size: without it nothing is batched")
        elif self.max_ongoing_requests is not None and self.max_ongoing_requests < self.max_batch_size:
            raise ValueError(
                f"max_ongoing_requests must be ≥ max_batch_size ({self.max_batch_size}), "
                f"got {self.max_ongoing_requests}: a batch could never be full"
            )

    @classmethod
    def from_options(cls, config: BackendConfig | None, options: Mapping[str, Any]) -> BackendConfig:
        """The record that a decorator's arguments make.

        Raises:
            TypeError: an unknown option (named with the nearest known one), or both forms at once.
            ValueError: an option's value is out of range.
        """
        if config is None:
            check_options(cls, "@app.backend", options)
            return cls(**options)
        if not isinstance(config, BackendConfig):
            raise TypeError(f"config must be a BackendConfig, got {type(config).__name__}")
        if options:
            raise TypeError(
                f"give either config=BackendConfig(...) or its fields, not both "
                f"({', '.join(sorted(options))})"
            )
        return config

    def merge(self, **changes: Any) -> BackendConfig:
        """A copy with these fields changed, validated as a whole."""
        check_options(type(self), "a backend's configuration", changes)
        return dataclasses.replace(self, **changes)

    def needs_new_replicas(self, other: BackendConfig) -> bool:
        """Whether replicas that run with this cannot be given `other` while they run.

        What a process asks of the cluster is settled when it starts, and the user's object may belong to the
        thread that made it.
        """
        return self.num_threads != other.num_threads or (self.ray_actor_options or {}) != (
            other.ray_actor_options or {}
        )

    def ongoing_limit(self, *, is_async: bool) -> int:
        """`max_ongoing_requests`, or the default for this kind of backend."""
        if self.max_ongoing_requests is not None:
            return self.max_ongoing_requests
        if self.max_batch_size is not None:
            return 2 * self.max_batch_size * self.max_concurrent_batches
        return ASYNC_ONGOING if is_async else self.num_threads

    @property
    def prefetch(self) -> int:
        """Requests that a router hands to a replica beyond what it believes free."""
        return self.max_batch_size or 1


@dataclass(frozen=True, kw_only=True)
class HTTPOptions:
    """The HTTP servers of an instance.

    Attributes:
        host: address to bind. Anything but a loopback address is reachable from other machines. "node":
            each server binds its own node's address in Ray, the one that the other nodes reach it by.
        port: TCP port; 0 picks a free one, on each node another.
        location: "HeadOnly" (one server, on the head node), "EveryNode" (one on each, also on nodes that
            join later), or "NoServer"/None.
        middlewares: ASGI middlewares, outermost first. Each is a factory, called with the ASGI app that it
            wraps, or a `starlette.middleware.Middleware` with its options; or the import string of
            either, "package.module:name". On Ray import strings only: each server imports them itself.
        root_path: the path prefix that a reverse proxy in front strips.
        access_log: log a line per request.
        debug: put the exception's type, text and traceback into 500 answers.
        max_body_bytes: largest request body; larger ones get a 413.
        max_header_bytes: request line and header together; more gets a 431.
        max_connections: open connections per server; more get a 503.
        keep_alive_s: seconds an idle connection stays open.
        ssl_certfile: PEM file with the certificate chain; serves HTTPS.
        ssl_keyfile: PEM file with its private key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    location: Location | None = "HeadOnly"
    middlewares: Sequence[Any] = ()
    root_path: str = ""
    access_log: bool = False
    debug: bool = False
    max_body_bytes: int = 16 * 1024 * 1024
    max_header_bytes: int = 64 * 1024
    max_connections: int = 65_536
    keep_alive_s: float = 75.0
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.host, str) or not self.host:
            raise TypeError(
                f"host must be an address, a name or {NODE_HOST!r}, got {self.host!r}: "
                "for no HTTP server at all there is location=None"
            )
        _check_count("port", self.port, least=0)
        if self.port > 65_535:
            raise ValueError(f"port must be ≤ 65535, got {self.port}")
        for name in ("max_body_bytes", "max_header_bytes", "max_connections"):
            _check_count(name, getattr(self, name), least=1)
        check_seconds("keep_alive_s", self.keep_alive_s)
        known = (*Location.__args__, None)  # type: ignore[attr-defined]
        if self.location not in known:
            raise ValueError(f"location must be one of {', '.join(map(repr, known))}, got {self.location!r}")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ValueError(f"root_path must start with '/' and not end with one, got {self.root_path!r}")
        if isinstance(self.middlewares, str) or not isinstance(self.middlewares, Sequence):
            raise TypeError(f"middlewares must be a list of factories, got {self.middlewares!r}")
        for entry in self.middlewares:
            if not isinstance(entry, str) and not callable(entry) and not hasattr(entry, "cls"):
                raise TypeError(
                    f"a middleware is a factory, a Middleware of Starlette's, or the import string of one, "
                    f"got {entry!r}"
                )
        if self.ssl_keyfile and not self.ssl_certfile:
            raise ValueError("ssl_keyfile needs ssl_certfile")

    @classmethod
    def parse(cls, options: HTTPOptions | Mapping[str, Any] | None) -> HTTPOptions:
        """The record itself, one made of a dict, or the defaults for None."""
        if options is None:
            return cls()
        if isinstance(options, HTTPOptions):
            return options
        if not isinstance(options, Mapping):
            raise TypeError(f"http must be HTTPOptions or a dict, got {type(options).__name__}")
        check_options(cls, "HTTPOptions", options)
        return cls(**options)

    @property
    def serves(self) -> bool:
        """Whether there is a server at all."""
        return self.location not in (None, "NoServer")


def check_options(record: type[Any], where: str, options: Mapping[str, Any]) -> None:
    """TypeError for the first option that is no field of the dataclass `record`."""
    known = [field.name for field in dataclasses.fields(record)]
    for name in options:
        if name not in known:
            hint = FOREIGN_OPTIONS.get(name) if record is BackendConfig else None
            raise TypeError(f"{where} has no option {name!r}: {hint or did_you_mean(name, known)}")


def _check_count(name: str, value: Any, *, least: int, most: int = MAX_COUNT) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be ≥ {least}, got {value}")
    if value > most:
        raise ValueError(f"{name} must be ≤ {most}, got {value}")


def check_seconds(name: str, value: Any, *, positive: bool = False) -> None:
    """TypeError or ValueError for what is no number of seconds, in range."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, got {value!r}")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name} must be {'>' if positive else '≥'} 0 and finite, got {value}")
    if value > MAX_SECONDS:
        raise ValueError(f"{name} must be ≤ {MAX_SECONDS:.0f} seconds, a year, got {value}")

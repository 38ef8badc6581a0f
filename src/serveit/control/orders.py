"""What the controller and its processes tell each other through Ray: msgpack'd octets, never pickles.

What only replicas and drivers unpickle (the app by value, an exception) travels inside as octets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from serveit.config import BackendConfig

NAMESPACE = "serveit"
"""The Ray namespace of an instance's actors."""
CONTROLLER = "controller"
"""The name of the controller's actor."""
PROXY_NAMES = "proxy-"
"""What the names of proxies' actors begin with."""
_PASSING = re.compile(r"#\d+\b|\b\d+(\.\d+)? s\b")


class ReplicaOrder(msgspec.Struct, frozen=True):
    """Everything that a process needs to become a replica."""

    id: str
    app: str
    backend: str
    code: bytes
    """An encoded `Shipment`."""
    folder: str
    """Where its socket goes, if the node has the same file system; made with mode 0700."""
    secret: bytes
    """For channels over TCP."""
    over_tcp: bool
    """Whether callers on other nodes have to reach it."""
    log_level: str = "info"
    actor: str = ""
    """The name of its actor; an `ActorName`."""
    actor_options: Mapping[str, Any] = {}
    """What it asks of the cluster."""
    settings: bytes = b""
    """How it is configured: encoded `Settings`; empty for what the code says."""
    max_ongoing: int = 1
    """Requests that it runs at once."""


class Settings(msgspec.Struct, frozen=True):
    """How a running replica is configured. Two that are equal, octet by octet, ask the same of it."""

    config: BackendConfig
    """Without what only the controller or the user's code understands."""
    user_config: bytes | None = None
    """Pickled; None for what the code says."""


class ActorName(NamedTuple):
    """What the name of a replica's actor tells a controller that finds it running."""

    app: str
    replica: str
    """Its id, "backend#7"."""
    version: int
    """Of the app that its backend was made of; later ones may run it unchanged."""
    token: str
    """Of the instance: nobody else's actor in the cluster has this name."""

    def __str__(self) -> str:
        return f"{self.app}/{self.replica}.{self.version}@{self.token}"

    @property
    def backend(self) -> str:
        return self.replica.rpartition("#")[0]

    @property
    def number(self) -> int:
        """Of the replica."""
        return int(self.replica.rpartition("#")[2])

    @classmethod
    def parse(cls, name: str) -> ActorName | None:
        """None for the name of an actor that is no replica."""
        found = re.fullmatch(r"([^/]+)/(.+#\d+)\.(\d+)@(\w+)", name, re.DOTALL)
        return cls(found[1], found[2], int(found[3]), found[4]) if found is not None else None


class ProxyOrder(msgspec.Struct, frozen=True):
    """Everything that a process needs to become a proxy."""

    id: str
    options: bytes
    """Encoded HTTPOptions."""
    secret: bytes
    paths: tuple[str, ...] = ()
    """Where middlewares are found: the driver's import paths."""
    log_level: str = "info"
    node: str = ""
    """The id of the node that it serves on."""
    is_first: bool = True
    """Whether that is the head node."""


class Started(msgspec.Struct, frozen=True, tag=True):
    """The process is what it was ordered to be."""

    pid: int
    address: str
    """A replica's: where its callers connect, an encoded `Place`. A proxy's: its URL."""
    settings: bytes = b""
    """What a replica is configured by, at present."""


class Configured(msgspec.Struct, frozen=True, tag=True):
    """A running replica has taken in its new settings."""


class Leaving(msgspec.Struct, frozen=True, tag=True):
    """The process is ending already: a controller that is gone now has told it to."""


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """It cannot become that, or take in that: what the user's code, or the address to listen on, raised."""

    failure: bytes
    """An encoded `Failure`: type, text and traceback."""
    pickled: bytes = b""
    """The exception, for the driver; empty if it does not pickle."""
    where: str = ""
    """Which replica it was."""
    text: str = ""
    """What was raised, in a line."""


class Health(msgspec.Struct, frozen=True):
    """How a replica is."""

    illness: str = ""
    """Why it is not to be used any more, in a line; empty if it is well."""
    hangs: bool = False
    """It cannot be asked to end what it runs."""


class Place(msgspec.Struct, frozen=True):
    """Where a replica can be reached; its text is `ReplicaInfo.address`."""

    node: str
    unix: str
    tcp: str = ""
    actor: str = ""
    """The name of the actor, for tasks."""


class BackendChange(msgspec.Struct, frozen=True):
    """What is to change of a backend while it serves."""

    options: dict[str, Any] = {}
    """Fields of `BackendConfig`, but for `user_config`."""
    user_config: bytes | None = None
    """Another one, pickled; None to leave it."""
    deploy_timeout_s: float | None = None
    """How long a replica may wait for its place in the cluster; None: as before."""


class Joined(msgspec.Struct, frozen=True):
    """What the controller tells a process that joins the instance."""

    secret: bytes
    lines: str
    """Where watchers and owners of apps hold a connection, that tells of their end: an encoded `Place`."""


class Deployed(msgspec.Struct, frozen=True, tag=True):
    """The app is up, and proxies know it."""

    version: tuple[int, int]
    """Of the first snapshot that says so."""


class Deploying(msgspec.Struct, frozen=True, tag=True):
    """The app is on its way."""

    backends: dict[str, tuple[int, int]]
    """By name: replicas of the new version that are ready, and how many there are to be."""
    waiting: tuple[str, ...] = ()
    """What it waits for, where that is not the start of the user's code: a line each."""

    @property
    def reasons(self) -> dict[str, str]:
        """A line of `waiting` for each reason: which one of many replicas it is, and for how long it has
        waited, is no news."""
        reasons: dict[str, str] = {}
        for text in self.waiting:
            reasons.setdefault(_PASSING.sub("", text), text)
        return reasons


class DeployFailed(msgspec.Struct, frozen=True, tag=True):
    """The app did not come up; what ran before runs on."""

    text: str
    cause: StartFailed | None = None


encode = msgspec.msgpack.encode


def decode_outcome(octets: bytes) -> Started | StartFailed | Leaving:
    """What a process said of its start."""
    return msgspec.msgpack.decode(octets, type=Started | StartFailed | Leaving)


def decode_configured(octets: bytes) -> Configured | StartFailed | Leaving:
    """What a process said of new settings."""
    return msgspec.msgpack.decode(octets, type=Configured | StartFailed | Leaving)


def decode_health(octets: bytes) -> Health:
    """What a replica said of how it is."""
    return msgspec.msgpack.decode(octets, type=Health)


def decode_deployed(octets: bytes) -> Deployed | DeployFailed | Deploying:
    """What became of a deploy so far."""
    return msgspec.msgpack.decode(octets, type=Deployed | DeployFailed | Deploying)


def place_text(place: Place) -> str:
    return msgspec.json.encode(place).decode()


def parse_place(text: str) -> Place:
    return msgspec.json.decode(text, type=Place)

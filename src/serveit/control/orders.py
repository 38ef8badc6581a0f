"""What the controller and its processes tell each other through Ray: msgpack'd octets, never pickles.

What only replicas and drivers unpickle (the app by value, an exception) travels inside as octets.
"""

from __future__ import annotations

import msgspec

NAMESPACE = "serveit"
"""The Ray namespace of an instance's actors."""
CONTROLLER = "controller"
"""The name of the controller's actor."""


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
    """The name of its actor: no other replica of the cluster has it, not even one that a dead controller
    has left."""


class ProxyOrder(msgspec.Struct, frozen=True):
    """Everything that a process needs to become a proxy."""

    id: str
    options: bytes
    """Encoded HTTPOptions."""
    secret: bytes
    paths: tuple[str, ...] = ()
    """Where middlewares are found: the driver's import paths."""
    log_level: str = "info"


class Started(msgspec.Struct, frozen=True, tag=True):
    """The process is what it was ordered to be."""

    pid: int
    address: str
    """A replica's: where its callers connect, an encoded `Place`. A proxy's: its URL."""


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """It cannot become that: what the user's code, or the address to listen on, raised."""

    failure: bytes
    """An encoded `Failure`: type, text and traceback."""
    pickled: bytes = b""
    """The exception, for the driver; empty if it does not pickle."""
    where: str = ""
    """Which replica it was."""
    text: str = ""
    """What was raised, in a line."""


class Place(msgspec.Struct, frozen=True):
    """Where a replica can be reached; its text is `ReplicaInfo.address`."""

    node: str
    unix: str
    tcp: str = ""
    actor: str = ""
    """The name of the actor, for tasks."""


class Joined(msgspec.Struct, frozen=True):
    """What the controller tells a process that joins the instance."""

    secret: bytes
    lines: str
    """Where watchers and owners of apps hold a connection, that tells of their end: an encoded `Place`."""


class Deployed(msgspec.Struct, frozen=True, tag=True):
    """The app is up, and proxies know it."""

    version: tuple[int, int]
    """Of the first snapshot that says so."""


class DeployFailed(msgspec.Struct, frozen=True, tag=True):
    """The app did not come up; what ran before runs on."""

    text: str
    cause: StartFailed | None = None


encode = msgspec.msgpack.encode


def decode_outcome(octets: bytes) -> Started | StartFailed:
    """What a process said of its start."""
    return msgspec.msgpack.decode(octets, type=Started | StartFailed)


def decode_deployed(octets: bytes) -> Deployed | DeployFailed:
    """What became of a deploy."""
    return msgspec.msgpack.decode(octets, type=Deployed | DeployFailed)


def place_text(place: Place) -> str:
    return msgspec.json.encode(place).decode()


def parse_place(text: str) -> Place:
    return msgspec.json.decode(text, type=Place)

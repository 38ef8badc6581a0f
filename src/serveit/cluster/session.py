"""Ray in this process: the one it is connected to, one that is joined, or an embedded one of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from serveit.cluster.refs import stop_waiting
from serveit.control.orders import NAMESPACE
from serveit.wire.sockets import is_dead

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger("serveit.session")

REACH_S = 5.0
"""What a cluster's address gets to accept a connection."""
YOUNG_S = 10.0
"""What a process gets between making its socket and listening on it."""


_lock = threading.Lock()
"""Held while this process's Ray is started, joined, or shut down."""
_users = 0
"""Sessions in the Ray that was started or joined here: the last one to be closed shuts it down."""
_embedded = False
"""Whether it was started here."""


class Session:
    """Ray for as long as this process serves.

    Attributes:
        embedded: whether it was started here, and ends with the last session.
    """

    def __init__(self, *, embedded: bool, joined: bool) -> None:
        self.embedded = embedded
        self._joined = joined

    @property
    def is_last(self) -> bool:
        """Whether an embedded Ray ends with this one."""
        return self.embedded and _users == 1

    def __repr__(self) -> str:
        return f"<Session {'embedded' if self.embedded else 'joined'}>"

    @property
    def folder(self) -> str:
        """For the sockets of this cluster's processes on this machine; short, since their paths may not
        be long. The processes make it, with mode 0700."""
        job = ray.get_runtime_context().get_session_name()
        return str(_sockets() / job.removeprefix("session_").replace("_", "-")[-24:])

    def close(self) -> None:
        """Leave Ray as it was found. The user may have left it already."""
        global _users
        with _lock:
            if not ray.is_initialized() or not (self.embedded or self._joined):
                return
            _users -= 1
            if _users > 0:
                return
            folder = Path(self.folder)
            stop_waiting()
            ray.shutdown()
            if self.embedded:
                _remove(folder, young_s=0.0)


def open_session(address: str | None = None) -> Session:
    """Ray for this process; blocking, for some seconds where one has to be started.

    Args:
        address: of a cluster to join, "auto" for the one on this machine. None: the Ray that this process
            is connected to, else a new one, embedded: only what is needed, reachable with a token only.

    Raises:
        ConnectionError: no cluster at the address.
        RuntimeError: this process is connected to another.
    """
    global _users
    with _lock:
        if not ray.is_initialized():
            _users = 0
            session = _start(address)
        else:
            session = _found(address)
        _users += session.embedded or session._joined
    return session


def join_cluster(address: str) -> None:
    """Connect this process to Ray, if it is not connected yet. For handles that came from elsewhere."""
    with _lock:
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)


def _found(address: str | None) -> Session:
    """In the Ray that this process is connected to."""
    here = ray.get_runtime_context().gcs_address
    if address not in (None, "auto", here):
        raise RuntimeError(
            f"this process is connected to the Ray cluster at {here} already, not to {address!r}: "
            "leave address out, or call ray.shutdown() first"
        )
    started_here = _users > 0
    return Session(embedded=started_here and _embedded, joined=started_here and not _embedded)


def _start(address: str | None) -> Session:
    """In a Ray that this process joins, or starts."""
    global _embedded
    _embedded = address is None
    if address is not None:
        _check_reachable(address)
        try:
            ray.init(address=address, namespace=NAMESPACE, logging_level=logging.ERROR)
        except (ConnectionError, ValueError) as error:
            raise ConnectionError(
                f"no Ray cluster at {address!r}: {error}; `ray start --head` starts one, "
                "and without an address serveit starts its own"
            ) from None
        return Session(embedded=False, joined=True)
    _sweep()
    _make_token()
    with _environment():
        # "local" spelled out: a pointer that a dead cluster left must not be followed.
        ray.init(
            address="local",
            namespace=NAMESPACE,
            include_dashboard=False,
            logging_level=logging.ERROR,
        )
    return Session(embedded=True, joined=False)


def _check_reachable(address: str) -> None:
    """Ray would try for minutes, and say what it tries on stderr.

    Raises:
        ConnectionError: nobody listens at "host:port". Other forms are left to Ray.
    """
    host, colon, port = address.rpartition(":")
    if not colon or "/" in address or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except OSError as error:
        raise ConnectionError(
            f"no Ray cluster at {address!r}: {error.strerror or error}; `ray start --head` starts one, "
            "and without an address serveit starts its own"
        ) from None


def node_address() -> str:
    """The address of this process's node, as others on the network reach it."""
    find: Any = ray.util.get_node_ip_address  # typed by nobody
    return str(find())


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """What Ray's processes inherit: without their bytecode they take twice as long to start."""
    removed = os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    quiet = "RAY_USAGE_STATS_ENABLED" not in os.environ
    if quiet:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        yield
    finally:
        if quiet:
            del os.environ["RAY_USAGE_STATS_ENABLED"]
        if removed is not None:
            os.environ["PYTHONDONTWRITEBYTECODE"] = removed


def _make_token() -> None:
    """Ray protects an embedded cluster by a token, and would leave it in a file that everybody can read."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return
    if os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        return
    path = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):  # what cannot be made here is Ray's to report
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))


def _sockets() -> Path:
    return Path(tempfile.gettempdir()) / f"serveit-{os.getuid()}"


def _sweep() -> None:
    """Remove what processes that were killed have left: sockets on which nobody listens."""
    with contextlib.suppress(OSError):
        for folder in _sockets().iterdir():
            _remove(folder, YOUNG_S)


def _remove(folder: Path, young_s: float) -> None:
    """Remove a folder's dead sockets, and the folder if that empties it; nothing that is young.

    A process that is just starting has made its folder, and bound a socket that it does not listen on yet.
    """
    before = time.time() - young_s
    with contextlib.suppress(OSError):
        is_old = folder.lstat().st_mtime <= before
        for path in folder.iterdir():
            found = path.lstat()
            if found.st_mtime <= before and is_dead(str(path)):
                path.unlink(missing_ok=True)
        if is_old:
            folder.rmdir()

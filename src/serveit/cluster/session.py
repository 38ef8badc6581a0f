"""Ray in this process: the one it is connected to, one that is joined, or an embedded one of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from serveit.cluster.address import WAYS_OUT, find_cluster
from serveit.cluster.reaper import VARIABLE, Reaper
from serveit.cluster.refs import stop_waiting
from serveit.control.orders import NAMESPACE
from serveit.wire.sockets import is_dead

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger("serveit.session")

YOUNG_S = 10.0
"""What a process gets between making its socket and listening on it."""


_lock = threading.Lock()
"""Held while this process's Ray is started, joined, or shut down."""
_connection: _Connection | None = None
"""The last one that was started or joined here, while it has sessions."""


class _Connection:
    """A Ray that was started or joined here, and is left when its last session is closed.

    Attributes:
        embedded: whether it was started here, and ends with its last session.
        address: that it was joined by, which Ray may spell otherwise.
        num_sessions: the one mutable thing.
    """

    def __init__(self, reaper: Reaper | None, address: str | None = None) -> None:
        """
        Args:
            reaper: of one that was started here.
            address: of one that was joined.
        """
        self.address = address
        self.embedded = reaper is not None
        self.num_sessions = 0
        self._reaper = reaper
        self._name = _name()

    @property
    def is_there(self) -> bool:
        """Whether this process is connected to it still: the user may have left it."""
        return ray.is_initialized() and _name() == self._name

    def close(self) -> None:
        """Leave it, as it was found."""
        if self.is_there:
            folder = _folder()
            stop_waiting()
            ray.shutdown()
            if self.embedded:
                _remove(folder, young_s=0.0)
        if self._reaper is not None:
            self._reaper.close()


class Session:
    """Ray for as long as this process serves.

    Attributes:
        embedded: whether it was started here, and ends with the last session.
    """

    def __init__(self, connection: _Connection | None = None) -> None:
        """
        Args:
            connection: None where this process was connected already, and remains so.
        """
        self.embedded = connection is not None and connection.embedded
        self._connection = connection

    @property
    def is_broken(self) -> bool:
        """Whether an embedded Ray has ended, or is about to: a signal to a whole group of processes, or to a
        service, ends Ray's as well."""
        from ray._private import worker

        node: Any = getattr(worker, "_global_node", None)
        return self.embedded and node is not None and bool(node.dead_processes())

    @property
    def is_last(self) -> bool:
        """Whether an embedded Ray ends with this one."""
        return self.embedded and self._connection is not None and self._connection.num_sessions == 1

    def __repr__(self) -> str:
        return f"<Session {'embedded' if self.embedded else 'joined'}>"

    @property
    def folder(self) -> str:
        """For the sockets of this cluster's processes on this machine; short, since their paths may not
        be long. The processes make it, with mode 0700."""
        return str(_folder())

    def close(self) -> None:
        """Leave Ray as it was found. The user may have left it already."""
        global _connection
        with _lock:
            connection, self._connection = self._connection, None
            if connection is None:
                return
            connection.num_sessions -= 1
            if connection.num_sessions == 0:
                _connection = None if _connection is connection else _connection
                connection.close()


def open_session(address: str | None = None) -> Session:
    """Ray for this process; blocking, for some seconds where one has to be started.

    Args:
        address: of a cluster to join, "auto" for the one on this machine. None: the Ray that this process
            is connected to, else a new one, embedded: only what is needed, reachable with a token only.

    Raises:
        ConnectionError: no cluster at the address.
        RuntimeError: this process is connected to another.
    """
    global _connection
    connection: _Connection | None
    with _lock:
        if not ray.is_initialized():
            connection = _connection = _start() if address is None else _joined(address)
        else:
            connection = _found(address)
        if connection is not None:
            connection.num_sessions += 1
        return Session(connection)


def join_cluster(address: str) -> None:
    """Connect this process to Ray, if it is not connected yet. For handles that came from elsewhere."""
    with _lock:
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)


def _found(address: str | None) -> _Connection | None:
    """The Ray that this process is connected to, if that was begun here."""
    known = _connection if _connection is not None and _connection.is_there else None
    here = ray.get_runtime_context().gcs_address
    if address not in (None, "auto", here, known and known.address):
        raise RuntimeError(
            f"this process is connected to the Ray cluster at {here} already, not to {address!r}: "
            "leave address out, or call ray.shutdown() first"
        )
    return known


def _joined(address: str) -> _Connection:
    """A cluster that this process joins. Whoever started it looks after its end."""
    address = find_cluster(address)
    try:
        ray.init(address=address, namespace=NAMESPACE, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        raise ConnectionError(f"no Ray cluster at {address!r}: {error}; {WAYS_OUT}") from None
    return _Connection(None, address)


def _start() -> _Connection:
    """A Ray that ends with this process, however that ends."""
    _sweep()
    _make_token()
    reaper = Reaper()
    reaper.start()
    try:
        with _environment(reaper.marker):
            # "local" spelled out: a pointer that a dead cluster left must not be followed.
            ray.init(
                address="local",
                namespace=NAMESPACE,
                include_dashboard=False,
                logging_level=logging.ERROR,
            )
        reaper.remove(str(_folder()))
    except BaseException:
        reaper.close()
        raise
    return _Connection(reaper)


def node_address() -> str:
    """The address of this process's node, as others on the network reach it."""
    find: Any = ray.util.get_node_ip_address  # typed by nobody
    return str(find())


@contextlib.contextmanager
def _environment(marker: str) -> Iterator[None]:
    """What Ray's processes inherit, and this process has no longer than they take to start.

    The marker tells the reaper which they are: their titles must not be written over it, as they are where
    there is no SPT_NOENV. Without their bytecode they would take twice as long to start.
    """
    changes = {VARIABLE: marker, "SPT_NOENV": "1", "PYTHONDONTWRITEBYTECODE": None}
    if "RAY_USAGE_STATS_ENABLED" not in os.environ:
        changes["RAY_USAGE_STATS_ENABLED"] = "0"
    before = {name: os.environ.get(name) for name in changes}
    _set(changes)
    try:
        yield
    finally:
        _set(before)


def _set(environment: dict[str, str | None]) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


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


def _name() -> str:
    """Of the Ray that this process is connected to."""
    return str(ray.get_runtime_context().get_session_name())


def _folder() -> Path:
    return _sockets() / _name().removeprefix("session_").replace("_", "-")[-24:]


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

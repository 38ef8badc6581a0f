"""Sockets of channels: addresses, binding, and what keeps other users of the machine away."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
import struct
import sys
from contextlib import suppress
from typing import NamedTuple

MAX_PATH = 103 if sys.platform == "darwin" else 107
"""Octets of a Unix socket's path that the kernel takes."""

SOCKET_BUFFER = 1024 * 1024


class Address(NamedTuple):
    """Where a channel's listening end is: "unix:/path" or "tcp:host:port", taken apart."""

    kind: str
    host: str
    """Or the path."""
    port: int

    @classmethod
    def parse(cls, text: str, secret: bytes) -> Address:
        """Take it apart and check what can be checked without asking anybody.

        Raises:
            ValueError: it is neither, the path is too long, or TCP is to be spoken without a secret.
        """
        kind, _, place = text.partition(":")
        if kind == "unix" and place:
            if len(os.fsencode(place)) > MAX_PATH:
                raise ValueError(f"the path of a Unix socket may have {MAX_PATH} bytes at most: {place}")
            return cls(kind, place, 0)
        host, _, port = place.rpartition(":")
        if kind != "tcp" or not host or not (port.isascii() and port.isdigit()):
            raise ValueError(f"an address is unix:/path or tcp:host:port, not {text!r}")
        if not secret:
            raise ValueError(f"{text}: TCP needs a secret")
        return cls(kind, host.removeprefix("[").removesuffix("]"), int(port))

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix:{self.host}"
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"


def named(error: OSError, address: str) -> OSError:
    """The same error, saying where."""
    if error.errno is None:
        return type(error)(f"{address}: {error}")
    return OSError(error.errno, f"{error.strerror}: {address}")


async def bind_tcp(where: Address) -> socket.socket:
    """A socket at the address, not listening yet."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, _, _, place = found[0]
    # With the protocol named: asyncio sets TCP_NODELAY on no other.
    sock = socket.socket(family, kind, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(place)
    except OSError as error:
        sock.close()
        raise named(error, str(where)) from None
    return sock


def prepare(sock: socket.socket, kind: str) -> None:
    """A connected socket's options, and who is at its other end. Raises PermissionError for another user."""
    if kind == "tcp":
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return
    check_peer(sock)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)


def peer_uid(sock: socket.socket) -> int | None:
    """Who is at the other end of a Unix socket; None where the platform does not say."""
    if hasattr(socket, "SO_PEERCRED"):
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return int(struct.unpack("3i", credentials)[1])
    if hasattr(socket, "LOCAL_PEERCRED"):
        # SOL_LOCAL; struct xucred: version, uid, then groups.
        credentials = sock.getsockopt(0, socket.LOCAL_PEERCRED, 76)
        return int(struct.unpack_from("2I", credentials)[1])
    return None


def check_peer(sock: socket.socket) -> None:
    """Refuse other users.

    Raises:
        PermissionError: it is one.
    """
    uid = peer_uid(sock)
    if uid not in (None, os.geteuid()):
        raise PermissionError(f"the other end runs as uid {uid}, this one as {os.geteuid()}")


def private_directory(path: str) -> None:
    """Make it, or make sure that nobody else could put anything into it."""
    with suppress(FileExistsError):
        os.makedirs(path, mode=0o700)
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise PermissionError(f"{path} is to hold sockets and is no directory (a link to one will not do)")
    if found.st_uid != os.geteuid():
        raise PermissionError(f"{path} is to hold sockets and belongs to uid {found.st_uid}")
    mode = stat.S_IMODE(found.st_mode) & 0o777
    if mode != 0o700:
        raise PermissionError(f"{path} is to hold sockets and has mode {mode:o}; only 700 keeps others out")


def bind_private(path: str) -> socket.socket:
    """A Unix socket at `path`, not listening yet, that only this user can reach.

    Raises:
        PermissionError: others could come at its directory.
        OSError: somebody listens there.
    """
    private_directory(os.path.dirname(path) or ".")
    sock = socket.socket(socket.AF_UNIX)
    try:
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not is_dead(path):
                raise OSError(error.errno, f"{os.strerror(error.errno or 0)}: unix:{path}") from None
            os.unlink(path)
            sock.bind(path)
        # Nobody can connect before `listen`, nor come through the directory.
        os.chmod(path, 0o600)
    except BaseException:
        sock.close()
        raise
    return sock


def is_dead(path: str) -> bool:
    """Whether a socket file has no process any more."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) == errno.ECONNREFUSED

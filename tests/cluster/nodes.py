"""Several Ray nodes on one machine, each on an address of its own on loopback."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def nodes_environment() -> Iterator[dict[str, str]]:
    """For a cluster that has nothing to do with the session's, and soon misses a node that is lost."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    inherited.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory(prefix="nodes", ignore_cleanup_errors=True) as folder:
        health = {"period": "500", "timeout": "2000", "initial_delay": "500"}
        yield {
            **inherited,
            **{f"RAY_health_check_{name}_ms": value for name, value in health.items()},
            "RAY_health_check_failure_threshold": "4",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": folder,  # short, for the sake of the sockets in it
            "HOME": folder,
        }


def free_port(*addresses: str) -> int:
    """One that is free at each of them."""
    while True:
        with socket.socket() as first:
            first.bind((addresses[0], 0))
            port: int = first.getsockname()[1]
            try:
                for address in addresses[1:]:
                    with socket.socket() as other:
                        other.bind((address, port))
            except OSError:
                continue
            return port


def listens(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:
        return False
    return True

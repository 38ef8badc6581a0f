"""Which Ray cluster an address means, found in a few seconds and in silence.

Ray alone would try for minutes, say on standard error what it tries, and take any cluster that it finds on
this machine, those included whose token this process does not have.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

REACH_S = 3.0
"""What a cluster's address gets to accept a connection, and then to answer: less than the 5 s after which Ray
says on standard error that it tries."""

NOTHING_RUNS = (
    "no Ray cluster runs on this machine, and RAY_ADDRESS names none: `serveit run module:app` starts one "
    "with the app, `ray start --head` one that stays, for `serveit deploy module:app`"
)
WAYS_OUT = "`ray start --head` starts one, and `serveit run` without an address its own"


def find_cluster(address: str) -> str:
    """The address of a cluster that answers, and that lets this process in.

    Args:
        address: "host:port", or "auto": what RAY_ADDRESS says; else the cluster that `ray start` made on this
            machine; else the one that runs here. Other forms are left to Ray. A cluster of this machine is
            sent this account's token.

    Raises:
        ConnectionError: there is none; the text says what to do.
    """
    named = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address
    if named not in ("", "auto"):
        _check(named)
        return named
    with _silence():
        _use_own_token()
        started, running = _found_here()
        found = [place for place in started if _refusal(place) is None]
        refusals = {}
        if not found:
            refusals = {place: _refusal(place) for place in running}
            found = [place for place, refusal in refusals.items() if refusal is None]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConnectionError(
            f"several Ray clusters run on this machine, at {' and '.join(sorted(found))}: "
            "name one as the address, or in RAY_ADDRESS"
        )
    for place, refusal in refusals.items():
        if isinstance(refusal, ray.exceptions.AuthenticationError):
            raise ConnectionError(_wrong_token(place))
    raise ConnectionError(NOTHING_RUNS)


def _check(address: str) -> None:
    """Raises ConnectionError where nobody is at "host:port", or refuses this process."""
    if _parts(address) is None:
        return
    with _silence():
        refusal = _refusal(address)
        if isinstance(refusal, ray.exceptions.AuthenticationError) and _is_here(address):
            _use_own_token()
            refusal = _refusal(address)
    if isinstance(refusal, ray.exceptions.AuthenticationError):
        raise ConnectionError(_wrong_token(address))
    if refusal is not None:
        reason = getattr(refusal, "strerror", None) or refusal
        raise ConnectionError(f"no Ray cluster at {address!r}: {reason}; {WAYS_OUT}")


def _wrong_token(address: str) -> str:
    if os.environ.get("RAY_AUTH_MODE") != "token":
        way = "with RAY_AUTH_MODE=token in the environment it is sent the one in ~/.ray/auth_token"
    else:
        way = "RAY_AUTH_TOKEN, or a file that RAY_AUTH_TOKEN_PATH names, holds another than ~/.ray/auth_token"
    return f"the Ray cluster at {address} takes only those who have its token: {way}"


def _parts(address: str) -> tuple[str, int] | None:
    host, colon, port = address.rpartition(":")
    if not colon or "/" in address or not port.isdecimal():
        return None
    return host.strip("[]"), int(port)


def _found_here() -> tuple[list[str], Iterable[str]]:
    """What `ray start` noted, which may have ended since, and all clusters that run on this machine."""
    from ray._private import services

    find: Any = services
    if hasattr(find, "_cached_find_gcs_addresses"):  # what ran when this process last looked
        find._cached_find_gcs_addresses.cache_clear()
    noted = find.find_bootstrap_address(None)
    return [noted] if noted else [], sorted(find.find_gcs_addresses())


def _is_here(address: str) -> bool:
    """Whether it is one of this machine: this account's token is not sent to another unasked."""
    parts = _parts(address)
    if parts is None:
        return False
    try:
        found = socket.getaddrinfo(parts[0], 0, type=socket.SOCK_DGRAM)
        for family, kind, protocol, _, place in found:
            with socket.socket(family, kind, protocol) as own:
                own.bind(place)  # which only works for addresses of one's own
    except OSError:
        return False
    return bool(found)


def _use_own_token() -> None:
    """As Ray does for a cluster of this machine: where there is a token, it is used."""
    from ray._private.authentication import authentication_token_setup

    setup: Any = authentication_token_setup
    setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _refusal(address: str) -> Exception | None:
    """Why the cluster cannot be joined; None if it can."""
    parts = _parts(address)
    if parts is None:
        return ValueError("not host:port")
    try:
        socket.create_connection(parts, timeout=REACH_S).close()
    except OSError as error:
        return error
    return _ask(address)


def _ask(address: str) -> Exception | None:
    """Ask Ray's control service who it is. In a thread: what is no such service may never answer."""
    from ray import _raylet

    service: Any = _raylet
    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            service.GcsClient(address=address)
        except Exception as error:
            outcome.append(error)
        else:
            outcome.append(None)

    thread = threading.Thread(target=ask, name="serveit-ask-cluster", daemon=True)
    thread.start()
    thread.join(REACH_S)
    return outcome[0] if outcome else TimeoutError("what listens there does not answer as Ray does")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing of what Ray says below Python, straight to the descriptor, about an attempt that fails."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)

"""Small types that every room shares: what an HTTP request and an answer are on their way.

A leaf: it imports nothing of serveit's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import msgspec

Executed = Literal["no", "maybe", "yes"]
"""Whether user code ran for a request that failed; every error carries it."""

HeaderList = list[tuple[bytes, bytes]]
"""HTTP fields in the order they came, names in lower case, as in ASGI."""

DEFAULT_METHOD = "__call__"
"""The method of a backend that is called when none is named; a function has no other."""


class HttpRequest(msgspec.Struct, array_like=True, gc=False):
    """An HTTP request on its way from a proxy to a replica; the body travels beside it.

    Nothing in it is converted: a proxy knows patterns only as regex text, so the replica, which has
    the user's code, turns `path_values` into ints, floats and UUIDs.
    """

    route: str
    """The pattern that matched, as declared: "/api/<user_id:int>"."""
    target: str
    """The method of the backend to call; `DEFAULT_METHOD` for functions."""
    method: str
    path: str
    """Percent-decoded, with the root path in front, as ASGI's `scope["path"]`."""
    raw_path: bytes
    query: bytes
    headers: HeaderList
    path_values: list[str]
    """In the order of the pattern's parameters."""
    scheme: str = "http"
    http_version: str = "1.1"
    root_path: str = ""
    client: tuple[str, int] | None = None
    server: tuple[str, int | None] | None = None


class Timer(Protocol):
    """What `Clock.call_later` gives back."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """Where time comes from. Real: the event loop's. In tests: one that the test advances."""

    def time(self) -> float:
        """Monotonic seconds; any thread may ask."""
        ...

    def call_later(self, delay_s: float, callback: Callable[..., Any], *args: Any) -> Timer: ...

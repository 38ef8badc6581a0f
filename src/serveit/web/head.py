"""Header fields: what the ingress itself reads of a request's, and what may go into an answer's.

Hot path: `read_head` and `are_sendable` once per request.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from serveit.context import new_request_id
from serveit.exceptions import InvalidRequest

if TYPE_CHECKING:
    from serveit.types import HeaderList

MAX_REQUEST_ID = 128
MAX_TIMEOUT_S = 24 * 3600.0
"""What a client can ask for at most; not for the backend's own `request_timeout_s`."""
REQUEST_ID = b"x-request-id"

_WANTED = frozenset(
    {
        REQUEST_ID,
        b"x-request-timeout-ms",
        b"x-serve-shard-key",
        b"content-length",
        b"transfer-encoding",
        b"expect",
    }
)
MAX_DIGITS = 19
_NOT_IN_NAMES = re.compile(rb"[^!#$%&'*+\-.^_`|~0-9A-Za-z]")
_NOT_IN_VALUES = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_MAX_SEEN = 256
_seen_names: set[bytes] = set()
"""Names of answers' fields that were found to be good: nearly always the same few."""


class Unsendable(ValueError):
    """An answer whose status or header fields HTTP does not have; nothing of it was sent."""


class Head:
    """A request's header, as far as it concerns serveit.

    Attributes:
        request_id: the client's, or a new one.
        headers: all fields but inbound `x-serveit-*`, which only serveit may write.
        has_body: whether a body follows, going by HTTP/1.1's rules.
        content_length: as announced; None if it is not known beforehand.
        shard_key: what makes the choice of a backend sticky.
        expects_continue: the client may hold its body back until it is asked for it.
    """

    __slots__ = (
        "_timeout_ms",
        "content_length",
        "expects_continue",
        "has_body",
        "headers",
        "request_id",
        "shard_key",
    )

    def __init__(self, headers: HeaderList, wanted: dict[bytes, bytes]) -> None:
        self.headers = headers
        self.has_body = False
        self.expects_continue = False
        self.content_length: int | None = None
        self.shard_key: str | None = None
        self._timeout_ms: bytes | None = None
        if not wanted:  # as most requests are
            self.request_id = new_request_id()
            return
        self.request_id = _accepted(wanted.get(REQUEST_ID)) or new_request_id()
        self._timeout_ms = wanted.get(b"x-request-timeout-ms")
        self.expects_continue = b"expect" in wanted
        shard_key = wanted.get(b"x-serve-shard-key")
        if shard_key is not None:
            # As handles have it, so that both go the same way; what is no UTF-8 is a key as well.
            self.shard_key = shard_key.decode("utf-8", "surrogateescape")
        length = wanted.get(b"content-length")
        if length is not None and length.isdigit() and len(length) <= MAX_DIGITS:
            self.content_length = int(length)
        self.has_body = b"transfer-encoding" in wanted or (length is not None and self.content_length != 0)

    @property
    def timeout_s(self) -> float | None:
        """How long the client is willing to wait, a day at most.

        Raises:
            InvalidRequest: `x-request-timeout-ms` is no number of milliseconds.
        """
        value = self._timeout_ms
        if value is None:
            return None
        if not value.isdigit() or len(value) > 10 or int(value) == 0:
            message = "x-request-timeout-ms must be a whole number of milliseconds > 0"
            raise InvalidRequest(message, [{"loc": ["header", "x-request-timeout-ms"], "msg": message}])
        return min(int(value) / 1000, MAX_TIMEOUT_S)


def read_head(headers: HeaderList) -> Head:
    """One pass over the header fields, their names in lower case."""
    wanted: dict[bytes, bytes] = {}
    forged = False
    for name, value in headers:
        if name in _WANTED:
            wanted[name] = value
        elif name.startswith(b"x-serveit-"):
            forged = True
    if forged:
        headers = [field for field in headers if not field[0].startswith(b"x-serveit-")]
    return Head(headers, wanted)


def are_sendable(headers: HeaderList) -> bool:
    """Whether the fields can go out: a line break in one would start another field, or an answer."""
    for name, _ in headers:
        if name not in _seen_names:
            if not name or _NOT_IN_NAMES.search(name):
                return False
            if len(_seen_names) < _MAX_SEEN:
                _seen_names.add(name)
    return not _NOT_IN_VALUES.search(b"".join([value for _, value in headers]))


def request_id_of(headers: HeaderList) -> str:
    """The client's name for the request, if it is one that can be logged and echoed; else a new one."""
    given = next((value for name, value in headers if name == REQUEST_ID), None)
    return _accepted(given) or new_request_id()


def _accepted(value: bytes | None) -> str | None:
    if not value or len(value) > MAX_REQUEST_ID:
        return None
    text = value.decode("latin-1")
    return text if text.isascii() and text.isprintable() else None

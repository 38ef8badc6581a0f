"""Errors as answers: `application/problem+json` (RFC 9457), the same from every corner."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from serveit.exceptions import InvalidRequest, Rejected, ServeitError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serveit.types import Executed, HeaderList
    from serveit.wire.frames import Failure

MEDIA_TYPE = b"application/problem+json"


class Problem(NamedTuple):
    """An answer, whole."""

    status: int
    headers: HeaderList
    body: bytes


class RequestFailed(ServeitError):
    """A replica answered with ERROR; kept as it came, since a proxy unpickles nothing."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text, executed=failure.executed)
        self.failure = failure


def problem(
    status: int,
    detail: str = "",
    *,
    executed: Executed = "no",
    errors: Sequence[dict[str, Any]] = (),
    headers: HeaderList | None = None,
    **more: Any,
) -> Problem:
    """Make one.

    Args:
        status: the HTTP status.
        detail: a sentence for whoever reads the answer.
        executed: whether user code ran; becomes `x-serveit-executed`.
        errors: a 422's faults, each with `loc` and `msg`.
        headers: further header fields.
        more: further members of the document.
    """
    document: dict[str, Any] = {"type": "about:blank", "title": _title(status), "status": status}
    if detail:
        document["detail"] = detail
    if errors:
        document["errors"] = list(errors)
    document.update({name: value for name, value in more.items() if value})
    body = msgspec.json.encode(document)
    fields = [
        (b"content-type", MEDIA_TYPE),
        (b"content-length", b"%d" % len(body)),
        (b"x-serveit-executed", executed.encode()),
    ]
    own = {name for name, _ in fields}
    fields.extend(field for field in headers or () if field[0] not in own)
    return Problem(status, fields, body)


def problem_of(error: BaseException, *, debug: bool) -> Problem:
    """The answer for what the router or a replica raised.

    Args:
        error: a ServeitError; anything else is a 500 without detail.
        debug: put the exception's type, text and traceback into a 500.
    """
    if isinstance(error, RequestFailed):
        return _of_failure(error.failure, debug=debug)
    if not isinstance(error, ServeitError):
        return problem(500, str(error) if debug else "", executed="maybe")
    headers: HeaderList = []
    if isinstance(error, Rejected):
        headers.append((b"retry-after", b"%d" % error.retry_after_s))
    errors = error.errors if isinstance(error, InvalidRequest) else ()
    return problem(error.status, str(error), executed=error.executed, errors=errors, headers=headers)


def _of_failure(failure: Failure, *, debug: bool) -> Problem:
    more: dict[str, Any] = {}
    if debug and failure.status == 500:
        more = {"exception": f"{failure.kind}: {failure.text}", "traceback": failure.traceback}
    return problem(
        failure.status,
        failure.detail,
        executed=failure.executed,
        errors=failure.errors,
        headers=failure.headers,
        **more,
    )


def _title(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"

"""Errors as answers: `application/problem+json` (RFC 9457), the same from every corner."""

from __future__ import annotations

import traceback
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from serveit.exceptions import InvalidRequest, Rejected, ServeitError
from serveit.web.head import are_sendable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import Send

    from serveit.types import Executed, HeaderList
    from serveit.wire.frames import Failure

MEDIA_TYPE = b"application/problem+json"

WITHOUT_BODY = (204, 304)
"""Statuses whose answers have none, whatever was meant to be sent."""

_OWN = frozenset({b"content-type", b"content-length", b"transfer-encoding", b"x-serveit-executed"})


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

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.failure,)


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
        status: the HTTP status; one that no final answer can have becomes 500.
        detail: a sentence for whoever reads the answer.
        executed: whether user code ran; becomes `x-serveit-executed`.
        errors: a 422's faults, each with `loc` and `msg`.
        headers: further header fields, lower case; those that cannot be sent are left out.
        more: further members of the document.
    """
    if not 200 <= status <= 599:
        status = 500
    said: HeaderList = [(b"x-serveit-executed", executed.encode())]
    said.extend(field for field in headers or () if field[0] not in _OWN and are_sendable([field]))
    if status in WITHOUT_BODY:
        return Problem(status, said, b"")
    document: dict[str, Any] = {"type": "about:blank", "title": _title(status), "status": status}
    if detail:
        document["detail"] = detail
    if errors:
        document["errors"] = list(errors)
    document.update({name: value for name, value in more.items() if value})
    body = msgspec.json.encode(document)
    return Problem(
        status, [(b"content-type", MEDIA_TYPE), (b"content-length", b"%d" % len(body)), *said], body
    )


def problem_of(error: BaseException, *, debug: bool) -> Problem:
    """The answer for what the router, a replica or a middleware raised.

    Args:
        error: a ServeitError; anything else is a 500 without detail.
        debug: put the exception's type, text and traceback into a 500.
    """
    if isinstance(error, RequestFailed):
        return _of_failure(error.failure, executed=error.executed, debug=debug)
    if not isinstance(error, ServeitError):
        return problem(500, executed="maybe", **(_debug(error) if debug else {}))
    headers: HeaderList = []
    if isinstance(error, Rejected):
        headers.append((b"retry-after", b"%d" % error.retry_after_s))
    errors = error.errors if isinstance(error, InvalidRequest) else ()
    return problem(error.status, str(error), executed=error.executed, errors=errors, headers=headers)


async def send_problem(send: Send, answer: Problem, request_id: str) -> None:
    """Send it as an ASGI application does."""
    headers = [*answer.headers, (b"x-request-id", request_id.encode())]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


def _of_failure(failure: Failure, *, executed: Executed, debug: bool) -> Problem:
    more: dict[str, Any] = {}
    if debug and failure.status == 500:
        more = {"exception": f"{failure.kind}: {failure.text}", "traceback": failure.traceback}
    return problem(
        failure.status,
        failure.detail,
        executed=executed,
        errors=failure.errors,
        headers=failure.headers,
        **more,
    )


def _debug(error: BaseException) -> dict[str, Any]:
    lines = traceback.format_exception(error)
    return {"exception": f"{type(error).__qualname__}: {error}", "traceback": "".join(lines)}


def _title(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"

"""Every error that serveit raises, and what a caller may conclude from it.

    ServeitError
    ├── NotServing              nothing runs that could answer (a RuntimeError)
    │   └── NeedsRay            this needs the Ray runtime
    ├── Rejected                503: not executed, may be sent again
    │   ├── QueueFull           the caller's bounded queue is full
    │   ├── NoReplica           no replica was ready in time
    │   └── Draining            the replica or the instance is stopping
    ├── ReplicaDied             502: it may have been executed
    ├── DeadlineExceeded        504: (a TimeoutError)
    ├── InvalidRequest          422: a parameter is missing or has a bad value (a ValueError)
    │   ├── PathNotFound        404
    │   ├── UnsupportedMediaType 415
    │   └── BodyTooLarge        413
    ├── EncodingError           500: the result cannot be sent (a TypeError)
    ├── BatchError              500: a batch function's results do not fit its items
    ├── RemoteError             500: user code raised what cannot be rebuilt here
    ├── ItemErrors              raised by a batch function: some items failed, others did not
    ├── ImportFailed            an import string that leads nowhere
    └── ProtocolError           bytes on a channel that are not serveit's

`status` is the HTTP status, `executed` says whether user code ran: "no", "maybe" or "yes".
What the user's own code raises arrives as what it was, with the remote traceback as its cause.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from serveit.types import Executed


class ServeitError(Exception):
    """The base of the tree.

    Attributes:
        status: the HTTP status that the error is answered with.
        executed: whether user code ran for the request that failed.
    """

    status: ClassVar[int] = 500
    default_executed: ClassVar[Executed] = "no"

    def __init__(self, message: str = "", *, executed: Executed | None = None) -> None:
        super().__init__(message)
        self.executed: Executed = executed if executed is not None else self.default_executed


class NotServing(ServeitError, RuntimeError):
    """Nothing is running that could answer the call; the text says how to start it."""

    status = 503


class NeedsRay(NotServing):
    """Asked for what only Ray can give (an ObjectRef, a cluster) where Ray does not run."""


class Rejected(ServeitError):
    """The request was not executed and may be sent again.

    Attributes:
        retry_after_s: what the `Retry-After` header says.
    """

    status = 503
    retry_after_s: ClassVar[int] = 1


class QueueFull(Rejected):
    """As many requests wait in this router as `max_queued_requests` allows."""


class NoReplica(Rejected):
    """No replica of the backend was ready before the request gave up."""


class Draining(Rejected):
    """The replica or the instance is stopping and takes nothing new."""


class ReplicaDied(ServeitError):
    """The replica was lost with the request on it."""

    status = 502
    default_executed = "maybe"


class DeadlineExceeded(ServeitError, TimeoutError):
    """The deadline passed; `executed` is "no" if the request was still waiting."""

    status = 504
    default_executed = "maybe"


class InvalidRequest(ServeitError, ValueError):
    """A parameter or the body does not fit the function's signature.

    Args:
        message: one sentence.
        errors: one record a fault: `{"loc": ["query", "limit"], "msg": "expected int, got 'x'"}`.
    """

    status = 422

    def __init__(self, message: str = "", errors: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(message)
        self.errors = list(errors)


class PathNotFound(InvalidRequest):
    """No route takes the path, or a value in it does not convert."""

    status = 404


class UnsupportedMediaType(InvalidRequest):
    """The body's content type is not one that the function's parameter can be made from."""

    status = 415


class BodyTooLarge(InvalidRequest):
    """The body is larger than `max_body_bytes`."""

    status = 413


class EncodingError(ServeitError, TypeError):
    """The result of user code cannot be sent; the text names the type and the place in it."""

    default_executed = "yes"


class BatchError(ServeitError):
    """A batch function returned something other than one result an item."""

    default_executed = "yes"


class RemoteError(ServeitError):
    """User code raised an exception that cannot be pickled or rebuilt in the caller's process.

    Args:
        message: the exception's type and text.
        remote_traceback: its traceback, as text; empty if unknown.
    """

    default_executed = "yes"

    def __init__(self, message: str = "", remote_traceback: str = "") -> None:
        super().__init__(message)
        self.remote_traceback = remote_traceback

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text}\n\n{self.remote_traceback}" if self.remote_traceback else text


class RemoteTraceback(Exception):
    """Shown as the cause of an exception that was raised in a replica; holds its traceback."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0] if self.args else ""}"""'


class ItemErrors(ServeitError):
    """Raised by a batch function in place of a result: some items failed.

    A function whose declared type has no room for exceptions among its results raises this;
    returning the same list does the same.

    Args:
        outcomes: one entry an item, in order: its result, or the exception that it failed with.
    """

    default_executed = "yes"

    def __init__(self, outcomes: Sequence[Any] = ()) -> None:
        failed = sum(isinstance(outcome, BaseException) for outcome in outcomes)
        super().__init__(f"{failed} of {len(outcomes)} items failed")
        self.outcomes = list(outcomes)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.outcomes,), self.__dict__


class ImportFailed(ServeitError, ImportError):
    """An import string that does not lead to what it should; the text says what is missing."""


class ProtocolError(ServeitError):
    """Bytes on a channel that are not serveit's wire format, or break its rules."""

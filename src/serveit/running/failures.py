"""What an ERROR frame says of an exception. The one gate through which errors leave a replica.

Nothing of an exception that user code made is trusted here, neither its text nor its attributes: an
ERROR that could not be written would leave its caller waiting.
"""

from __future__ import annotations

import concurrent.futures.thread
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import msgspec

from serveit.exceptions import (
    BatchError,
    DeadlineExceeded,
    Draining,
    EncodingError,
    NeedsRay,
    NoReplica,
    NotServing,
    QueueFull,
    RemoteTraceback,
    ReplicaDied,
    ServeitError,
)
from serveit.types import Executed
from serveit.wire.frames import Failure

if TYPE_CHECKING:
    from serveit.types import HeaderList

MAX_TEXT = 4 * 1024
MAX_TRACEBACK = 16 * 1024
MAX_ERRORS = 50
MAX_LISTED = 64 * 1024
"""Octets that `errors` and `headers` may take, each; longer ones are left out."""

_OF_CALLS: dict[type[ServeitError], str] = {
    kind: f"a backend that this one called {what}"
    for kinds, what in (
        ((QueueFull, NoReplica, Draining, NotServing, NeedsRay), "did not take the request"),
        ((ReplicaDied,), "was lost with the request on it"),
        ((DeadlineExceeded,), "did not answer in time"),
    )
    for kind in kinds
}
"""What user code raises because of a call that it made; their own texts advise the one who made it."""

_EXECUTED = get_args(Executed)
_NOT_THE_USERS = (str(Path(__file__).resolve().parent), concurrent.futures.thread.__file__)


class Cancelled(ServeitError):
    """Its caller gave the request up; nobody reads this."""

    status = 499


def failure_of(
    error: BaseException, *, others: int, in_user_code: bool, traced: bool = True, is_own: bool = False
) -> Failure:
    """Describe an exception for the caller.

    Args:
        error: what ended the request.
        others: the replica's load, as every answer carries it.
        in_user_code: whether the user's function had been called: then the request was executed,
            whatever the exception says of itself (user code may raise serveit's own).
        traced: whether the caller can use the traceback, which costs more than all the rest.
        is_own: whether serveit made it for this very request, though user code had been called.
    """
    status = status_of(error)
    executed: Executed = "yes" if in_user_code else "no"
    if isinstance(error, ServeitError) and not in_user_code and error.executed in _EXECUTED:
        executed = error.executed
    return Failure(
        others=others,
        status=status,
        kind=_clip(type(error).__qualname__, MAX_TEXT),
        detail=_detail(error, status, is_own=is_own or not in_user_code),
        text=_clip(text_of(error), MAX_TEXT),
        executed=executed,
        errors=_errors(error),
        headers=_headers(error),
        traceback=user_traceback(error) if traced and in_user_code else "",
    )


def status_of(error: BaseException) -> int:
    """serveit's own errors have one, and Starlette's HTTPException; the rest is a 500: what other
    libraries call `status_code` is mostly what somebody else answered to this backend."""
    if isinstance(error, ServeitError):
        status = _attribute(error, "status")
    elif _is_http(error):
        status = _attribute(error, "status_code")
    else:
        return 500
    return int(status) if isinstance(status, int) and 300 <= status <= 599 else 500


def is_of_a_call(error: BaseException) -> bool:
    """Whether user code that raises this made a call that failed."""
    return type(error) in _OF_CALLS


def user_traceback(error: BaseException) -> str:
    """The traceback as text, without serveit's own frames on top."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frames = frames.tb_next
    try:
        lines = traceback.format_exception(type(error), error, frames or error.__traceback__)
    except Exception:  # an exception's notes and attributes may be anything
        lines = [*traceback.format_tb(frames), f"{type(error).__qualname__}: {text_of(error)}\n"]
    return _clip("".join(lines), MAX_TRACEBACK)


def text_of(error: object) -> str:
    """`str(error)`, even if that raises."""
    try:
        return str(error)
    except Exception:
        return "(its text cannot be made)"


def _detail(error: BaseException, status: int, *, is_own: bool) -> str:
    """Text for any HTTP client: never of an exception that was not meant for one."""
    if isinstance(error, ServeitError):
        if not is_own and is_of_a_call(error):
            return _OF_CALLS[type(error)]
        if status == 500 and not _is_of_the_answer(error, is_own):
            return ""
        return _clip(text_of(error), MAX_TEXT)
    if not _is_http(error) or (status == 500 and _attribute(error, "status_code") != 500):
        return ""
    detail = _attribute(error, "detail")
    return _clip(text_of(error if detail is None else detail), MAX_TEXT)


def _is_of_the_answer(error: ServeitError, is_own: bool) -> bool:
    """Whether it says what is wrong with the result, to whoever wrote the backend."""
    if isinstance(error, BatchError):  # made here, and not in a replica that user code called
        return is_own or not isinstance(error.__cause__, RemoteTraceback)
    return is_own and isinstance(error, EncodingError)


def _is_http(error: BaseException) -> bool:
    """Whether it is Starlette's HTTPException, made to be an answer."""
    exceptions = sys.modules.get("starlette.exceptions")
    return exceptions is not None and isinstance(error, exceptions.HTTPException)


def _errors(error: BaseException) -> list[dict[str, Any]]:
    errors = _attribute(error, "errors") if isinstance(error, ServeitError) else None
    if not isinstance(errors, list) or not all(isinstance(fault, dict) for fault in errors):
        return []
    return errors[:MAX_ERRORS] if _fits(errors[:MAX_ERRORS]) else []


def _headers(error: BaseException) -> HeaderList:
    headers = _attribute(error, "headers") if _is_http(error) else None
    if not isinstance(headers, Mapping):
        return []
    try:
        fields = [
            (str(name).lower().encode("latin-1"), str(value).encode("latin-1"))
            for name, value in headers.items()
        ]
    except Exception:
        return []
    return fields if _fits(fields) else []


def _attribute(error: BaseException, name: str) -> Any:
    """An attribute of an exception; None if there is none, also where a property raises."""
    try:
        return getattr(error, name, None)
    except Exception:
        return None


def _fits(listed: list[Any]) -> bool:
    """Whether it goes over the wire, and reads there as what it was: with text as keys."""
    if not listed:
        return True
    try:
        octets = msgspec.msgpack.encode(listed)
        msgspec.msgpack.decode(octets, type=list[dict[str, Any]] if isinstance(listed[0], dict) else list)
    except Exception:
        return False
    return len(octets) <= MAX_LISTED


def _clip(text: str, limit: int) -> str:
    """Both ends of a long text; replaces lone surrogates, which msgpack refuses."""
    if len(text) > limit:
        text = (
            f"{text[: limit // 2]}\n... ({len(text) - limit} characters left out) ...\n{text[-limit // 2 :]}"
        )
    return text.encode("utf-8", "backslashreplace").decode()

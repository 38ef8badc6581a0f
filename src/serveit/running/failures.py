"""What an ERROR frame says of an exception. The one gate through which errors leave a replica.

Nothing of an exception that user code made is trusted here, neither its text nor its attributes: an
ERROR that could not be written would leave its caller waiting.
"""

from __future__ import annotations

import concurrent.futures.thread
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import msgspec

from serveit.exceptions import BatchError, EncodingError, ServeitError
from serveit.types import Executed
from serveit.wire.frames import Failure

if TYPE_CHECKING:
    from serveit.types import HeaderList

MAX_TEXT = 4 * 1024
MAX_TRACEBACK = 16 * 1024
MAX_ERRORS = 50
MAX_LISTED = 64 * 1024
"""Octets that `errors` and `headers` may take, each; longer ones are left out."""

_EXECUTED = get_args(Executed)
_NOT_THE_USERS = (str(Path(__file__).resolve().parent), concurrent.futures.thread.__file__)


class Cancelled(ServeitError):
    """Its caller gave the request up; nobody reads this."""

    status = 499


def failure_of(error: BaseException, *, others: int, in_user_code: bool, traced: bool = True) -> Failure:
    """Describe an exception for the caller.

    Args:
        error: what ended the request.
        others: the replica's load, as every answer carries it.
        in_user_code: whether the user's function had been called: then the request was executed,
            whatever the exception says of itself (user code may raise serveit's own).
        traced: whether the caller can use the traceback, which costs more than all the rest.
    """
    status = status_of(error)
    executed: Executed = "yes" if in_user_code else "no"
    if isinstance(error, ServeitError) and not in_user_code and error.executed in _EXECUTED:
        executed = error.executed
    return Failure(
        others=others,
        status=status,
        kind=_clip(type(error).__qualname__, MAX_TEXT),
        detail=_detail(error, status),
        text=_clip(text_of(error), MAX_TEXT),
        executed=executed,
        errors=_errors(error),
        headers=_headers(error),
        traceback=user_traceback(error) if traced and in_user_code else "",
    )


def status_of(error: BaseException) -> int:
    """serveit's own errors have one; so has any exception with a `status_code`, as Starlette's
    HTTPException; the rest is a 500."""
    status = _attribute(error, "status" if isinstance(error, ServeitError) else "status_code")
    return int(status) if isinstance(status, int) and 300 <= status <= 599 else 500


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


def _detail(error: BaseException, status: int) -> str:
    """Text for any HTTP client: never of an exception that was not meant for one."""
    if isinstance(error, ServeitError):
        shown = status != 500 or isinstance(error, (EncodingError, BatchError))
        return _clip(text_of(error), MAX_TEXT) if shown else ""
    if status == 500 and _attribute(error, "status_code") != 500:
        return ""
    detail = _attribute(error, "detail")
    return _clip(text_of(error if detail is None else detail), MAX_TEXT)


def _errors(error: BaseException) -> list[dict[str, Any]]:
    errors = _attribute(error, "errors") if isinstance(error, ServeitError) else None
    if not isinstance(errors, list) or not all(isinstance(fault, dict) for fault in errors):
        return []
    return errors[:MAX_ERRORS] if _fits(errors[:MAX_ERRORS]) else []


def _headers(error: BaseException) -> HeaderList:
    headers = _attribute(error, "headers")
    if not isinstance(headers, Mapping) or _attribute(error, "status_code") is None:
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

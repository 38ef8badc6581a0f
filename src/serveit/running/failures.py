"""What an ERROR frame says of an exception. The one gate through which errors leave a replica."""

from __future__ import annotations

import concurrent.futures.thread
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serveit.exceptions import BatchError, EncodingError, ServeitError
from serveit.wire.frames import Failure

if TYPE_CHECKING:
    from serveit.types import Executed, HeaderList

MAX_TEXT = 4 * 1024
MAX_TRACEBACK = 16 * 1024
MAX_ERRORS = 50

_NOT_THE_USERS = (str(Path(__file__).resolve().parent), concurrent.futures.thread.__file__)


def failure_of(error: BaseException, *, others: int, in_user_code: bool) -> Failure:
    """Describe an exception for the caller.

    Args:
        error: what ended the request.
        others: the replica's load, as every answer carries it.
        in_user_code: whether the user's function had been called: then the request was executed,
            whatever the exception says of itself (user code may raise serveit's own).
    """
    executed: Executed = "yes"
    if isinstance(error, ServeitError) and not in_user_code:
        executed = error.executed
    elif not in_user_code:
        executed = "no"
    status = status_of(error)
    return Failure(
        others=others,
        status=status,
        kind=type(error).__qualname__,
        detail=_detail(error, status),
        text=_clip(_text(error), MAX_TEXT),
        executed=executed,
        errors=list(getattr(error, "errors", ()))[:MAX_ERRORS] if isinstance(error, ServeitError) else [],
        headers=_headers(error),
        traceback=user_traceback(error) if in_user_code else "",
    )


def status_of(error: BaseException) -> int:
    """serveit's own errors have one; so has any exception with a `status_code`, as Starlette's
    HTTPException; the rest is a 500."""
    if isinstance(error, ServeitError):
        return error.status
    status = getattr(error, "status_code", None)
    return status if isinstance(status, int) and 300 <= status <= 599 else 500


def user_traceback(error: BaseException) -> str:
    """The traceback as text, without serveit's own frames on top."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frames = frames.tb_next
    lines = traceback.format_exception(type(error), error, frames or error.__traceback__)
    return _clip("".join(lines), MAX_TRACEBACK)


def _detail(error: BaseException, status: int) -> str:
    """Text for any HTTP client: never of an exception that was not meant for one."""
    if isinstance(error, ServeitError):
        shown = status != 500 or isinstance(error, (EncodingError, BatchError))
        return _clip(str(error), MAX_TEXT) if shown else ""
    if status_of(error) == 500 and not hasattr(error, "status_code"):
        return ""
    detail = getattr(error, "detail", None)
    return _clip(str(detail) if detail is not None else _text(error), MAX_TEXT)


def _headers(error: BaseException) -> HeaderList:
    headers: Any = getattr(error, "headers", None)
    if not hasattr(error, "status_code") or not isinstance(headers, dict):
        return []
    return [
        (str(name).lower().encode("latin-1"), str(value).encode("latin-1")) for name, value in headers.items()
    ]


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "(its text cannot be made)"


def _clip(text: str, limit: int) -> str:
    """Whole lines from both ends of a long text; replaces lone surrogates, which msgpack refuses."""
    if len(text) > limit:
        text = (
            f"{text[: limit // 2]}\n... ({len(text) - limit} characters left out) ...\n{text[-limit // 2 :]}"
        )
    return text.encode("utf-8", "backslashreplace").decode()

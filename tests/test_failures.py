from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from serveit.exceptions import (
    BatchError,
    DeadlineExceeded,
    EncodingError,
    InvalidRequest,
    NotServing,
    QueueFull,
    Rejected,
    RemoteTraceback,
    ReplicaDied,
    ServeitError,
)
from serveit.running.failures import (
    MAX_ERRORS,
    MAX_LISTED,
    MAX_TEXT,
    MAX_TRACEBACK,
    Cancelled,
    failure_of,
    is_of_a_call,
    status_of,
    text_of,
    user_traceback,
)
from serveit.wire.frames import Failure, Frame, FrameType, decode_message, encode_frame, encode_message


def describe(
    error: BaseException, *, in_user_code: bool = True, traced: bool = True, is_own: bool = False
) -> Failure:
    """The failure as a caller reads it: it must go over the wire."""
    failure = failure_of(error, others=2, in_user_code=in_user_code, traced=traced, is_own=is_own)
    meta = encode_message(failure)
    encode_frame(FrameType.ERROR, 1, meta, bytes(64 * 1024))
    return decode_message(Failure, Frame(FrameType.ERROR, 0, 1, meta, b""))


class Teapot(HTTPException):
    def __init__(self, detail: str) -> None:
        super().__init__(418, detail)
        self.headers: Any = {"X-Pot": "é", "retry-after": 5}


def test_any_exception_is_a_500_that_tells_an_http_client_nothing() -> None:
    failure = describe(ValueError("secret"))
    assert (failure.others, failure.status, failure.kind) == (2, 500, "ValueError")
    assert (failure.detail, failure.text, failure.executed) == ("", "secret", "yes")
    assert failure.traceback == "ValueError: secret\n"
    assert (failure.errors, failure.headers) == ([], [])


def test_before_user_code_it_is_not_executed_and_has_no_traceback() -> None:
    failure = describe(AttributeError("no method"), in_user_code=False)
    assert (failure.status, failure.executed, failure.traceback) == (500, "no", "")


def test_serveits_own_errors_say_what_they_are() -> None:
    late = describe(DeadlineExceeded("late", executed="no"), in_user_code=False)
    assert (late.status, late.detail, late.executed) == (504, "late", "no")
    maybe = describe(DeadlineExceeded("late"), in_user_code=False)
    assert maybe.executed == "maybe"
    assert describe(Cancelled("gone"), in_user_code=False).status == 499
    fault = {"loc": ["query", "a"], "msg": "missing"}
    invalid = describe(InvalidRequest("bad", [fault]), in_user_code=False)
    assert (invalid.status, invalid.errors, invalid.detail) == (422, [fault], "bad")


def test_once_user_code_ran_it_was_executed_whatever_is_raised() -> None:
    nested = describe(QueueFull("a nested call's"))
    assert (nested.status, nested.executed, nested.text) == (503, "yes", "a nested call's")


@pytest.mark.parametrize(
    ("error", "status", "detail"),
    [
        (QueueFull("use handle.map"), 503, "did not take the request"),
        (NotServing("serveit run"), 503, "did not take the request"),
        (ReplicaDied("replica x#1"), 502, "was lost with the request on it"),
        (DeadlineExceeded("late"), 504, "did not answer in time"),
    ],
)
def test_what_a_nested_call_raised_is_no_advice_for_the_client(
    error: ServeitError, status: int, detail: str
) -> None:
    failure = describe(error)
    assert (failure.status, failure.detail) == (status, f"a backend that this one called {detail}")
    assert is_of_a_call(error)
    assert describe(error, is_own=True).detail == describe(error, in_user_code=False).detail == str(error)


class Busy(QueueFull):
    """The user's own."""


def test_what_user_code_made_of_serveits_errors_is_for_the_client() -> None:
    for error in (Busy("come back later"), Rejected("come back later"), InvalidRequest("come back later")):
        assert describe(error).detail == "come back later"
        assert not is_of_a_call(error)


def test_a_500_that_is_about_the_answer_says_so() -> None:
    for error in (EncodingError("$.x is nan"), BatchError("2 for 3")):
        assert describe(error, is_own=True).detail == str(error)
    assert describe(BatchError("2 for 3")).detail == "2 for 3"
    assert describe(ServeitError("internal"), is_own=True).detail == ""


def test_a_500_about_another_answer_does_not() -> None:
    remote = BatchError("2 for 3")
    remote.__cause__ = RemoteTraceback("there")
    for error in (EncodingError("an argument of 'x'"), remote):
        assert describe(error).detail == ""


class Upstream(Exception):
    """As the SDKs of HTTP services raise it."""

    status_code = 401
    headers = {"www-authenticate": "Bearer"}
    detail = "sk-1234"


def test_what_an_upstream_service_answered_is_not_the_answer() -> None:
    failure = describe(Upstream("Incorrect API key: sk-1234"))
    assert (failure.status, failure.detail, failure.headers) == (500, "", [])
    assert failure.text == "Incorrect API key: sk-1234"


def test_without_starlette_nothing_is_an_http_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "starlette.exceptions")
    assert describe(HTTPException(404)).status == 500


def test_an_exception_with_a_status_is_for_the_client() -> None:
    failure = describe(Teapot("short and stout"))
    assert (failure.status, failure.detail) == (418, "short and stout")
    assert failure.headers == [(b"x-pot", "é".encode("latin-1")), (b"retry-after", b"5")]
    starlettes = describe(HTTPException(404, "no such cat", {"a": "b"}))
    assert (starlettes.status, starlettes.detail, starlettes.headers) == (404, "no such cat", [(b"a", b"b")])
    assert describe(HTTPException(500, "on purpose")).detail == "on purpose"
    assert describe(HTTPException(500)).detail == "Internal Server Error"


@pytest.mark.parametrize("status", [200, 99, 600, "404", None, 4.04])
def test_a_status_that_is_none_is_a_500(status: Any) -> None:
    error = HTTPException(404, "x")
    error.status_code = status
    assert status_of(error) == 500
    assert describe(error).detail == ""


def test_a_traceback_begins_in_user_code_and_is_left_out_where_nobody_wants_it() -> None:
    try:
        raise_here()
    except KeyError as error:
        caught = error
    text = user_traceback(caught)
    assert "test_a_traceback_begins" in text
    assert "raise_here" in text
    assert describe(caught).traceback == text
    assert describe(caught, traced=False).traceback == ""


def raise_here() -> None:
    raise KeyError("here")


def test_long_texts_keep_both_ends() -> None:
    failure = describe(ValueError("a" * 100_000 + "z"))
    assert failure.text.startswith("aaa")
    assert failure.text.endswith("z")
    assert "characters left out" in failure.text
    assert len(failure.text) < MAX_TEXT + 100
    assert len(failure.traceback) < MAX_TRACEBACK + 100


class Silent(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Sly(ServeitError):
    """All its attributes are traps."""

    status = "teapot"  # type: ignore[assignment]

    def __init__(self, message: str = "", **attributes: Any) -> None:
        super().__init__(message)
        self.__dict__.update(attributes)


class Trap(HTTPException):
    def __init__(self, text: str) -> None:
        Exception.__init__(self, text)

    def __str__(self) -> str:
        return "x"

    @property
    def status_code(self) -> int:  # type: ignore[override]
        raise RuntimeError("no status")

    @property
    def headers(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no headers")


def test_exceptions_are_not_trusted() -> None:
    failure = describe(Silent())
    assert failure.text == "(its text cannot be made)"
    assert text_of(Silent()) == failure.text
    assert "Silent" in failure.traceback
    assert describe(Trap("x")).status == 500
    sly = describe(Sly("x", executed="perhaps", errors="all"), in_user_code=False)
    assert (sly.status, sly.executed, sly.errors) == (500, "no", [])
    noted = ValueError("x")
    noted.__notes__ = 5  # type: ignore[assignment]
    assert "ValueError: x" in describe(noted).traceback
    surrogate = describe(ValueError("\ud800"))
    assert surrogate.text == "\\ud800"


class Http(HTTPException):
    def __init__(self, text: str) -> None:
        super().__init__(404, text)


class BadNotes(ValueError):
    @property
    def __notes__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no notes")


def test_a_traceback_that_cannot_be_formatted_still_names_the_exception() -> None:
    assert describe(BadNotes("x")).traceback.endswith("BadNotes: x\n")


@pytest.mark.parametrize(
    "errors",
    [
        [{"loc": threading.Lock()}],
        ["text"],
        [{"msg": "\ud800"}],
        [{1: 2}],
        [{"n": 2**80}],
        [{"long": "x" * MAX_LISTED}],
        ({"a": 1},),
        None,
    ],
)
def test_errors_that_cannot_be_sent_are_left_out(errors: Any) -> None:
    error = InvalidRequest("bad")
    error.errors = errors
    assert describe(error).errors == []


def test_there_are_so_many_errors_at_most() -> None:
    assert len(describe(InvalidRequest("bad", [{"n": n} for n in range(500)])).errors) == MAX_ERRORS


@pytest.mark.parametrize(
    "headers", [{"a": "\u20ac"}, {"a": "x" * MAX_LISTED}, [("a", "b")], None, {Silent(): 1}]
)
def test_headers_that_cannot_be_sent_are_left_out(headers: Any) -> None:
    error = Teapot("x")
    error.headers = headers
    assert describe(error).headers == []


@given(
    text=st.text(),
    attributes=st.dictionaries(
        st.sampled_from(["status_code", "detail", "headers", "errors", "executed", "status"]),
        st.one_of(
            st.none(),
            st.integers(),
            st.text(),
            st.binary(),
            st.lists(st.dictionaries(st.text(), st.text())),
            st.dictionaries(st.one_of(st.text(), st.integers()), st.one_of(st.text(), st.binary())),
        ),
    ),
    make=st.sampled_from([Sly, Exception, Http]),
    in_user_code=st.booleans(),
)
def test_whatever_an_exception_is_made_of_it_can_be_sent(
    text: str, attributes: dict[str, Any], make: type[Exception], in_user_code: bool
) -> None:
    error = make(text)
    error.__dict__.update(attributes)
    failure = describe(error, in_user_code=in_user_code)
    assert 300 <= failure.status <= 599
    assert failure.kind == make.__name__

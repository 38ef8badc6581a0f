from __future__ import annotations

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
    QueueFull,
    ServeitError,
)
from serveit.running.failures import (
    MAX_ERRORS,
    MAX_LISTED,
    MAX_TEXT,
    MAX_TRACEBACK,
    Cancelled,
    failure_of,
    status_of,
    text_of,
    user_traceback,
)
from serveit.wire.frames import Failure, Frame, FrameType, decode_message, encode_frame, encode_message


def describe(error: BaseException, *, in_user_code: bool = True, traced: bool = True) -> Failure:
    """The failure as a caller reads it: it must go over the wire."""
    failure = failure_of(error, others=2, in_user_code=in_user_code, traced=traced)
    meta = encode_message(failure)
    encode_frame(FrameType.ERROR, 1, meta, bytes(64 * 1024))
    return decode_message(Failure, Frame(FrameType.ERROR, 0, 1, meta, b""))


class Teapot(Exception):
    status_code = 418
    headers = {"X-Pot": "é", "retry-after": 5}


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
    assert (nested.status, nested.executed, nested.detail) == (503, "yes", "a nested call's")


@pytest.mark.parametrize("error", [EncodingError("$.x is nan"), BatchError("2 for 3")])
def test_a_500_that_is_about_the_answer_says_so(error: ServeitError) -> None:
    assert describe(error).detail == str(error)
    assert describe(ServeitError("internal")).detail == ""


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
    error = Exception("x")
    error.status_code = status  # type: ignore[attr-defined]
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


class Trap(Exception):
    @property
    def status_code(self) -> int:
        raise RuntimeError("no status")

    @property
    def headers(self) -> Any:
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
    own=st.booleans(),
    in_user_code=st.booleans(),
)
def test_whatever_an_exception_is_made_of_it_can_be_sent(
    text: str, attributes: dict[str, Any], own: bool, in_user_code: bool
) -> None:
    error: Exception = Sly(text) if own else Exception(text)
    error.__dict__.update(attributes)
    failure = describe(error, in_user_code=in_user_code)
    assert 300 <= failure.status <= 599
    assert failure.kind in ("Sly", "Exception")

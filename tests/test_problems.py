from __future__ import annotations

import pickle
from typing import Any

import msgspec
import pytest

from serveit.exceptions import (
    DeadlineExceeded,
    InvalidRequest,
    NotServing,
    QueueFull,
    ReplicaDied,
    UnsupportedMediaType,
)
from serveit.types import HeaderList
from serveit.web.problems import Problem, RequestFailed, problem, problem_of, send_problem
from serveit.wire.frames import Failure


def document(answer: Problem) -> dict[str, Any]:
    decoded: dict[str, Any] = msgspec.json.decode(answer.body)
    return decoded


def failure(status: int = 500, **changes: Any) -> Failure:
    known: dict[str, Any] = {
        "others": 0,
        "status": status,
        "kind": "ValueError",
        "detail": "",
        "text": "secret",
        "executed": "yes",
        "traceback": "Traceback of theirs",
        **changes,
    }
    return Failure(**known)


def test_a_problem_is_whole() -> None:
    answer = problem(404, "gone", headers=[(b"allow", b"GET")])
    assert document(answer) == {
        "type": "about:blank",
        "title": "Not Found",
        "status": 404,
        "detail": "gone",
    }
    assert answer.headers == [
        (b"content-type", b"application/problem+json"),
        (b"content-length", b"%d" % len(answer.body)),
        (b"x-serveit-executed", b"no"),
        (b"allow", b"GET"),
    ]


def test_what_frames_the_answer_is_serveits_own_and_bad_fields_are_left_out() -> None:
    theirs: HeaderList = [
        (b"content-length", b"1"),
        (b"content-type", b"text/html"),
        (b"transfer-encoding", b"chunked"),
        (b"x-serveit-executed", b"no"),
        (b"x", b"a\r\nset-cookie: b"),
        (b"www-authenticate", b"Basic"),
    ]
    answer = problem(401, executed="yes", headers=theirs)
    assert [name for name, _ in answer.headers] == [
        b"content-type",
        b"content-length",
        b"x-serveit-executed",
        b"www-authenticate",
    ]
    assert dict(answer.headers)[b"x-serveit-executed"] == b"yes"


@pytest.mark.parametrize("status", [204, 304])
def test_some_statuses_have_no_body(status: int) -> None:
    assert problem(status, "x") == Problem(status, [(b"x-serveit-executed", b"no")], b"")


@pytest.mark.parametrize(
    ("status", "sent", "title"), [(99, 500, "Internal Server Error"), (599, 599, "Error")]
)
def test_statuses_that_http_lacks(status: int, sent: int, title: str) -> None:
    answer = problem(status)
    assert (answer.status, document(answer)["title"]) == (sent, title)


@pytest.mark.parametrize(
    ("error", "status", "executed"),
    [
        (QueueFull("full"), 503, b"no"),
        (NotServing("stopped"), 503, b"no"),
        (DeadlineExceeded("late"), 504, b"maybe"),
        (ReplicaDied("lost"), 502, b"maybe"),
        (UnsupportedMediaType("form"), 415, b"no"),
    ],
)
def test_serveits_errors_have_their_status(error: Exception, status: int, executed: bytes) -> None:
    answer = problem_of(error, debug=False)
    fields = dict(answer.headers)
    assert (answer.status, document(answer)["detail"]) == (status, str(error))
    assert fields[b"x-serveit-executed"] == executed
    assert fields.get(b"retry-after") == (b"1" if isinstance(error, QueueFull) else None)


def test_a_422_lists_its_faults() -> None:
    faults = [{"loc": ["query", "limit"], "msg": "expected int"}]
    assert document(problem_of(InvalidRequest("no", faults), debug=False))["errors"] == faults


def test_an_unexpected_error_says_nothing_but_with_debug() -> None:
    try:
        raise KeyError("/etc/secret")
    except KeyError as error:
        hidden, shown = problem_of(error, debug=False), problem_of(error, debug=True)
    assert document(hidden) == {"type": "about:blank", "title": "Internal Server Error", "status": 500}
    assert dict(hidden.headers)[b"x-serveit-executed"] == b"maybe"
    assert document(shown)["exception"] == "KeyError: '/etc/secret'"
    assert "test_problems.py" in document(shown)["traceback"]


def test_a_replicas_failure_is_passed_on() -> None:
    hidden = problem_of(RequestFailed(failure()), debug=False)
    assert b"secret" not in hidden.body
    assert b"Traceback" not in hidden.body
    shown = document(problem_of(RequestFailed(failure()), debug=True))
    assert (shown["exception"], shown["traceback"]) == ("ValueError: secret", "Traceback of theirs")
    teapot = problem_of(RequestFailed(failure(418, detail="short", headers=[(b"x-tea", b"1")])), debug=True)
    assert document(teapot)["detail"] == "short"
    assert "traceback" not in document(teapot)
    assert (b"x-tea", b"1") in teapot.headers
    assert pickle.loads(pickle.dumps(RequestFailed(failure(418)))).failure == failure(418)


async def test_it_is_sent_with_the_requests_id() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await send_problem(send, problem(404), "id-1")
    assert (b"x-request-id", b"id-1") in sent[0]["headers"]
    assert sent[1] == {"type": "http.response.body", "body": problem(404).body}

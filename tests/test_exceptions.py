"""The tree of errors: drawn as it is, exported, and whole after a journey through pickle."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from typing import Any, get_args

import pytest

import serveit
from serveit import exceptions
from serveit.exceptions import (
    DeadlineExceeded,
    EncodingError,
    ImportFailed,
    InvalidRequest,
    ItemErrors,
    NeedsRay,
    NotServing,
    QueueFull,
    Rejected,
    RemoteError,
    RemoteTraceback,
    ReplicaDied,
    ServeitError,
)
from serveit.types import Executed


def tree(kind: type[ServeitError] = ServeitError) -> list[type[ServeitError]]:
    """`kind` and all below it in this module, as the docstring draws them."""
    below = [sub for sub in kind.__subclasses__() if sub.__module__ == exceptions.__name__]
    return [kind, *(found for sub in below for found in tree(sub))]


TREE = tree()
each = pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)


def made(kind: type[ServeitError]) -> ServeitError:
    """An error with everything in it that can differ from the default."""
    if kind is ItemErrors:
        error: ServeitError = ItemErrors([1, ValueError("second"), None])
    elif kind is RemoteError:
        error = RemoteError("Custom: text", "Traceback: line 3")
    elif issubclass(kind, InvalidRequest):
        error = kind("bad value", [{"loc": ["query", "limit"], "msg": "expected int, got 'x'"}])
    else:
        error = kind("what, where and the way out")
    error.executed = "maybe" if error.executed != "maybe" else "no"
    error.add_note("seen on the way")
    return error


def state_of(error: BaseException) -> Any:
    """What is compared: exceptions have no equality."""
    state = dict(vars(error))
    if "outcomes" in state:
        state["outcomes"] = [
            (type(outcome), outcome.args) if isinstance(outcome, BaseException) else outcome
            for outcome in state["outcomes"]
        ]
    return type(error), str(error), state


# -- the tree -------------------------------------------------------------------------------------


def test_the_tree_that_is_drawn_is_the_tree_that_is() -> None:
    drawn = []
    for line in inspect.getdoc(exceptions).splitlines():  # type: ignore[union-attr]
        found = re.match(r"^ {4}((?:[│ ] {3})*)(?:[├└]── )?([A-Z]\w+)(?: |$)", line)
        if found:
            depth = len(found[1]) // 4 + ("──" in line)
            drawn.append((depth, found[2]))
    assert drawn == [(_depth(kind), kind.__name__) for kind in TREE]


def _depth(kind: type) -> int:
    """By the first base only: the others (RuntimeError, …) are no part of the tree."""
    return 0 if kind is ServeitError else 1 + _depth(kind.__bases__[0])


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_what_the_drawing_says_of_each_is_so(kind: type[ServeitError]) -> None:
    drawn = re.search(rf"── {kind.__name__} +(.*)", exceptions.__doc__ or "")
    said = drawn[1] if drawn else ""
    status = re.match(r"(\d{3})", said)
    inherited = kind.__bases__[0]
    if status:
        assert kind.status == int(status[1])
    elif kind not in (NotServing, NeedsRay) and issubclass(inherited, ServeitError):
        assert kind.status == inherited.status
    for builtin in ("RuntimeError", "TimeoutError", "ValueError", "TypeError"):
        if f"(a {builtin})" in said:
            assert issubclass(kind, getattr(__import__("builtins"), builtin))


@each
def test_each_has_a_status_and_says_whether_user_code_ran(kind: type[ServeitError]) -> None:
    assert 400 <= kind.status <= 599
    assert kind().executed == kind.default_executed in get_args(Executed)
    assert kind.__doc__


@each
def test_each_is_exported(kind: type[ServeitError]) -> None:
    assert getattr(serveit, kind.__name__) is kind
    assert kind.__name__ in serveit.__all__


def test_no_error_is_defined_outside_the_tree() -> None:
    others = {
        name
        for name, value in vars(exceptions).items()
        if inspect.isclass(value) and issubclass(value, BaseException) and value not in TREE
    }
    assert others == {"RemoteTraceback"}, "which is no error but the cause that shows a traceback"


# -- pickling -------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("protocol", [2, 5])
def test_each_survives_pickling_with_all_that_it_says(kind: type[ServeitError], protocol: int) -> None:
    error = made(kind)
    back = pickle.loads(pickle.dumps(error, protocol))
    assert state_of(back) == state_of(error)
    assert back.args == error.args or kind is ItemErrors
    assert pickle.loads(pickle.dumps(back, protocol)).__notes__ == ["seen on the way"]


@each
def test_each_survives_copying(kind: type[ServeitError]) -> None:
    error = made(kind)
    assert state_of(copy.copy(error)) == state_of(error)


@each
def test_each_may_be_made_of_nothing(kind: type[ServeitError]) -> None:
    back = pickle.loads(pickle.dumps(kind()))
    assert type(back) is kind


class Mine(ItemErrors):
    """A user's own."""


def test_subclasses_of_users_survive_too() -> None:
    back = pickle.loads(pickle.dumps(Mine([ValueError("x"), 2])))
    assert type(back) is Mine
    assert str(back) == "1 of 2 items failed"
    assert back.outcomes[1] == 2


# -- one by one -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in TREE if "executed" in inspect.signature(kind).parameters])
@pytest.mark.parametrize("executed", get_args(Executed))
def test_executed_may_be_said_otherwise(kind: type[ServeitError], executed: Executed) -> None:
    error = kind("text", executed=executed)
    assert (error.executed, str(error), error.args) == (executed, "text", ("text",))


def test_the_ways_to_catch_them_that_python_users_expect() -> None:
    for error, kinds in {
        DeadlineExceeded("late"): TimeoutError,
        NotServing("nothing"): RuntimeError,
        InvalidRequest("bad"): ValueError,
        EncodingError("odd"): TypeError,
        ImportFailed("missing"): ImportError,
    }.items():
        with pytest.raises(kinds):
            raise error
    assert str(DeadlineExceeded("late")) == "late"
    assert str(ImportFailed("missing")) == "missing"


def test_what_may_be_sent_again_says_when() -> None:
    for kind in tree(Rejected):
        assert issubclass(kind, Rejected)
        assert kind.retry_after_s >= 1
        assert kind().executed == "no"
    assert ReplicaDied().executed == DeadlineExceeded().executed == "maybe"
    assert QueueFull.status == 503


def test_item_errors_count_what_failed() -> None:
    error = ItemErrors((1, ValueError(), KeyError()))
    assert str(error) == "2 of 3 items failed"
    assert error.outcomes[0] == 1 and len(error.outcomes) == 3
    assert str(ItemErrors()) == "0 of 0 items failed"


def test_a_remote_error_shows_the_traceback_if_there_is_one() -> None:
    assert str(RemoteError("Custom: text", "Traceback: line 3")) == "Custom: text\n\nTraceback: line 3"
    assert str(RemoteError("Custom: text")) == "Custom: text"


def test_a_remote_traceback_shows_what_it_holds() -> None:
    assert str(RemoteTraceback("Traceback: line 3")) == '\n"""\nTraceback: line 3"""'
    assert str(RemoteTraceback()) == '\n"""\n"""'


def test_the_errors_of_a_request_are_its_own() -> None:
    records = [{"loc": ["query"], "msg": "no"}]
    error = InvalidRequest("bad", records)
    records.clear()
    assert error.errors == [{"loc": ["query"], "msg": "no"}]
    assert InvalidRequest().errors == []

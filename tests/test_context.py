from __future__ import annotations

import contextvars
import dataclasses
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

import serveit
from serveit import NotServing
from serveit.context import Context, context, enter, inherited_deadline, new_request_id, resolve, serving


class Known:
    """A resolver of one name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_handle(self, name: str, *, sync: bool = False) -> Any:
        return f"{self.name}'s {name}{' (sync)' if sync else ''}"


def inside(function: Any, *args: Any) -> Any:
    return contextvars.copy_context().run(function, *args)


def test_a_thread_of_the_users_own_takes_the_context_along() -> None:
    def in_thread(function: Any) -> Any:
        with ThreadPoolExecutor(1) as threads:
            return threads.submit(function).result()

    def code() -> Any:
        enter(Context("app", "backend", "backend#1", "request"), None)
        with pytest.raises(NotServing, match=r"contextvars.copy_context\(\).run"):
            in_thread(context)
        return in_thread(partial(contextvars.copy_context().run, context))

    assert inside(code) == Context("app", "backend", "backend#1", "request")


def test_outside_a_replica_there_is_no_context() -> None:
    with pytest.raises(NotServing, match=r"serveit.context\(\) is for code that runs in a replica"):
        context()
    assert inherited_deadline() is None
    assert serveit.context is context


def test_inside_there_is() -> None:
    here = Context("app", "double", "double#1")
    request = here.of_request("r1", 12.5)

    def run() -> None:
        enter(request, None)
        assert context() is request
        assert inherited_deadline() == 12.5

    inside(run)
    assert (here.request_id, here.deadline) == ("", None)
    assert request == Context("app", "double", "double#1", "r1", 12.5)
    with pytest.raises(NotServing):
        context()


def test_a_context_is_a_frozen_record() -> None:
    here = Context("app", "double", "double#1", deadline=1.0)
    with pytest.raises(AttributeError):
        here.app = "other"  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(here)) == here
    assert "deadline=1.0" in repr(here)
    assert not dataclasses.is_dataclass(here)


def test_request_ids_are_unique() -> None:
    assert len({new_request_id() for _ in range(100)}) == 100


def test_a_name_is_resolved_by_who_serves_the_app_the_newest_first() -> None:
    app, other = object(), object()
    with serving(app, Known("old")):
        assert resolve(app, "x") == "old's x"
        with serving(app, Known("new")):
            assert resolve(app, "x", sync=True) == "new's x (sync)"
        assert resolve(app, "x") == "old's x"
        with pytest.raises(NotServing):
            resolve(other, "x")
    with pytest.raises(NotServing, match="'x' is not being served: start the app with `serveit run"):
        resolve(app, "x")


def test_inside_a_replica_its_own_instance_resolves() -> None:
    app = object()

    def run() -> Any:
        enter(Context("app", "b", "b#1"), Known("own"))
        return resolve(app, "x")

    with serving(app, Known("this process")):
        assert inside(run) == "own's x"
        assert resolve(app, "x") == "this process's x"


def test_an_app_is_served_no_longer_than_its_block() -> None:
    app = object()
    with pytest.raises(RuntimeError, match="boom"), serving(app, Known("a")):
        raise RuntimeError("boom")
    with pytest.raises(NotServing):
        resolve(app, "x")

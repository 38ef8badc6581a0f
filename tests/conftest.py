"""For every test: asyncio as the loop, and nothing left behind."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterator

import pytest
from hypothesis import settings

from tests.cluster.instance import Instance, open_instance
from tests.support import Leftovers, leaving_no_tasks

# A slow machine is no failure; pytest-timeout stops what hangs.
settings.register_profile("serveit", deadline=None)
settings.load_profile("serveit")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    with Leftovers() as leftovers:
        yield
        found = leftovers.found()
    assert not found, "the test left behind\n" + "\n".join(found)


@pytest.fixture(scope="session")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """The Ray of this session, and the serveit instance that runs in it."""
    with open_instance(tmp_path_factory.mktemp("home")) as instance:
        yield instance


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs Ray goes last: the other tests are alone with the machine."""
    items.sort(key=lambda item: item.get_closest_marker("cluster") is not None)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    if inspect.iscoroutinefunction(pyfuncitem.obj):
        pyfuncitem.obj = leaving_no_tasks(pyfuncitem.obj)
    return (yield)

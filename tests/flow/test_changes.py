"""What a client tells and changes, and what its handles say when it has ended."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import serveit
from serveit import App
from serveit.exceptions import NotServing
from tests.flow import apps
from tests.flow.conftest import Serve, Served


@pytest.fixture
def app() -> App:
    return apps.changed


async def test_status_and_routes(served: Served) -> None:
    status = await served.client.status()
    assert (status["app"], status["url"]) == (served.app_name, served.client.url)
    assert list(status["backends"]) == ["steady"] and status["failed"] == {}
    ((id, replica),) = status["backends"]["steady"].items()
    assert id.startswith("steady#")
    assert (replica["state"], replica["running"], replica["waiting"]) == ("ready", 0, 0)
    pattern = "/steady/<number:int>"
    assert await served.client.routes() == {served.prefix + pattern: [pattern, ["GET", "HEAD"]]}


async def test_replicas_come_and_go_without_an_error(app: App, serve: Serve) -> None:
    async with serve(app) as served:
        answers: list[Any] = []
        stop = asyncio.Event()

        async def ask_on() -> None:
            while not stop.is_set():
                called, got = await asyncio.gather(
                    served.handle("steady").call(len(answers)), served.http.get(f"/steady/{len(answers)}")
                )
                assert got.status_code == 200, got.text
                answers.append((called[0], called[1], got.json()[1]))

        asking = [asyncio.ensure_future(ask_on()) for _ in range(4)]
        for num_replicas in (2, 3, 1):
            await served.client.update("steady", num_replicas=num_replicas)
            status = await served.client.status()
            states = [replica["state"] for replica in status["backends"]["steady"].values()]
            assert states.count("ready") == num_replicas and "starting" not in states
            begun = len(answers)
            while len(answers) < begun + 60:
                await asyncio.wait(asking, timeout=0.01, return_when=asyncio.FIRST_EXCEPTION)
            assert len({way for answer in answers[begun + 8 :] for way in answer[1:]}) == num_replicas
        stop.set()
        await asyncio.gather(*asking)


async def test_wrong_changes_are_refused(served: Served) -> None:
    with pytest.raises(KeyError, match="no backend 'stedy': did you mean 'steady'"):
        await served.client.update("stedy", num_replicas=2)
    with pytest.raises(ValueError, match="num_replicas"):
        await served.client.update("steady", num_replicas=-1)
    assert len((await served.client.status())["backends"]["steady"]) == 1


async def test_after_the_end_handles_say_so(app: App, kind: str, ray_or_none: object) -> None:
    http = {"port": 0} if kind == "local" else None
    async with serveit.serve(app, local=kind == "local", name="ends", prefix="/ends", http=http) as client:
        handle, blocking = client.get_handle("steady"), client.get_handle("steady", sync=True)
        assert (await handle.call(1))[0] == 1
    with pytest.raises(NotServing, match="has been shut down"):
        await handle.call(2)
    with pytest.raises(NotServing, match="has been shut down"):
        await asyncio.to_thread(blocking.call, 2)


async def test_a_handle_in_an_app_that_is_not_served() -> None:
    with pytest.raises(NotServing, match="'steady' is not being served"):
        await apps.steady.call(1)

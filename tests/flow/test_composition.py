"""A model made of others: handles got in its constructor, arrays from one to the next."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from serveit import App
from tests.flow.conftest import Served
from tests.flow.models import models


@pytest.fixture
def app() -> App:
    return models


async def test_the_second_model_is_asked_where_the_first_is_sure(served: Served) -> None:
    reply = await served.http.post("/composed", json=[0.1, 0.2])
    assert reply.json() == {"result": 1, "score": pytest.approx(0.15)}
    reply = await served.http.post("/composed", json=[100.0, 100.0])
    assert reply.status_code == 200
    assert reply.json() == {"result": 2, "score": 100.0, "doubled": [200.0, 200.0], "halves": [100.0, 100.0]}


async def test_arrays_stay_arrays(served: Served) -> None:
    composed = served.handle("Composed")
    answers = await asyncio.gather(*(composed.call([float(number), 1.0]) for number in range(1, 30)))
    for number, answer in enumerate(answers, 1):
        assert answer["score"] == (number + 1) / 2 and answer["halves"] == [number, 1.0]
        assert isinstance(answer["doubled"], np.ndarray) and answer["doubled"].tolist() == [2 * number, 2]

"""Which cluster an address means. What Ray answers is made up: a real one is asked in tests/cluster."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest
import ray

from serveit.cluster import address
from serveit.cluster.address import find_cluster

WRONG_TOKEN = ray.exceptions.AuthenticationError("wrong")


class FakeClusters:
    """What runs on this machine, and what each says to this process."""

    def __init__(self) -> None:
        self.noted: list[str] = []
        self.answers: dict[str, Exception | None] = {}
        self.asked: list[str] = []

    def found_here(self) -> tuple[list[str], list[str]]:
        return self.noted, sorted(self.answers)

    def ask(self, place: str) -> Exception | None:
        self.asked.append(place)
        return self.answers[place]


@pytest.fixture
def place() -> Iterator[str]:
    """Where something listens."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def other() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture(autouse=True)
def clusters(monkeypatch: pytest.MonkeyPatch) -> FakeClusters:
    fake = FakeClusters()
    monkeypatch.setattr(address, "_found_here", fake.found_here)
    monkeypatch.setattr(address, "_ask", fake.ask)
    monkeypatch.setattr(address, "_use_own_token", lambda: None)
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    return fake


def test_nothing_runs() -> None:
    with pytest.raises(
        ConnectionError, match=r"no Ray cluster runs on this machine.*`serveit run.*`ray start"
    ):
        find_cluster("auto")


def test_the_one_that_runs_here(clusters: FakeClusters, place: str) -> None:
    clusters.answers[place] = None
    assert find_cluster("auto") == place


def test_of_several_the_one_that_ray_start_noted(clusters: FakeClusters, place: str, other: str) -> None:
    clusters.answers = {place: None, other: None}
    with pytest.raises(ConnectionError, match=r"several Ray clusters .* and .*: name one"):
        find_cluster("auto")
    clusters.noted = [other]
    assert find_cluster("auto") == other


def test_a_note_of_one_that_has_ended_is_not_followed(clusters: FakeClusters, place: str) -> None:
    clusters.noted, clusters.answers[place] = ["127.0.0.1:1"], None
    assert find_cluster("auto") == place
    assert clusters.asked == [place]


def test_others_with_tokens_of_their_own_are_passed_over(
    clusters: FakeClusters, place: str, other: str
) -> None:
    clusters.answers = {place: WRONG_TOKEN, other: None}
    assert find_cluster("auto") == other
    clusters.answers = {place: WRONG_TOKEN}
    with pytest.raises(
        ConnectionError, match=f"the Ray cluster at {place} takes only .* token: with RAY_AUTH_"
    ):
        find_cluster("auto")


def test_the_environment_names_one(
    clusters: FakeClusters, place: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clusters.answers = {place: None, other: None}
    monkeypatch.setenv("RAY_ADDRESS", other)
    assert find_cluster("auto") == other
    assert find_cluster(place) == place
    monkeypatch.setenv("RAY_ADDRESS", "")
    clusters.answers = {place: None}
    assert find_cluster("auto") == place


def test_where_nobody_listens() -> None:
    with pytest.raises(ConnectionError, match="no Ray cluster at '127.0.0.1:1': .*refused; `ray start"):
        find_cluster("127.0.0.1:1")


def test_the_wrong_token(clusters: FakeClusters, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clusters.answers[place] = WRONG_TOKEN
    with pytest.raises(ConnectionError, match="with RAY_AUTH_MODE=token in the environment it is sent"):
        find_cluster(place)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(ConnectionError, match="RAY_AUTH_TOKEN_PATH names, holds another than"):
        find_cluster(place)


@pytest.mark.parametrize("form", ["nonsense", "ray://127.0.0.1:1", "127.0.0.1:no-port"])
def test_other_forms_are_ray_s_to_read(form: str, clusters: FakeClusters) -> None:
    assert find_cluster(form) == form
    assert clusters.asked == []


def test_what_does_not_answer_is_given_up(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    release = threading.Event()

    class Hanging:
        def __init__(self, address: str) -> None:
            release.wait()

    monkeypatch.setattr("ray._raylet.GcsClient", Hanging)
    monkeypatch.setattr(address, "REACH_S", 0.05)
    with pytest.raises(ConnectionError, match="what listens there does not answer as Ray does"):
        find_cluster(place)
    release.set()


def test_what_ray_says_meanwhile_is_not_heard(
    place: str, clusters: FakeClusters, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def loud(where: str) -> None:
        os.write(2, b"trying, trying\n")

    monkeypatch.setattr(address, "_ask", loud)
    assert find_cluster(place) == place
    os.write(2, b"heard\n")
    assert capfd.readouterr().err == "heard\n"

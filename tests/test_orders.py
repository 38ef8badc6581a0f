from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serveit.control.orders import (
    ActorName,
    Deployed,
    DeployFailed,
    Deploying,
    Joined,
    Leaving,
    Place,
    ProxyOrder,
    ReplicaOrder,
    Started,
    StartFailed,
    decode_deployed,
    decode_outcome,
    encode,
    parse_place,
    place_text,
)


@pytest.mark.parametrize(
    "outcome", [Started(1, "there"), StartFailed(b"why", b"\x80", "replica b#1", "ValueError: no"), Leaving()]
)
def test_what_became_of_a_start(outcome: Started | StartFailed | Leaving) -> None:
    assert decode_outcome(encode(outcome)) == outcome


@pytest.mark.parametrize(
    "outcome",
    [
        Deployed((17, 3)),
        DeployFailed("no"),
        DeployFailed("no", StartFailed(b"why")),
        Deploying({"b": (1, 2)}, ("replica b#2 needs 4 CPU, 2 free; waiting for 3 s",)),
    ],
)
def test_what_became_of_a_deploy(outcome: Deployed | DeployFailed | Deploying) -> None:
    assert decode_deployed(encode(outcome)) == outcome


@pytest.mark.parametrize(
    "order",
    [
        ReplicaOrder("b#1", "app", "b", b"\x00code", "/folder", b"\xffsecret", True, "debug", "app/b#1@t0"),
        ProxyOrder("proxy", b"{}", b"\xffsecret", ("/one", "/two")),
        Joined(b"\xffsecret", "{}"),
    ],
)
def test_orders_travel(order: msgspec.Struct) -> None:
    assert msgspec.msgpack.decode(encode(order), type=type(order)) == order


@given(st.text(), st.text(), st.text(), st.text())
def test_places_are_text(node: str, unix: str, tcp: str, actor: str) -> None:
    place = Place(node, unix, tcp, actor)
    assert parse_place(place_text(place)) == place


@given(
    st.text(min_size=1).filter(lambda name: "/" not in name),
    st.text(min_size=1),
    st.integers(0, 10**9),
    st.integers(0, 10**9),
    st.from_regex(r"[0-9a-f]{6}", fullmatch=True),
)
def test_names_of_actors_tell_what_they_are(
    app: str, backend: str, number: int, version: int, token: str
) -> None:
    name = ActorName(app, f"{backend}#{number}", version, token)
    assert ActorName.parse(str(name)) == name
    assert (name.backend, name.number) == (backend, number)


@pytest.mark.parametrize(
    "name",
    ["controller", "proxy-0a1b-01234567-1", "app/b#1@t0", "app/b.1@t0", "app/b#1.1", ""],
)
def test_other_names_are_no_replicas(name: str) -> None:
    assert ActorName.parse(name) is None


def test_one_kind_is_not_taken_for_another() -> None:
    with pytest.raises(msgspec.ValidationError, match="Started"):
        decode_deployed(encode(Started(1, "there")))


def test_many_replicas_wait_for_the_same_reason() -> None:
    waiting = (
        "replica b#3 needs 4 CPU, 2 free; waiting for 12 s",
        "replica b#4 needs 4 CPU, 2 free; waiting for 1 s",
        "replica c#5 needs 4 CPU, 2 free; waiting for 0.5 s",
    )
    assert list(Deploying({}, waiting).reasons.values()) == [waiting[0], waiting[2]]

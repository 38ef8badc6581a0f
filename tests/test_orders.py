from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serveit.control.orders import (
    Deployed,
    DeployFailed,
    Joined,
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


@pytest.mark.parametrize("outcome", [Started(1, "there"), StartFailed(b"why", b"\x80", "replica b#1")])
def test_what_became_of_a_start(outcome: Started | StartFailed) -> None:
    assert decode_outcome(encode(outcome)) == outcome


@pytest.mark.parametrize(
    "outcome", [Deployed((17, 3)), DeployFailed("no"), DeployFailed("no", StartFailed(b"why"))]
)
def test_what_became_of_a_deploy(outcome: Deployed | DeployFailed) -> None:
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


def test_one_kind_is_not_taken_for_another() -> None:
    with pytest.raises(msgspec.ValidationError, match="Started"):
        decode_deployed(encode(Started(1, "there")))

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serveit.declare.conversion import (
    BAD_BODY,
    BAD_VALUE,
    MAX_FAULTS,
    body_faults,
    conversion_for,
    invalid_request,
    shorten,
    text_faults,
)

LONG = "x" * 5_000


class Custom:
    pass


class Optionally(msgspec.Struct):
    """The custom field need not be in a document, so that its class does no harm."""

    a: int
    cache: Custom | None = None
    kids: list[Optionally] = []


class Needs(msgspec.Struct):
    custom: Custom
    kids: list[Needs] = []


class Broken(msgspec.Struct):
    a: NotThere  # type: ignore[name-defined]  # noqa: F821


class Renamed(msgspec.Struct, rename={"a": "a.b[0]`"}):
    a: int


class Picky(msgspec.Struct):
    a: int

    def __post_init__(self) -> None:
        raise ValueError(f"not {self.a}: {LONG}")


class Model(pydantic.BaseModel):
    a: int

    @pydantic.field_validator("a")
    def _check(cls, a: int) -> int:
        raise ValueError(LONG)


def decoding(annotation: Any, body: bytes) -> list[dict[str, Any]]:
    with pytest.raises(BAD_BODY) as caught:
        conversion_for(annotation).decode(body)
    return body_faults(caught.value, ["body"])


def test_recursive_types_and_custom_fields_with_defaults() -> None:
    assert conversion_for(Optionally).decode(b'{"a":1,"kids":[{"a":2}]}') == Optionally(
        1, kids=[Optionally(2)]
    )
    with pytest.raises(
        TypeError, match="Needs\\] holds a Custom, which JSON is not made into: give that field a"
    ):
        conversion_for(list[Needs])
    with pytest.raises(TypeError, match="Broken cannot be used: name 'NotThere' is not defined"):
        conversion_for(Broken)


def test_custom_classes_pass_where_the_value_is_made_already() -> None:
    made = Custom()
    assert conversion_for(Custom, custom=True).convert(made) is made
    with pytest.raises(TypeError, match="Custom is nothing that a request"):
        conversion_for(Custom)


def test_names_with_odd_characters_do_no_harm() -> None:
    (fault,) = decoding(Renamed, b'{"a.b[0]`":"x"}')
    assert fault["loc"][0] == "body"
    assert fault["msg"] == "expected int, got str"


def test_messages_of_validators_are_cut() -> None:
    for annotation in (Picky, Model):
        (fault,) = decoding(annotation, b'{"a":1}')
        assert len(fault["msg"]) == 120
        assert "x…x" in fault["msg"]
    (fault,) = decoding(Literal["a"], f'"{LONG}"'.encode())
    assert len(fault["msg"]) == 120


@pytest.mark.parametrize("annotation", [msgspec.defstruct("S", [], forbid_unknown_fields=True)])
def test_long_names_of_unknown_fields_are_cut(annotation: Any) -> None:
    (fault,) = decoding(annotation, f'{{"{LONG}":1}}'.encode())
    assert len(fault["msg"]) < 120
    assert len(fault["loc"][1]) == 80


def test_long_keys_are_cut_in_pydantics_places() -> None:
    (fault,) = decoding(dict[str, Model | None], f'{{"{LONG}":3}}'.encode())
    assert len(fault["loc"][1]) == 80


def test_text_faults_name_the_element() -> None:
    conversion = conversion_for(list[int])
    with pytest.raises(BAD_VALUE, match="Expected `int`") as caught:
        conversion.convert(["1", LONG])
    (fault,) = text_faults(caught.value, ["query", "n"], ["1", LONG], ())
    assert fault["loc"] == ["query", "n", 1]
    assert fault["msg"].startswith("expected int, got 'xxx")
    assert len(fault["msg"]) < 100


def test_a_request_error_tells_three_and_records_fifty() -> None:
    faults = [{"loc": ["body", "x", number, "y"], "msg": f"bad {number}"} for number in range(99)]
    error = invalid_request(faults)
    assert str(error) == "body.x[0].y: bad 0; body.x[1].y: bad 1; body.x[2].y: bad 2; and 96 more"
    assert error.errors == faults[:MAX_FAULTS]
    assert str(invalid_request(faults[:1])) == "body.x[0].y: bad 0"


@given(st.text(), st.integers(min_value=4, max_value=100))
def test_shorten(text: str, limit: int) -> None:
    short = shorten(text, limit)
    assert len(short) <= limit
    assert short == text or (len(text) > limit and len(short) == limit and "…" in short)
    assert short[:2] == text[:2]


@dataclasses.dataclass
class Leaf:
    number: int


@dataclasses.dataclass
class Node:
    leaves: list[Leaf]
    more: Node | None = None


def test_nothing_is_left_on_users_classes() -> None:
    """msgspec's own is in the way where a class has to be pickled by value."""

    conversion = conversion_for(dict[str, Node])
    assert not {"__msgspec_cache__"} & {*vars(Node), *vars(Leaf)}
    assert conversion.decode(b'{"a": {"leaves": [{"number": 1}]}}') == {"a": Node([Leaf(1)])}

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pytest

from serveit.declare.signature import (
    REQUIRED,
    UNANNOTATED,
    Body,
    Header,
    Parameter,
    Query,
    read_signature,
    type_name,
)

if TYPE_CHECKING:
    from fractions import Fraction


class Service:
    def __call__(self, x: int) -> Fraction:
        raise NotImplementedError

    def with_unknown(self, x: Fraction) -> None: ...

    def without_self() -> None:  # type: ignore[misc]
        raise NotImplementedError

    def with_stars(*args: int) -> None:
        raise NotImplementedError


def read(func: Callable[..., Any], *, drop_first: bool = False) -> tuple[Parameter, ...]:
    return read_signature(func, drop_first=drop_first, where="route '/x'").parameters


def refused(func: Callable[..., Any], *, drop_first: bool = False) -> str:
    with pytest.raises(TypeError) as caught:
        read(func, drop_first=drop_first)
    return str(caught.value)


def test_parameters_are_read_with_their_annotations_evaluated() -> None:
    def f(a, /, b: int, c: list[str] = [], *, d: Annotated[int, Query("n")] = 3) -> None:  # type: ignore[no-untyped-def]  # noqa: B006
        ...

    assert read(f) == (
        Parameter("a", UNANNOTATED, REQUIRED, False, None),
        Parameter("b", int, REQUIRED, False, None),
        Parameter("c", list[str], [], False, None),
        Parameter("d", Annotated[int, Query("n")], 3, True, Query("n")),
    )


@pytest.mark.parametrize(
    ("annotation", "marker"),
    [
        (Annotated[int, Body()], Body()),
        (Annotated[int, Query], Query()),
        (Annotated[int, "other", Header("x-a")], Header("x-a")),
        (Annotated[int, Query("n")] | None, Query("n")),
        (Annotated[int, np.zeros(2), "other"], None),
        (int, None),
    ],
)
def test_markers_are_found(annotation: Any, marker: Any) -> None:
    def f(x: Any) -> None: ...

    f.__annotations__["x"] = annotation
    assert read(f)[0].marker == marker


def test_markers_are_values() -> None:
    assert Query("a") == Query("a") != Query()
    assert len({Body(), Body(), Header("a"), Header("a")}) == 2
    with pytest.raises(AttributeError):
        Query("a").alias = "b"  # type: ignore[misc]


def test_self_is_no_parameter_of_an_unbound_method() -> None:
    assert [parameter.name for parameter in read(Service.__call__, drop_first=True)] == ["x"]
    assert [parameter.name for parameter in read(Service().__call__)] == ["x"]
    assert [parameter.name for parameter in read(Service())] == ["x"]
    for func in (Service.without_self, Service.with_stars):
        assert refused(func, drop_first=True).endswith(
            "() is a method without `self`: write it as the first parameter"
        )


def test_a_return_annotation_need_not_be_there_at_run_time() -> None:
    def f(a: int, b=1) -> Fraction:  # type: ignore[no-untyped-def]
        raise NotImplementedError

    def g(a: int) -> Fraction:
        raise NotImplementedError

    for func in (f, functools.partial(f, b=2), functools.wraps(f)(lambda *args: None), g):
        assert read(func)[0] == Parameter("a", int, REQUIRED, False, None)
    assert read(Service())[0].annotation is int


def test_an_annotation_that_is_not_there_at_run_time_is_refused() -> None:
    def f(a: int, b: Fraction) -> None: ...

    assert refused(f) == (
        f"route '/x': {f.__qualname__}(): parameter 'b' is annotated 'Fraction', which cannot be evaluated "
        "(name 'Fraction' is not defined): define its names at module level and import them at run time, not "
        "only under `if TYPE_CHECKING:`"
    )
    assert "Service.with_unknown(): parameter 'x' is annotated 'Fraction'" in refused(
        Service.with_unknown, drop_first=True
    )


def test_what_has_no_signature_is_refused() -> None:
    assert refused(max) == (
        "route '/x': max() has no signature that can be read: wrap it in a function with annotated parameters"
    )
    assert "has no signature that can be read" in refused(3)  # type: ignore[arg-type]


def test_refusals_name_function_and_parameter() -> None:
    def f(a: int) -> None: ...

    signature = read_signature(f, drop_first=False, where="here")
    assert (
        str(signature.refusal(signature.parameters[0], "is wrong"))
        == f"{signature.owner}: parameter 'a' is wrong"
    )
    assert str(signature.refusal(None, "is wrong")) == f"here: {f.__qualname__}() is wrong"


@pytest.mark.parametrize(
    ("annotation", "name"),
    [
        (int, "int"),
        (Service, "Service"),
        (list[int], "list[int]"),
        (Annotated[list[int], Query()], "list[int]"),
        (Any, "Any"),
        (int | None, "int | None"),
    ],
)
def test_type_names_are_short(annotation: Any, name: str) -> None:
    assert type_name(annotation) == name

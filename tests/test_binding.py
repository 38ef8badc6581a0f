from __future__ import annotations

import asyncio
import collections
import dataclasses
import datetime
import enum
import functools
import inspect
import subprocess
import sys
import uuid
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Annotated, Any, Literal, NamedTuple, Optional, TypedDict
from urllib.parse import quote_plus, urlencode

import attrs
import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.convertors import CONVERTOR_TYPES, Convertor
from starlette.requests import Request

from serveit.declare.binding import (
    Binding,
    Body,
    Header,
    Query,
    asgi_scope,
    plan_binding,
    starlette_request,
)
from serveit.declare.routing import compile_pattern
from serveit.exceptions import InvalidRequest, PathNotFound, UnsupportedMediaType
from serveit.types import HttpRequest

JSON = [(b"content-type", b"application/json")]
FORM = [(b"content-type", b"application/x-www-form-urlencoded")]
LONG = "x" * 5_000
SOME_ID = uuid.UUID("12345678-1234-5678-1234-567812345678")


class Level(enum.Enum):
    LOW = 1
    HIGH = 2


class Shape(enum.Enum):
    ROUND = "round"
    FLAT = "flat"


class Inner(msgspec.Struct):
    x: list[int]


class Item(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    inner: Inner | None = None
    sizes: dict[int, int] = {}
    shape: Shape = Shape.ROUND


@dataclasses.dataclass
class Box:
    width: int


@attrs.define
class Tag:
    width: int


class Options(TypedDict):
    width: int


class Pair(NamedTuple):
    width: int
    height: int = 1


class Model(pydantic.BaseModel):
    width: int
    parts: list[int] = []


@pydantic.dataclasses.dataclass
class CheckedBox:
    width: Annotated[int, pydantic.Field(ge=1)]


class Custom:
    pass


class MyRequest(Request):
    pass


def optional(annotation: Any) -> Any:
    """typing's union, which is not the same as that of `|`."""
    return Optional[annotation]  # noqa: UP045


Positive = Annotated[int, msgspec.Meta(ge=1)]
Checked = Annotated[int, pydantic.Field(ge=1)]


def plan(
    func: Callable[..., Any],
    path: str = "/",
    *,
    methods: Sequence[str] = ("GET", "POST"),
    batch: bool = False,
    drop_first: bool = False,
) -> Binding:
    return plan_binding(
        func,
        pattern=compile_pattern(path),
        methods=methods,
        batch=batch,
        drop_first=drop_first,
        where="route '/'",
    )


def http(
    *values: str, query: bytes = b"", headers: Sequence[tuple[bytes, bytes]] = (), method: str = "POST"
) -> HttpRequest:
    return HttpRequest(
        route="/",
        target="__call__",
        method=method,
        path="/a b",
        raw_path=b"/a%20b",
        query=query,
        headers=list(headers),
        path_values=list(values),
        client=("127.0.0.1", 5000),
        server=("127.0.0.1", 8000),
    )


def called(
    func: Callable[..., Any],
    *values: str,
    path: str = "/",
    query: bytes = b"",
    headers: Sequence[tuple[bytes, bytes]] = (),
    body: bytes = b"",
) -> Any:
    """What `func` returns for a request."""
    args, kwargs = plan(func, path).bind(http(*values, query=query, headers=headers), body)
    return func(*args, **kwargs)


def faults(func: Callable[..., Any], *values: str, **request: Any) -> list[dict[str, Any]]:
    with pytest.raises(InvalidRequest) as caught:
        called(func, *values, **request)
    assert type(caught.value) is InvalidRequest
    assert caught.value.status == 422
    assert len(str(caught.value)) < 1_000
    return caught.value.errors


def refused(func: Callable[..., Any], path: str = "/", **how: Any) -> str:
    with pytest.raises(TypeError) as caught:
        plan(func, path, **how)
    said = str(caught.value)
    assert said.startswith(f"route '/': {func.__qualname__}()")
    return said


def taking(annotation: Any, default: Any = dataclasses.MISSING, name: str = "x") -> Callable[..., Any]:
    """A function with one parameter of that annotation, which returns its argument."""

    def taker(value: Any) -> Any:
        return value

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return taker(*args, **kwargs)

    parameter = inspect.Parameter(
        name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        annotation=annotation,
        default=inspect.Parameter.empty if default is dataclasses.MISSING else default,
    )
    wrapper.__signature__ = inspect.Signature([parameter])  # type: ignore[attr-defined]
    return wrapper


# 1: the path


def test_path_values_are_what_the_convertors_make() -> None:
    def f(a: int, b: str, c: float, d: uuid.UUID, e: str) -> Any:
        return a, b, c, d, e

    path = "/<a:int>/<b>/{c:float}/<d:uuid>/<e:path>"
    values = ["7", "x", "1.5", str(SOME_ID), "y/z"]
    assert called(f, *values, path=path) == (7, "x", 1.5, SOME_ID, "y/z")
    assert not plan(f, path).reads_body


def test_path_values_go_to_their_names_in_any_order_and_may_be_left_out() -> None:
    def f(b, /, a) -> Any:  # type: ignore[no-untyped-def]
        return a, b

    assert plan(f, "/<a>/<b:int>/<c>").bind(http("x", "2", "z"), b"") == ([2, "x"], {})


def test_a_function_without_parameters() -> None:
    def f() -> None: ...

    assert plan(f).bind(http(query=b"a=1"), b"{") == ([], {})
    assert plan(f, "/<a:int>").bind(http("1"), b"") == ([], {})


def test_keyword_only_parameters_are_passed_by_name() -> None:
    def f(a: int, *, b: int, limit: int = 3) -> Any: ...

    assert plan(f, "/<a:int>/<b:int>").bind(http("1", "2", query=b"limit=4"), b"") == (
        [1],
        {"b": 2, "limit": 4},
    )

    def g(*, b: int) -> Any: ...

    assert plan(g, "/<b:int>").bind(http("2"), b"") == ([], {"b": 2})


@pytest.mark.parametrize(
    ("annotation", "key", "text", "value"),
    [
        (int, "str", "7", 7),
        (float, "str", "1.5", 1.5),
        (bool, "str", "true", True),
        (uuid.UUID, "str", str(SOME_ID), SOME_ID),
        (datetime.date, "str", "2024-01-02", datetime.date(2024, 1, 2)),
        (Decimal, "str", "1.10", Decimal("1.10")),
        (Level, "str", "2", Level.HIGH),
        (Shape, "path", "flat", Shape.FLAT),
        (Literal["a", "b"], "str", "b", "b"),
        (optional(str), "str", "null", "null"),
        (int | None, "str", "7", 7),
        (int | str, "str", "7", "7"),
        (Any, "str", "7", "7"),
        (Positive, "int", "7", 7),
        (Positive, "str", "7", 7),
        (Annotated[int, msgspec.Meta(title="a number")], "int", "7", 7),
        (float, "int", "7", 7.0),
        (int | None, "int", "7", 7),
        (Level, "int", "2", Level.HIGH),
        (Literal[1, 2], "int", "2", 2),
        (Decimal, "int", "7", Decimal(7)),
        (Decimal, "float", "7.5", Decimal("7.5")),
        (uuid.UUID | None, "uuid", str(SOME_ID), SOME_ID),
        (Checked, "int", "7", 7),
        (Checked, "str", "7", 7),
    ],
)
def test_a_path_value_is_converted_to_its_annotation(
    annotation: Any, key: str, text: str, value: Any
) -> None:
    got = called(taking(annotation), text, path=f"/<x:{key}>")
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("annotation", "key", "text", "msg"),
    [
        (int, "str", "x", "expected int, got 'x'"),
        (int, "str", "1.5", "expected int, got '1.5'"),
        (uuid.UUID, "str", "x", "invalid UUID, got 'x'"),
        (datetime.date, "str", "x", "invalid RFC3339 encoded date, got 'x'"),
        (Decimal, "str", "x", "invalid decimal string, got 'x'"),
        (Level, "int", "3", "expected one of 1, 2, got 3"),
        (Literal["a", "b"], "str", "c", "expected one of 'a', 'b', got 'c'"),
        (Positive, "int", "0", "expected int >= 1, got 0"),
        (Checked, "int", "0", "Input should be greater than or equal to 1"),
        (bool, "int", "3", "expected bool, got 3"),
        (
            Annotated[str, msgspec.Meta(pattern="`a`")],
            "str",
            "b",
            "expected `str` matching regex '`a`', got 'b'",
        ),
    ],
)
def test_a_path_value_that_does_not_fit_is_a_422(annotation: Any, key: str, text: str, msg: str) -> None:
    assert faults(taking(annotation), text, path=f"/<x:{key}>") == [{"loc": ["path", "x"], "msg": msg}]


def test_a_path_value_that_its_convertor_refuses_is_a_404() -> None:
    def f(a: int, limit: int) -> None: ...

    def g() -> None: ...

    for func in (f, g):
        with pytest.raises(PathNotFound):
            plan(func, "/<a:int>").bind(http("9" * 5_000), b"")


@pytest.mark.parametrize(
    ("annotation", "key"),
    [
        (str, "int"),
        (uuid.UUID, "int"),
        (datetime.date, "int"),
        (Literal["a"], "int"),
        (Shape, "int"),
        (dict, "int"),
        (str, "float"),
        (Level, "float"),
        (str, "uuid"),
        (int, "uuid"),
        (list[int], "str"),
        (Item, "path"),
        (bytes, "str"),
        (Model, "str"),
        (None, "str"),
    ],
)
def test_a_path_parameter_that_can_never_fit_is_refused(annotation: Any, key: str) -> None:
    with pytest.raises(TypeError, match=r"parameter 'x' is annotated .* never gives: annotate it ") as caught:
        plan(taking(annotation), f"/<x:{key}>")
    assert f"<x:{key}>" in str(caught.value)


def test_a_marked_path_parameter_is_refused() -> None:
    def f(x: Annotated[int, Query()]) -> None: ...

    assert "parameter 'x' is in the path and marked Query() as well" in refused(f, "/<x>")


class DayConvertor(Convertor[datetime.date]):
    regex = "[0-9]{8}"

    def convert(self, value: str) -> datetime.date:
        return datetime.date(int(value[:4]), int(value[4:6]), int(value[6:]))

    def to_string(self, value: datetime.date) -> str:
        return value.strftime("%Y%m%d")


class CustomConvertor(Convertor[Custom]):
    regex = "[a-z]+"

    def convert(self, value: str) -> Custom:
        return Custom()

    def to_string(self, value: Custom) -> str:
        return "a"


def test_custom_convertors_give_what_they_make(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONVERTOR_TYPES, "day", DayConvertor())
    monkeypatch.setitem(CONVERTOR_TYPES, "custom", CustomConvertor())
    day = datetime.date(2024, 1, 2)

    def f(day: datetime.date, x, custom: Custom) -> Any:  # type: ignore[no-untyped-def]
        return day, x, type(custom)

    assert called(f, "20240102", "20240102", "a", path="/<day:day>/<x:day>/<custom:custom>") == (
        day,
        day,
        Custom,
    )
    assert faults(taking(int), "20240102", path="/<x:day>")[0]["loc"] == ["path", "x"]


# 2: Starlette's Request


async def test_request_by_annotation() -> None:
    def f(limit: int, r: Request, kind: str = "k") -> Any:
        return limit, r, kind

    binding = plan(f, "/<name>/<n:int>")
    assert binding.reads_body
    (limit, request, kind), _ = binding.bind(
        http("é", "3", query=b"limit=4&q=a%20b", headers=[(b"x-a", b"1"), *JSON]), b'{"a":1}'
    )
    assert (limit, kind) == (4, "k")
    assert type(request) is Request
    assert request.path_params == {"name": "é", "n": 3}
    assert request.query_params["q"] == "a b"
    assert request.headers["x-a"] == "1"
    assert request.method == "POST"
    assert request.client is not None
    assert request.client.host == "127.0.0.1"
    assert request.url.hostname == "127.0.0.1"
    assert await request.json() == {"a": 1}


async def test_request_by_name_alone() -> None:
    def f(request) -> Any:  # type: ignore[no-untyped-def]
        return request

    def g(request, name, limit: int = 1) -> Any:  # type: ignore[no-untyped-def]
        return request

    request = called(f, body=b"abc")
    assert type(request) is Request
    assert [part async for part in request.stream()] == [b"abc", b""]
    assert called(g, "n", path="/<name>").path_params == {"name": "n"}


def test_among_other_parameters_without_annotation_request_is_a_name() -> None:
    def f(request, other) -> Any:  # type: ignore[no-untyped-def]
        return request, other

    def g(request: str) -> str:
        return request

    assert called(f, query=b"request=a&other=b") == ("a", "b")
    assert called(g, query=b"request=a") == "a"


def test_a_subclass_of_request_is_made() -> None:
    def f(r: MyRequest) -> Any:
        return r

    assert type(called(f)) is MyRequest


async def test_the_body_comes_once_and_the_client_is_there_for_as_long_as_one_asks() -> None:
    request = starlette_request(http(), b"abc", {})
    assert not await request.is_disconnected()
    assert await request.body() == b"abc"
    assert not await request.is_disconnected()
    waiting = asyncio.ensure_future(request.receive())
    await asyncio.sleep(0)
    assert not waiting.done()
    waiting.cancel()


def test_the_scope_is_asgis() -> None:
    request = http(query=b"a=1", headers=JSON)
    assert asgi_scope(request, {"n": 1}) == {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/a b",
        "raw_path": b"/a%20b",
        "query_string": b"a=1",
        "root_path": "",
        "headers": JSON,
        "client": ("127.0.0.1", 5000),
        "server": ("127.0.0.1", 8000),
        "path_params": {"n": 1},
    }


# 3: markers


def test_markers() -> None:
    def f(
        a: Annotated[int, Body()],
        b: Annotated[str, Query("other")],
        c: Annotated[int, Header("X-Limit")],
        user_agent: Annotated[str, Header()],
        d: Annotated[Positive, Query] = 5,
        e: Annotated[int, Query("E")] | None = None,
    ) -> Any:
        return a, b, c, user_agent, d, e

    headers = [(b"x-limit", b"7"), (b"user-agent", b"w\xfcrk"), *JSON]
    assert called(f, query=b"other=o&E=3", headers=headers, body=b"3") == (3, "o", 7, "würk", 5, 3)
    assert [fault["loc"] for fault in faults(f)] == [
        ["body"],
        ["query", "other"],
        ["header", "x-limit"],
        ["header", "user-agent"],
    ]


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (list[int], [1, 2]),
        (set[int], {1, 2}),
        (frozenset[int], frozenset({1, 2})),
        (tuple[int, ...], (1, 2)),
        (tuple[int, str], (1, "2")),
        (Sequence[int], [1, 2]),
        (list[str], ["1", "2"]),
        (list, ["1", "2"]),
        (list[int] | None, [1, 2]),
    ],
)
def test_repeated_keys_make_lists(annotation: Any, value: Any) -> None:
    assert called(taking(Annotated[annotation, Query()]), query=b"x=1&y=0&x=2") == value
    headers = [(b"x", b"1"), (b"y", b"0"), (b"x", b"2")]
    assert called(taking(Annotated[annotation, Header()]), headers=headers) == value


def test_lists_from_the_query_have_defaults_and_faults() -> None:
    func = taking(Annotated[list[int], Query("n")])
    assert called(func, query=b"n=1") == [1]
    assert faults(func) == [{"loc": ["query", "n"], "msg": "missing"}]
    assert faults(func, query=b"n=1&n=b") == [{"loc": ["query", "n", 1], "msg": "expected int, got 'b'"}]
    assert called(taking(Annotated[list[int], Query()], None)) is None
    assert faults(taking(Annotated[tuple[int, int], Query()]), query=b"x=1")[0]["msg"] == (
        "expected array of length 2, got ['1']"
    )


def test_of_a_repeated_key_the_last_counts_and_of_a_repeated_header_the_first() -> None:
    assert called(taking(int), query=b"x=1&x=2") == 2
    assert called(taking(Annotated[int, Header()]), headers=[(b"x", b"1"), (b"x", b"2")]) == 1


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (
            Annotated[dict[str, int], Query()],
            "cannot be made from the text of the query: annotate it str, or make",
        ),
        (Annotated[Item, Header()], "cannot be made from the text of a header"),
        (Annotated[bytes, Query()], "cannot be made from the text of the query"),
        (Annotated[list[list[int]], Query()], "cannot be made from the text of the query"),
        (Annotated[int, Query(), Header()], "is marked Query and Header: keep one of them"),
        (Annotated[Custom, Body()], "cannot be bound: Custom is nothing that a request's text or JSON"),
        (Annotated[Custom, Query()], "cannot be bound: Custom is nothing"),
        (None, "is annotated None, which cannot be made"),
        (
            Custom,
            "cannot be bound: Custom is nothing that a request's text or JSON is made into; make it a dat",
        ),
        (Custom | None, "Custom"),
        (list[Custom], "list[tests.test_binding.Custom] holds a Custom, which JSON is not made into"),
        (list[Request], "holds a Request"),
        (collections.deque, "deque is nothing that"),
        (
            datetime.datetime | str,
            "cannot be bound: datetime.datetime | str cannot be used: Type unions may not",
        ),
        (Annotated[Custom, pydantic.Field()], "cannot be bound: Custom cannot be used: Unable to generate"),
        (
            Annotated[Model | Custom, Body()],
            "cannot be bound: tests.test_binding.Model | tests.test_binding.Custom",
        ),
        (3, "cannot be bound: 3 cannot be used"),
    ],
)
def test_types_that_no_request_gives_are_refused(annotation: Any, text: str) -> None:
    with pytest.raises(TypeError) as caught:
        plan(taking(annotation))
    assert "parameter 'x' " in str(caught.value)
    assert text in str(caught.value)


def test_a_marker_as_default_is_refused() -> None:
    def f(x: int = Query()) -> None:  # type: ignore[assignment]
        ...

    assert "parameter 'x' has Query() as its default: write `x: Annotated[..., Query()]`" in refused(f)


# 4: the body


@pytest.mark.parametrize(
    ("annotation", "body", "value"),
    [
        (Item, b'{"name":"n","inner":{"x":[1]}}', Item("n", Inner([1]))),
        (Box, b'{"width":2}', Box(2)),
        (Tag, b'{"width":2}', Tag(2)),
        (Options, b'{"width":2}', {"width": 2}),
        (Pair, b"[1,2]", Pair(1, 2)),
        (Model, b'{"width":"2"}', Model(width=2)),
        (CheckedBox, b'{"width":2}', CheckedBox(2)),
        (list[Model], b'[{"width":2}]', [Model(width=2)]),
        (Model | None, b"null", None),
        (Model | CheckedBox, b'{"width":2}', Model(width=2)),
        (dict, b'{"a":[1.5,null]}', {"a": [1.5, None]}),
        (dict[str, int], b'{"a":1}', {"a": 1}),
        (list, b'[1,"a"]', [1, "a"]),
        (list[Item], b'[{"name":"n"}]', [Item("n")]),
        (tuple[int, str], b'[1,"a"]', (1, "a")),
        (set[int], b"[1,1]", {1}),
        (Item | None, b"null", None),
        (optional(dict), b"{}", {}),
        (int | list[int], b"3", 3),
        (Annotated[list[int], msgspec.Meta(max_length=2)], b"[1,2]", [1, 2]),
        (Annotated[list[int], pydantic.Field(max_length=2)], b"[1,2]", [1, 2]),
        (bytes, b"{\xff", b"{\xff"),
        (bytearray, b"{\xff", bytearray(b"{\xff")),
        (memoryview, b"{\xff", memoryview(b"{\xff")),
        (bytes | None, b"null", b"null"),
        (Annotated[bytes, Body()], b"a", b"a"),
        (Annotated[str, Body()], b'"a"', "a"),
        (Annotated[Any, Body()], b'{"a":null}', {"a": None}),
        (Annotated[object, Body()], b"1", 1),
    ],
)
@pytest.mark.parametrize("headers", [[], JSON, [(b"content-type", b"Application/LD+JSON ; charset=utf-8")]])
def test_the_body(annotation: Any, body: bytes, value: Any, headers: Any) -> None:
    binding = plan(taking(annotation))
    assert binding.reads_body
    assert binding.bind(http(headers=headers), body) == ([value], {})


def test_raw_json_is_checked_and_kept() -> None:
    raw = called(taking(msgspec.Raw), body=b'{"a" : 1}')
    assert bytes(raw) == b'{"a" : 1}'
    assert faults(taking(msgspec.Raw), body=b'{"a" : ')[0]["loc"] == ["body"]


@pytest.mark.parametrize("annotation", [bytes, bytearray, optional(bytes)])
def test_bytes_take_any_media_type_and_an_empty_body(annotation: Any) -> None:
    for headers in ([], FORM, [(b"content-type", b"image/png")]):
        assert called(taking(annotation), headers=headers, body=b"a=b") == b"a=b"
    assert called(taking(annotation)) == b""
    assert called(taking(annotation, b"default")) == b"default"


def test_limits_hold_for_bytes() -> None:
    short = taking(Annotated[bytes, msgspec.Meta(max_length=2)])
    assert called(short, body=b"ab") == b"ab"
    assert faults(short, body=b"abc") == [{"loc": ["body"], "msg": "expected bytes of length <= 2"}]


@pytest.mark.parametrize("annotation", [Item, Item | None, optional(dict[str, int]), Model, Model | None])
def test_an_empty_body_gives_the_default_or_is_missing(annotation: Any) -> None:
    assert called(taking(annotation, None)) is None
    for headers in ([], JSON, FORM):
        assert faults(taking(annotation), headers=headers) == [
            {"loc": ["body"], "msg": "the body is missing"}
        ]


@pytest.mark.parametrize(
    ("annotation", "body", "loc", "msg"),
    [
        (dict, b'{"a":', [], "input data was truncated"),
        (dict, b"{} x", [], "JSON is malformed: trailing characters (byte 4)"),
        (dict, b'{"a":"\xff"}', [], "not valid UTF-8"),
        (dict, b'{"a":' + b"[" * 100_000, [], "nested too deeply"),
        (dict, b"[]", [], "expected object, got array"),
        (Item, b"{}", ["name"], "missing required field 'name'"),
        (Item, b'{"name":1}', ["name"], "expected str, got int"),
        (Item, b'{"name":"n","inner":{}}', ["inner", "x"], "missing required field 'x'"),
        (Item, b'{"name":"n","inner":{"x":[1,"2"]}}', ["inner", "x", 1], "expected int, got str"),
        (Item, b'{"name":"n","sizes":{"a":1}}', ["sizes", "[key]"], "expected int, got str"),
        (Item, b'{"name":"n","sizes":{"1":"a"}}', ["sizes", "..."], "expected int, got str"),
        (Item, b'{"name":"n","shape":"odd"}', ["shape"], "invalid enum value 'odd'"),
        (Item, b'{"name":"n","odd":1}', ["odd"], "contains unknown field 'odd'"),
        (Pair, b"[]", [], "expected array of length 1 to 2"),
        (list[tuple[int, str]], b'[[1,"a"],[1,2]]', [1, 1], "expected str, got int"),
        (Model, b'{"parts":[]}', ["width"], "Field required"),
        (
            Model,
            b'{"width":1,"parts":[1,"a"]}',
            ["parts", 1],
            "Input should be a valid integer, unable to parse string as an integer",
        ),
        (Model, b"{", [], "Invalid JSON: EOF while parsing an object at line 1 column 1"),
        (list[CheckedBox], b'[{"width":0}]', [0, "width"], "Input should be greater than or equal to 1"),
    ],
)
def test_a_bad_body_is_a_422_that_names_the_place(
    annotation: Any, body: bytes, loc: list[Any], msg: str
) -> None:
    assert faults(taking(annotation), body=body) == [{"loc": ["body", *loc], "msg": msg}]


@pytest.mark.parametrize("media_type", [b"text/plain", b"application/octet-stream", b"image/png; a=b"])
def test_other_media_types_are_a_415(media_type: bytes) -> None:
    with pytest.raises(UnsupportedMediaType) as caught:
        called(taking(dict), headers=[(b"content-type", media_type)], body=b"{}")
    assert caught.value.status == 415
    assert str(caught.value) == (
        f"the body must be application/json, got {media_type.partition(b';')[0].decode()}"
    )


@pytest.mark.parametrize(
    "media_type", [b"application/x-www-form-urlencoded", b"Multipart/Form-Data; boundary=x"]
)
@pytest.mark.parametrize("annotation", [Item, Model])
def test_a_form_is_a_415_that_names_curls_option(media_type: bytes, annotation: Any) -> None:
    with pytest.raises(UnsupportedMediaType, match="-H 'content-type: application/json'") as caught:
        called(taking(annotation), headers=[(b"content-type", media_type)], body=b"a=b")
    assert caught.value.errors[0]["loc"] == ["header", "content-type"]


def test_two_bodies_are_refused() -> None:
    def f(a: Item, n: int, b: dict[str, int]) -> None: ...

    assert "parameter 'b' and 'a' are both the body" in refused(f)


@pytest.mark.parametrize("methods", [["GET"], ["HEAD"], ["get", "HEAD"]])
def test_a_body_on_a_route_without_one_is_refused(methods: list[str]) -> None:
    def f(items: list[int]) -> None: ...

    def g(item: Item | None = None) -> None: ...

    said = refused(f, methods=methods)
    assert "parameter 'items' (list[int]) is the body, which" in said
    assert 'add methods=["POST"] to the route' in said
    assert "`items: Annotated[list[int], Query()]`" in said
    assert "Query()" not in refused(g, methods=methods)


def test_a_body_is_for_other_methods() -> None:
    def f(item: Item) -> None: ...

    for methods in (["GET", "POST"], ["DELETE"], []):
        assert plan(f, methods=methods).reads_body


# 5: the query


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        (str, "a b+ü", "a b+ü"),
        (str, "", ""),
        (int, "-7", -7),
        (float, "1.5", 1.5),
        (bool, "false", False),
        (bool, "1", True),
        (uuid.UUID, str(SOME_ID), SOME_ID),
        (
            datetime.datetime,
            "2024-01-02T03:04:05Z",
            datetime.datetime(2024, 1, 2, 3, 4, 5, tzinfo=datetime.UTC),
        ),
        (datetime.date, "2024-01-02", datetime.date(2024, 1, 2)),
        (Decimal, "1.10", Decimal("1.10")),
        (Level, "1", Level.LOW),
        (Shape, "round", Shape.ROUND),
        (Literal[1, 2], "1", 1),
        (Literal["a", "b"] | None, "a", "a"),
        (int | None, "3", 3),
        (optional(str), "3", "3"),
        (Any, "3", "3"),
        (Positive, "3", 3),
        (Checked, "3", 3),
        (pydantic.PositiveInt, "3", 3),
    ],
)
def test_the_query(annotation: Any, text: str, value: Any) -> None:
    func = taking(annotation)
    assert not plan(func).reads_body
    assert called(func, query=b"a=1&x=" + quote_plus(text).encode() + b"&b") == value
    assert called(taking(annotation, None), query=b"y=1") is None
    assert faults(func) == [{"loc": ["query", "x"], "msg": "missing"}]


def test_the_query_without_annotation_is_text() -> None:
    def f(a, b=10) -> Any:  # type: ignore[no-untyped-def]
        return a, b

    assert called(f, query=b"a=1&b=2") == ("1", "2")
    assert called(f, query=b"a=1") == ("1", 10)


@pytest.mark.parametrize(
    ("annotation", "text", "msg"),
    [
        (int, b"", "expected int, got ''"),
        (int, b"1_0", "expected int, got '1_0'"),
        (int, b"9" * 5_000, "integer value out of range, got '"),
        (bool, b"on", "expected bool, got 'on'"),
        (int | None, b"x", "expected int | null, got 'x'"),
        (Shape, b"odd", "expected one of 'round', 'flat', got 'odd'"),
        (Shape | None, LONG.encode(), "expected one of 'round', 'flat', got 'xxx"),
        (Positive, b"0", "expected int >= 1, got '0'"),
        (Checked, b"0", "Input should be greater than or equal to 1"),
        (uuid.UUID, LONG.encode(), "invalid UUID, got 'xxx"),
    ],
)
def test_a_bad_query_is_a_422_that_repeats_little_of_it(annotation: Any, text: bytes, msg: str) -> None:
    (fault,) = faults(taking(annotation), query=b"x=" + text)
    assert fault["loc"] == ["query", "x"]
    assert fault["msg"].startswith(msg)
    assert len(fault["msg"]) < 200


def test_all_faults_are_told_at_once() -> None:
    def f(id: int, limit: int, item: Item, page: int = 1, *, token: Annotated[str, Header()]) -> None: ...

    with pytest.raises(InvalidRequest) as caught:
        called(f, "x", path="/<id>", query=b"limit=a&page=b", body=b"[]")
    assert [(".".join(fault["loc"]), fault["msg"]) for fault in caught.value.errors] == [
        ("path.id", "expected int, got 'x'"),
        ("query.limit", "expected int, got 'a'"),
        ("body", "expected object, got array"),
        ("query.page", "expected int, got 'b'"),
        ("header.token", "missing"),
    ]
    assert str(caught.value) == (
        "path.id: expected int, got 'x'; query.limit: expected int, got 'a'; "
        "body: expected object, got array; and 2 more"
    )


@given(st.integers(), st.floats(allow_nan=False), st.text(), st.booleans(), st.lists(st.text(), min_size=1))
def test_what_is_written_into_a_query_comes_back(a: int, b: float, c: str, d: bool, e: list[str]) -> None:
    def f(a: int, b: float, c: str, d: bool, e: Annotated[list[str], Query()]) -> Any:
        return a, b, c, d, e

    query = urlencode({"a": a, "b": b, "c": c, "d": str(d).lower(), "e": e}, doseq=True).encode()
    if b in (float("inf"), float("-inf")):
        assert called(f, query=query)[1] == b
    else:
        assert called(f, query=query) == (a, b, c, d, e)


# What is refused, and whose signature is read


def test_star_arguments_are_refused() -> None:
    def f(*args: int) -> None: ...

    def g(a: int, **kwargs: int) -> None: ...

    assert "parameter '*args' cannot be bound to a request" in refused(f)
    assert "parameter '**kwargs' cannot be bound to a request" in refused(g)
    assert "*args" in refused(f, batch=True)


def test_methods_lose_their_self() -> None:
    class Classifier:
        def __call__(self, x: int) -> int:
            return x

        def batch(self, items: list[int]) -> list[int]:
            return items

    assert plan(Classifier.__call__, drop_first=True).bind(http(query=b"x=1"), b"") == ([1], {})
    assert plan(Classifier().__call__).bind(http(query=b"x=1"), b"") == ([1], {})
    assert plan(Classifier.batch, drop_first=True, batch=True).bind(http(), b"1") == ([1], {})


def test_callables_of_other_kinds() -> None:
    def f(a: int, b: int, c: int = 3) -> Any:
        return a, b, c

    @functools.wraps(f)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return f(*args, **kwargs)

    assert called(wrapped, query=b"a=1&b=2") == (1, 2, 3)
    assert plan(functools.partial(f, 7)).bind(http(query=b"b=2"), b"") == ([2, 3], {})
    assert plan(functools.partial(f, b=7)).bind(http(query=b"a=2"), b"") == ([2], {"b": 7, "c": 3})


# Batches


@pytest.mark.parametrize(
    ("annotation", "body", "item"),
    [
        (list[int], b"3", 3),
        (list[str], b'"a"', "a"),
        (list[bytes], b"\xff", b"\xff"),
        (list[bytes], b"", b""),
        (list[Item], b'{"name":"n"}', Item("n")),
        (list[Model], b'{"width":1}', Model(width=1)),
        (list[dict[str, int]], b'{"a":1}', {"a": 1}),
        (list[list[int]], b"[1]", [1]),
        (list[Any], b"[1]", [1]),
        (list[int | None], b"null", None),
        (Sequence[int], b"3", 3),
        (Annotated[list[int], Body()], b"3", 3),
        (list, b"[1]", [1]),
    ],
)
def test_a_batch_function_gets_one_item_a_request(annotation: Any, body: bytes, item: Any) -> None:
    binding = plan(taking(annotation), batch=True)
    assert binding.reads_body
    assert binding.bind(http(headers=JSON), body) == ([item], {})


def test_a_batch_function_without_annotation_gets_any_json_or_requests() -> None:
    def f(items) -> Any: ...  # type: ignore[no-untyped-def]

    def g(requests) -> Any: ...  # type: ignore[no-untyped-def]

    def h(request) -> Any: ...  # type: ignore[no-untyped-def]

    def i(these: list[Request]) -> Any: ...

    assert plan(f, batch=True).bind(http(), b'{"a":[1]}') == ([{"a": [1]}], {})
    for func in (g, h, i):
        (request,), kwargs = plan(func, "/<n:int>", batch=True, methods=["GET"]).bind(http("7"), b"")
        assert type(request) is Request
        assert request.path_params == {"n": 7}
        assert kwargs == {}


def test_a_bad_item_is_a_422() -> None:
    binding = plan(taking(list[int]), batch=True)
    with pytest.raises(InvalidRequest, match="body: expected int, got str"):
        binding.bind(http(), b'"a"')
    with pytest.raises(InvalidRequest, match="body: the body is missing"):
        binding.bind(http(), b"")
    with pytest.raises(UnsupportedMediaType):
        binding.bind(http(headers=FORM), b"3")


def no_parameter() -> None: ...


def two_parameters(a: list[int], b: list[int]) -> None: ...


def keyword_only(*, items: list[int]) -> None: ...


def in_the_path(n: list[int]) -> None: ...


def from_the_query(items: Annotated[list[int], Query()]) -> None: ...


def a_tuple(items: tuple[int, ...]) -> None: ...


def one_int(item: int) -> None: ...


def one_request(request: Request) -> None: ...


def of_customs(items: list[Custom]) -> None: ...


@pytest.mark.parametrize(
    ("func", "text"),
    [
        (no_parameter, "takes exactly one list[T] and has no parameter: write `items: list[T]`"),
        (two_parameters, "takes exactly one list[T] and has 2 parameters (a, b): write `items: list[T]`"),
        (keyword_only, "parameter 'items' is keyword-only, a batch is given by position: drop the `*`"),
        (in_the_path, "parameter 'n' is a batch, whose items come from bodies, and in the path as well"),
        (from_the_query, "parameter 'items' is a batch, whose items come from bodies: drop the mark"),
        (a_tuple, "not tuple[int, ...]: write `items: list[int]`, or drop max_batch_size"),
        (one_int, "not int: write `item: list[int]`, or drop max_batch_size"),
        (one_request, "not Request: write `request: list[Request]`"),
        (of_customs, "parameter 'items' cannot be bound: Custom is nothing"),
    ],
)
def test_batch_functions_that_do_not_fit_say_what_to_write(func: Callable[..., Any], text: str) -> None:
    assert text in refused(func, "/<n:int>", batch=True)


def test_a_batch_on_a_route_without_bodies_is_refused() -> None:
    def f(items: list[int]) -> None: ...

    said = refused(f, batch=True, methods=["GET", "HEAD"])
    assert "parameter 'items' takes its items from bodies, which GET and HEAD requests do not have" in said
    assert 'add methods=["POST"] to the route, or take list[Request]' in said


# What is imported


def test_pydantic_and_requests_are_not_imported_for_functions_that_do_not_use_them() -> None:
    code = """
import sys
from serveit.declare.binding import plan_binding
from serveit.declare.routing import compile_pattern
def f(a: int, b: dict, c: float = 1.0): ...
plan_binding(f, pattern=compile_pattern("/<a:int>"), methods=["POST"], batch=False, where="here")
print([name for name in ("pydantic", "starlette.requests", "starlette.responses") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Whatever comes


def much(
    a: int,
    item: Item,
    level: Level | None = None,
    when: datetime.datetime | None = None,
    price: Decimal | None = None,
    some: Annotated[set[Positive] | None, Query()] = None,
    x_y: Annotated[float | None, Header()] = None,
) -> None: ...


def much_of_pydantic(a: Checked, item: dict[str, Model], some: Annotated[list[Checked], Query()]) -> None: ...


MUCH = plan(much, "/<a>")
MUCH_OF_PYDANTIC = plan(much_of_pydantic, "/<a>")
KEYS = ["a", "level", "when", "price", "some"]

numbers = st.from_regex(r"[-+]?[0-9]{1,30}([.eE][0-9]{1,3})?", fullmatch=True)
texts = numbers | st.text() | st.datetimes().map(str) | st.sampled_from(["null", "NaN", "-0", "1e999"])
documents = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["name", "inner", "x", "width"]), inner),
)
bodies = st.binary() | documents.map(msgspec.json.encode) | st.integers(1, 3_000).map(lambda n: b"[" * n)


@pytest.mark.parametrize("binding", [MUCH, MUCH_OF_PYDANTIC])
@given(
    texts,
    st.binary() | st.lists(st.tuples(st.sampled_from(KEYS), texts)).map(lambda it: urlencode(it).encode()),
    st.lists(st.tuples(st.sampled_from([b"x-y", b"content-type"]), st.binary())),
    bodies,
)
def test_whatever_comes_is_bound_or_refused(
    binding: Binding, value: str, query: bytes, headers: list[tuple[bytes, bytes]], body: bytes
) -> None:
    try:
        args, kwargs = binding.bind(http(value, query=query, headers=headers), body)
    except InvalidRequest as error:
        assert error.errors
        assert len(str(error)) < 1_000
        msgspec.json.encode(error.errors)
    else:
        assert len(args) == (7 if binding is MUCH else 3)
        assert kwargs == {}


def test_a_misspelt_path_parameter_is_refused() -> None:
    def f(z: int) -> None: ...

    with pytest.raises(TypeError, match="'z' is not in the path '/x/<y>', whose 'y' no parameter takes"):
        plan(f, "/x/<y>")

    def meant(z: Annotated[int, Query()]) -> None: ...

    assert plan(meant, "/x/<y>").bind(http("1", query=b"z=3"), b"") == ([3], {})


def test_a_multipart_form_is_not_a_file() -> None:
    def f(data: bytes) -> None: ...

    binding = plan(f, methods=("POST",))
    envelope = http(headers=[(b"content-type", b"Multipart/Form-Data; boundary=x")])
    with pytest.raises(UnsupportedMediaType, match="--data-binary @file"):
        binding.bind(envelope, b"--x--")
    form = http(headers=[(b"content-type", b"application/x-www-form-urlencoded")])
    assert binding.bind(form, b"raw") == ([b"raw"], {})

from __future__ import annotations

import collections
import dataclasses
import datetime
import enum
import json
import math
import struct
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import attrs
import msgspec
import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.background import BackgroundTask
from starlette.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)

from serveit.declare.encoding import ChunkEncoder, encode_json, encode_result, is_stream, needs_asgi
from serveit.exceptions import EncodingError

NAN = math.nan
INF = math.inf
LONG = "x" * 5_000


class Color(enum.Enum):
    RED = "red"


class Number(enum.Enum):
    NAN = math.nan


class Tone(enum.StrEnum):
    DARK = "dark"


class Point(NamedTuple):
    x: Any
    y: Any = None


class Item(msgspec.Struct, rename="camel"):
    some_x: Any
    other: Any = msgspec.UNSET


@dataclasses.dataclass
class Box:
    label: Any
    inner: Any = None


@attrs.define
class Tag:
    name: Any


class Model(pydantic.BaseModel):
    a: Any
    when: datetime.date | None = None
    long_name: int = pydantic.Field(default=1, alias="longName")


class Sparse(pydantic.BaseModel):
    values: Any = None

    @pydantic.field_serializer("values", when_used="json")
    def _write(self, values: list[Any]) -> list[Any]:
        return [None, *values]


class Text(str):
    def __str__(self) -> str:
        return "not the text"


class Whole(int):
    pass


class Real(float):
    pass


class Octets(bytes):
    pass


class Moment(datetime.datetime):
    pass


class Plain:
    pass


class Lookup(Mapping[str, Any]):
    def __init__(self, found: dict[str, Any]) -> None:
        self.found = found

    def __getitem__(self, key: str) -> Any:
        return self.found[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)


class Endless(Mapping[str, Any]):
    """A new one in each: no cycle, and no end."""

    def __getitem__(self, key: str) -> Any:
        return Endless()

    def __iter__(self) -> Iterator[str]:
        return iter("ab")

    def __len__(self) -> int:
        return 2


class Tensor:
    def tolist(self) -> list[int]:
        return [1]


def message_of(value: Any) -> str:
    with pytest.raises(EncodingError) as caught:
        encode_json(value)
    return str(caught.value)


# Whole answers


@pytest.mark.parametrize(
    ("value", "media_type", "body"),
    [
        ("grüß", b"text/plain; charset=utf-8", "grüß".encode()),
        ("", b"text/plain; charset=utf-8", b""),
        (Text("own"), b"text/plain; charset=utf-8", b"own"),
        (Tone.DARK, b"text/plain; charset=utf-8", b"dark"),
        (b"\x00\xff", b"application/octet-stream", b"\x00\xff"),
        (bytearray(b"ab"), b"application/octet-stream", b"ab"),
        (memoryview(b"abcd")[::2], b"application/octet-stream", b"ac"),
        (None, b"application/json", b"null"),
        (True, b"application/json", b"true"),
        ({"a": [1, 2.5, "ü", None]}, b"application/json", '{"a":[1,2.5,"ü",null]}'.encode()),
        ([], b"application/json", b"[]"),
    ],
)
def test_a_result_is_text_octets_or_json(value: Any, media_type: bytes, body: bytes) -> None:
    encoded = encode_result(value)
    assert encoded.status == 200
    assert encoded.body == body
    assert type(encoded.body) is bytes
    assert encoded.headers == [
        (b"content-type", media_type),
        (b"content-length", str(len(body)).encode()),
    ]


def test_answers_do_not_share_their_headers() -> None:
    first = encode_result("a")
    first.headers.append((b"x-more", b"1"))
    assert len(encode_result("a").headers) == 2
    response = Response("a")
    encode_result(response).headers.clear()
    assert response.raw_headers


def test_text_that_is_no_unicode_is_an_error() -> None:
    with pytest.raises(EncodingError, match=r"'\\ud800' at 3 is half of a surrogate pair"):
        encode_result("abc\ud800" + LONG)


@pytest.mark.parametrize(
    "response",
    [
        Response(b"raw"),
        Response(memoryview(b"view"), status_code=201),
        Response(status_code=204),
        PlainTextResponse("hi", headers={"x-a": "1"}),
        JSONResponse({"a": 1}, status_code=418),
        HTMLResponse("<p>"),
        RedirectResponse("/there"),
    ],
)
def test_a_plain_response_is_as_it_is(response: Response) -> None:
    response.set_cookie("k", "v")
    encoded = encode_result(response)
    assert not needs_asgi(response)
    assert encoded == (response.status_code, response.raw_headers, bytes(response.body))
    assert type(encoded.body) is bytes


class OwnRender(Response):
    def render(self, content: Any) -> bytes:
        return b"<" + str(content).encode() + b">"


class OwnCall(Response):
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await super().__call__(scope, receive, send)


class Bodiless(Response):
    def __init__(self) -> None:
        self.status_code = 200


def test_a_response_with_its_own_render_is_plain() -> None:
    response = OwnRender("x")
    assert not needs_asgi(response)
    assert encode_result(response).body == b"<x>"


@pytest.mark.parametrize(
    "response",
    [
        StreamingResponse(iter(["a"])),
        FileResponse(__file__),
        OwnCall("x"),
        Bodiless(),
        Response("x", background=BackgroundTask(print)),
    ],
)
def test_other_responses_run_as_asgi_apps(response: Response) -> None:
    assert needs_asgi(response)
    with pytest.raises(EncodingError, match=f"a .*{type(response).__name__} has no whole body"):
        encode_result(response)


@pytest.mark.parametrize("value", [None, "text", {"a": 1}, object(), Response])
def test_what_is_no_response_needs_no_asgi(value: Any) -> None:
    assert not needs_asgi(value)


def test_nothing_is_imported_for_results_that_do_not_need_it() -> None:
    code = """
import sys
from serveit.declare.encoding import encode_result, needs_asgi
from serveit.exceptions import EncodingError
assert encode_result({"a": None}).body == b'{"a":null}'
assert not needs_asgi({})
try:
    encode_result({"a": [float("nan")], "b": object()})
except EncodingError as error:
    print(error)
print([name for name in ("starlette.responses", "numpy", "pydantic") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    fault, imported = done.stdout.splitlines()
    assert "$.a[0] is nan" in fault
    assert imported == "[]"


# Streams


def numbers() -> Iterator[int]:
    yield 1


async def many_numbers() -> AsyncIterator[int]:
    yield 1


class Counting:
    def __aiter__(self) -> Counting:
        return self

    async def __anext__(self) -> int:
        raise StopAsyncIteration


def test_generators_and_async_iterators_are_streams() -> None:
    assert is_stream(numbers())
    assert is_stream(number for number in [1])
    assert is_stream(many_numbers())
    assert is_stream(Counting())


@pytest.mark.parametrize("value", [[1], "text", b"b", map(str, [1]), iter([1]), zip([1]), numbers, {}, None])
def test_other_iterators_are_not(value: Any) -> None:
    assert not is_stream(value)


@pytest.mark.parametrize(
    ("chunks", "media_type", "body"),
    [
        (["a", "ü"], "text/plain; charset=utf-8", "aü".encode()),
        (["a", b"\xff", bytearray(b"c")], "text/plain; charset=utf-8", b"a\xffc"),
        ([b"\xff", "ü", memoryview(b"c")], "application/octet-stream", b"\xff\xc3\xbcc"),
        ([{"a": 1}, [2], None, 3, Item(1)], "application/x-ndjson", b'{"a":1}\n[2]\nnull\n3\n{"someX":1}\n'),
    ],
)
def test_the_first_chunk_decides_what_a_stream_is(chunks: list[Any], media_type: str, body: bytes) -> None:
    encoder = ChunkEncoder()
    assert encoder.media_type is None
    assert encoder.encode(chunks[0]) == body[: len(ChunkEncoder().encode(chunks[0]))]
    assert encoder.media_type == media_type
    rest = b"".join(map(encoder.encode, chunks[1:]))
    assert ChunkEncoder().encode(chunks[0]) + rest == body
    assert encoder.media_type == media_type


@pytest.mark.parametrize(
    ("first", "other", "text"),
    [
        ("a", {"b": 1}, "chunk 2 of the stream is a dict and the first was a str"),
        (b"a", None, "chunk 2 of the stream is a NoneType and the first was a bytes"),
        ({"b": 1}, "a", "chunk 2 of the stream is a str and the first was a dict"),
        (1, b"a", "chunk 2 of the stream is a bytes and the first was a int"),
    ],
)
def test_a_chunk_of_another_kind_is_an_error(first: Any, other: Any, text: str) -> None:
    encoder = ChunkEncoder()
    encoder.encode(first)
    with pytest.raises(EncodingError, match=text):
        encoder.encode(other)


def test_a_chunk_that_cannot_be_encoded_says_which_it_is() -> None:
    encoder = ChunkEncoder()
    encoder.encode({"x": 1})
    with pytest.raises(EncodingError, match=r"chunk 2 of the stream: .* \$\.x is nan"):
        encoder.encode({"x": NAN})
    with pytest.raises(EncodingError, match=r"chunk 1 of the stream: .*surrogate"):
        ChunkEncoder().encode("\udc00")


# JSON

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
)
jsonable = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)


@given(jsonable)
def test_json_comes_back_as_it_was(value: Any) -> None:
    assert json.loads(encode_json(value)) == value


Place = tuple[Any, str]
"""A value with one number in it that JSON does not have, and where that is."""

bad_numbers = st.sampled_from([NAN, INF, -INF, np.float64(NAN), np.float32(INF), Number.NAN, Real(NAN)])


def around(inner: st.SearchStrategy[Place]) -> st.SearchStrategy[Place]:
    return st.one_of(
        st.tuples(inner, st.lists(jsonable, max_size=3), st.lists(jsonable, max_size=3)).map(
            lambda drawn: ([*drawn[1], drawn[0][0], *drawn[2]], f"[{len(drawn[1])}]{drawn[0][1]}")
        ),
        st.tuples(inner, st.dictionaries(st.sampled_from("abc"), jsonable)).map(
            lambda drawn: ({**drawn[1], "x": drawn[0][0]}, f".x{drawn[0][1]}")
        ),
        inner.map(lambda place: (Item(place[0]), f".some_x{place[1]}")),
        inner.map(lambda place: (Box(None, place[0]), f".inner{place[1]}")),
        inner.map(lambda place: (Tag(place[0]), f".name{place[1]}")),
        inner.map(lambda place: (Point(None, place[0]), f"[1]{place[1]}")),
        inner.map(lambda place: ({"a b": place[0]}, f"['a b']{place[1]}")),
        inner.map(lambda place: ({7: place[0]}, f"[7]{place[1]}")),
        inner.map(lambda place: (collections.deque([1, place[0]]), f"[1]{place[1]}")),
        inner.map(lambda place: (Lookup({"k": place[0]}), f".k{place[1]}")),
    )


@given(st.recursive(bad_numbers.map(lambda number: (number, "")), around, max_leaves=1))
def test_nan_anywhere_is_found_and_its_path_named(place: Place) -> None:
    value, path = place
    said = message_of(value)
    if len(path) < 90:
        assert f" ${path} is " in said
    assert " is nan, which" in said or " is inf, which" in said or " is -inf, which" in said
    assert len(said) < 400


@given(jsonable, st.binary(max_size=40))
def test_none_and_bytes_beside_each_other_are_no_nan(value: Any, data: bytes) -> None:
    assert b"null" in encode_json([None, value, data])


def test_bytes_that_look_like_nan_in_msgpack_are_no_nan() -> None:
    assert encode_json([None, b"\xcb\x7f\xf8"]) == b'[null,"y3/4"]'
    assert encode_json([None, 2**70]) == b"[null,1180591620717411303424]"
    assert "$[2] is nan" in message_of([None, 2**70, NAN])


@pytest.mark.parametrize(
    ("value", "data"),
    [
        (2**200, str(2**200).encode()),
        ((1, "a"), b'[1,"a"]'),
        ({1}, b"[1]"),
        (frozenset([2]), b"[2]"),
        ({1: 2, 1.5: 3, Color.RED: 4, uuid.UUID(int=1): 5}, None),
        (Color.RED, b'"red"'),
        ([Tone.DARK], b'["dark"]'),
        (Point(1, 2), b"[1,2]"),
        (Item(1), b'{"someX":1}'),
        (Item(None, other=2), b'{"someX":null,"other":2}'),
        (Box("a"), b'{"label":"a","inner":null}'),
        (Tag("a"), b'{"name":"a"}'),
        (Decimal("1.10"), b'"1.10"'),
        (datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC), b'"2024-01-02T00:00:00Z"'),
        ([b"abc"], b'["YWJj"]'),
        (msgspec.Raw(b'{"a":1}'), b'{"a":1}'),
        ([Text("own"), Whole(3), Real(1.5), Octets(b"abc")], b'["own",3,1.5,"YWJj"]'),
        (Moment(2024, 1, 2), b'"2024-01-02T00:00:00"'),
        (range(3), b"[0,1,2]"),
        (collections.deque([1]), b"[1]"),
        ({"a": 1}.keys(), b'["a"]'),
        ({"a": 1}.values(), b"[1]"),
        (Lookup({"a": None}), b'{"a":null}'),
        (collections.UserString("us"), b'"us"'),
        (PurePosixPath("/a/b"), b'"/a/b"'),
        (Model(a=1, when=datetime.date(2024, 1, 2), longName=2), b'{"a":1,"when":"2024-01-02","longName":2}'),
        (Sparse(values=[1, 2]), b'{"values":[null,1,2]}'),
        (Model(a=[None, (1, {2})]), b'{"a":[null,[1,[2]]],"when":null,"longName":1}'),
    ],
)
def test_what_msgspec_knows_and_what_is_added(value: Any, data: bytes | None) -> None:
    encoded = encode_json(value)
    assert json.loads(encoded) is not Ellipsis
    assert data is None or encoded == data


@pytest.mark.parametrize(
    ("value", "data"),
    [
        (np.float64(1.5), b"1.5"),
        (np.float32(1.5), b"1.5"),
        (np.longdouble(1.5), b"1.5"),
        (np.int64(3), b"3"),
        (np.uint8(3), b"3"),
        (np.bool_(True), b"true"),
        (np.str_("a"), b'"a"'),
        (np.datetime64("2024-01-02"), b'"2024-01-02"'),
        (np.array([[1, 2], [3, 4]]), b"[[1,2],[3,4]]"),
        (np.array(2.5), b"2.5"),
        (np.array([1.5], dtype=np.float16), b"[1.5]"),
        (np.array([1.5], dtype=np.longdouble), b"[1.5]"),
        (np.array([True, False]), b"[true,false]"),
        (np.array(["a", "b"]), b'["a","b"]'),
        (np.array([{"a": None}, 1], dtype=object), b'[{"a":null},1]'),
        (np.array(["2024-01-02"], dtype="M8[D]"), b'["2024-01-02"]'),
        (np.ma.masked_invalid([1.0, NAN]), b"[1.0,null]"),
        (np.zeros((2, 0)), b"[[],[]]"),
        ({np.int64(1): np.float64(2)}, b'{"1":2.0}'),
        ({np.str_("k"): 1}, b'{"k":1}'),
    ],
)
def test_numpy(value: Any, data: bytes) -> None:
    if not isinstance(value, str):
        assert encode_result(value).body == data
    assert encode_json(value) == data


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.array([1.0, NAN]), "$[1] is nan, which"),
        ({"a": np.array([[0, 1], [INF, NAN]], dtype=np.float32)}, "$.a[1][0] is inf, which"),
        (np.array(NAN), "$ is nan, which"),
        (np.float32(NAN), "$ is nan, which"),
        (np.array([None, NAN], dtype=object), "$[1] is nan, which"),
        ([None, np.zeros(3), np.array([NAN])], "$[2][0] is nan, which"),
        (np.array([NAN]).view(np.matrix), "$[0][0] is nan, which"),
        (np.array([1j]), "$ is a numpy.ndarray of dtype complex128, which"),
        (np.zeros(1, dtype=[("a", "f8")]), "$ is a numpy.ndarray of dtype [('a', '<f8')], which"),
        (np.timedelta64(1, "ns"), "$ is a numpy.timedelta64 of dtype timedelta64[ns], which"),
        ([np.datetime64("NaT")], "$[0] is a numpy.datetime64 of NaT, which"),
    ],
)
@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_numpy_without_a_form_in_json(value: Any, text: str) -> None:
    assert text in message_of(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Plain(), "$ is a tests.test_encoding.Plain, which has no form in JSON: make it a dataclass"),
        ({"items": [1, {"x": Plain()}]}, "$.items[1].x is a tests.test_encoding.Plain, which"),
        (Item(Box(Tag(Point(1, Plain())))), "$.some_x.label.name[1] is a tests.test_encoding.Plain"),
        ([Model(a=NAN)], "$[0].a is nan, which"),
        ([Model(a={"b": [None, (INF,)]})], "$[0].a.b[1][0] is inf, which"),
        ({"m": Model(a=Model(a=NAN))}, "$.m.a.a is nan, which"),
        ([Model(a=Plain())], "$[0] Unable to serialize unknown type: "),
        ([1j], "$[0] is a complex, which"),
        ({"a": numbers()}, "$.a is a generator, which has no form in JSON: make it a list"),
        ([map(str, [1])], "$[0] is a map, which has no form in JSON: make it a list"),
        ([many_numbers()], "$[0] is a async_generator, which"),
        ([Tensor()], "$[0] is a tests.test_encoding.Tensor, which has no form in JSON: call its .tolist()"),
        ({"a": msgspec.UNSET}, "$.a is a msgspec.UnsetType, which"),
        ({"a": {(1, 2): 3}}, "$.a has (1, 2) (a tuple) as a key: keys are str or numbers"),
        ({True: 1}, "$ has True (a bool) as a key"),
        ({None: 1}, "$ has None (a NoneType) as a key"),
        ({range(2): 1}, "$ has range(0, 2) (a range) as a key"),
        ({frozenset([1]): 1}, "(a frozenset) as a key"),
        (["ok", "\ud800"], "$[1] holds '\\ud800', half of a surrogate pair"),
        ({"k": {"\udfff": 1}}, "$.k holds '\\udfff', half of a surrogate pair"),
        ({"a b": {"c": Plain()}}, "$['a b'].c is a "),
        ({1: {Color.RED: Plain()}}, "$[1][<Color.RED: 'red'>] is a "),
    ],
)
def test_a_value_without_a_form_in_json_is_named_with_its_place(value: Any, text: str) -> None:
    assert text in message_of(value)


async def test_a_coroutine_is_to_be_awaited() -> None:
    async def forgotten() -> None: ...

    coroutine = forgotten()
    said = message_of({"a": coroutine})
    assert (
        "$.a is a coroutine, which has no form in JSON: await it, in a function that is `async def`" in said
    )
    await coroutine


def test_a_number_of_too_many_digits_is_an_error() -> None:
    assert "$.n " in message_of({"n": 10**5_000})


def test_a_cycle_is_an_error_and_says_where_it_closes() -> None:
    items: list[Any] = [1]
    items.append({"back": items})
    assert "$[1].back is a value that it is itself in" in message_of(items)
    item = Item(None)
    item.some_x = [item]
    assert "$.some_x[0] is a value that it is itself in" in message_of(item)
    lookup = Lookup({})
    lookup.found["me"] = lookup
    assert "$.me is a value that it is itself in" in message_of(lookup)


def test_what_is_twice_in_a_value_is_no_cycle() -> None:
    shared = {"a": None}
    assert encode_json([shared, shared, {"b": shared}]) == b'[{"a":null},{"a":null},{"b":{"a":null}}]'
    assert "$[3] is nan" in message_of([shared, [shared], shared, NAN])


def test_a_value_too_deep_is_an_error() -> None:
    deep: Any = []
    for _ in range(5_000):
        deep = [deep]
    assert "$ (list): it is nested too deeply" in message_of(deep)
    assert "it is nested too deeply" in message_of(Endless())


def test_errors_hold_little_of_the_value() -> None:
    for value in (
        {LONG: NAN},
        {(LONG,): 1},
        [LONG, "\ud800" + LONG],
        {f"k{number}": Plain() for number in range(1)} | {LONG: 1},
        np.zeros(1, dtype=[(f"field_{number}", "f8") for number in range(500)]),
    ):
        assert len(message_of(value)) < 400


class Stubborn(Mapping[str, int]):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, key: str) -> int:
        raise self.error

    def __iter__(self) -> Iterator[str]:
        raise self.error

    def __len__(self) -> int:
        return 1


def test_what_a_value_raises_itself_is_told() -> None:
    assert message_of([Stubborn(ValueError("shop is shut"))]).endswith("$[0] shop is shut")
    with pytest.raises(KeyError, match="mine"):
        encode_json([Stubborn(KeyError("mine"))])


class Fickle(Mapping[str, Any]):
    """Fails once."""

    def __init__(self) -> None:
        self.failed = False

    def __getitem__(self, key: str) -> int:
        return 1

    def __iter__(self) -> Iterator[str]:
        if not self.failed:
            self.failed = True
            raise ValueError("not now " + LONG)
        return iter("a")

    def __len__(self) -> int:
        return 1


def test_a_fault_that_is_not_found_again_is_told_as_it_was() -> None:
    said = message_of(Fickle())
    assert "$ (tests.test_encoding.Fickle): not now x" in said
    assert len(said) < 300


# Large values: the event loop waits while a fault is looked for


class Counted(str):
    """A text that counts how often it is looked at."""

    looks = 0

    def encode(self, *args: Any, **kwargs: Any) -> bytes:
        Counted.looks += 1
        return str.encode(self, *args, **kwargs)


def test_the_search_for_a_fault_comes_to_an_end() -> None:
    large = [0.5] * 30_000
    many = {"n": [[0.5]] * 15_000, "m": [1.5]}
    for value in (large, many):
        for bad in (NAN, INF):
            said = message_of([value, None, bad])
            assert said.endswith("somewhere in it is nan or an infinity, which JSON does not have")
        said = message_of([value, Plain()])
        assert "somewhere in $ (list): is a tests.test_encoding.Plain, which has no form in JSON: " in said
        assert message_of([NAN, value]).startswith("the result cannot be sent as JSON: $[0] is nan")


def test_a_large_value_is_not_walked_through() -> None:
    Counted.looks = 0
    message_of([*[Counted("x")] * 100_000, Plain()])
    assert 10_000 < Counted.looks < 30_000


LIKE_NAN = struct.unpack(">d", b"\x3f\xcb\x7f\xf0\x00\x00\x00\x00")[0]
"""A number with octets in it as those that NaN begins with in msgpack."""


def test_a_large_value_without_a_fault_is_not_mistaken_for_one() -> None:
    large = [0.5] * 30_000
    for value in ([LIKE_NAN, None], [LIKE_NAN, None, b"x", {1: uuid.UUID(int=0)}], [2**70, None]):
        assert json.loads(encode_json([*value, *large]))[len(value)] == 0.5
    said = message_of([2**70, *large, NAN])  # which msgpack has no form for: looked for to the end
    assert "$[30001] is nan" in said


def test_models_with_none_in_a_large_list() -> None:
    class Model(pydantic.BaseModel):
        values: list[Any]

    assert encode_json(Model(values=[None, 1.5])) == b'{"values":[null,1.5]}'
    assert "$.values[1] is nan" in message_of(Model(values=[None, NAN]))

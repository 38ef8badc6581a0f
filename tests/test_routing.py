from __future__ import annotations

import pickle
import re
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.convertors import CONVERTOR_TYPES, Convertor, register_url_convertor
from starlette.routing import compile_path

from serveit.declare.routing import Pattern, compile_pattern
from serveit.exceptions import PathNotFound

if TYPE_CHECKING:
    from collections.abc import Iterator

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "str": st.text(min_size=1).filter(lambda text: "/" not in text),
    "path": st.text().filter(lambda text: "\n" not in text),
    "int": st.integers(0, 10**40),
    # Starlette writes floats with 20 decimals, so smaller ones lose digits.
    "float": st.floats(1e-3, 1e300) | st.just(0.0),
    "uuid": st.uuids(),
}


def match(pattern: Pattern, path: str) -> dict[str, Any] | None:
    found = re.fullmatch(pattern.regex, path)
    return None if found is None else pattern.convert(found.groups())


class Custom(Convertor[str]):
    def __init__(self, regex: str) -> None:
        self.regex = regex  # type: ignore[misc]

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


@pytest.fixture(autouse=True)
def same_convertors_after() -> Iterator[None]:
    before = dict(CONVERTOR_TYPES)
    yield
    CONVERTOR_TYPES.clear()
    CONVERTOR_TYPES.update(before)


def test_both_spellings_mean_the_same() -> None:
    angle, curly = compile_pattern("/api/<user_id:int>/<n>"), compile_pattern("/api/{user_id:int}/{n:str}")
    assert angle.regex == curly.regex == "/api/([0-9]+)/([^/]+)"
    assert angle.params == curly.params == (("user_id", "int"), ("n", "str"))
    assert angle.shape == curly.shape == "/api/{:int}/{:str}"
    assert angle.text == "/api/<user_id:int>/<n>"
    assert not angle.is_literal


def test_mixed_spellings_and_adjacent_parameters() -> None:
    pattern = compile_pattern("/<a:int>{b}/{rest:path}")
    assert pattern.shape == "/{:int}{:str}/{:path}"
    assert match(pattern, "/12x/y/z") == {"a": 12, "b": "x", "rest": "y/z"}


def test_names_do_not_count_in_the_shape_but_convertors_do() -> None:
    assert compile_pattern("/<a>").shape == compile_pattern("/{b:str}").shape
    assert compile_pattern("/<a>").shape != compile_pattern("/<a:path>").shape
    assert compile_pattern("/<a>").shape != compile_pattern("/<a>/").shape


def test_a_literal_is_matched_as_text() -> None:
    pattern = compile_pattern("/a.b+c (ü)/100%")
    assert pattern.is_literal
    assert pattern.shape == pattern.text
    assert match(pattern, "/a.b+c (ü)/100%") == {}
    assert match(pattern, "/aXb+c (ü)/100%") is None
    assert match(compile_pattern("/"), "/") == {}


def test_values_come_out_typed_and_in_order() -> None:
    found = match(compile_pattern("/api/<user_id:int>/<number:float>"), "/api/123/3.14")
    assert found == {"user_id": 123, "number": 3.14}
    assert [type(value) for value in found.values()] == [int, float]


@pytest.mark.parametrize(
    "path",
    [
        *("/api/x/3.14", "/api/1/2\n", "/api/1\n/2", "/api/-1/2", "/api/1/-2", "/api/1/1e3", "/api/1/.5"),
        *("/api/1/2.", "/api/1/nan", "/api/ 1/2", "/api/1_0/2", "/api/٣/2", "/api/1/٣.٥", "/api//2"),
        *("/api/1/2/", "/API/1/2", "x/api/1/2"),
    ],
)
def test_what_does_not_match(path: str) -> None:
    assert match(compile_pattern("/api/<user_id:int>/<number:float>"), path) is None


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("int", "0007", 7),
        ("int", "12345678901234567890", 12345678901234567890),
        ("int", "9" * 4300, 10**4300 - 1),
        ("float", "3", 3.0),
        ("float", "007.50", 7.5),
        ("uuid", "12345678123456781234567812345678", uuid.UUID("12345678-1234-5678-1234-567812345678")),
        ("uuid", "ABCDEF00-1234-5678-1234-567812345678", uuid.UUID("abcdef00-1234-5678-1234-567812345678")),
        ("path", "", ""),
        ("path", "a//b/", "a//b/"),
        ("str", "a b\n", "a b\n"),
    ],
)
def test_a_value_converts(key: str, text: str, value: Any) -> None:
    found = match(compile_pattern(f"/x/<v:{key}>"), f"/x/{text}")
    assert found == {"v": value}
    assert type(found["v"]) is type(value)


@pytest.mark.parametrize(("key", "text"), [("int", "7" * 5000), ("float", "7" * 5000)])
def test_a_value_that_does_not_convert_is_a_404_without_the_value(key: str, text: str) -> None:
    with pytest.raises(PathNotFound) as caught:
        match(compile_pattern(f"/<first>/<v:{key}>"), f"/x/{text}")
    error = caught.value
    assert error.status == 404
    assert error.__cause__ is None
    assert f"the value of 'v' in the path is not a valid {key}" in str(error)
    assert error.errors == [
        {"loc": ["path", "v"], "msg": f"the value of 'v' in the path is not a valid {key}"}
    ]
    assert "777" not in str(error)


def test_an_error_that_is_no_value_error_is_the_convertors_own() -> None:
    class Broken(Custom):
        def convert(self, value: str) -> str:
            raise KeyError(value)

    register_url_convertor("broken", Broken("[a-z]+"))
    with pytest.raises(KeyError):
        match(compile_pattern("/<x:broken>"), "/abc")


def test_a_pattern_survives_pickling() -> None:
    pattern = compile_pattern("/<a:int>/<b:uuid>")
    again = pickle.loads(pickle.dumps(pattern))
    assert again == pattern
    assert hash(again) == hash(pattern)
    assert again.format(**match(again, f"/1/{uuid.UUID(int=5)}") or {}) == f"/1/{uuid.UUID(int=5)}"
    assert repr(pattern).startswith("Pattern(text='/<a:int>/<b:uuid>', regex='/([0-9]+)/(")


# Custom convertors


@pytest.mark.parametrize(
    ("regex", "plain", "value"),
    [
        ("[a-z]{2}(-[A-Z]{2})?", "[a-z]{2}(?:-[A-Z]{2})?", "en-GB"),
        ("(?P<lang>[a-z]+)(?P<rest>(-)x)?", "(?:[a-z]+)(?:(?:-)x)?", "en-x"),
        ("en|de", "en|de", "de"),
        (r"\((a)\)", r"\((?:a)\)", "(a)"),
        (r"[(](a)[^)]", r"[(](?:a)[^)]", "(a!"),
        (r"[]()]+(b)", r"[]()]+(?:b)", "])b"),
        (r"[^]()](b)", r"[^]()](?:b)", "xb"),
        (r"[\](](b)", r"[\](](?:b)", "(b"),
        (r"(?:a)(?=b)(?i:B)(?#c)(?<=b)", r"(?:a)(?=b)(?i:B)(?#c)(?<=b)", "ab"),
        (r"\141(b)", r"\141(?:b)", "ab"),
    ],
)
def test_a_custom_convertors_groups_add_no_values(regex: str, plain: str, value: str) -> None:
    register_url_convertor("custom", Custom(regex))
    pattern = compile_pattern("/<x:custom>/<n:int>")
    assert pattern.regex == f"/({plain})/([0-9]+)"
    assert pattern.shape == "/{:custom}/{:int}"
    assert match(pattern, f"/{value}/7") == {"x": value, "n": 7}


@pytest.mark.parametrize(
    "regex",
    [
        *(r"(a)\1", r"(?P<q>a)(?P=q)", "(a)?(?(1)b|c)", "(?P<q>a)?(?(q)b|c)", r"x\1", "(?i)abc"),
        *("a)(b", "a)", "(", "[a", "(?x: # [\n (a) ] \n )"),
    ],
)
def test_a_custom_convertor_that_cannot_stand_inside_a_pattern(regex: str) -> None:
    register_url_convertor("custom", Custom(regex))
    with pytest.raises(
        ValueError, match=r"the convertor 'custom' cannot stand inside a pattern \("
    ) as caught:
        compile_pattern("/<x:custom>")
    assert isinstance(caught.value.__cause__, re.error)


def test_a_custom_convertor_that_is_registered_anew_leaves_the_pattern_alone() -> None:
    register_url_convertor("custom", Custom("[a-z]+"))
    pattern = compile_pattern("/<x:custom>")
    register_url_convertor("custom", CONVERTOR_TYPES["int"])
    assert match(pattern, "/abc") == {"x": "abc"}


def test_a_custom_regex_means_what_it_means_in_starlette() -> None:
    register_url_convertor("word", Custom(r"\w+"))
    starlettes, _, _ = compile_path("/{x:word}")
    assert match(compile_pattern("/<x:word>"), "/größe") == {"x": "größe"}
    assert starlettes.match("/größe")


# Building a path


def test_format_builds_the_decoded_path() -> None:
    pattern = compile_pattern("/a/<x:int>{y}/<self>")
    assert pattern.format(x=7, y="b c", self="ü") == "/a/7b c/ü"
    assert compile_pattern("/a").format() == "/a"


@pytest.mark.parametrize(
    ("params", "error", "text"),
    [
        ({}, KeyError, r"'/a/<user:int>' needs a value for 'user' \(int\)"),
        ({"user": 1, "usr": 1}, KeyError, "has no parameter 'usr': did you mean 'user'"),
        ({"user": -1}, ValueError, "'user' of '/a/<user:int>' takes a value of type int: Negative"),
        ({"user": "x"}, ValueError, "takes a value of type int"),
        ({"user": None}, ValueError, "takes a value of type int"),
        ({"user": float("inf")}, ValueError, "takes a value of type int"),
    ],
)
def test_what_format_refuses(params: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        compile_pattern("/a/<user:int>").format(**params)


@pytest.mark.parametrize(("key", "value"), [("str", ""), ("str", "a/b")])
def test_format_refuses_text_with_starlettes_own_checks(key: str, value: str) -> None:
    with pytest.raises(ValueError, match="'x' of"):
        compile_pattern(f"/<x:{key}>").format(x=value)


def test_format_refuses_what_would_not_match() -> None:
    register_url_convertor("custom", Custom("[a-z]+"))
    with pytest.raises(ValueError, match=r"'x' of '/<x:custom>' \(custom\) does not match 'A'"):
        compile_pattern("/<x:custom>").format(x="A")
    with pytest.raises(ValueError, match="does not match"):
        compile_pattern("/<x:path>").format(x="a\nb")


# Mistakes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must start with '/': write '/'"),
        ("api/<x>", "must start with '/': write '/api/<x>'"),
        ("<x:path>", "must start with '/'"),
        ("/-/routes", "reserved for serveit"),
        ("/-/", "reserved for serveit"),
        ("/-", "reserved for serveit"),
        ("/<x:itn>", "no convertor 'itn' for '<x:itn>': did you mean 'int'?"),
        ("/<x:zzz>", "no convertor 'zzz' for '<x:zzz>': there is 'float', 'int'"),
        ("/<int:user>", "the name comes first: write '<user:int>'"),
        ("/{int:user}", "the name comes first: write '{user:int}'"),
        ("/<a>/{a:int}", "two parameters called 'a': rename one"),
        ("/<>", "'<>' is empty: write a name in it, as in '<name>'"),
        ("/{}", "'{}' is empty: write a name in it, as in '{name}'"),
        ("/<x", "the '<' at position 1 has no partner"),
        ("/x>", "the '>' at position 2 has no partner"),
        ("/{x", "the '{' at position 1"),
        ("/x}", "the '}' at position 2"),
        ("/<x}", "the '<' at position 1"),
        ("/<a{b}>", "the '<' at position 1"),
        ("/<<a>>", "the '<' at position 1"),
        ("/<user id>", "'user id' cannot be a parameter's name"),
        ("/<1x>", "'1x' cannot be a parameter's name"),
        ("/<größe>", "'größe' cannot be"),
        ("/<:int>", "'' cannot be a parameter's name"),
        ("/<x :int>", "'x ' cannot be"),
        ("/<x\n>", "cannot be a parameter's name"),
        ("/<int: x>", "no convertor ' x'"),
        ("/<x: int>", "a space in '<x: int>': write '<x:int>'"),
        ("/{x:int }", "a space in '{x:int }': write '{x:int}'"),
        ("/<x:>", "'<x:>' names no convertor: write '<x>' for a str"),
        ("/a?b=<c>", "'?' starts the query, .* take query values as parameters of the function"),
        ("/a#b", "'#' starts the fragment"),
        ("/a%20b", "percent-decoded path: in place of '%20' write ' '"),
        ("/<x>/stra%C3%9Fe", "in place of '%C3%9F' write 'ß'"),
        ("/a%3Fb", "in place of '%3F' take it as a parameter"),
        ("/a%25b", "in place of '%25' take it as a parameter"),
    ],
)
def test_a_mistake_is_named_with_the_way_out(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="@app.route: bad path pattern ") as caught:
        compile_pattern(text, "@app.route")
    assert repr(text) in str(caught.value)
    assert re.search(message.replace("(", r"\(").replace("?'", r"\?'").replace("{", r"\{"), str(caught.value))


@pytest.mark.parametrize("text", [None, 3, b"/api", ["/a"]])
def test_a_pattern_must_be_a_str(text: Any) -> None:
    with pytest.raises(TypeError, match=r"^route: a path pattern must be a str such as '/api/<name>', got "):
        compile_pattern(text)


# Properties


TYPED = st.one_of(*(st.tuples(st.just(key), values) for key, values in VALUES.items() if key != "path"))


@given(st.lists(TYPED, max_size=4), VALUES["path"])
def test_format_match_convert_is_a_round_trip(typed: list[tuple[str, Any]], rest: str) -> None:
    # The one path stands last: two could share the slashes out in several ways.
    pattern = compile_pattern(
        "/r" + "".join(f"/<p{i}:{key}>" for i, (key, _) in enumerate(typed)) + "/<rest:path>"
    )
    params = {f"p{i}": value for i, (_, value) in enumerate(typed)} | {"rest": rest}
    found = match(pattern, pattern.format(**params))
    assert found == params
    assert [type(found[name]) for name in params] == [type(value) for value in params.values()]


LITERALS = st.text().filter(lambda text: not re.search(r"[<>{}?#]|%[0-9a-fA-F]{2}", text))
PIECES = st.lists(st.tuples(LITERALS, st.sampled_from(sorted(VALUES))), max_size=5)


@given(PIECES)
def test_both_spellings_compile_to_the_same(pieces: list[tuple[str, str]]) -> None:
    angle = compile_pattern("/+" + "".join(f"{text}<p{i}:{key}>" for i, (text, key) in enumerate(pieces)))
    curly = compile_pattern("/+" + "".join(f"{text}{{q{i}:{key}}}" for i, (text, key) in enumerate(pieces)))
    assert angle.regex == curly.regex
    assert angle.shape == curly.shape
    assert re.compile(angle.regex).groups == len(angle.params) == len(pieces)


@given(st.text() | st.text("/<>{}:int_x1 %2?#-(").map("/{}".format))
def test_any_text_compiles_or_is_a_value_error(text: str) -> None:
    try:
        pattern = compile_pattern(text)
    except ValueError as error:
        assert repr(text) in str(error)
    else:
        assert re.compile(pattern.regex).groups == len(pattern.params)


@given(st.text())
def test_matching_any_path_gives_values_or_a_404(path: str) -> None:
    pattern = compile_pattern("/<a:int><b:float>/<c>/<d:path>")
    try:
        found = match(pattern, "/" + path)
    except PathNotFound:
        found = None
    assert found is None or set(found) == {"a", "b", "c", "d"}

"""A route's pattern: both spellings, compiled to regex text when the route is declared.

The text travels to the proxies, which match with it and know nothing else of a pattern; the values
they find are converted in the replica, where custom convertors live. Hot path: `Pattern.convert`,
once per request.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from starlette.convertors import CONVERTOR_TYPES, FloatConvertor

from serveit.config import did_you_mean
from serveit.exceptions import PathNotFound

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.convertors import Convertor

_BRACKETS = re.compile(r"<(?P<angle>[^<>{}]*)>|\{(?P<curly>[^<>{}]*)\}|(?P<lone>[<>{}])")
_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_PERCENT_ENCODED = re.compile(r"(?:%[0-9a-fA-F]{2})+")
_NEVER_LITERAL = "<>{}?#%"
_REGEX_TOKEN = re.compile(
    r"""
      \\.                               # an escape
    | \[\^?\]?(?:\\.|[^\]\\])*\]        # a set; a "]" that comes first in it is an ordinary member
    | (?P<group>\((?:\?P<\w+>|(?!\?)))  # what opens a capturing group, named or not
    """,
    re.VERBOSE | re.DOTALL,
)
_CONVERSION_ERRORS = (AssertionError, ValueError, TypeError, OverflowError)


@dataclass(frozen=True, slots=True)
class Pattern:
    """A compiled pattern; made by `compile_pattern`.

    Attributes:
        text: as declared: "/api/<user_id:int>".
        regex: for `re.fullmatch`, without flags, on the percent-decoded path: one plain group a
            parameter, in order. Not meant for `re.ASCII`: the text alone says what it takes.
            Starlette's own convertors write their digits as [0-9], and a custom one that writes
            `\\w` gets the Unicode letters that it gets in Starlette.
        params: (name, convertor's key) of each parameter, in order.
        shape: the pattern without the parameters' names: "/api/{:int}". Two patterns of equal shape
            match the same paths.
    """

    text: str
    regex: str
    params: tuple[tuple[str, str], ...]
    shape: str
    _literals: tuple[str, ...] = field(repr=False, compare=False)
    """What stands before, between and after the parameters: one more than there are of these."""
    _convertors: tuple[Convertor[Any], ...] = field(repr=False, compare=False)
    """Kept, not looked up by key again: a key that is registered anew must not change this pattern."""

    @property
    def is_literal(self) -> bool:
        """Whether the pattern has no parameters, so that it matches its own text only."""
        return not self.params

    def convert(self, values: Sequence[str]) -> dict[str, Any]:
        """The parameters by name.

        Args:
            values: the regex's groups, in order.

        Raises:
            PathNotFound: a convertor raised ValueError (`int` does for more than 4,300 digits), or
                a `float` is too large to be one. The value itself, of any length, is not repeated.
        """
        found = {}
        for (name, key), convertor, value in zip(self.params, self._convertors, values, strict=True):
            try:
                found[name] = converted = convertor.convert(value)
            except ValueError:
                raise self._not_found(name, key) from None  # the cause's text may hold the value
            if isinstance(convertor, FloatConvertor) and math.isinf(converted):
                raise self._not_found(name, key)
        return found

    def _not_found(self, name: str, key: str) -> PathNotFound:
        message = f"the value of {name!r} in the path is not a valid {key}"
        return PathNotFound(
            f"no such path under {self.text!r}: {message}", errors=[{"loc": ["path", name], "msg": message}]
        )

    def format(self, /, **params: Any) -> str:
        """The path with these parameters in it: percent-decoded, as the pattern matches it.

        `urllib.parse.quote` makes it part of a URL.

        Raises:
            KeyError: a parameter is missing or unknown.
            ValueError: a value that the parameter's convertor cannot write, or would not match.
        """
        names = [name for name, _ in self.params]
        for name in params:
            if name not in names:
                raise KeyError(f"{self.text!r} has no parameter {name!r}: {did_you_mean(name, names)}")
        pieces = [self._literals[0]]
        for (name, key), convertor, after in zip(
            self.params, self._convertors, self._literals[1:], strict=True
        ):
            if name not in params:
                raise KeyError(f"{self.text!r} needs a value for {name!r} ({key})")
            try:
                value = convertor.to_string(params[name])
            except _CONVERSION_ERRORS as error:
                raise ValueError(f"{name!r} of {self.text!r} takes a value of type {key}: {error}") from error
            # Starlette checks with `assert` only, which `python -O` leaves out.
            if not re.fullmatch(convertor.regex, value):
                raise ValueError(f"{name!r} of {self.text!r} ({key}) does not match {value!r}")
            pieces += (value, after)
        return "".join(pieces)


def compile_pattern(text: str, where: str = "route") -> Pattern:
    """The compiled form of a pattern.

    `"/api/<user_id:int>/{rest:path}"`: parameters in either spelling, `str` where no convertor is
    named; the convertors are Starlette's, those of `register_url_convertor` included. Everything
    else is literal and compared with the percent-decoded path.

        text:     "/api/<user_id:int>"
        regex:    "/api/([0-9]+)"
        params:   (("user_id", "int"),)
        shape:    "/api/{:int}"

    Args:
        text: the pattern.
        where: what errors start with: who declares the pattern.

    Raises:
        TypeError: `text` is not a str.
        ValueError: the pattern is wrong; says what about it, and what to write.
    """
    if not isinstance(text, str):
        raise TypeError(f"{where}: a path pattern must be a str such as '/api/<name>', got {text!r}")
    try:
        return _compile(text)
    except _Mistake as mistake:
        raise ValueError(f"{where}: bad path pattern {text!r}: {mistake}") from mistake.__cause__


class _Mistake(Exception):
    """What is wrong with a pattern; `compile_pattern` adds the pattern and where it stands."""


def _compile(text: str) -> Pattern:
    if not text.startswith("/"):
        raise _Mistake(f"it must start with '/': write {'/' + text!r}")
    if text == "/-" or text.startswith("/-/"):
        raise _Mistake("'/-/' is reserved for serveit's own routes: let it start with another name")
    literals, params = _split(text)
    for literal in literals:
        _check_literal(literal)
    convertors = []
    regex, shape = re.escape(literals[0]), literals[0]
    for (_, key), after in zip(params, literals[1:], strict=True):
        convertor = CONVERTOR_TYPES[key]
        convertors.append(convertor)
        regex += f"({_without_groups(key, convertor.regex)})" + re.escape(after)
        shape += "{:" + key + "}" + after
    return Pattern(text, regex, tuple(params), shape, tuple(literals), tuple(convertors))


def _split(text: str) -> tuple[list[str], list[tuple[str, str]]]:
    """The literals (one more than parameters) and the parameters as (name, convertor's key)."""
    literals: list[str] = []
    params: list[tuple[str, str]] = []
    end = 0
    for match in _BRACKETS.finditer(text):
        if match["lone"]:
            raise _Mistake(
                f"the {match['lone']!r} at position {match.start()} has no partner: a parameter is written "
                "<name>, <name:int> or {name:int}, and brackets cannot be literal"
            )
        name, key = _parse_param(match[0], match["angle"] if match["angle"] is not None else match["curly"])
        if name in dict(params):
            raise _Mistake(f"it has two parameters called {name!r}: rename one")
        literals.append(text[end : match.start()])
        params.append((name, key))
        end = match.end()
    literals.append(text[end:])
    return literals, params


def _parse_param(written: str, inside: str) -> tuple[str, str]:
    """The name and the convertor's key of one parameter: `<user_id:int>` → ("user_id", "int")."""
    open_, close = written[0], written[-1]
    name, colon, key = inside.partition(":")
    if not inside:
        raise _Mistake(f"{written!r} is empty: write a name in it, as in '{open_}name{close}'")
    if colon and key not in CONVERTOR_TYPES and name in CONVERTOR_TYPES and _NAME.fullmatch(key):
        raise _Mistake(f"in {written!r} the name comes first: write '{open_}{key}:{name}{close}'")
    if not _NAME.fullmatch(name):
        raise _Mistake(
            f"{name!r} cannot be a parameter's name: write it as a Python name "
            "of ASCII letters, digits and _, not starting with a digit"
        )
    if not colon:
        return name, "str"
    if key in CONVERTOR_TYPES:
        return name, key
    if key.strip() in CONVERTOR_TYPES:
        raise _Mistake(f"there is a space in {written!r}: write '{open_}{name}:{key.strip()}{close}'")
    if not key:
        raise _Mistake(f"{written!r} names no convertor: write '{open_}{name}{close}' for a str")
    raise _Mistake(
        f"there is no convertor {key!r} for {written!r}: {did_you_mean(key, list(CONVERTOR_TYPES))}"
    )


def _check_literal(literal: str) -> None:
    """Refuse what a percent-decoded path without its query never holds, or holds in another form."""
    for char, what in ("?", "query"), ("#", "fragment"):
        if char in literal:
            raise _Mistake(
                f"{char!r} starts the {what}, which is no part of the path: leave it out"
                + (" and take query values as parameters of the function" if what == "query" else "")
            )
    if encoded := _PERCENT_ENCODED.search(literal):
        decoded = unquote(encoded[0])
        instead = "take it as a parameter" if set(decoded) & set(_NEVER_LITERAL) else f"write {decoded!r}"
        raise _Mistake(f"it is compared with the percent-decoded path: in place of {encoded[0]!r} {instead}")


def _without_groups(key: str, regex: str) -> str:
    """The convertor's regex with its capturing groups made non-capturing, so that it adds no values.

    Raises:
        _Mistake: it refers back to one of its groups, or is no regex inside another one.
    """
    plain = _REGEX_TOKEN.sub(lambda token: "(?:" if token["group"] else token[0], regex)
    try:
        if re.compile(plain).groups:  # a comment of a verbose regex can hide one from the tokens above
            raise re.error("a capturing group is left")
        re.compile(f"({plain})")
    except re.error as error:
        raise _Mistake(
            f"the regex {regex!r} of the convertor {key!r} cannot stand inside a pattern ({error}): its "
            "groups are made non-capturing, so write it without references to them and without flags "
            "for the whole regex ('(?i:...)' in place of '(?i)...')"
        ) from error
    return plain

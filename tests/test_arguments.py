from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from serveit.command.arguments import http_options, options_as_given, serving_options
from serveit.config import HTTPOptions


def parsed(*words: str) -> HTTPOptions:
    """What a command's words make of the HTTP servers' options."""
    found: list[HTTPOptions] = []

    @click.command()
    @serving_options
    def command(name: str, prefix: str | None, **http: object) -> None:
        found.append(http_options(**http))  # type: ignore[arg-type]

    result = CliRunner().invoke(command, words)
    if result.exit_code:
        raise click.UsageError(result.output)
    return found[0]


def test_any_of_them() -> None:
    given = (
        "max_body_bytes=67108864",
        "root_path=/api",
        "middlewares=a:b",
        "middlewares=c:d",
        "keep_alive_s=5",
    )
    options = parsed("--port", "0", *(f"--http-option={option}" for option in given))
    expected = HTTPOptions(
        port=0, max_body_bytes=67_108_864, root_path="/api", middlewares=["a:b", "c:d"], keep_alive_s=5
    )
    assert options == expected
    assert parsed("--port", "0", *options_as_given(options)) == expected


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("max_body", "is not of the form NAME=VALUE"),
        ("max_body_byte=1", "did you mean 'max_body_bytes'"),
        ("max_body_bytes=many", "max_body_bytes must be an int, got 'many'"),
        ("port=1", "port: it is given twice, or has an option of its own"),
    ],
)
def test_what_is_wrong_with_one(option: str, text: str) -> None:
    with pytest.raises(click.UsageError, match=text):
        parsed("--http-option", option)

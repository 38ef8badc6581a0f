"""Options and arguments that several commands have, and what they are read into."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click
import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from serveit.config import HTTPOptions

Command = TypeVar("Command", bound="Callable[..., Any]")


class Decorator(Protocol):
    """Adds to a command."""

    def __call__(self, command: Command, /) -> Command: ...


def _options(*options: Decorator) -> Decorator:
    def decorate(command: Command, /) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


asking = _options(
    click.option(
        "--address",
        default="auto",
        envvar="RAY_ADDRESS",
        show_envvar=True,
        show_default=True,
        help="Of the Ray cluster, host:port; auto: the one on this machine.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else, on standard output."),
)
of_app = click.option(
    "--app", "app_name", default="default", show_default=True, help="Name of the app in the instance."
)
serving_options = _options(
    click.option("--name", default="default", show_default=True, help="Of the app in the instance."),
    click.option(
        "--prefix", help="In front of all the app's paths: /like/this; by default that of the app it updates."
    ),
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
    click.option(
        "--port", default=8000, show_default=True, type=click.IntRange(0, 65_535), help="0 picks a free one."
    ),
    click.option(
        "--http-location",
        type=click.Choice(["HeadOnly", "EveryNode", "NoServer"]),
        default="HeadOnly",
        show_default=True,
        help="Where HTTP servers run.",
    ),
    click.option("--no-http", is_flag=True, help="The same as --http-location NoServer."),
    click.option("--access-log", is_flag=True, help="Log a line per request."),
    click.option("--debug", is_flag=True, help="Put tracebacks into 500 answers."),
    click.option(
        "--http-option",
        "more",
        metavar="NAME=VALUE",
        multiple=True,
        help="Any other of HTTPOptions, max_body_bytes=67108864 say; middlewares may be given several times.",
    ),
)
_DEFAULT = click.core.ParameterSource.DEFAULT
_HTTP = ("host", "port", "http_location", "no_http", "access_log", "debug", "more")


def http_options(
    host: str,
    port: int,
    http_location: Any,
    no_http: bool,
    access_log: bool,
    debug: bool,
    more: Sequence[str],
) -> HTTPOptions:
    from serveit.config import HTTPOptions

    find = click.get_current_context().get_parameter_source
    if no_http and http_location != "NoServer" and find("http_location") is not _DEFAULT:
        raise click.UsageError(f"--no-http and --http-location {http_location} contradict each other")
    location: Any = "NoServer" if no_http else http_location
    try:
        given = {"host": host, "port": port, "location": location, "access_log": access_log, "debug": debug}
        return HTTPOptions.parse({**given, **_read(more)})
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from None


def _read(options: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE, several times; the value as JSON, or as it stands."""
    found: dict[str, Any] = {}
    for option in options:
        name, sign, text = option.partition("=")
        if not (name and sign):
            raise click.UsageError(f"--http-option {option!r} is not of the form NAME=VALUE")
        try:
            value = msgspec.json.decode(text)
        except msgspec.DecodeError:
            value = text
        if name == "middlewares":
            value = [*found.get(name, ()), value]
        elif name in found or name in _HTTP or name == "location":
            raise click.UsageError(f"--http-option {name}: it is given twice, or has an option of its own")
        found[name] = value
    return found


def options_as_given(options: HTTPOptions) -> list[str]:
    """What `--http-option` would be given for those that have no option of their own."""
    words = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name not in (*_HTTP, "location") and value != field.default:
            values = value if field.name == "middlewares" else [value]
            words += [f"--http-option={field.name}={msgspec.json.encode(each).decode()}" for each in values]
    return words


def is_http_given() -> bool:
    """Whether any option of the HTTP servers was: an instance that runs has its own."""
    find = click.get_current_context().get_parameter_source
    return any(find(name) is not _DEFAULT for name in _HTTP)


timeout = click.option(
    "--deploy-timeout",
    "timeout_s",
    default=60.0,
    show_default=True,
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="How long replicas may wait for resources.",
)


def pairs(what: str, number: Callable[[str], Any]) -> Callable[..., dict[str, Any]]:
    """A click callback that reads NAME=NUMBER, several times."""

    def parse(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> dict[str, Any]:
        pairs: dict[str, Any] = {}
        for value in values:
            name, sign, text = value.rpartition("=")
            if name in pairs:
                raise click.BadParameter(f"{name!r} is given twice", context, parameter)
            try:
                pairs[name] = number(text)
            except ValueError:
                sign = ""
            if not (sign and name):
                raise click.BadParameter(f"{value!r} is not of the form {what}", context, parameter)
        return pairs

    return parse

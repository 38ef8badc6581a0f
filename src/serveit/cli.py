"""The command: `serveit run app:app`. A mistake is answered in one message that names the way out."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from serveit.exceptions import ServeitError

if TYPE_CHECKING:
    from serveit.client import Client
    from serveit.config import HTTPOptions
    from serveit.declare.app import App


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="serveit", prog_name="serveit")
def main() -> None:
    """Serve Python functions and models over HTTP and native handles."""


@main.command()
@click.argument("target")
@click.option("--local", is_flag=True, help="In this process, without Ray.")
@click.option(
    "--reload", is_flag=True, help="Serve the new code whenever a Python file below this folder is saved."
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=8000, show_default=True, type=click.IntRange(0, 65_535), help="0 picks a free one."
)
@click.option(
    "--http-location",
    type=click.Choice(["HeadOnly", "EveryNode", "NoServer"]),
    default="HeadOnly",
    show_default=True,
    help="Where HTTP servers run.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
)
@click.option("--access-log", is_flag=True, help="Log a line per request.")
@click.option("--debug", is_flag=True, help="Put tracebacks into 500 answers.")
@click.option("--fd", type=int, hidden=True, help="A listening socket that the parent made (--reload).")
@click.option("--ready-fd", type=int, hidden=True, help="Closed with a byte once ready (--reload).")
def run(
    target: str,
    local: bool,
    reload: bool,
    host: str,
    port: int,
    http_location: Any,
    log_level: str,
    access_log: bool,
    debug: bool,
    fd: int | None,
    ready_fd: int | None,
) -> None:
    """Serve the app TARGET until Ctrl-C.

    TARGET is "module:app", or "module" or "path/to/file.py" that holds one app.
    """
    from serveit.config import HTTPOptions
    from serveit.logs import configure

    configure(log_level)
    options = HTTPOptions(host=host, port=port, location=http_location, access_log=access_log, debug=debug)
    if reload:
        from serveit.reload import supervise

        sys.exit(
            supervise(target, options, [*_passed_on(local, http_location, log_level, access_log, debug)])
        )
    app = _load(target)
    sock = socket.socket(fileno=fd) if fd is not None else None
    _serve(app, options, local, sock, ready_fd)


def _passed_on(local: bool, location: str, log_level: str, access_log: bool, debug: bool) -> list[str]:
    """The options that a reloading parent gives its children."""
    flags = [("--local", local), ("--access-log", access_log), ("--debug", debug)]
    return [flag for flag, given in flags if given] + ["--http-location", location, "--log-level", log_level]


def _load(target: str) -> App:
    from serveit.declare.app import App
    from serveit.importer import import_target

    try:
        found: App = import_target(target, App)
    except ServeitError as error:
        raise click.ClickException(str(error)) from None
    except Exception as error:
        raise _their_fault(error, f"{target} cannot be imported") from None
    return found


def _serve(
    app: App, options: HTTPOptions, local: bool, sock: socket.socket | None, ready_fd: int | None
) -> None:
    from serveit.client import run as serve_until_stopped

    def on_ready(client: Client) -> None:
        if ready_fd is not None:
            os.write(ready_fd, b"1")
            os.close(ready_fd)
        _show(app, client)

    try:
        serve_until_stopped(app, http=options, local=local, sock=sock, on_ready=on_ready)
    except ServeitError as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        if error.__notes__ if hasattr(error, "__notes__") else False:
            raise _their_fault(error, "the app cannot be started") from None
        raise click.ClickException(error.strerror or str(error)) from None
    except Exception as error:
        raise _their_fault(error, "the app cannot be started") from None


def _their_fault(error: BaseException, what: str) -> click.ClickException:
    """The user's own traceback, without serveit's and the import system's frames, and what it meant."""
    own = str(Path(__file__).parent)
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith((own, "<frozen ")):
        frames = frames.tb_next
    lines = traceback.format_exception(type(error), error, frames)
    click.echo("".join(lines), err=True, nl=False)
    return click.ClickException(what)


def _show(app: App, client: Client) -> None:
    replicas = sum(backend.config.num_replicas for backend in app.backends.values())
    click.echo(f"serving {client.url or 'without HTTP'}  ({len(app.backends)} backends, {replicas} replicas)")
    width = max((len(route.pattern.text) for route in app.routes), default=0)
    for route in app.routes:
        leads_to = ", ".join(f"{name} {weight:.0%}" for name, weight in route.traffic.weights)
        if len(route.traffic.weights) == 1:
            leads_to = route.traffic.weights[0][0]
        click.echo(f"  {route.pattern.text:<{width}}  {','.join(route.methods):<9}  {leads_to}")

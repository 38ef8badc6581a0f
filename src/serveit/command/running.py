"""What `serveit run` does around `serving.run`: it imports the app, and shows where it serves."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any

import click

from serveit.command.arguments import options_as_given
from serveit.command.explaining import explain, explained

if TYPE_CHECKING:
    from collections.abc import Iterator

    from serveit.client import Client
    from serveit.command.progress import Progress
    from serveit.config import HTTPOptions
    from serveit.declare.app import App


def passed_on(options: HTTPOptions, name: str, prefix: str, log_level: str) -> list[str]:
    """The options that a reloading parent gives its children."""
    flags = [("--access-log", options.access_log), ("--debug", options.debug)]
    given = [flag for flag, is_on in flags if is_on]
    location = str(options.location)
    named = ["--name", name, "--prefix", prefix, "--http-location", location, "--log-level", log_level]
    return ["--local", *given, *named, *options_as_given(options)]


@contextlib.contextmanager
def stopping_early(code: int) -> Iterator[None]:
    """While the app is imported, and until `run` looks after signals itself, they end the command."""

    def end(*_: Any) -> None:
        sys.exit(code)

    previous = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def load(target: str, name: str, prefix: str) -> App:
    """The app, checked; what is wrong with it is said as `explaining` does."""
    from serveit.client import check_app
    from serveit.declare.app import App
    from serveit.importer import import_target

    try:
        app: App = import_target(target, App)
    except Exception as error:
        raise explain(error, f"{target} cannot be imported", theirs=True) from None
    if not app.backends:
        raise click.ClickException(
            f"the app in {target} has nothing to serve: put @app.route(...) or @app.backend on a function, "
            "before the app is used"
        )
    try:
        check_app(app, name, prefix)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    return app


def listening(fd: int | None) -> socket.socket | None:
    """The socket that a reloading parent has made."""
    # The protocol's number is spelled out: where Python cannot ask for it, asyncio leaves TCP_NODELAY off.
    return socket.socket(proto=socket.IPPROTO_TCP, fileno=fd) if fd is not None else None


def serve(app: App, ready_fd: int | None, *, local: bool, **options: Any) -> None:
    """Serve it until Ctrl-C, with progress; `options` are those of `serving.run`."""
    from serveit.command.progress import Lines, show_progress
    from serveit.serving import run as serve_until_stopped

    joins = options["address"] is not None
    progress: Progress = Lines() if local else show_progress("connecting" if joins else "starting Ray")

    def on_ready(client: Client) -> None:
        progress.close()
        if ready_fd is not None:
            longest_s = max(b.config.graceful_shutdown_timeout_s for b in app.backends.values())
            os.write(ready_fd, b"%f" % longest_s)
            os.close(ready_fd)
        show(app, client, options["name"], options["prefix"])

    with explained("the app cannot be started"), progress:
        serve_until_stopped(app, local=local, on_ready=on_ready, on_progress=progress.deploying, **options)


def write_spec(app: App, fd: int, **options: Any) -> None:
    """Say what the app is to be to the parent, who deploys it and need not import it."""
    from serveit.cluster.shipping import spec_of
    from serveit.control.orders import encode

    try:
        spec = spec_of(app, **options)
    except (TypeError, ValueError) as error:  # it cannot be imported elsewhere, nor pickled
        raise click.ClickException(str(error)) from None
    with open(fd, "wb") as file:
        file.write(encode(spec))


def show(app: App, client: Client, name: str = "default", prefix: str = "") -> None:
    """Where it serves, and its routes."""
    from serveit.command.reporting import routes_of, serving_lines
    from serveit.control.snapshot import app_info

    counts = {backend.name: backend.config.num_replicas for backend in app.backends.values()}
    routes = routes_of([app_info(app, name, prefix, {})])
    click.echo("\n".join(serving_lines(client.url, counts, routes)))


def end_with(parent_fd: int) -> None:
    """Stop when the parent's end of the pipe is closed, by itself or by its death."""

    def watch() -> None:
        os.read(parent_fd, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="serveit-parent", daemon=True).start()


def leave() -> None:
    """End at once where a `def` function still runs in its thread: the interpreter would wait for it."""
    threads = [thread for thread in threading.enumerate() if not thread.daemon]
    if threads != [threading.main_thread()]:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

"""The command: `serveit run app:app`. A mistake is answered in one message that names the way out."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import importlib
import itertools
import os
import re
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from serveit.exceptions import ImportFailed, RemoteTraceback, ServeitError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from serveit.client import Client
    from serveit.config import HTTPOptions
    from serveit.declare.app import App

_OWN = str(Path(__file__).parent) + os.sep
_MACHINERY = (
    _OWN,
    "<frozen ",
    "uvloop/",
    *(str(Path(str(module.__file__)).parent) + os.sep for module in (asyncio, concurrent.futures, importlib)),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="serveit", prog_name="serveit")
def main() -> None:
    """Serve Python functions and models over HTTP and native handles."""


@main.command()
@click.argument("target")
@click.option("--local", is_flag=True, help="In this process, without Ray.")
@click.option("--address", help="Of a Ray cluster to join; without it an embedded Ray is started.")
@click.option("--reload", is_flag=True, help="Serve the new code whenever a Python file here is saved.")
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
@click.option("--ready-fd", type=int, hidden=True, help="Gets a byte once ready (--reload).")
@click.option("--parent-fd", type=int, hidden=True, help="At its end when the parent is gone (--reload).")
def run(
    target: str,
    local: bool,
    address: str | None,
    reload: bool,
    host: str,
    port: int,
    http_location: Any,
    log_level: str,
    access_log: bool,
    debug: bool,
    fd: int | None,
    ready_fd: int | None,
    parent_fd: int | None,
) -> None:
    """Serve the app TARGET until Ctrl-C.

    TARGET is "module:app", or "module" or "path/to/file.py" that holds one app.
    """
    from serveit.config import HTTPOptions
    from serveit.logs import configure

    configure(log_level)
    try:
        options = HTTPOptions(
            host=host, port=port, location=http_location, access_log=access_log, debug=debug
        )
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from None
    if local and address is not None:
        raise click.UsageError("--address is for Ray, and --local does without: give one of them")
    if reload:
        from serveit.reload import supervise

        if not local:
            raise click.UsageError("--reload needs --local: on Ray this version does not reload")
        sys.exit(supervise(target, options, _passed_on(http_location, log_level, access_log, debug)))
    if parent_fd is not None:
        _end_with(parent_fd)
    with _stopping_early():
        app = _load(target)
        _serve(app, options, local, address, log_level, fd, ready_fd)
    _leave()


def _passed_on(location: str, log_level: str, access_log: bool, debug: bool) -> list[str]:
    """The options that a reloading parent gives its children."""
    flags = [("--access-log", access_log), ("--debug", debug)]
    given = [flag for flag, is_on in flags if is_on]
    return ["--local", *given, "--http-location", location, "--log-level", log_level]


@contextlib.contextmanager
def _stopping_early() -> Iterator[None]:
    """Until `run` looks after signals itself, while the app is imported, they end the command with 0."""

    def leave(*_: Any) -> None:
        sys.exit(0)

    previous = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _load(target: str) -> App:
    from serveit.declare.app import App
    from serveit.importer import import_target

    try:
        app: App = import_target(target, App)
    except Exception as error:
        raise _explain(error, f"{target} cannot be imported", theirs=True) from None
    if not app.backends:
        raise click.ClickException(
            f"the app in {target} has nothing to serve: put @app.route(...) or @app.backend on a function, "
            "before the app is used"
        )
    return app


def _serve(
    app: App,
    options: HTTPOptions,
    local: bool,
    address: str | None,
    log_level: str,
    fd: int | None,
    ready_fd: int | None,
) -> None:
    from serveit.serving import run as serve_until_stopped

    def on_ready(client: Client) -> None:
        if ready_fd is not None:
            longest_s = max(b.config.graceful_shutdown_timeout_s for b in app.backends.values())
            os.write(ready_fd, b"%f" % longest_s)
            os.close(ready_fd)
        _show(app, client)

    # The protocol's number is spelled out: where Python cannot ask for it, asyncio leaves TCP_NODELAY off.
    sock = socket.socket(proto=socket.IPPROTO_TCP, fileno=fd) if fd is not None else None
    try:
        serve_until_stopped(
            app,
            http=options,
            local=local,
            address=address,
            sock=sock,
            log_level=log_level,
            on_ready=on_ready,
        )
    except Exception as error:
        theirs = hasattr(error, "__notes__")  # which replica it was
        if theirs or isinstance(error, (ServeitError, OSError)):
            raise _explain(error, "the app cannot be started", theirs=theirs) from None
        raise


def _explain(error: Exception, what: str, *, theirs: bool) -> click.ClickException:
    """One message for what serveit refuses; for what the user's code raised its own traceback, first.

    Args:
        error: what happened.
        what: could not be done because of it.
        theirs: whether it came out of the user's code.
    """
    if isinstance(error, ImportFailed) or not theirs:
        return click.ClickException(getattr(error, "strerror", None) or str(error))
    click.echo(_users_traceback(error), err=True, nl=False)
    return click.ClickException(what)


def _users_traceback(error: BaseException) -> str:
    """The traceback from the user's first line on, without serveit's own."""
    if isinstance(error.__cause__, RemoteTraceback):
        notes = "".join(f"{note}\n" for note in getattr(error, "__notes__", ()))
        return _users_frames(str(error.__cause__.args[0])) + notes
    told = traceback.TracebackException.from_exception(error)
    pending = [told]
    while pending:
        part = pending.pop()
        frames = itertools.dropwhile(lambda frame: frame.filename.startswith(_MACHINERY), part.stack)
        theirs = [frame for frame in frames if not frame.filename.startswith(_OWN)]
        part.stack = traceback.StackSummary.from_list(theirs)
        pending += [cause for cause in (part.__cause__, part.__context__) if cause is not None]
    return "".join(told.format())


def _users_frames(text: str) -> str:
    """The same of a traceback that came from a replica, as text."""
    kept, is_theirs = [], False
    for part in re.split(r'^(?=  File "|\S)', text, flags=re.MULTILINE):
        found = re.match(r'  File "(.*?)"', part)
        if found is None:
            is_theirs = is_theirs and not part.startswith("Traceback ")
        elif found[1].startswith(_MACHINERY if not is_theirs else _OWN):
            continue
        else:
            is_theirs = True
        kept.append(part)
    return "".join(kept)


def _show(app: App, client: Client) -> None:
    replicas = sum(backend.config.num_replicas for backend in app.backends.values())
    counts = f"{_count(len(app.backends), 'backend')}, {_count(replicas, 'replica')}"
    click.echo(f"serving {client.url or 'without HTTP'}  ({counts})")
    rows = []
    for route in app.routes:
        weights = route.traffic.weights
        leads_to = ", ".join(f"{name} {weight:.0%}" for name, weight in weights)
        rows.append(
            (route.pattern.text, ",".join(route.methods), weights[0][0] if len(weights) == 1 else leads_to)
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for path, methods, leads_to in rows:
        click.echo(f"  {path:<{widths[0]}}  {methods:<{widths[1]}}  {leads_to}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _end_with(parent_fd: int) -> None:
    """Stop when the parent's end of the pipe is closed, by itself or by its death."""

    def watch() -> None:
        os.read(parent_fd, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="serveit-parent", daemon=True).start()


def _leave() -> None:
    """End at once where a `def` function still runs in its thread: the interpreter would wait for it."""
    threads = [thread for thread in threading.enumerate() if not thread.daemon]
    if threads != [threading.main_thread()]:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

"""`--reload` on Ray: a parent owns the app, a child imports it; a saved file is a rolling update.

The parent never imports the user's code. It keeps Ray, the instance and its HTTP servers, and for each
change starts a child, `serveit run --spec-fd`, which imports the app, writes down what it is to be, and ends;
that is deployed. What serves goes on until the new code is up, and for good if that does not come up.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import click
import msgspec

from serveit.command.explaining import explain
from serveit.command.reporting import routes_of, serving_lines
from serveit.command.watching import changes_async, describe, distrust_bytecode, folders
from serveit.control.spec import AppSpec
from serveit.exceptions import ServeitError
from serveit.serving import loop_factory, say_what_is_waited_for
from serveit.signals import StopSignals

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
    from pathlib import Path

    from serveit.cluster.ownership import OwnedApp
    from serveit.config import HTTPOptions

LONGEST_S = 3600.0
"""When to stop waiting for the app's end. No user code runs here that could hold it up, and what runs
on Ray gets the app's own times, which change with it."""


class CannotImport(Exception):
    """The child has ended without a spec, and has said why."""


class Importer:
    """Starts children that import the app, each in a group of its own: Ctrl-C in a terminal goes to this
    process alone."""

    def __init__(self, target: str, arguments: Sequence[str], parent_fd: int) -> None:
        """
        Args:
            target: what `serveit run` was given.
            arguments: passed on to each child.
            parent_fd: of a pipe; a child ends when the other end is closed, by this process's death too.
        """
        self._target = target
        self._arguments = arguments
        self._parent_fd = parent_fd

    async def spec(self) -> AppSpec:
        """What the app is to be by the code that is there now; if this is cancelled the child is killed.

        Raises:
            CannotImport: it has not become known.
        """
        with tempfile.TemporaryFile() as told:  # no pipe: what the user's code starts may keep that open
            process = self._start(told.fileno())
            waiting = asyncio.ensure_future(asyncio.to_thread(process.wait))
            try:
                code = await asyncio.shield(waiting)
            finally:
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                await waiting
            told.seek(0)
            octets = told.read()
        if code != 0 or not octets:
            raise CannotImport(f"exit code {code}")
        return msgspec.msgpack.decode(octets, type=AppSpec)

    def _start(self, spec_fd: int) -> subprocess.Popen[bytes]:
        passed = {"--spec-fd": spec_fd, "--parent-fd": self._parent_fd}
        command = [sys.executable, "-m", "serveit", "run", self._target, *self._arguments]
        for option, fd in passed.items():
            command += [option, str(fd)]
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=list(passed.values()), process_group=0
        )


class Redeployer:
    """Deploys the app anew for each change, and says what becomes of it.

    A change stops a child that still imports what was there before it. A deploy that is under way then
    goes on, until the next one takes its place: in the meantime it may well come into force.

    All mutable state: `_importing` (the attempt whose child runs; None without one), `_deploys` (how many
    have begun), `_serves` (whether one has come into force).
    """

    def __init__(
        self,
        spec: Callable[[], Awaitable[AppSpec]],
        deploy: Callable[[AppSpec], Awaitable[None]],
        show: Callable[[AppSpec], None],
    ) -> None:
        """
        Args:
            spec: an `Importer`'s.
            deploy: returns when it is in force, or raises.
            show: called with what is in force.
        """
        self._spec = spec
        self._deploy = deploy
        self._show = show
        self._importing: asyncio.Task[None] | None = None
        self._deploys = 0
        self._serves = False

    async def follow(self, changes: AsyncIterator[list[Path]]) -> None:
        """Deploy, and again for each batch of files that changed; the first may be an empty one."""
        is_first = True
        async with asyncio.TaskGroup() as attempts:
            async for changed in changes:
                if changed and not is_first:
                    click.echo(f"{describe(changed)} changed: starting the new code", err=True)
                if changed or is_first:  # only now that no change can be missed
                    is_first = False
                    await self._stop_importing()
                    distrust_bytecode(changed)
                    self._importing = attempts.create_task(self._attempt())

    async def _stop_importing(self) -> None:
        if self._importing is not None:
            self._importing.cancel()
            await asyncio.wait((self._importing,))

    async def _attempt(self) -> None:
        try:
            spec = await self._spec()
        except CannotImport:
            return self._say_it_failed()
        finally:
            self._importing = None
        self._deploys = number = self._deploys + 1
        try:
            await self._deploy(spec)
        except Exception as error:
            if number == self._deploys:  # or else another has taken its place
                _explain(error).show()
                self._say_it_failed()
        else:
            self._serves = True
            if number == self._deploys:
                self._show(spec)

    def _say_it_failed(self) -> None:
        if self._serves:
            click.echo("the new code does not start: the old one goes on serving", err=True)
        else:
            click.echo("the app does not start: saving a file tries again", err=True)


def follow(
    target: str,
    http: HTTPOptions | None,
    arguments: Sequence[str],
    *,
    name: str = "default",
    address: str | None = None,
    log_level: str = "info",
) -> None:
    """Serve `target` on Ray and follow its files until SIGINT or SIGTERM.

    Args:
        target: what `serveit run` was given.
        http: of the HTTP servers; None takes them as they are, or the defaults.
        arguments: passed on to each child.
        name: of the app.
        address: of a Ray cluster to join; without one an embedded Ray is started.
        log_level: of the processes on Ray.
    """
    watched = folders(target)
    with (
        _pipe() as parent_fd,
        StopSignals(LONGEST_S) as signals,
        asyncio.Runner(loop_factory=loop_factory()) as runner,
    ):
        importer = Importer(target, arguments, parent_fd)
        own = _own_app(name, http, address, log_level)
        try:
            runner.run(_until_stopped(_serve(importer, watched, own, signals), signals))
        except (ServeitError, OSError, ValueError) as error:
            raise _explain(error) from None


@contextlib.contextmanager
def _pipe() -> Iterator[int]:
    """The end to read from, of a pipe that nobody writes to."""
    reader, writer = os.pipe()
    try:
        yield reader
    finally:
        os.close(writer)
        os.close(reader)


async def _until_stopped(serve: Coroutine[Any, Any, None], signals: StopSignals) -> None:
    stopped = asyncio.ensure_future(signals.attach().wait())
    serving = asyncio.ensure_future(serve)
    try:
        await signals.first_of(serving, stopped)
        serving.cancel()
        await signals.first_of(serving)
        if not serving.cancelled():
            serving.result()  # raises what it ended with
    finally:
        stopped.cancel()
        signals.ending()


@contextlib.asynccontextmanager
async def _own_app(
    name: str, http: HTTPOptions | None, address: str | None, log_level: str
) -> AsyncIterator[tuple[OwnedApp, str | None]]:
    """The app's place, with the instance's URL: its servers listen before anything is deployed."""
    from serveit.cluster.ownership import check_free, opened_session, own_app

    check_free(http, address)
    async with (
        opened_session(address) as session,
        own_app(session, name, http, log_level=log_level) as (app, serve_http),
    ):
        yield app, await serve_http()


async def _serve(
    importer: Importer,
    watched: Sequence[Path],
    own: contextlib.AbstractAsyncContextManager[tuple[OwnedApp, str | None]],
    signals: StopSignals,
) -> None:
    owned: asyncio.Future[tuple[OwnedApp, str | None]] = asyncio.get_running_loop().create_future()

    async def deploy(spec: AppSpec) -> None:
        app, _ = await asyncio.shield(owned)
        await app.deploy(spec)

    redeployer = Redeployer(importer.spec, deploy, lambda spec: _show(spec, owned.result()[1]))

    async def follow() -> None:
        async with contextlib.aclosing(changes_async(watched)) as changes:
            await redeployer.follow(changes)

    following = asyncio.ensure_future(follow())  # the first child imports while Ray starts
    try:
        async with own as (app, url):
            signals.started()
            owned.set_result((app, url))
            try:
                await asyncio.shield(following)
            finally:
                await _end(following)
                await say_what_is_waited_for(app)
    finally:
        await _end(following)


async def _end(task: asyncio.Future[None]) -> None:
    task.cancel()
    await asyncio.wait((task,))


def _explain(error: Exception) -> click.ClickException:
    theirs = any(note.startswith("(while replica ") for note in getattr(error, "__notes__", ()))
    return explain(error, "the app cannot be started", theirs=theirs)


def _show(spec: AppSpec, url: str | None) -> None:
    """What serves from now on, as `serveit run` shows it."""
    counts = {backend.name: backend.num_replicas for backend in spec.backends}
    click.echo("\n".join(serving_lines(url, counts, routes_of([spec]))))

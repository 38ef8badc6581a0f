"""The instance in a Ray cluster, as drivers ask it: each change and each question to the controller.

`runtime` serves an app through it, and the command's `status`, `scale` and their kin need no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import sys
import time
from typing import TYPE_CHECKING, Any

import msgspec

from serveit.cluster.contact import ask, find_controller, join
from serveit.cluster.controller import start_controller
from serveit.cluster.environments import packed, packed_options
from serveit.cluster.session import open_session
from serveit.cluster.shipping import spec_of
from serveit.config import HTTPOptions
from serveit.control.orders import (
    BackendChange,
    Deployed,
    DeployFailed,
    Deploying,
    ProxyOrder,
    Started,
    StartFailed,
    decode_deployed,
    encode,
)
from serveit.control.spec import AppSpec
from serveit.exceptions import NotServing
from serveit.wire.frames import Failure
from serveit.wire.pickles import load_exception

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Mapping

    from serveit.cluster.contact import Line
    from serveit.cluster.session import Session
    from serveit.control.orders import Joined
    from serveit.declare.app import App

logger = logging.getLogger("serveit.client")

JOIN_S, JOIN_RETRY_S = 30.0, 0.2
"""What the controller gets to start and answer, and between attempts where one is just ending."""
SLOW_S = 2.0
"""A change that takes longer says what it waits for."""


class Waits:
    """Logs what a change of an app waits for, each thing once: for those who have no display of their own.

    All mutable state: `_told` (what it waited for when it last said so).
    """

    def __init__(self, app: str, now: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            app: its name.
            now: gives seconds.
        """
        self._app = app
        self._now = now
        self._began = now()
        self._told: Collection[str] = ()

    def __call__(self, so_far: Deploying) -> None:
        if self._now() - self._began < SLOW_S:
            return
        reasons = so_far.reasons
        for reason, text in reasons.items():
            if reason not in self._told:
                logger.warning("app %r: %s", self._app, text)
        self._told = reasons.keys()


class Instance:
    """One instance. What it is asked while its controller starts anew is asked again."""

    def __init__(self, controller: Any) -> None:
        """
        Args:
            controller: its actor.
        """
        self._controller = controller

    async def join(self) -> Joined:
        """What those need who take part. Raises NotServing."""
        return await join(self._controller, JOIN_S)

    # -- the whole of it ---------------------------------------------------------------------

    async def status(self) -> dict[str, Any]:
        """All of it, as plain data.

        Returns:
            "url" (None without HTTP), "controller" ("pid", "epoch"), "proxies" (by node) and "apps":
            of each what `Client.status` tells.
        """
        octets = await ask(self._controller, "status", None)
        told: dict[str, Any] = msgspec.msgpack.decode(octets)
        return told

    async def specs(self) -> dict[str, AppSpec]:
        """All apps, as they are to be, by name."""
        return msgspec.msgpack.decode(await ask(self._controller, "specs"), type=dict[str, AppSpec])

    async def shutdown(self) -> None:
        """End all apps, what runs in them first, and the instance."""
        await ask(self._controller, "shutdown", timeout_s=None)

    async def end_if_empty(self) -> None:
        """End it, if no app runs and nobody is about to deploy one."""
        await ask(self._controller, "end_if_empty", timeout_s=None)

    async def http(self, options: HTTPOptions | None, joined: Joined, log_level: str = "info") -> str | None:
        """The URL of the instance's HTTP servers, started if need be; None where it has none.

        Args:
            options: of the servers; None takes them as they are, or the defaults.
            joined: what `join` gave.
            log_level: of a server that is started.

        Raises:
            ValueError: there are some with other options.
            OSError: the address cannot be listened on.
        """
        asked = options or HTTPOptions()
        order = None
        if asked.serves:
            order = ProxyOrder(
                id=f"proxy-{secrets.token_hex(4)}",
                options=_encode_options(asked),
                secret=joined.secret,
                paths=tuple(sys.path),
                log_level=log_level,
            )
        wanted = order.options if order is not None and options is not None else None
        ordered = encode(order) if order is not None else None
        octets = await ask(self._controller, "http", wanted, ordered, timeout_s=None)
        outcome = msgspec.msgpack.decode(octets, type=Started | StartFailed | None)
        if isinstance(outcome, StartFailed):
            raise _error(outcome)
        return outcome.address if outcome is not None else None

    async def url(self) -> str | None:
        """Where it answers HTTP."""
        url: str | None = await ask(self._controller, "url")
        return url

    # -- its apps ----------------------------------------------------------------------------

    async def deploy(
        self, spec: AppSpec, on_progress: Callable[[Deploying], None] | None = None, *, wait: bool = True
    ) -> None:
        """Make an app what the spec says; returns when it is in force.

        Args:
            spec: of `make_spec`.
            on_progress: told how far it is, at once and whenever that changes; without it, what a slow one
                waits for is logged.
            wait: False to return when it is sure to be tried.

        Raises:
            ValueError: a route of it belongs to another app, or a runtime_env names what is not there.
            NotServing: a replica finds no place, or dies again and again while it starts.
            Exception: what a replica's start-up code raised. What ran before runs on.
        """
        spec = await asyncio.to_thread(packed, spec)
        version = await ask(self._controller, "deploy", encode(spec), timeout_s=None)
        tell, seen = on_progress or Waits(spec.name), b""
        while wait:
            octets = await ask(self._controller, "deployed", spec.name, version, seen, timeout_s=None)
            outcome = decode_deployed(octets)
            if not isinstance(outcome, Deploying):
                _check(outcome)
                outcome = Deploying({b.name: (b.num_replicas, b.num_replicas) for b in spec.backends})
                wait = False
            seen = octets
            tell(outcome)

    def app(self, name: str) -> InstanceApp:
        """One of its apps, whether it runs or not."""
        return InstanceApp(self._controller, name)


class InstanceApp:
    """One app of an instance. All but `delete` raise KeyError, with the known ones, where it does not run."""

    def __init__(self, controller: Any, name: str) -> None:
        self._controller = controller
        self._name = name

    async def status(self) -> dict[str, Any]:
        """Its part of `Instance.status`."""
        told: dict[str, Any] = msgspec.msgpack.decode(await ask(self._controller, "status", self._name))
        return told

    async def spec(self) -> AppSpec:
        """The app as it is to be."""
        return msgspec.msgpack.decode(await ask(self._controller, "describe", self._name), type=AppSpec)

    async def update(self, backend: str, wanted: BackendChange, *, wait: bool = True) -> None:
        """Change a backend's options; returns when they are in force, or, told not to wait, when they are
        sure to be tried. What a slow change waits for is logged."""
        if "ray_actor_options" in wanted.options:  # none, too: what the driver's job has is not left out
            given = wanted.options["ray_actor_options"]
            asked = await asyncio.to_thread(packed_options, backend, {} if given is None else given)
            options = {**wanted.options, "ray_actor_options": asked or None}
            wanted = msgspec.structs.replace(wanted, options=options)
        telling = asyncio.ensure_future(self._tell())
        try:
            octets = await ask(
                self._controller, "update", self._name, backend, encode(wanted), wait, timeout_s=None
            )
        finally:
            telling.cancel()
            await asyncio.wait((telling,))
        outcome = decode_deployed(octets)
        assert not isinstance(outcome, Deploying), "nobody has asked how far it is"
        _check(outcome)

    async def _tell(self) -> None:
        """Log what the change that is under way waits for, until there is none."""
        tell, seen = Waits(self._name), b""
        await asyncio.sleep(SLOW_S)
        with contextlib.suppress(NotServing):  # whoever waits for the change itself is told that
            while (
                octets := await ask(self._controller, "moved", self._name, seen, timeout_s=None)
            ) is not None:
                so_far = decode_deployed(octets)
                assert isinstance(so_far, Deploying), "what became of it, others are told"
                tell(so_far)
                seen = octets

    async def reroute(
        self, endpoint: str, weights: Mapping[str, float] | None, shadows: Mapping[str, float]
    ) -> None:
        """Change where an endpoint leads; returns when proxies and handles know."""
        await ask(self._controller, "reroute", self._name, endpoint, weights, shadows, timeout_s=None)

    async def delete(self, owner: str | None = None) -> None:
        """End it: what it runs first; with the last one ends the instance.

        Args:
            owner: only if it is still this driver's; None whoever's it is.
        """
        await ask(self._controller, "delete", self._name, owner, timeout_s=None)


@contextlib.asynccontextmanager
async def open_instance(
    address: str | None = "auto", *, http: HTTPOptions | None = None, start: bool = False
) -> AsyncIterator[Instance]:
    """The instance in a cluster, for as long as one is inside; it goes on after that.

    Args:
        address: of the cluster; see `open_session`.
        http: of its HTTP servers, where this starts it or finds it without; None for what is there.
        start: whether to start an instance where none runs, which ends with its last app, and at once if
            what is inside raises before there is one.

    Raises:
        ConnectionError: there is no such cluster.
        NotServing: no instance runs there.
    """
    session = await asyncio.to_thread(open_session, address)
    try:
        if not start:
            yield Instance(await asyncio.to_thread(find_controller))
            return
        instance, joined = await start_instance(session, None)
        try:
            await instance.http(http, joined)
            yield instance
        except BaseException:
            with contextlib.suppress(NotServing):
                await instance.end_if_empty()
            raise
    finally:
        await asyncio.to_thread(session.close)


async def start_instance(
    session: Session, line: Line | None, log_level: str = "info"
) -> tuple[Instance, Joined]:
    """The instance, started where there is none; one that is just ending is waited for.

    Args:
        session: with its Ray.
        line: opened to the controller.
        log_level: of its processes, if this starts it.

    Raises:
        NotServing: it does not answer.
        OSError: the line cannot be opened.
    """
    begun = time.monotonic()
    while True:
        controller = await asyncio.to_thread(
            start_controller, session.folder, not session.embedded, log_level
        )
        try:
            joined = await join(controller, JOIN_S)
            if line is not None:
                await line.open(joined)
            return Instance(controller), joined
        except (NotServing, ConnectionError, FileNotFoundError):
            if time.monotonic() - begun > JOIN_S:
                raise
            await asyncio.sleep(JOIN_RETRY_S)


async def make_spec(
    app: App, *, name: str, prefix: str = "", owner: str = "", deploy_timeout_s: float = 60.0
) -> AppSpec:
    """`shipping.spec_of`, which may take a while, beside the event loop."""
    return await asyncio.to_thread(
        spec_of, app, name=name, prefix=prefix, owner=owner, deploy_timeout_s=deploy_timeout_s
    )


def _check(outcome: Deployed | DeployFailed) -> None:
    if isinstance(outcome, DeployFailed):
        raise _error(outcome.cause) if outcome.cause is not None else NotServing(outcome.text)


def check_middlewares(options: HTTPOptions) -> None:
    """Raises TypeError for those that are no import strings: proxies unpickle nothing."""
    for middleware in options.middlewares:
        if not isinstance(middleware, str):
            raise TypeError(
                f"on Ray middlewares are import strings, 'package.module:factory'; got {middleware!r}: HTTP "
                "servers are processes of their own, which unpickle nothing. One with options has a name in "
                "a module: 'package.module:cors' for cors = Middleware(CORSMiddleware, allow_origins=[...])"
            )


def _encode_options(options: HTTPOptions) -> bytes:
    check_middlewares(options)
    return msgspec.json.encode(options)


def _error(failed: StartFailed) -> Exception:
    """What a process could not start for, as the exception that it was."""
    if not failed.failure:
        return NotServing(failed.where)
    error = load_exception(msgspec.msgpack.decode(failed.failure, type=Failure), failed.pickled)
    error.add_note(f"(while {failed.where} started)")
    return error

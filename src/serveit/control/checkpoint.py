"""What an instance is to be, as it is kept for the controller that comes after one that died.

Only what was asked for, and which of it serves: what runs is found running. A change is kept before
it is acknowledged; what follows from it (the new version serves, it has failed) soon after.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Protocol

import msgspec

from serveit.control.processes import backoff_s, pause
from serveit.control.spec import AppSpec, BackendSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from serveit.control.orders import BackendChange
    from serveit.types import Clock

logger = logging.getLogger("serveit.controller")

FORMAT = 1
MAX_PAUSE_S = 5.0
"""Between attempts to keep what could not be kept."""


MAX_ATTEMPTS = 6
"""To remove it at the end."""


class VersionRecord(msgspec.Struct, frozen=True):
    """One version of an app."""

    number: int
    spec: AppSpec
    proven: bool = False
    given_up: dict[str, str] = {}
    """Why, by backend."""

    def origin(self, backend: str) -> int:
        """The version that a backend's replicas are made of."""
        found = self.spec.find(backend)
        return found.since or self.number if found is not None else self.number

    def forgiving(self, backend: str) -> VersionRecord:
        """The same with a backend that is tried anew."""
        given_up = {name: why for name, why in self.given_up.items() if name != backend}
        return msgspec.structs.replace(self, given_up=given_up)


class AppRecord(msgspec.Struct, frozen=True):
    """One app."""

    versions: tuple[VersionRecord, ...]
    """Those of which replicas may run."""
    target: int
    """The number of the one that it is to be."""
    live: int | None = None
    """Of the one that callers know."""
    before: dict[str, BackendSpec] = {}
    """Backends as they were before the change that is under way."""
    changing: bool = False
    """Whether a change is under way."""
    failed: str = ""
    """Why the last change failed."""
    leaving: bool = False
    """It has been deleted, and ends what it runs."""

    @property
    def spec(self) -> AppSpec:
        """As it is to be."""
        return next(version.spec for version in self.versions if version.number == self.target)

    def respecified(self, spec: AppSpec) -> AppRecord:
        """The same with another spec of its target."""
        versions = (
            msgspec.structs.replace(v, spec=spec) if v.number == self.target else v for v in self.versions
        )
        return msgspec.structs.replace(self, versions=tuple(versions))

    def rerouted(
        self, endpoint: str, weights: Mapping[str, float] | None, shadows: Mapping[str, float]
    ) -> AppRecord:
        """The same with other traffic, also in the version that serves, where that has them."""
        versions = []
        for version in self.versions:
            if version.number in (self.target, self.live):
                with contextlib.suppress(KeyError, ValueError):
                    spec = version.spec.rerouted(endpoint, weights, shadows)
                    version = msgspec.structs.replace(version, spec=spec)
            versions.append(version)
        return msgspec.structs.replace(self, versions=tuple(versions))

    def updated(self, name: str, wanted: BackendChange) -> AppRecord:
        """The same on its way to other options of a backend, which is tried anew.

        Raises:
            KeyError, TypeError, ValueError: as `AppSpec.changed`.
        """
        changed = self.respecified(self.spec.changed(name, wanted))
        origin = next(v.origin(name) for v in changed.versions if v.number == self.target)
        versions = tuple(v.forgiving(name) if v.origin(name) == origin else v for v in changed.versions)
        before = {name: self.spec.backend(name), **(self.before if self.changing else {})}
        return msgspec.structs.replace(changed, versions=versions, before=before, changing=True, failed="")

    def retargeted(self, version: VersionRecord) -> AppRecord:
        """The same on its way to another version. A change of what serves that was under way is not made of
        it: the version may have that in it."""
        kept = self
        if self.changing and self.target == self.live:
            spec = self.spec
            for backend in self.before.values():
                spec = spec.with_backend(backend)
            kept = self.respecified(spec)
        return msgspec.structs.replace(
            kept,
            versions=(*kept.versions, version),
            target=version.number,
            before={},
            changing=True,
            failed="",
        )


class Checkpoint(msgspec.Struct, frozen=True):
    """One instance."""

    epoch: int
    """Of the controller's snapshots."""
    token: str
    """In the names of its actors."""
    secret: bytes
    version: int
    """The last version that was deployed."""
    number: int
    """Of the last replica that was started."""
    apps: dict[str, AppRecord]
    leaving: tuple[AppRecord, ...] = ()
    """Deleted apps; another of the name may be among `apps`."""
    http: bytes | None = None
    """What `Proxies` keeps."""
    ending: bool = False
    """All of it is to end."""
    format: int = FORMAT


class _Head(msgspec.Struct, frozen=True):
    """What is in the checkpoint of any version."""

    format: int


class Store(Protocol):
    """Where it is kept: something that outlives the controller."""

    async def save(self, octets: bytes) -> None:
        """Raises OSError where that cannot be done."""

    async def load(self) -> bytes | None: ...

    async def clear(self) -> None: ...


def decode_checkpoint(octets: bytes) -> Checkpoint:
    """Raises ValueError for one that another version of serveit has written."""
    way_out = "`serveit shutdown` with the version that wrote it, or restart the Ray cluster"
    try:
        found = msgspec.msgpack.decode(octets, type=_Head).format
        if found == FORMAT:
            return msgspec.msgpack.decode(octets, type=Checkpoint)
    except msgspec.MsgspecError as error:
        raise ValueError(f"the instance's checkpoint cannot be read ({error}): {way_out}") from error
    raise ValueError(f"the instance's checkpoint has format {found}, this serveit reads {FORMAT}: {way_out}")


class Checkpoints:
    """Keeps the checkpoint up to date, one write at a time.

    All mutable state: `_changed` (whether there is something that was not written), `_writing` (the task
    that does it when nobody waits for it), `_closed`; `changing` is held by whoever writes.
    """

    def __init__(self, store: Store, clock: Clock, current: Callable[[], Checkpoint]) -> None:
        """
        Args:
            store: where.
            clock: for pauses between attempts.
            current: what is to be kept now.
        """
        self.changing = asyncio.Lock()
        self._store = store
        self._clock = clock
        self._current = current
        self._changed = self._closed = False
        self._writing: asyncio.Task[None] | None = None

    async def load(self) -> Checkpoint | None:
        """What is kept. Raises ValueError for one that another version of serveit has written."""
        octets = await self._store.load()
        return decode_checkpoint(octets) if octets is not None else None

    async def keep(self, checkpoint: Checkpoint) -> None:
        """Keep what is about to be. Whoever asks holds `changing`, and makes it so when this returns:
        from then on it survives this process.

        Raises:
            OSError: it cannot be kept, and should not be made so.
        """
        assert self.changing.locked(), "changes are made one at a time"
        try:
            await self._store.save(msgspec.msgpack.encode(checkpoint))
        except BaseException:
            self.mark()  # what is kept now may be either
            raise

    def mark(self) -> None:
        """What is to be kept has changed."""
        self._changed = True
        if not self._closed and (self._writing is None or self._writing.done()):
            self._writing = asyncio.get_running_loop().create_task(self._write())

    async def kept(self) -> None:
        """Wait until all that was marked has been written."""
        if self._writing is not None and not self._writing.done():
            await asyncio.wait((self._writing,))

    async def aclose(self) -> None:
        """Write no more, and leave nothing to come back to."""
        self._closed = True
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.wait((self._writing,))
        async with self.changing:
            for attempts in range(2, 2 + MAX_ATTEMPTS):
                try:
                    return await self._store.clear()
                except OSError as error:
                    logger.error("the instance's checkpoint cannot be removed: %s", error)
                await pause(self._clock, backoff_s(attempts, MAX_PAUSE_S))

    async def _write(self) -> None:
        attempts = 0
        while self._changed:
            try:
                async with self.changing:
                    self._changed = False
                    await self._store.save(msgspec.msgpack.encode(self._current()))
            except OSError as error:
                self._changed = True
                attempts += 1
                logger.error("the state of the instance cannot be kept: %s", error)
                await pause(self._clock, backoff_s(attempts + 1, MAX_PAUSE_S))

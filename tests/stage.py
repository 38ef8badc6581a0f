"""A stage for the controller: a clock that stands still, and a cluster and a store in the test's hands.

What a controller reaches the world by (`Hands`, `FakeStore`, its clock) is cut off when it is made to
crash: processes and what was stored outlive it, its own last movements come to nothing.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

import msgspec

from serveit.config import BackendConfig
from serveit.control.checkpoint import Checkpoint, decode_checkpoint
from serveit.control.controller import Controller
from serveit.control.orders import (
    ActorName,
    BackendChange,
    Configured,
    Deployed,
    DeployFailed,
    Health,
    Leaving,
    ProxyOrder,
    ReplicaOrder,
    Started,
    StartFailed,
)
from serveit.control.processes import Node, ProcessDied
from serveit.control.snapshot import AppInfo, EndpointInfo, RouteInfo, Snapshot
from serveit.control.spec import AppSpec, BackendSpec
from serveit.running.failures import failure_of
from serveit.testing import ManualClock
from serveit.types import Timer

LONG_S = 3600.0
PID = 17
QUIET_STEPS = 3
"""Steps of the event loop after which the end of a task has set off all that it does."""


class FakeProcess:
    """A process in the test's hands: what a start gives, when it dies, how long a stop takes."""

    def __init__(self, name: str, order: ReplicaOrder | ProxyOrder, address: str) -> None:
        loop = asyncio.get_running_loop()
        self.name = name
        self.order = order
        self.address = address
        self.here: asyncio.Future[None] = loop.create_future()
        self.outcome: asyncio.Future[Started | StartFailed] = loop.create_future()
        self.gone: asyncio.Future[str] = loop.create_future()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.may_stop = asyncio.Event()
        self.may_stop.set()
        self.is_idle = asyncio.Event()
        self.is_idle.set()
        self.drains: list[float] = []
        self.to_deadlines = False
        self.idles: list[float] = []
        self.condition = Health()
        self.may_tell = asyncio.Event()
        self.may_tell.set()
        self.looks = 0
        self.killed = 0
        self.starts = 0
        self.settings = order.settings if isinstance(order, ReplicaOrder) else b""
        self.refuses: BaseException | None = None
        self.may_configure = asyncio.Event()
        self.may_configure.set()
        self.configured: list[bytes] = []

    def __repr__(self) -> str:
        return f"<FakeProcess {self.name}>"

    # in the test's hands

    def place(self) -> None:
        if not self.here.done():
            self.here.set_result(None)

    def ready(self) -> None:
        self.place()
        if not self.outcome.done():
            self.outcome.set_result(Started(PID, self.address, self.settings))

    def fail(self, error: BaseException) -> None:
        self.place()
        self.outcome.set_result(failed(self.order.id, error))

    def die(self, how: str = "SIGKILL") -> None:
        if not self.gone.done():
            self.gone.set_result(how)
        for future in (self.here, self.outcome):
            if not future.done():
                future.set_exception(ProcessDied(how))
                future.exception()

    @property
    def alive(self) -> bool:
        return not self.gone.done()

    @property
    def is_ready(self) -> bool:
        """Whether callers could use it."""
        return self.alive and self.outcome.done() and not self.drains

    # what a controller asks of it

    async def placed(self) -> None:
        await asyncio.shield(self.here)
        self._check_alive()

    async def start(self) -> Started | StartFailed | Leaving:
        self.starts += 1
        await self.may_answer.wait()
        outcome = await asyncio.shield(self.outcome)
        self._check_alive()
        is_leaving = self.drains and isinstance(self.order, ReplicaOrder)  # a server does not tell
        if is_leaving:
            return Leaving()
        if isinstance(outcome, Started):
            outcome = msgspec.structs.replace(outcome, settings=self.settings)
        return outcome

    async def configure(self, settings: bytes) -> Configured | StartFailed | Leaving:
        self.configured.append(settings)
        await self.may_configure.wait()
        self._check_alive()
        if self.refuses is not None:
            self.settings = b""
            return failed(self.order.id, self.refuses)
        self.settings = settings
        return Configured()

    def _check_alive(self) -> None:
        if not self.alive:
            raise ProcessDied(self.gone.result())

    async def status(self) -> dict[str, Any]:
        return {"running": 3}

    async def health(self, timeout_s: float) -> Health:
        self.looks += 1
        await self.may_tell.wait()
        return self.condition

    async def idle(self, timeout_s: float) -> None:
        self.idles.append(timeout_s)
        await self.is_idle.wait()

    async def death(self) -> str:
        return await asyncio.shield(self.gone)

    async def stop(self, drain_s: float, *, to_deadlines: bool = False) -> None:
        self.drains.append(drain_s)
        self.to_deadlines = to_deadlines
        stopping = asyncio.ensure_future(self.may_stop.wait())
        try:
            await asyncio.wait((stopping, self.gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
        self.die("stopped")

    def kill(self) -> None:
        if self.alive:
            self.killed += 1
        self.die("killed")


def failed(where: str, error: BaseException) -> StartFailed:
    """What a process says of what the user's code raised."""
    failure = failure_of(error, others=0, in_user_code=True)
    octets = msgspec.msgpack.encode(failure)
    return StartFailed(octets, where=where, text=f"{failure.kind}: {failure.text}")


class FakeCluster:
    """Makes FakeProcesses; with `eager` they are ready at once. It outlives controllers."""

    def __init__(self) -> None:
        self.eager = True
        self.refuses: Exception | None = None
        self.lacks = ""
        self.made: list[FakeProcess] = []

    def of(self, prefix: str) -> list[FakeProcess]:
        """Those that live, in the order they were made."""
        return [process for process in self.made if process.alive and process.order.id.startswith(prefix)]

    def find(self, name: str) -> FakeProcess | None:
        """The one that lives under this name."""
        return next((process for process in self.made if process.alive and process.name == name), None)

    def make(self, name: str, order: ReplicaOrder | ProxyOrder, address: str) -> FakeProcess:
        if self.refuses is not None:
            raise self.refuses
        assert self.find(name) is None, f"{name} runs already"
        process = FakeProcess(name, order, address)
        self.made.append(process)
        if self.eager:
            process.ready()
        return process

    def make_stray(self, name: str) -> FakeProcess:
        """One that no controller of this instance has made."""
        order = ReplicaOrder(name, "", "", b"", "", b"", False, actor=name)
        return self.make(name, order, f"at {name}")


class Held:
    """A process as one controller holds it: the hand of a dead one does nothing any more."""

    def __init__(self, process: FakeProcess, hands: Hands) -> None:
        self.process = process
        self._hands = hands

    async def placed(self) -> None:
        await self.process.placed()

    async def start(self) -> Started | StartFailed | Leaving:
        return await self.process.start()

    async def configure(self, settings: bytes) -> Configured | StartFailed | Leaving:
        if self._hands.are_cut:
            await asyncio.Event().wait()
        return await self.process.configure(settings)

    async def status(self) -> dict[str, Any]:
        return await self.process.status()

    async def health(self, timeout_s: float) -> Health:
        return await self.process.health(timeout_s)

    async def idle(self, timeout_s: float) -> None:
        await self.process.idle(timeout_s)

    async def death(self) -> str:
        return await self.process.death()

    async def stop(self, drain_s: float, *, to_deadlines: bool = False) -> None:
        if self._hands.are_cut:
            await asyncio.Event().wait()
        await self.process.stop(drain_s, to_deadlines=to_deadlines)

    def kill(self) -> None:
        if not self._hands.are_cut:
            self.process.kill()


class Hands:
    """The launcher of one controller."""

    def __init__(self, cluster: FakeCluster) -> None:
        self.are_cut = False
        self._cluster = cluster

    def replica(self, order: ReplicaOrder) -> Held:
        return self._made(order.actor, order, f"at {order.actor}")

    def proxy(self, order: ProxyOrder) -> Held:
        port = msgspec.json.decode(order.options).get("port") or 4321
        return self._made(order.id, order, f"http://127.0.0.1:{port}/a:b")

    def adopt(self, order: ReplicaOrder | ProxyOrder) -> Held:
        name = order.actor if isinstance(order, ReplicaOrder) else order.id
        return self._found(name, order)

    def stray(self, name: str) -> Held:
        return self._found(name, ReplicaOrder(name, "", "", b"", "", b"", False))

    async def nodes(self) -> list[Node]:
        return [Node("0123456789", "127.0.0.1", True)]

    async def running(self) -> list[str]:
        return [process.name for process in self._cluster.of("")]

    async def lacking(self, order: ReplicaOrder) -> str:
        return self._cluster.lacks

    def _made(self, name: str, order: ReplicaOrder | ProxyOrder, address: str) -> Held:
        if self.are_cut:
            return Held(FakeProcess(name, order, address), self)
        return Held(self._cluster.make(name, order, address), self)

    def _found(self, name: str, order: ReplicaOrder | ProxyOrder) -> Held:
        process = self._cluster.find(name)
        if process is None:
            process = FakeProcess(name, order, "")
            process.die(f"{name} is gone")
        return Held(process, self)


class Kept:
    """What is stored; it outlives controllers. All that was ever kept is in `history`."""

    def __init__(self) -> None:
        self.octets: bytes | None = None
        self.history: list[bytes] = []

    def put(self, octets: bytes) -> None:
        self.octets = octets
        self.history.append(octets)

    @property
    def checkpoint(self) -> Checkpoint:
        assert self.octets is not None, "nothing is kept"
        return decode_checkpoint(self.octets)


class FakeStore:
    """One controller's way there: refuses with `error`, waits while `may_save` is not set."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept
        self.error: OSError | None = None
        self.may_save = asyncio.Event()
        self.may_save.set()
        self.is_cut = False
        self.saves = 0

    async def save(self, octets: bytes) -> None:
        self.saves += 1
        await asyncio.sleep(0)
        await self._reached()
        self.kept.put(octets)
        await asyncio.sleep(0)

    async def load(self) -> bytes | None:
        await self._reached()
        return self.kept.octets

    async def clear(self) -> None:
        await self._reached()
        self.kept.octets = None

    async def _reached(self) -> None:
        await self.may_save.wait()
        if self.is_cut:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error


class HeldClock:
    """The clock as one controller has it."""

    def __init__(self, clock: ManualClock) -> None:
        self.time = clock.time
        self.is_cut = False
        self._clock = clock

    def call_later(self, delay_s: float, callback: Callable[..., Any], *args: Any) -> Timer:
        return self._clock.call_later(delay_s, self._call, callback, args)

    def _call(self, callback: Callable[..., Any], args: Iterable[Any]) -> None:
        if not self.is_cut:
            callback(*args)


class Member:
    """A watcher: takes in every snapshot, unless it does not hear."""

    def __init__(self, controller: Controller, name: str = "member") -> None:
        self.name = name
        self.controller = controller
        self.snapshots: list[Snapshot] = []
        self.hears = asyncio.Event()
        self.hears.set()
        self.task = asyncio.ensure_future(self._follow())

    async def _follow(self) -> None:
        version = (0, 0)
        while True:
            snapshot = await self.controller.publisher.watch(self.name, version)
            await self.hears.wait()
            self.snapshots.append(snapshot)
            version = snapshot.version

    @property
    def replicas(self) -> dict[str, list[str]]:
        """What it knows, by backend."""
        return serving(self.snapshots[-1])


class Stage:
    """A controller with everything around it."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.launcher = FakeCluster()
        self.kept = Kept()
        self._tasks: list[asyncio.Future[Any]] = []
        self._make_controller()

    def _make_controller(self) -> None:
        self.hands, self.store = Hands(self.launcher), FakeStore(self.kept)
        self._own_clock = HeldClock(self.clock)
        self.controller = Controller(
            self.hands, self.store, folder="/x", over_tcp=False, log_level="info", clock=self._own_clock
        )

    async def open(self) -> None:
        """Let the first controller begin."""
        self._others = asyncio.all_tasks()
        await self.controller.take_over(await self.controller.restore())

    # -- its end, and the next ---------------------------------------------------------------

    async def crash(self) -> None:
        """The controller is gone from one moment to the next, and whoever asked it hears nothing."""
        self.hands.are_cut = self.store.is_cut = self._own_clock.is_cut = True
        quiet = 0
        while quiet < QUIET_STEPS:
            tasks = asyncio.all_tasks() - self._others - {asyncio.current_task()}
            quiet = 0 if tasks else quiet + 1
            for task in tasks:
                task.cancel()  # again and again: what it does in the end waits for others
            await asyncio.sleep(0)
        self._tasks.clear()

    async def recover(self) -> None:
        """The next one begins, and has begun; `witness` sees what it tells."""
        beginning = await self.begin_recovery()
        if not beginning.done():
            await self.clock.advance(2.0)  # somebody does not answer
        beginning.result()

    async def begin_recovery(self) -> asyncio.Task[None]:
        """The same as far as it goes without time passing."""
        beginning = self.begin_at_once()
        await self.clock.settle()
        return beginning

    def begin_at_once(self) -> asyncio.Task[None]:
        """The same without a step of the event loop."""
        self._make_controller()
        return self.begin(self._begin_again())

    async def _begin_again(self) -> None:
        kept = await self.controller.restore()
        await self.controller.take_over(kept)
        self.witness = self.member("witness")
        if kept is not None:
            self.begin(self.controller.await_owners(kept))

    async def follow(self) -> None:
        """Crash and recovery."""
        await self.crash()
        await self.recover()

    # -- what others do ----------------------------------------------------------------------

    def member(self, name: str = "member") -> Member:
        member = Member(self.controller, name)
        self._tasks.append(member.task)
        return member

    def begin(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.append(task)
        return task

    async def result(self, awaitable: Awaitable[Any]) -> Any:
        """Of what needs no time to pass."""
        task = asyncio.ensure_future(awaitable)
        await self.clock.settle()
        assert task.done() or task.cancel() is None, "it takes time"
        return task.result()

    async def owner_lost(self, owner: str, grace_s: float) -> None:
        """One of a driver's connections is gone; returns when what follows from that has happened."""
        await self.controller.owners.lost(owner, grace_s)
        await self.controller.last_ended()

    async def deploying(self, spec: AppSpec) -> asyncio.Task[Any]:
        """What becomes of it."""
        return self.begin(self.controller.outcomes.deployed(spec.name, await self.controller.deploy(spec)))

    async def deploy(self, spec: AppSpec) -> Deployed | DeployFailed:
        outcome = await self.result(await self.deploying(spec))
        assert isinstance(outcome, Deployed | DeployFailed)
        return outcome

    async def status(self, name: str = "app") -> dict[str, Any]:
        told: dict[str, Any] = await self.result(self.controller.status(name))
        return told

    # -- what is seen ------------------------------------------------------------------------

    @property
    def serving(self) -> dict[str, list[str]]:
        return serving(self.controller.snapshot)

    @property
    def running(self) -> list[str]:
        """Ids of the replicas that live."""
        return [process.order.id for process in self.launcher.of("")]

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        self.store.error = None
        self.store.may_save.set()
        for process in self.launcher.made:
            for event in (process.may_stop, process.is_idle, process.may_answer, process.may_tell):
                event.set()
        self.begin(self.controller.shutdown())
        await self.clock.advance(LONG_S)
        await asyncio.wait(self._tasks[-1:])
        assert not self.launcher.of("")
        assert self.kept.octets is None, "nothing is left to come back to"


def staged(tests: type) -> type:
    """Each test opens and closes its stage in its own time: what it leaves running is found after it."""
    for name, test in list(vars(tests).items()):
        if name.startswith("test_"):
            setattr(tests, name, on_stage(test))
    return tests


def on_stage(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def run(*args: Any, **fixtures: Any) -> None:
        stage = fixtures["stage"]
        await stage.open()
        try:
            await test(*args, **fixtures)
        finally:
            await stage.aclose()

    return run


def serving(snapshot: Snapshot) -> dict[str, list[str]]:
    return {
        f"{app.name}.{backend.name}": [replica.id for replica in backend.replicas]
        for app in snapshot.apps
        for backend in app.backends
    }


def actor_name(process: FakeProcess) -> ActorName:
    name = ActorName.parse(process.name)
    assert name is not None, f"{process} is a replica"
    return name


def version_of(process: FakeProcess) -> int:
    """The version of its app that a replica runs."""
    return actor_name(process).version


def spec(
    name: str = "app",
    *,
    prefix: str = "",
    owner: str = "",
    surge: int = 1,
    id: str = "",
    more: tuple[str, ...] = (),
    **backends: int,
) -> AppSpec:
    """An app with so many replicas of each backend, each at a route of its own.

    Args:
        name: of the app.
        prefix: in front of its paths.
        owner: whose end is its.
        surge: of all backends.
        id: of the deploy.
        more: patterns of further routes; all lead to the first backend.
        backends: how many replicas of each.
    """
    backends = backends or {"b": 1}
    first = next(iter(backends))
    leads = {f"/{backend}": backend for backend in backends} | dict.fromkeys(more, first)
    return AppSpec(
        name=name,
        backends=tuple(
            BackendSpec(backend, number, BackendConfig(max_ongoing_requests=7, max_surge=surge))
            for backend, number in backends.items()
        ),
        endpoints=tuple(EndpointInfo(pattern, ((backend, 1.0),)) for pattern, backend in leads.items()),
        routes=tuple(RouteInfo(pattern, pattern, ("GET", "HEAD"), pattern, prefix) for pattern in leads),
        code=b"code",
        owner=owner,
        id=id,
    )


def uncounted(snapshot: Snapshot) -> list[AppInfo]:
    """What serves, without how many replicas its controller has seen come and go."""
    return [
        msgspec.structs.replace(
            app,
            backends=tuple(msgspec.structs.replace(b, num_started=0, num_died=0) for b in app.backends),
        )
        for app in snapshot.apps
    ]


def scaled_to(number: int) -> BackendChange:
    """So many of a backend."""
    return BackendChange({"num_replicas": number})

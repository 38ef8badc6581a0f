"""What a Python caller holds to call a backend or an endpoint. Async and native; `sync` is its shim.

Hot path: `call` once per call.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, cast

from serveit.calling.exchange import Exchange
from serveit.calling.flow import Flow
from serveit.config import MAX_SECONDS, check_options
from serveit.context import inherited_deadline, new_request_id
from serveit.exceptions import DeadlineExceeded, QueueFull
from serveit.wire.frames import STREAM, Buffer, Call, CallAnswer, Failure, FrameType, Reserve, Reserved
from serveit.wire.pickles import dump, load, load_exception

if TYPE_CHECKING:
    from serveit.calling.directory import Directory
    from serveit.calling.gateway import Gateway
    from serveit.calling.sync import SyncHandle
    from serveit.types import Clock

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
E = TypeVar("E", bound=Exchange)

MAX_MISSING_S = 60.0
"""How long a call without a deadline waits for a name that is not there yet (`missing_ok`)."""


@dataclass(frozen=True)
class HandleOptions:
    """What `options` changes; each handle has its own, frozen."""

    method_name: str | None = None
    shard_key: str | None = None
    timeout_s: float | None = None
    missing_ok: bool = False

    def __post_init__(self) -> None:
        timeout_s: Any = self.timeout_s
        if timeout_s is not None:
            if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)):
                raise TypeError(f"timeout_s must be a number of seconds or None, got {timeout_s!r}")
            if not (timeout_s > 0 and math.isfinite(timeout_s)):
                raise ValueError(f"timeout_s must be > 0 and finite, got {timeout_s!r}; None for no limit")
        missing_ok: Any = self.missing_ok
        if not isinstance(missing_ok, bool):
            raise TypeError(f"missing_ok must be True or False, got {missing_ok!r}")
        for name in ("method_name", "shard_key"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name} must be a str or None, got {value!r}")
            if value and not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
                raise ValueError(f"{name} must be text that UTF-8 has a form for, got {value!r}")

    def __str__(self) -> str:
        """Those that are set, without the method's name; each with a space in front."""
        shown = ("shard_key", "timeout_s", "missing_ok")
        return "".join(f" {name}={value!r}" for name in shown if (value := getattr(self, name)))


class CallExchange(Exchange):
    """A CALL under way."""

    __slots__ = ()

    def __init__(self, target: str, pickled: tuple[list[int], list[Buffer]], deadline: float | None) -> None:
        sizes, buffers = pickled
        message = Call(new_request_id(), target, sizes)
        super().__init__(FrameType.CALL, message, buffers, CallAnswer, deadline)

    def rebuild(self, failure: Failure, body: bytes) -> BaseException:
        return load_exception(failure, body)

    async def result(self) -> Any:
        """The value, whole. Whoever is cancelled while waiting for it takes the request back."""
        try:
            answer = await self.answer
            if answer.flags & STREAM:
                self.cancel()
                raise TypeError(
                    "the function returned a stream, not a value: use `async for item in handle.stream(...)`"
                )
            body: Buffer = answer.body if answer.inflow is None else await answer.inflow.read_all()
        except asyncio.CancelledError:
            self.cancel()
            raise
        message: Any = answer.message
        return load(message.sizes, body)


class ReserveExchange(Exchange):
    """A RESERVE under way, and then the slot that it holds."""

    __slots__ = ("request_id",)

    def __init__(self, target: str, deadline: float | None) -> None:
        self.request_id = new_request_id()
        message = Reserve(self.request_id, target)
        super().__init__(FrameType.RESERVE, message, (b"",), Reserved, deadline)

    def rebuild(self, failure: Failure, body: bytes) -> BaseException:
        return load_exception(failure, body)


class Handle(Generic[P, R]):
    """Calls a backend, or an endpoint's backends by its traffic. Got from `client.get_handle(name)`.

    Arguments reach the function exactly as given, pickled; results come back as they were returned.
    What the function raises is raised here, with the replica's traceback as its cause. `handle.explain`
    is the handle of the method `explain`.
    """

    def __init__(self, gateway: Gateway, name: str, options: HandleOptions = HandleOptions()) -> None:
        self._gateway = gateway
        self._name = name
        self._options = options
        self._arguments = f"an argument of {name!r}"

    def __repr__(self) -> str:
        app = self._gateway.app
        method = f".{self._options.method_name}" if self._options.method_name else ""
        return f"<Handle {app}/{self._name}{method}{self._options}>"

    def __getattr__(self, name: str) -> Handle[..., Any]:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return cast("Handle[..., Any]", self.options(method_name=name))

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced(sync=False)

    def reduced(self, *, sync: bool) -> tuple[Any, ...]:
        """What pickles it, or its blocking form."""
        return self._gateway.reduce(self._name, self._options, sync=sync)

    @property
    def gateway(self) -> Gateway:
        """Its way to the app."""
        return self._gateway

    def options(self, **changes: Any) -> Handle[P, R]:
        """A copy with other options; this one stays as it is.

        Args:
            method_name: method of the class to call in place of `__call__`.
            shard_key: the same key goes to the same backend while the weights stand.
            timeout_s: seconds until the call is given up with `DeadlineExceeded`.
            missing_ok: calls wait for a name that the app does not have (yet): until their deadline, or
                60 s without one. False: they raise KeyError.
        """
        check_options(HandleOptions, "a handle", changes)
        return type(self)(self._gateway, self._name, replace(self._options, **changes))

    async def call(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function and wait for its value.

        Raises:
            QueueFull: `max_queued_requests` wait in this process already; see `map`.
            DeadlineExceeded: `timeout_s` or the caller's own deadline passed.
            KeyError: the backend or endpoint is gone.
            NotServing: the app is.
            ReplicaDied: the replica was lost in the middle.
            EncodingError: arguments or result do not pickle.
            Exception: whatever the function raised.
        """
        exchange = await self._begin(args, kwargs)
        result: R = await exchange.result()
        return result

    async def stream(self, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[Any]:
        """Call a generator and get its items as they are made; the call begins with the first.

        The generator is held back while this side does not read, and closed when it stops reading.

        Raises:
            Exception: as `call`; what the generator raises comes after the items before it.
        """
        exchange = await self._begin(args, kwargs)
        try:
            answer = await exchange.answer
            if not answer.flags & STREAM:
                raise TypeError(
                    f"{self._name!r} returned a value, not a stream: use `await handle.call(...)`"
                )
            inflow, ended = answer.inflow, answer.inflow is None
            while inflow is not None and not ended:
                item, ended = await inflow.read()
                if item:
                    yield load((), item)
        finally:
            exchange.cancel()  # of what is still to come

    def map(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        *,
        max_in_flight: int = 64,
        ordered: bool = True,
    ) -> AsyncIterator[Any]:
        """Call the function once per item, several at a time.

        Args:
            items: each is the function's only argument; taken one by one as there is room.
            max_in_flight: calls that are submitted and not yet handed out.
            ordered: results in the order of the items; False: `(index, result)` as they come.

        Raises:
            Exception: what the first failing call, or `items`, raised; the calls still under way are
                cancelled.
        """
        if isinstance(max_in_flight, bool) or not isinstance(max_in_flight, int):
            raise TypeError(f"max_in_flight must be an int, got {max_in_flight!r}")
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight must be ≥ 1, got {max_in_flight}")
        if not isinstance(items, AsyncIterable):
            items = iter(items)
        return self._map(items, max_in_flight, ordered)

    async def _map(
        self, items: Iterable[Any] | AsyncIterable[Any], max_in_flight: int, ordered: bool
    ) -> AsyncIterator[Any]:
        flow = Flow(self._begin, max_in_flight, ordered)
        feeder = asyncio.get_running_loop().create_task(flow.feed(items))
        try:
            while (index := await flow.next()) is not None:
                result = await flow.take(index)
                yield result if ordered else (index, result)
        finally:
            feeder.cancel()
            flow.cancel()
            await asyncio.wait((feeder,))

    async def remote(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Wait for a slot, submit, and return a `ray.ObjectRef`: await it, `ray.get` it, pass it on.

        ObjectRefs among the arguments are waited for here and fetched by the replica. What the function
        raises is raised by the ObjectRef, and so is DeadlineExceeded at the deadline. An endpoint's shadows
        are not sent copies.

        Raises:
            NeedsRay: the app runs without Ray.
            QueueFull, DeadlineExceeded, ReplicaDied: as `call`, until there is a slot.
            EncodingError: arguments do not pickle.
        """
        gateway = await self._enter()
        tasks = gateway.needs_tasks()
        deadline = self._deadline(gateway)
        if self._options.missing_ok:
            await self._appeared(gateway.directory, deadline)
        if tasks.are_among(args, kwargs):
            await self._refs_in_time(tasks.wait(args, kwargs), deadline, gateway.directory.clock)
        exchange = self._route(gateway, lambda target: ReserveExchange(target, deadline))
        try:
            await exchange.answer
            connection = exchange.connection
            assert connection is not None, "it was answered"
            return await tasks.start(connection.replica, exchange.request_id, args, kwargs)
        except BaseException:
            exchange.cancel()
            raise

    @property
    def sync(self) -> SyncHandle[P, R]:
        """The blocking handle with the same options, for threads without an event loop."""
        from serveit.calling.sync import SyncHandle

        return SyncHandle(self)

    async def _enter(self) -> Gateway:
        """The gateway of the running event loop."""
        gateway = self._gateway
        if not gateway.is_here():
            gateway = self._gateway = await gateway.enter(self)
        return gateway

    async def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallExchange:
        """Submit a call. Hot path."""
        gateway = await self._enter()
        deadline = self._deadline(gateway)
        if self._options.missing_ok:
            await self._appeared(gateway.directory, deadline)
        if gateway.tasks is not None and gateway.tasks.are_among(args, kwargs):
            fetching = gateway.tasks.fetch(args, kwargs)
            args, kwargs = await self._refs_in_time(fetching, deadline, gateway.directory.clock)
        pickled = dump((args, kwargs), self._arguments)
        return self._route(gateway, lambda target: CallExchange(target, pickled, deadline))

    def _deadline(self, gateway: Gateway) -> float | None:
        """When a call that begins now is given up."""
        deadline = inherited_deadline()
        timeout_s = self._options.timeout_s
        if timeout_s is None:
            return deadline
        own = gateway.directory.clock.time() + min(timeout_s, MAX_SECONDS)
        return own if deadline is None else min(own, deadline)

    async def _refs_in_time(self, work: Coroutine[Any, Any, T], deadline: float | None, clock: Clock) -> T:
        """What becomes of the ObjectRefs among the arguments, if it does before the deadline."""
        if deadline is None:
            return await work
        late = f"the deadline passed while waiting for the ObjectRefs among the arguments of {self._name!r}"
        return await _in_time(work, deadline, clock, lambda: late)

    async def _appeared(self, directory: Directory, deadline: float | None) -> None:
        """Wait until the app has what this handle calls, for a handle that was got without it."""
        if directory.has(self._name):
            return

        def late() -> str:
            return (
                f"this call has waited for as long as it may ({limit}), but {directory.missing(self._name)}"
            )

        clock = directory.clock
        limit = f"without a deadline {MAX_MISSING_S:.0f} s" if deadline is None else "until its deadline"
        until = clock.time() + MAX_MISSING_S if deadline is None else deadline
        await _in_time(directory.wait_for(self._name), until, clock, late)

    def _route(self, gateway: Gateway, make: Callable[[str], E]) -> E:
        """Make an exchange and give it to the router of the backend that this call goes to."""
        directory, options = gateway.directory, self._options
        endpoint = directory.endpoint(self._name)
        target = options.method_name or endpoint.target
        exchange = make(target)
        try:
            directory.choose(endpoint, options.shard_key).submit(exchange)
        except QueueFull as error:
            raise QueueFull(
                f"{error}; `handle.map(items, max_in_flight=...)` submits only so many at a time"
            ) from None
        if endpoint.traffic.shadows and exchange.frame_type == FrameType.CALL:
            directory.shadow(endpoint, lambda: make(target))
        return exchange


async def _in_time(work: Coroutine[Any, Any, T], deadline: float, clock: Clock, late: Callable[[], str]) -> T:
    """What becomes of what a call waits for, if it does before the deadline; `late` says what did not."""
    task = asyncio.get_running_loop().create_task(work)
    over = asyncio.Event()
    task.add_done_callback(lambda _: over.set())
    timer = clock.call_later(max(0.0, deadline - clock.time()), over.set)
    try:
        await over.wait()
    finally:
        timer.cancel()
        task.cancel()
    if not task.done():
        raise DeadlineExceeded(late(), executed="no")
    return task.result()

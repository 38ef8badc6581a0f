"""What a Python caller holds to call a backend or an endpoint. Async and native; `sync` is its shim.

Hot path: `call` once per call.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, NoReturn, ParamSpec, TypeVar, cast

from serveit.calling.exchange import Answer, Exchange
from serveit.context import inherited_deadline, new_request_id
from serveit.exceptions import NeedsRay
from serveit.wire.frames import STREAM, Buffer, Call, CallAnswer, Failure, FrameType, Message
from serveit.wire.pickles import dump, load, load_exception

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal

    from serveit.calling.directory import Directory
    from serveit.calling.sync import SyncHandle

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class HandleOptions:
    """What `options` changes; each handle has its own, frozen."""

    method_name: str | None = None
    shard_key: str | None = None
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be > 0, got {self.timeout_s!r}")
        for name in ("method_name", "shard_key"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name} must be a str, got {value!r}")


@dataclass
class Gateway:
    """What the handles of one app share in a process.

    Attributes:
        directory: names to routers.
        loop: the event loop that the routers live in.
        portal: the way to that loop from other threads.
        remote: the function behind `Handle.remote`; None where Ray does not run.
    """

    directory: Directory
    loop: asyncio.AbstractEventLoop
    portal: BlockingPortal
    remote: Callable[..., Any] | None = None


class CallExchange(Exchange):
    """A CALL under way."""

    __slots__ = ()

    def __init__(self, target: str, pickled: tuple[list[int], list[Buffer]], deadline: float | None) -> None:
        sizes, buffers = pickled
        message = Call(new_request_id(), target, sizes)
        super().__init__(FrameType.CALL, message, buffers, CallAnswer, deadline)

    def rebuild(self, failure: Failure, body: bytes) -> BaseException:
        return load_exception(failure, body)

    async def answered(self) -> Answer[Message]:
        """The head of the answer; whoever is cancelled while waiting takes the request back."""
        try:
            return await self.answer
        except asyncio.CancelledError:
            self.cancel()
            raise

    async def result(self) -> Any:
        """The value, whole."""
        answer = await self.answered()
        if answer.flags & STREAM:
            self.cancel()
            raise TypeError("the function returned a stream: use `async for item in handle.stream(...)`")
        message = cast("CallAnswer", answer.message)
        if answer.inflow is None:
            return load(message.sizes, answer.body)
        try:
            return load(message.sizes, await answer.inflow.read_all())
        except asyncio.CancelledError:
            self.cancel()
            raise


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

    def __repr__(self) -> str:
        app = self._gateway.directory.app
        method = f".{self._options.method_name}" if self._options.method_name else ""
        return f"<Handle (async) {app}/{self._name}{method}>"

    def __getattr__(self, name: str) -> Handle[..., Any]:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return cast("Handle[..., Any]", self.options(method_name=name))

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{self!r} cannot be pickled: without Ray a handle stays in its process; "
            "inside a backend use `app.handle(...)`"
        )

    def options(self, **changes: Any) -> Handle[P, R]:
        """A copy with other options; this one stays as it is.

        Args:
            method_name: method of the class to call in place of `__call__`.
            shard_key: the same key goes to the same backend while the weights stand.
            timeout_s: seconds until the call is given up with `DeadlineExceeded`.
        """
        try:
            options = replace(self._options, **changes)
        except TypeError as error:
            known = ", ".join(HandleOptions.__dataclass_fields__)
            raise TypeError(f"{error}; a handle's options are {known}") from None
        return type(self)(self._gateway, self._name, options)

    async def call(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function and wait for its value.

        Raises:
            QueueFull: `max_queued_requests` wait in this process already; see `map`.
            DeadlineExceeded: `timeout_s` or the caller's own deadline passed.
            ReplicaDied: the replica was lost in the middle.
            EncodingError: arguments or result do not pickle.
            Exception: whatever the function raised.
        """
        return cast("R", await self._submit(args, kwargs).result())

    async def stream(self, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[Any]:
        """Call a generator and get its items as they are made.

        The generator is held back while this side does not read, and closed when it stops reading.
        """
        exchange = self._submit(args, kwargs)
        answer = await exchange.answered()
        if answer.inflow is None or not answer.flags & STREAM:
            exchange.cancel()
            raise TypeError(f"{self._name!r} returned a value, not a stream: use `await handle.call(...)`")
        ended = False
        try:
            while not ended:
                item, ended = await answer.inflow.read()
                if item:
                    yield load((), item)
        finally:
            if not ended:
                exchange.cancel()

    async def map(
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
            Exception: what the first failing call raised; the calls still under way are cancelled.
        """
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight must be ≥ 1, got {max_in_flight}")
        finished: asyncio.Queue[tuple[int, CallExchange]] = asyncio.Queue()
        under_way: deque[tuple[int, CallExchange]] = deque()
        index = 0
        try:
            async for item in _iterate(items):
                if len(under_way) >= max_in_flight:
                    yield await self._take(under_way, finished, ordered)
                exchange = self._submit((item,), {})
                entry = index, exchange
                under_way.append(entry)
                if not ordered:
                    exchange.answer.add_done_callback(lambda _, entry=entry: finished.put_nowait(entry))  # type: ignore[misc]
                index += 1
            while under_way:
                yield await self._take(under_way, finished, ordered)
        finally:
            for _, exchange in under_way:
                exchange.cancel()
                exchange.answer.add_done_callback(_retrieve)

    async def remote(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Wait for a slot, submit, and return a `ray.ObjectRef`.

        Raises:
            NeedsRay: the app runs without Ray.
        """
        if self._gateway.remote is None:
            raise NeedsRay(
                f"handle.remote() gives a ray.ObjectRef and {self._gateway.directory.app!r} runs "
                "without Ray: use `await handle.call(...)`, which gives the value"
            )
        return await self._gateway.remote(self._name, self._options, args, kwargs)

    @property
    def sync(self) -> SyncHandle[P, R]:
        """The blocking handle with the same options, for threads without an event loop."""
        from serveit.calling.sync import SyncHandle

        return SyncHandle(self, self._gateway)

    @staticmethod
    async def _take(
        under_way: deque[tuple[int, CallExchange]],
        finished: asyncio.Queue[tuple[int, CallExchange]],
        ordered: bool,
    ) -> Any:
        entry = under_way[0] if ordered else await finished.get()
        result = await entry[1].result()
        under_way.remove(entry)
        return result if ordered else (entry[0], result)

    def _submit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallExchange:
        if asyncio.get_running_loop() is not self._gateway.loop:
            raise RuntimeError(
                f"{self!r} belongs to another event loop: get one in this loop, "
                "or use its blocking form `handle.sync` from a thread"
            )
        directory, options = self._gateway.directory, self._options
        endpoint = directory.endpoint(self._name)
        deadline = inherited_deadline()
        if options.timeout_s is not None:
            own = directory.clock.time() + options.timeout_s
            deadline = own if deadline is None else min(own, deadline)
        target = options.method_name or endpoint.target
        pickled = dump((args, kwargs), f"an argument of {self._name!r}")
        exchange = CallExchange(target, pickled, deadline)
        directory.choose(endpoint, options.shard_key).submit(exchange)
        if endpoint.traffic.shadows:
            directory.shadow(endpoint, lambda: CallExchange(target, pickled, deadline))
        return exchange


async def _iterate(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


def _retrieve(answer: asyncio.Future[Any]) -> None:
    if not answer.cancelled():
        answer.exception()

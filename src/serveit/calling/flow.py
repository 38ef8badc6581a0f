"""The calls of one `handle.map`, several at a time: fed by a task, read in order or as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serveit.calling.handle import CallExchange


class Flow:
    """The calls of one `map`: a task feeds them to the replicas, the reader takes their results.

    A task, because the results that are there must not wait for a slow source.
    """

    def __init__(
        self,
        begin: Callable[[tuple[Any, ...], dict[str, Any]], Awaitable[CallExchange]],
        max_in_flight: int,
        ordered: bool,
    ) -> None:
        self._begin = begin
        self._ordered = ordered
        self._room = asyncio.Semaphore(max_in_flight)
        self._under_way: dict[int, CallExchange] = {}
        self._next: asyncio.Queue[int | None] = asyncio.Queue()
        """Indices in the order in which they are handed out; None once `items` has ended."""
        self._count = 0
        self._error: BaseException | None = None
        self._fed = False

    async def feed(self, items: Iterable[Any] | AsyncIterable[Any]) -> None:
        """Submit a call per item, as there is room."""
        try:
            if isinstance(items, AsyncIterable):
                async for item in items:
                    await self._put(item)
            else:
                for item in items:
                    await self._put(item)
        except BaseException as error:  # whatever it is, it is the reader's: see `next`
            self._error = error
        self._next.put_nowait(None)

    async def _put(self, item: Any) -> None:
        await self._room.acquire()
        index, self._count = self._count, self._count + 1
        exchange = self._under_way[index] = await self._begin((item,), {})
        if self._ordered:
            self._next.put_nowait(index)
        else:
            exchange.answer.add_done_callback(lambda _: self._next.put_nowait(index))

    async def next(self) -> int | None:
        """Whose result is to be taken next; None when all are taken. Raises what `items` raised."""
        while self._under_way or not self._fed:
            index = await self._next.get()
            if index is not None:
                return index
            self._fed = True
            if self._error is not None:
                raise self._error
        return None

    async def take(self, index: int) -> Any:
        result = await self._under_way[index].result()
        del self._under_way[index]
        self._room.release()
        return result

    def cancel(self) -> None:
        for exchange in self._under_way.values():
            exchange.cancel()

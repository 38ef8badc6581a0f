"""A job that came as a Python call: pickles in, pickles out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from serveit.running.failures import failure_of
from serveit.running.job import Job, Lane
from serveit.wire.frames import MAX_INLINE, STREAM, Call, CallAnswer
from serveit.wire.pickles import dump, dump_exception, load

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from serveit.declare.backend import Method
    from serveit.running.reply import Reply


class CallJob(Job):
    """A CALL under way in its replica."""

    __slots__ = ("_body", "_sizes", "reply")

    def __init__(self, lane: Lane, call: Call, body: bytes, deadline: float | None, reply: Reply) -> None:
        super().__init__(lane, call.target, call.request_id, deadline)
        self.reply = reply
        self._sizes = call.sizes
        self._body: bytes = body

    def arguments(self, method: Method) -> tuple[Any, Any]:
        args, kwargs = load(self._sizes, self._body)
        self._body = b""
        if method.is_batch and (len(args) != 1 or kwargs):
            raise TypeError(
                f"{self.target!r} is called with batches: give exactly one item, "
                f"not {len(args)} positional and {len(kwargs)} keyword arguments"
            )
        return args, kwargs

    def queued(self) -> None:
        self.reply.queued()

    def started(self) -> None:
        self.reply.started()

    def refuse(self, reason: str) -> None:
        self.reply.refuse(reason)

    def is_whole(self, value: Any) -> bool:
        return True

    def answer(self, value: Any) -> None:
        sizes, buffers = dump(value, f"the result, of type {type(value).__name__},", "yes")
        self.reply.whole(CallAnswer(self.reply.others(), sizes), buffers, sum(sizes))

    async def stream(self, items: AsyncIterator[Any]) -> None:
        begun = False
        async for value in items:
            # One pickle without out-of-band buffers an item: items are many and small.
            what = f"an item of the stream, of type {type(value).__name__},"
            _, octets = dump(value, what, "yes", inline=True)
            if not begun:
                begun = True
                self.reply.begin(CallAnswer(self.reply.others(), []), STREAM)
            await self.reply.push(octets, item=True)
        if not begun:
            self.reply.begin(CallAnswer(self.reply.others(), []), STREAM)
        self.reply.finish()

    def fail(self, error: BaseException) -> None:
        failure = failure_of(error, others=self.reply.others(), in_user_code=self.in_user_code)
        self.reply.error(failure, dump_exception(error, MAX_INLINE))

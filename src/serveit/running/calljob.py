"""A job that came as a Python call: pickles in, pickles out."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from serveit.running.failures import failure_of
from serveit.running.job import Job, Lane
from serveit.wire.frames import MAX_INLINE, STREAM, Call, CallAnswer
from serveit.wire.pickles import dump, dump_exception, load

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from serveit.declare.backend import Method
    from serveit.running.reply import Reply

logger = logging.getLogger("serveit.replica")


class CallJob(Job):
    """A CALL under way in its replica."""

    __slots__ = ("_body", "_sizes")

    def __init__(self, lane: Lane, call: Call, body: bytes, deadline: float | None, reply: Reply) -> None:
        super().__init__(lane, call.target, call.request_id, deadline, reply)
        self._sizes = call.sizes
        self._body: bytes = body

    def arguments(self, method: Method) -> tuple[Any, Any]:
        args, kwargs = load(self._sizes, self._body)
        self._body = b""
        if method.is_batch:
            check_item(self.target, args, kwargs)
        return args, kwargs

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

    async def deliver(self, value: Any) -> None:
        raise AssertionError("unreachable: every value is whole")

    def fail(self, error: BaseException) -> None:
        send_error(self, error)


def raisable(error: BaseException) -> bool:
    """Whether it can be raised in the caller as it is: SystemExit would end the caller, a CancelledError
    would look like its own cancellation, and a StopIteration cannot be raised through futures."""
    return isinstance(error, Exception) and not isinstance(error, (StopIteration, StopAsyncIteration))


def send_error(job: Job, error: BaseException) -> None:
    """Send the error as it is, if it can be raised in the caller; else what it was, as text."""
    failure = failure_of(error, others=job.reply.others(), in_user_code=job.in_user_code)
    job.reply.error(failure, dump_exception(error, MAX_INLINE) if raisable(error) else b"")
    logger.debug("%s failed (request %s): %s: %s", job.target, job.request_id, failure.kind, failure.text)


def check_item(target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """TypeError unless the arguments are one item of a batch."""
    if len(args) != 1 or kwargs:
        raise TypeError(
            f"{target!r} is called with batches: give exactly one item, "
            f"not {len(args)} positional and {len(kwargs)} keyword arguments"
        )

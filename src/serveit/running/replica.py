"""A replica: one running copy of a backend. A plain class: no Ray, no sockets.

Hot path: `admit`, one task, `_release` once per request. Admission has its one owner here: at most
`max_ongoing_requests` run, whoever sends them, and a short waiting room is served round robin over
the callers.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serveit.context import Context, Resolver, enter
from serveit.declare.encoding import is_stream
from serveit.exceptions import BatchError, DeadlineExceeded, ItemErrors, ServeitError
from serveit.observe import NullObserver, Observer
from serveit.running.batching import Batcher, batch_outcomes
from serveit.running.instance import Instance
from serveit.running.job import Job, JobState, Lane

if TYPE_CHECKING:
    from serveit.config import BackendConfig
    from serveit.declare.backend import BackendRecord, Method
    from serveit.types import Clock

logger = logging.getLogger("serveit.replica")


@dataclass(frozen=True)
class ReplicaStatistics:
    """A replica at one moment."""

    running: int
    waiting: int
    gathering: int
    draining: bool


@dataclass
class BatchRun:
    """A batch that runs: how many of its jobs are still wanted."""

    task: asyncio.Task[None] | None
    wanted: int


class Cancelled(ServeitError):
    """Its caller gave the request up; nobody reads this."""

    status = 499
    default_executed = "maybe"


class Replica:
    """Constructs the backend and runs its requests.

    All mutable state: `_running` (slots taken), `_rotation` (lanes with waiting jobs, next first),
    `_waiting` (jobs in them), `_batchers` (by method), `_draining`. It belongs to the event
    loop that `start` ran in.
    """

    def __init__(
        self,
        backend: BackendRecord,
        *,
        id: str,
        app: str,
        clock: Clock,
        observer: Observer | None = None,
        resolver: Resolver | None = None,
        on_exit: Callable[[BaseException], None] | None = None,
    ) -> None:
        """
        Args:
            backend: what to run.
            id: unique in the instance.
            app: the app's name.
            clock: where time comes from.
            observer: told what happens.
            resolver: where user code finds handles.
            on_exit: called when user code raised SystemExit or KeyboardInterrupt, once its request
                is answered; without it the replica goes on.
        """
        self.id = id
        self.backend = backend
        self.config: BackendConfig = backend.config
        self.clock = clock
        self._observer = observer or NullObserver()
        self._resolver = resolver
        self._on_exit = on_exit
        self._context = Context(app, backend.name, id)
        self.instance = Instance(backend)
        self._batchers: dict[str, Batcher[Job]] = {}
        self._limit = 1
        self._running = 0
        self._rotation: deque[Lane] = deque()
        self._waiting = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def __repr__(self) -> str:
        state = "draining " if self._draining else ""
        return f"<Replica {self.id} {state}running={self._running}/{self._limit} waiting={self._waiting}>"

    @property
    def limit(self) -> int:
        """Requests that run at once; known once started."""
        return self._limit

    def statistics(self) -> ReplicaStatistics:
        gathering = sum(batcher.statistics().gathering for batcher in self._batchers.values())
        return ReplicaStatistics(self._running, self._waiting, gathering, self._draining)

    # -- life --------------------------------------------------------------------------------

    async def start(self) -> None:
        """Import, construct, `setup`, `reconfigure`, first health check.

        Raises:
            Exception: whatever the user's code raised.
        """
        context = contextvars.copy_context()
        context.run(enter, self._context, self._resolver)
        await asyncio.get_running_loop().create_task(self._start(), context=context)
        self._observer.replica_event(self.backend.name, self.id, "started")

    async def _start(self) -> None:
        await self.instance.start()
        self._limit = self.config.ongoing_limit(is_async=self.backend.is_async)

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Take nothing new and wait for what runs.

        Args:
            timeout_s: how long; None for `graceful_shutdown_timeout_s`.

        Returns:
            Whether all of it ended in time.
        """
        self._draining = True
        self._observer.replica_event(self.backend.name, self.id, "draining")
        for lane in self._rotation:
            while lane.waiting:
                job = lane.waiting.popleft()
                job.state = JobState.DONE
                job.refuse("draining")
        self._rotation.clear()
        self._waiting = 0
        limit_s = self.config.graceful_shutdown_timeout_s if timeout_s is None else timeout_s
        timed_out: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        timer = self.clock.call_later(limit_s, _set, timed_out)
        idle = asyncio.ensure_future(self._idle.wait())
        try:
            await asyncio.wait((idle, timed_out), return_when=asyncio.FIRST_COMPLETED)
        finally:
            timer.cancel()
            idle.cancel()
            timed_out.cancel()
        return self._running == 0

    async def aclose(self) -> None:
        """Let the instance clean up and end its threads; what still runs is on its own."""
        self._draining = True
        for batcher in self._batchers.values():
            batcher.close()
        await self.instance.aclose()
        self._observer.replica_event(self.backend.name, self.id, "stopped")

    # -- admission ---------------------------------------------------------------------------

    def admit(self, job: Job) -> None:
        """Run the job, let it wait, or refuse it; decided at once."""
        job.admitted_at = self.clock.time()
        backend, replica = self.backend.name, self.id
        if self._draining:
            self._observer.refused(backend, replica, "draining")
            job.refuse("draining")
        elif self._running < self._limit and not self._waiting:
            self._observer.admitted(backend, replica)
            self._begin(job)
        elif len(job.lane.waiting) < self.config.prefetch:
            self._observer.admitted(backend, replica)
            self._waiting += 1
            job.lane.waiting.append(job)
            if len(job.lane.waiting) == 1:
                self._rotation.append(job.lane)
            job.queued()
        else:
            self._observer.refused(backend, replica, "full")
            job.refuse("full")

    def others(self, lane: Lane) -> int:
        """Slots that everybody else holds; travels back on every answer."""
        return self._running - lane.running

    def cancel(self, job: Job) -> None:
        """Its caller gave up. A `def` function cannot be stopped: it keeps its slot until it returns."""
        if job.state == JobState.DONE or job.cancelled:
            return
        job.cancelled = True
        if job.state == JobState.WAITING:
            job.lane.waiting.remove(job)
            self._waiting -= 1
            if not job.lane.waiting:
                self._rotation.remove(job.lane)
            self._end(job, Cancelled("cancelled while waiting", executed="no"))
        elif job.state == JobState.GATHERING:
            self._batchers[job.target].discard(job)
            self._end(job, Cancelled("cancelled before its batch ran", executed="no"))
            self._release(job)
        elif job.batch is not None:
            job.batch.wanted -= 1
            if not job.batch.wanted and job.batch.task is not None:
                job.batch.task.cancel()
        elif job.entered and job.task is not None:
            job.task.cancel()

    def _begin(self, job: Job) -> None:
        self._running += 1
        job.lane.running += 1
        self._idle.clear()
        try:
            method, function = self.instance.method(job.target)
            if not method.is_batch:
                job.state = JobState.RUNNING
                job.task = asyncio.get_running_loop().create_task(self._run(job, method, function))
                return
            args, _ = job.arguments(method)
            (job.item,) = args
        except Exception as error:
            self._end(job, error)
            self._release(job)
            return
        job.state = JobState.GATHERING
        self._batcher(method, function).put(job)

    def _release(self, job: Job) -> None:
        """Give the slot to the next: lanes take turns, each lane's jobs in their order."""
        self._running -= 1
        job.lane.running -= 1
        while self._rotation and self._running < self._limit:
            lane = self._rotation.popleft()
            following = lane.waiting.popleft()
            self._waiting -= 1
            if lane.waiting:
                self._rotation.append(lane)
            if self._expired(following):
                self._end(
                    following, DeadlineExceeded("the deadline passed in the waiting room", executed="no")
                )
                continue
            following.started()
            self._begin(following)
        if not self._running:
            self._idle.set()

    # -- running -----------------------------------------------------------------------------

    async def _run(self, job: Job, method: Method, function: Callable[..., Any]) -> None:
        job.entered = True
        begun = self.clock.time()
        self._observer.started(self.backend.name, self.id, begun - job.admitted_at)
        error: BaseException | None = None
        try:
            if job.cancelled:
                raise asyncio.CancelledError
            enter(self._request_context(job), self._resolver)
            if self._expired(job):
                raise DeadlineExceeded("the deadline passed before the function was called", executed="no")
            args, kwargs = job.arguments(method)
            job.in_user_code = True
            value = await self.instance.call(method, function, args, kwargs)
            if is_stream(value):
                await self._stream(job, value)
            elif job.is_whole(value):
                job.answer(value)
            else:
                await job.deliver(value)
            job.state = JobState.DONE
        except BaseException as raised:
            error = Cancelled("cancelled while running") if job.cancelled else raised
            self._end(job, error)
        finally:
            self._observer.finished(self.backend.name, self.id, self.clock.time() - begun, error)
            self._release(job)
        if isinstance(error, (SystemExit, KeyboardInterrupt)):
            self._exit(error)

    async def _stream(self, job: Job, items: Any) -> None:
        steps = items if isinstance(items, AsyncIterator) else self.instance.iterate(items)
        try:
            await job.stream(steps)
        finally:
            close = getattr(steps, "aclose", None)
            if close is not None:
                await close()

    # -- batches -----------------------------------------------------------------------------

    def _batcher(self, method: Method, function: Callable[..., Any]) -> Batcher[Job]:
        batcher = self._batchers.get(method.name)
        if batcher is None:

            async def run(jobs: list[Job]) -> None:
                await self._run_batch(method, function, jobs)

            config = self.config
            batcher = self._batchers[method.name] = Batcher(
                run,
                max_size=config.max_batch_size or 1,
                wait_s=config.batch_wait_timeout_s,
                max_concurrent=config.max_concurrent_batches,
                clock=self.clock,
                wanted=self._still_wanted,
            )
        return batcher

    def _still_wanted(self, job: Job) -> bool:
        if not self._expired(job):
            return True
        self._end(job, DeadlineExceeded("the deadline passed before its batch ran", executed="no"))
        self._release(job)
        return False

    async def _run_batch(self, method: Method, function: Callable[..., Any], jobs: list[Job]) -> None:
        begun = self.clock.time()
        batch = BatchRun(asyncio.current_task(), len(jobs))
        for job in jobs:
            job.state, job.batch, job.in_user_code = JobState.RUNNING, batch, True
            self._observer.started(self.backend.name, self.id, begun - job.admitted_at)
        self._observer.batch(self.backend.name, self.id, len(jobs))
        enter(self._batch_context(jobs), self._resolver)
        failure: BaseException | None = None
        outcomes: Sequence[Any] = ()
        try:
            value = await self.instance.call(method, function, ([job.item for job in jobs],), {})
            outcomes = batch_outcomes(value, len(jobs), self.backend.name)
        except ItemErrors as error:
            try:
                outcomes = batch_outcomes(error.outcomes, len(jobs), self.backend.name)
            except BatchError as wrong:
                failure = wrong
        except BaseException as error:
            failure = error
        ran_s = self.clock.time() - begun
        for index, job in enumerate(jobs):
            self._finish_item(job, outcomes[index] if failure is None else failure, ran_s)
        if isinstance(failure, (SystemExit, KeyboardInterrupt)):
            self._exit(failure)

    def _finish_item(self, job: Job, outcome: Any, ran_s: float) -> None:
        error: BaseException | None = None
        if job.cancelled:
            error = Cancelled("cancelled while its batch ran")
        elif isinstance(outcome, BaseException):
            error = outcome
        else:
            try:
                if is_stream(outcome) or not job.is_whole(outcome):
                    raise BatchError(
                        f"a batch function's results must be whole values, got {type(outcome).__name__}"
                    )
                job.answer(outcome)
                job.state = JobState.DONE
            except Exception as raised:
                error = raised
        if error is not None:
            self._end(job, error)
        self._observer.finished(self.backend.name, self.id, ran_s, error)
        self._release(job)

    # -- small things ------------------------------------------------------------------------

    def _request_context(self, job: Job) -> Context:
        own = self._context
        return Context(own.app, own.backend, own.replica, job.request_id, job.deadline)

    def _batch_context(self, jobs: list[Job]) -> Context:
        own = self._context
        deadlines = [job.deadline for job in jobs]
        latest = (
            None if None in deadlines else max(deadline for deadline in deadlines if deadline is not None)
        )
        return Context(own.app, own.backend, own.replica, jobs[0].request_id, latest)

    def _expired(self, job: Job) -> bool:
        return job.deadline is not None and self.clock.time() >= job.deadline

    def _end(self, job: Job, error: BaseException) -> None:
        job.state = JobState.DONE
        job.fail(error)

    def _exit(self, error: BaseException) -> None:
        logger.critical("user code of backend %r raised %s", self.backend.name, type(error).__name__)
        if self._on_exit is not None:
            self._on_exit(error)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)

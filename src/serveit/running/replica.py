"""A replica: one running copy of a backend. A plain class: no Ray, no sockets.

Hot path: `admit`, one task, `_release` once per request. Admission has its one owner here: at most
`max_ongoing_requests` run, whoever sends them, and a short waiting room is served round robin over
the callers.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from serveit.context import Context, Resolver, enter
from serveit.declare.encoding import is_stream
from serveit.exceptions import DeadlineExceeded, Draining, ServeitError
from serveit.observe import NullObserver, Observer
from serveit.running.batching import Batcher, batch_outcomes, failed_outcomes
from serveit.running.failures import Cancelled
from serveit.running.instance import Instance
from serveit.running.job import BatchRun, Job, JobState, Lane, WaitingRoom, latest_deadline

if TYPE_CHECKING:
    from serveit.config import BackendConfig
    from serveit.declare.backend import BackendRecord, Method
    from serveit.types import Clock

logger = logging.getLogger("serveit.replica")

END_S, CLEAN_UP_S = 1.0, 5.0
"""What `aclose` gives cancelled requests to end, and then the user's clean-up."""


@dataclass(frozen=True)
class ReplicaStatistics:
    """A replica at one moment."""

    running: int
    waiting: int
    gathering: int
    draining: bool


class Replica:
    """Constructs the backend and runs its requests.

    All mutable state: `_running` (jobs that hold a slot), `_waiting` (jobs in the waiting room),
    `_sending` (jobs that are done, but for what their readers have not taken yet), `_batchers` (by
    method), `_draining`. It belongs to the event loop that `start` ran in.
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
        self.instance = Instance(backend)
        self._observer = observer or NullObserver()
        self._resolver = resolver
        self._on_exit = on_exit
        self._context = Context(app, backend.name, id)
        self._variables = contextvars.copy_context()
        """Every request starts in a copy of these: what one sets, no other sees."""
        self._batchers: dict[str, Batcher[Job]] = {}
        self.limit = 1
        """Requests that run at once; known once started."""
        self._running: set[Job] = set()
        self._waiting = WaitingRoom()
        self._undecided: dict[Job, None] = {}
        self._sending: set[Job] = set()
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def __repr__(self) -> str:
        state = f"{'draining ' if self._draining else ''}running={len(self._running)}/{self.limit}"
        return f"<Replica {self.id} {state} waiting={len(self._waiting)}>"

    def statistics(self) -> ReplicaStatistics:
        gathering = sum(batcher.statistics().gathering for batcher in self._batchers.values())
        return ReplicaStatistics(len(self._running), len(self._waiting), gathering, self._draining)

    # -- life --------------------------------------------------------------------------------

    async def start(self) -> None:
        """Import, construct, `setup`, `reconfigure`, first health check; `aclose` is due even if it fails.

        Raises:
            Exception: whatever the user's code raised.
        """
        self._variables = contextvars.copy_context()
        self._variables.run(enter, self._context, self._resolver)
        await self._spawn(self.instance.start(), self._variables)
        self.limit = self.config.ongoing_limit(is_async=self.backend.is_async)
        self._observer.replica_event(self.backend.name, self.id, "started")

    async def reconfigure(self, user_config: Any) -> None:
        """Hand a new `user_config` to the user's object. Raises what its `reconfigure` raises."""
        await self._spawn(self.instance.reconfigure(user_config))

    async def check_health(self) -> None:
        """Raises what the user's `check_health`, if there is one, raises: unhealthy."""
        await self._spawn(self.instance.check_health())

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Take nothing new, wait for what runs and for answers that are still going out.

        Args:
            timeout_s: how long; None for `graceful_shutdown_timeout_s`.

        Returns:
            Whether all of it ended in time.
        """
        self._close_doors()
        self._observer.replica_event(self.backend.name, self.id, "draining")
        limit_s = self.config.graceful_shutdown_timeout_s if timeout_s is None else timeout_s
        return await self._within(limit_s, self._idle.wait())

    async def aclose(self) -> None:
        """Cut off what still runs, let the object clean up and end the threads.

        What does not end by itself, as a function in a thread, is left alone after a while.
        """
        self._close_doors()
        for job in [*self._running, *self._sending]:
            if job.given_up is None:
                self._give_up(job, Draining("the replica has been stopped"))
        if not await self._within(END_S, self._idle.wait()):
            logger.warning("%r: %d requests do not end", self, len(self._running))
        if not await self._within(CLEAN_UP_S, self.instance.aclose()):
            logger.warning("%r: the clean-up of the backend's object does not end", self)
        self.instance.end_threads()
        self._observer.replica_event(self.backend.name, self.id, "stopped")

    def _close_doors(self) -> None:
        self._draining = True
        while self._waiting:
            self._refuse(self._waiting.pop(), "draining")
        for batcher in self._batchers.values():
            batcher.hurry()

    async def _within(self, limit_s: float, coroutine: Coroutine[Any, Any, Any]) -> bool:
        """Whether it ended in time, by the replica's clock; if not, it is cancelled and left alone."""
        task = self._spawn(coroutine)
        over = asyncio.Event()
        task.add_done_callback(lambda _: over.set())
        timer = self.clock.call_later(limit_s, over.set)
        try:
            await over.wait()
            return task.done()
        finally:
            timer.cancel()
            task.cancel()

    # -- admission ---------------------------------------------------------------------------

    def admit(self, job: Job) -> None:
        """Run the job, let it wait, or refuse it; decided at once."""
        job.admitted_at = self.clock.time()
        if self._draining:
            self._refuse(job, "draining")
            return
        free = self.limit - len(self._running)
        if free > 0 and not self._waiting and not self._waiting.is_contested(job.lane, self.limit):
            self._observer.admitted(self.backend.name, self.id)
            self._begin(job)
        elif len(job.lane.waiting) < self.config.prefetch + max(free, 0):
            self._observer.admitted(self.backend.name, self.id)
            self._waiting.add(job)
            if free > 0:
                self._decide_later(job)
            else:
                self._waiting.note_crowd(self.limit)
                job.queued()
        else:
            self._waiting.note_crowd(self.limit)
            self._refuse(job, "full")

    def _decide_later(self, job: Job) -> None:
        """A free slot goes by turns to who has asked by the end of this tick: where several jobs end in
        one tick, the first caller to hear of it would get all of their slots."""
        if not self._undecided:
            asyncio.get_running_loop().call_soon(self._decide)
        self._undecided[job] = None

    def _decide(self) -> None:
        self._fill()
        undecided, self._undecided = self._undecided, {}
        for job in undecided:
            if job.state == JobState.WAITING:
                self._waiting.note_crowd(self.limit)
                job.queued()

    def others(self, lane: Lane) -> int:
        """Slots that everybody else holds; travels back on every answer."""
        return len(self._running) - lane.running

    def cancel(self, job: Job) -> None:
        """Its caller gave up. A `def` function cannot be stopped: it keeps its slot until it returns."""
        if job.given_up is None:
            self._give_up(job, Cancelled("cancelled by its caller"))

    def sent(self, job: Job) -> None:
        """The last of its answer is on its way: its listener tells."""
        self._sending.discard(job)
        self._check_idle()

    def _refuse(self, job: Job, reason: str) -> None:
        job.state = JobState.DONE
        self._observer.refused(self.backend.name, self.id, reason)
        job.refuse(reason)

    def _give_up(self, job: Job, error: ServeitError) -> None:
        """End the job as far as that is possible, wherever it is."""
        job.given_up = error
        job.abort(error)
        if job.state == JobState.WAITING:
            self._waiting.remove(job)
        elif job.state == JobState.GATHERING:
            self._batchers[job.target].discard(job)
        if job.state != JobState.RUNNING:
            self._end(job, error)
        elif job.batch is not None:
            job.batch.wanted -= 1
            if not job.batch.wanted and job.batch.task is not None:
                job.batch.task.cancel()
        elif job.entered and job.task is not None:
            job.task.cancel()

    def _begin(self, job: Job) -> None:
        """Give the job a slot; one that is wrong from the start needs none."""
        try:
            method, function = self.instance.method(job.target)
            if method.is_batch:
                (job.item,), _ = job.arguments(method)
        except BaseException as error:
            self._end(job, error)
            self._check_exit(error)
            return
        self._running.add(job)
        job.lane.running += 1
        self._waiting.take_turn(job.lane)
        self._idle.clear()
        if method.is_batch:
            job.state = JobState.GATHERING
            self._batcher(method, function).put(job)
        else:
            job.state = JobState.RUNNING
            job.task = self._spawn(self._run(job, method, function))

    def _release(self, job: Job) -> None:
        """Give its slot, if it has one, to the next. Before it is answered: what the answer says of the
        replica's load is then true."""
        if job not in self._running:
            return
        self._running.remove(job)
        job.lane.running -= 1
        self._fill()

    def _fill(self) -> None:
        """Give free slots to who waits."""
        while self._waiting and len(self._running) < self.limit:
            following = self._waiting.pop()
            if late := self._late(following, "in the waiting room"):
                self._end(following, late)
                continue
            if following not in self._undecided:  # and so was told that it is queued
                following.started()
            self._begin(following)

    def _end(self, job: Job, error: BaseException) -> None:
        self._release(job)
        job.fail(error)
        self._done(job)

    def _done(self, job: Job) -> None:
        job.state = JobState.DONE
        if job.is_sending:
            self._sending.add(job)
        self._check_idle()

    def _check_idle(self) -> None:
        if not self._running and not self._sending:
            self._idle.set()

    # -- running -----------------------------------------------------------------------------

    async def _run(self, job: Job, method: Method, function: Callable[..., Any]) -> None:
        job.entered = True
        begun = self.clock.time()
        self._observer.started(self.backend.name, self.id, begun - job.admitted_at)
        error: BaseException | None = None
        try:
            job.check_wanted()
            enter(self._context.of_request(job.request_id, job.deadline), self._resolver)
            if late := self._late(job, "before the function was called"):
                raise late
            args, kwargs = job.arguments(method)
            job.in_user_code = True
            value = await self.instance.call(method, function, args, kwargs)
            job.check_wanted()
            if is_stream(value):
                await self._stream(job, value)
            elif job.is_whole(value):
                self._release(job)
                job.answer(value)
            else:
                await job.deliver(value)
            self._release(job)
            self._done(job)
        except BaseException as raised:
            error = raised
            self._end(job, job.given_up or error)
        self._observer.finished(self.backend.name, self.id, self.clock.time() - begun, job.given_up or error)
        self._check_exit(error)

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
            config = self.config
            batcher = self._batchers[method.name] = Batcher(
                partial(self._run_batch, method, function),
                max_size=config.max_batch_size or 1,
                wait_s=config.batch_wait_timeout_s,
                max_concurrent=config.max_concurrent_batches,
                clock=self.clock,
                wanted=self._still_wanted,
                context=self._variables,
            )
        return batcher

    def _still_wanted(self, job: Job) -> bool:
        if late := self._late(job, "before its batch ran"):
            self._end(job, late)
        return not late

    async def _run_batch(self, method: Method, function: Callable[..., Any], jobs: list[Job]) -> None:
        jobs = [job for job in jobs if not job.is_done]  # the rest was cancelled before this first step
        if not jobs:
            return
        begun = self.clock.time()
        batch = BatchRun(asyncio.current_task(), len(jobs))
        for job in jobs:
            job.state, job.batch, job.in_user_code = JobState.RUNNING, batch, True
            self._observer.started(self.backend.name, self.id, begun - job.admitted_at)
        self._observer.batch(self.backend.name, self.id, len(jobs))
        enter(self._context.of_request(jobs[0].request_id, latest_deadline(jobs)), self._resolver)
        error: BaseException | None = None
        try:
            value = await self.instance.call(method, function, ([job.item for job in jobs],), {})
            outcomes = batch_outcomes(value, len(jobs), self.backend.name)
        except BaseException as raised:
            error = raised
            outcomes = failed_outcomes(raised, len(jobs), self.backend.name)
        ran_s = self.clock.time() - begun
        for job, outcome in zip(jobs, outcomes, strict=True):
            self._finish_item(job, outcome, ran_s)
        self._check_exit(error)

    def _finish_item(self, job: Job, outcome: Any, ran_s: float) -> None:
        error = job.given_up or (outcome if isinstance(outcome, BaseException) else None)
        if error is None:
            try:
                self._release(job)
                job.answer_item(outcome)
                self._done(job)
            except Exception as raised:
                error = raised
        if error is not None:
            self._end(job, error)
        self._observer.finished(self.backend.name, self.id, ran_s, error)

    # -- small things ------------------------------------------------------------------------

    def _spawn(
        self, coroutine: Coroutine[Any, Any, None], context: contextvars.Context | None = None
    ) -> asyncio.Task[None]:
        """A task that starts with the replica's variables, whoever's code this runs in."""
        context = context or self._variables.copy()
        return asyncio.get_running_loop().create_task(coroutine, context=context)

    def _late(self, job: Job, where: str) -> DeadlineExceeded | None:
        """The error for a job whose deadline has passed."""
        if job.deadline is None or self.clock.time() < job.deadline:
            return None
        return DeadlineExceeded(f"the deadline passed {where}", executed="no")

    def _check_exit(self, error: BaseException | None) -> None:
        if not isinstance(error, (SystemExit, KeyboardInterrupt)):
            return
        logger.critical("user code of backend %r raised %r", self.backend.name, error)
        if self._on_exit is not None:
            self._on_exit(error)

"""A replica: one running copy of a backend. A plain class: no Ray, no sockets.

Hot path: `begin` and one task per request. Who may begin is `admission`'s: at most
`max_ongoing_requests` run, whoever sends them.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any

from serveit.context import Context, Resolver, enter
from serveit.declare.encoding import is_stream
from serveit.exceptions import DeadlineExceeded, Draining, ServeitError
from serveit.running.admission import Admission
from serveit.running.batches import Batches
from serveit.running.failures import Cancelled
from serveit.running.instance import Instance
from serveit.running.job import BatchRun, Job, JobState
from serveit.running.meter import ReplicaMeter, ReplicaStatistics

if TYPE_CHECKING:
    from serveit.config import BackendConfig
    from serveit.declare.backend import BackendRecord, Method
    from serveit.observe import Observer
    from serveit.types import Clock

logger = logging.getLogger("serveit.replica")

END_S, CLEAN_UP_S = 1.0, 5.0
"""What `aclose` gives cancelled requests to end, and then the user's clean-up."""

MAX_UNREAD = 64 * 1024 * 1024
"""While so many octets of large answers wait for their readers, further ones keep their slots."""


class Replica:
    """Constructs the backend and runs its requests.

    All mutable state: `admission` (its slots, and who waits for one), `_sending` (jobs that are done, but
    for what their readers have not taken yet) and `_unread` (the octets of these answers), `_starting`
    (the task; None before) and `_closed`. It belongs to the event loop that `start` ran in.
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
            observer: told what happens, in the place of the replica's own meter.
            resolver: where user code finds handles.
            on_exit: called when user code raised SystemExit or KeyboardInterrupt, once its request
                is answered; without it the replica goes on.
        """
        self.id = id
        self.backend = backend
        self.config: BackendConfig = backend.config
        self.clock = clock
        self.instance = Instance(backend)
        self.meter = ReplicaMeter()
        self.observer: Observer = observer or self.meter
        self._resolver = resolver
        self._on_exit = on_exit
        self._context = Context(app, backend.name, id)
        self.variables = contextvars.copy_context()
        """Every request starts in a copy of these: what one sets, no other sees."""
        self._batches = Batches(self)
        self.admission = admission = Admission(self)
        self.admit, self._release, self._running = admission.admit, admission.release, admission.running
        self._sending: set[Job] = set()
        self._unread = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._starting: asyncio.Task[None] | None = None
        self._closing = asyncio.Lock()
        self._closed = False

    def __repr__(self) -> str:
        admission = self.admission
        state = f"{'draining ' if admission.closed else ''}running={len(self._running)}/{admission.limit}"
        return f"<Replica {self.id} {state} waiting={len(admission.waiting)}>"

    def statistics(self) -> ReplicaStatistics:
        admission = self.admission
        return ReplicaStatistics(
            len(self._running), len(admission.waiting), self._batches.gathering, admission.closed
        )

    # -- life --------------------------------------------------------------------------------

    async def start(self) -> None:
        """Import, construct, `setup`, `reconfigure`, first health check; `aclose` is due even if it fails.

        Raises:
            Draining: it was stopped before.
            Exception: whatever the user's code raised.
        """
        if self.admission.closed:
            raise Draining("the replica has been stopped")
        self.variables = contextvars.copy_context()
        self.variables.run(enter, self._context, self._resolver)
        self._starting = self._spawn(self.instance.start(), self.variables)
        await self._starting
        self.admission.limit = self.config.ongoing_limit(is_async=self.backend.is_async)
        self.observer.replica_event(self.backend.name, self.id, "started")

    async def configure(self, config: BackendConfig, *, reconfigure: bool) -> None:
        """Take in other options while it serves: any but those that need another replica.

        Args:
            config: all of them.
            reconfigure: whether the user's object is handed its `user_config`. What that raises is raised,
                and the other options stay as they were.
        """
        if reconfigure:
            await self._spawn(self.instance.reconfigure(config.user_config))
        self.config = config
        self.admission.adjust(config.ongoing_limit(is_async=self.backend.is_async), config.prefetch)
        self._batches.adjust(config)

    async def check_health(self, on_begin: Callable[[], None] = lambda: None) -> None:
        """Raises what the user's `check_health`, if there is one, raises: unhealthy; see `Instance`."""
        await self._spawn(self.instance.check_health(on_begin))

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs or waits here, and no answer is still going out."""
        return self._idle.is_set() and not self.admission.waiting

    async def idle(self, timeout_s: float) -> bool:
        """Wait until it is idle, with open doors: what runs elsewhere may need it to come to its end.

        Whoever stops several replicas waits for all of them like this before the first one drains.

        Args:
            timeout_s: how long.

        Returns:
            Whether it was idle in time; it may have got something new since.
        """
        return await self._within(timeout_s, self._idle.wait())

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Take nothing new, wait for what runs and for answers that are still going out.

        Args:
            timeout_s: how long; None for `graceful_shutdown_timeout_s`.

        Returns:
            Whether all of it ended in time.
        """
        self.close_doors()
        self.observer.replica_event(self.backend.name, self.id, "draining")
        limit_s = self.config.graceful_shutdown_timeout_s if timeout_s is None else timeout_s
        return await self._within(limit_s, self._idle.wait())

    def longest_s(self, otherwise_s: float) -> float:
        """What the requests that run may still take: the rest of their deadlines, and at least so long for
        those that have none, or whose answers have begun."""
        now = self.clock.time()
        jobs = (*self._running, *self._sending)
        return max([otherwise_s, *(job.deadline - now for job in jobs if job.deadline is not None)])

    async def aclose(self) -> None:
        """Cut off what still runs, let the object clean up and end the threads.

        A start that is under way is given up; its constructor is waited for, or nobody would close what it
        makes. What else does not end by itself, as a function in a thread, is left alone after a while.
        Whoever asks again waits for the same end.
        """
        self.close_doors()
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.wait((self._starting,))
        async with self._closing:
            if not self._closed:
                await self._stop()
                self._closed = True

    async def _stop(self) -> None:
        for job in [*self._running, *self._sending]:
            if job.given_up is None:
                self._give_up(job, Draining("the replica has been stopped"))
        if not await self._within(END_S, self._idle.wait()):
            logger.warning("%r: %d requests do not end", self, len(self._running))
        if not await self._within(CLEAN_UP_S, self.instance.aclose()):
            logger.warning("%r: the clean-up of the backend's object does not end", self)
        self.instance.end_threads()
        self.observer.replica_event(self.backend.name, self.id, "stopped")

    def close_doors(self) -> None:
        """Take nothing new."""
        self.admission.close()
        self._batches.hurry()

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

    # -- jobs --------------------------------------------------------------------------------

    def cancel(self, job: Job) -> None:
        """Its caller gave up. A `def` function cannot be stopped: it keeps its slot until it returns."""
        if job.given_up is None and not job.outlives_caller:
            self._give_up(job, self._why_cancelled(job))

    def abandon(self, job: Job) -> None:
        """Whoever waits for its result gave up, or may as well: its deadline has passed."""
        if job.given_up is None and not job.is_done:
            self._give_up(job, self._why_cancelled(job))

    def lapse(self, job: Job) -> None:
        """A slot was held until its deadline and nobody took it up."""
        self._give_up(job, DeadlineExceeded("the deadline passed before the task came", executed="no"))

    def sent(self, job: Job) -> None:
        """The last of its answer is on its way: its listener tells."""
        if job in self._sending:
            self._sending.remove(job)
            self._unread -= job.reply.unread
            self._release(job)
        self._check_idle()

    def _give_up(self, job: Job, error: ServeitError) -> None:
        """End the job as far as that is possible, wherever it is."""
        job.given_up = error
        job.abort(error)
        if job.state == JobState.WAITING:
            self.admission.waiting.remove(job)
        elif job.state == JobState.GATHERING:
            self._batches.discard(job)
        if job.state != JobState.RUNNING:
            self.end(job, error)
        elif job.batch is not None:
            job.batch.wanted -= 1
            if not job.batch.wanted and job.batch.task is not None:
                job.batch.task.cancel()
        elif job.entered and job.task is not None:
            job.task.cancel()

    def begin(self, job: Job) -> None:
        """Give the job a slot; one that is wrong from the start needs none."""
        try:
            method, function = self.instance.method(job.target)
            if method.is_batch and not job.brings_arguments_later:
                (job.item,), _ = job.arguments(method)
        except BaseException as error:
            self.end(job, error)
            self.check_exit(error)
            return
        self.admission.take(job)
        self._idle.clear()
        if job.brings_arguments_later:
            job.state = JobState.RESERVED
            job.hold()
        else:
            self._launch(job, method, function)

    def claim(self, job: Job) -> None:
        """The arguments of a job that has held its slot are there: run it."""
        try:
            method, function = self.instance.method(job.target)
            if method.is_batch:
                (job.item,), _ = job.arguments(method)
        except BaseException as error:
            self.end(job, error)
            self.check_exit(error)
            return
        self._launch(job, method, function)

    def _launch(self, job: Job, method: Method, function: Callable[..., Any]) -> None:
        if method.is_batch:
            job.state = JobState.GATHERING
            self._batches.put(job, method, function)
        else:
            job.state = JobState.RUNNING
            job.task = self._spawn(self._run(job, method, function))

    def free(self, job: Job) -> None:
        """Give its slot to the next: its answer is there whole. Not while too much waits to be read: then
        the slot is kept until the answer has been, or the memory for answers would have no bound."""
        if self._unread < MAX_UNREAD:
            self._release(job)

    def is_free(self, job: Job) -> bool:
        """Whether it has no slot any more, or gives it up as soon as its code is through."""
        return job not in self._running or self._unread < MAX_UNREAD

    def end(self, job: Job, error: BaseException) -> None:
        """The job has failed."""
        self.observer.failed(self.backend.name, self.id, error)
        self._release(job)
        job.fail(error)
        self.done(job)

    def done(self, job: Job) -> None:
        """The job's last word is said; some of it may still have to wait for the reader."""
        job.state = JobState.DONE
        if job.is_sending:
            self._sending.add(job)
            self._unread += job.reply.unread
        if job in self._running and not job.reply.keeps_slot:
            self._release(job)
        self._check_idle()

    def _check_idle(self) -> None:
        if not self._running and not self._sending:
            self._idle.set()

    # -- running -----------------------------------------------------------------------------

    async def _run(self, job: Job, method: Method, function: Callable[..., Any]) -> None:
        job.entered = True
        if not method.takes_thread:
            job.begun_at = self.clock.time()
            self.observer.started(self.backend.name, self.id, job.begun_at - job.admitted_at)
        error: BaseException | None = None
        try:
            job.check_wanted()
            enter(self._context.of_request(job.request_id, job.deadline), self._resolver)
            if late := self.late(job, "before the function was called"):
                raise late
            args, kwargs = job.arguments(method)
            job.in_user_code = True
            value = await self.instance.call(method, function, args, kwargs, partial(self.note_begin, job))
            job.check_wanted()
            if is_stream(value):
                await self._stream(job, value)
            elif job.is_whole(value):
                if self._unread < MAX_UNREAD:  # else see `free`
                    self._release(job)
                job.answer(value)
            else:
                await job.deliver(value)
            self.done(job)
        except BaseException as raised:
            error = raised
            self.end(job, job.given_up or error)
        now = self.clock.time()
        begun = now if job.begun_at is None else job.begun_at
        if method.takes_thread:
            self.observer.started(self.backend.name, self.id, begun - job.admitted_at)
        self.observer.finished(self.backend.name, self.id, now - begun, job.given_up or error)
        self.check_exit(error)

    async def _stream(self, job: Job, items: Any) -> None:
        steps = items if isinstance(items, AsyncIterator) else self.instance.iterate(items)
        try:
            await job.stream(steps)
        finally:
            close = getattr(steps, "aclose", None)
            if close is not None:
                await close()

    # -- small things ------------------------------------------------------------------------

    def _spawn(
        self, coroutine: Coroutine[Any, Any, None], context: contextvars.Context | None = None
    ) -> asyncio.Task[None]:
        """A task that starts with the replica's variables, whoever's code this runs in."""
        context = context or self.variables.copy()
        return asyncio.get_running_loop().create_task(coroutine, context=context)

    def note_begin(self, run: Job | BatchRun) -> None:
        """In its thread."""
        run.begun_at = self.clock.time()

    def enter(self, request_id: str, deadline: float | None) -> None:
        """The running task's code runs for this request from here on."""
        enter(self._context.of_request(request_id, deadline), self._resolver)

    def late(self, job: Job, where: str) -> DeadlineExceeded | None:
        """The error for a job whose deadline has passed."""
        if job.deadline is None or self.clock.time() < job.deadline:
            return None
        return DeadlineExceeded(f"the deadline passed {where}", executed="no")

    def _why_cancelled(self, job: Job) -> ServeitError:
        """Callers cancel what is late, too, and are mostly the first to see it."""
        late = None if job.reply.has_begun else self.late(job, "before it was answered")
        return late or Cancelled("cancelled by its caller")

    def check_exit(self, error: BaseException | None) -> None:
        """User code asked for the end of the process: whoever runs the replica hears of it."""
        if not isinstance(error, (SystemExit, KeyboardInterrupt)):
            return
        logger.critical("user code of backend %r raised %r", self.backend.name, error)
        if self._on_exit is not None:
            self._on_exit(error)

"""A replica's batches: one batcher per method, and what becomes of the jobs of a batch that runs.

`replica` gives a job its slot and puts it here; `batching` decides who goes along with whom.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

from serveit.running.batching import Batcher, batch_outcomes, failed_outcomes
from serveit.running.job import BatchRun, Job, JobState, latest_deadline

if TYPE_CHECKING:
    from collections.abc import Callable

    from serveit.config import BackendConfig
    from serveit.declare.backend import Method
    from serveit.running.replica import Replica


class _Gathering(TypedDict):
    max_size: int
    wait_s: float
    max_concurrent: int


class Batches:
    """The batchers of one replica. All mutable state: `_batchers` (by method)."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._batchers: dict[str, Batcher[Job]] = {}

    @property
    def gathering(self) -> int:
        """Jobs whose batch does not run yet."""
        return sum(batcher.statistics().gathering for batcher in self._batchers.values())

    def put(self, job: Job, method: Method, function: Callable[..., Any]) -> None:
        """Hot path: once per item."""
        batcher = self._batchers.get(method.name)
        if batcher is None:
            batcher = self._batchers[method.name] = self._batcher(method, function)
        batcher.put(job)

    def discard(self, job: Job) -> None:
        """Forget a job whose batch does not run yet."""
        self._batchers[job.target].discard(job)

    def hurry(self) -> None:
        """Wait for no more items."""
        for batcher in self._batchers.values():
            batcher.hurry()

    def adjust(self, config: BackendConfig) -> None:
        """Gather by other options from here on."""
        for batcher in self._batchers.values():
            batcher.adjust(**_gathering(config))

    def _batcher(self, method: Method, function: Callable[..., Any]) -> Batcher[Job]:
        return Batcher(
            partial(self._run, method, function),
            **_gathering(self._replica.config),
            clock=self._replica.clock,
            wanted=self._still_wanted,
            context=self._replica.variables,
        )

    def _still_wanted(self, job: Job) -> bool:
        if late := self._replica.late(job, "before its batch ran"):
            self._replica.end(job, late)
        return not late

    async def _run(self, method: Method, function: Callable[..., Any], jobs: list[Job]) -> None:
        jobs = [job for job in jobs if not job.is_done]  # the rest was cancelled before this first step
        if not jobs:
            return
        replica, count, name = self._replica, len(jobs), self._replica.backend.name
        batch = BatchRun(asyncio.current_task(), count)
        for job in jobs:
            job.state, job.batch, job.in_user_code = JobState.RUNNING, batch, True
        if not method.takes_thread:
            batch.begun_at = replica.clock.time()
            self._tell_begun(jobs, batch.begun_at)
        replica.observer.batch(name, replica.id, count)
        replica.enter(jobs[0].request_id, latest_deadline(jobs))
        error: BaseException | None = None
        try:
            items = [job.item for job in jobs]
            value = await replica.instance.call(
                method, function, (items,), {}, partial(replica.note_begin, batch)
            )
            outcomes = batch_outcomes(value, count, name)
        except BaseException as raised:
            error = raised
            outcomes = failed_outcomes(raised, count, name)
        now = replica.clock.time()
        begun = now if batch.begun_at is None else batch.begun_at
        if method.takes_thread:
            self._tell_begun(jobs, begun)
        for job, outcome in zip(jobs, outcomes, strict=True):
            self._finish(job, outcome, now - begun)
        replica.check_exit(error)

    def _tell_begun(self, jobs: list[Job], begun: float) -> None:
        replica = self._replica
        for job in jobs:
            replica.observer.started(replica.backend.name, replica.id, begun - job.admitted_at)

    def _finish(self, job: Job, outcome: Any, ran_s: float) -> None:
        """Answer one job. Whatever its result does when it is encoded, its mates get theirs."""
        replica = self._replica
        error = job.given_up or (outcome if isinstance(outcome, BaseException) else None)
        escaped: BaseException | None = None
        if error is None:
            try:
                replica.free(job)
                job.answer_item(outcome)
                replica.done(job)
            except BaseException as raised:
                error = escaped = raised
        if error is not None:
            replica.end(job, error)
        replica.observer.finished(replica.backend.name, replica.id, ran_s, error)
        replica.check_exit(escaped)


def _gathering(config: BackendConfig) -> _Gathering:
    return {
        "max_size": config.max_batch_size or 1,
        "wait_s": config.batch_wait_timeout_s,
        "max_concurrent": config.max_concurrent_batches,
    }

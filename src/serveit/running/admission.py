"""Who gets a slot of a replica, who waits, and who is refused: whoever sends, and whatever they believe.

Hot path: `admit`, `take` and `release` once per request.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from serveit.running.job import Job, JobState, Lane, WaitingRoom
from serveit.running.notices import Notices

if TYPE_CHECKING:
    from serveit.running.replica import Replica


class Admission:
    """The slots of one replica and its waiting room, which is served round robin over the callers.

    All mutable state: `limit` (of slots; known once the replica has started), `running` (jobs that hold
    one), `waiting` (jobs in the waiting room), `_undecided` (those of them that have not been told),
    `closed` (nothing new is taken).
    """

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._prefetch = replica.config.prefetch
        self._backend = replica.backend.name
        self.notices = Notices(self, replica.clock)
        self.limit = 1
        self.running: set[Job] = set()
        self.waiting = WaitingRoom()
        self.closed = False
        self._undecided: dict[Job, None] = {}

    def __repr__(self) -> str:
        return f"<Admission running={len(self.running)}/{self.limit} waiting={len(self.waiting)}>"

    def adjust(self, limit: int, prefetch: int) -> None:
        """Another number of slots, and of places in the waiting room for each caller. What runs beyond it
        may end."""
        self.limit, self._prefetch = limit, prefetch
        self._fill()
        if self.notices.lanes:
            self.notices.schedule()

    def admit(self, job: Job) -> None:
        """Run the job, let it wait, or refuse it; decided at once."""
        replica = self._replica
        job.admitted_at = replica.clock.time()
        if self.closed:
            self._refuse(job, "draining")
            return
        free = self.limit - len(self.running)
        if free > 0 and not self.waiting and not self.waiting.is_contested(job.lane, self.limit):
            replica.observer.admitted(self._backend, replica.id)
            replica.begin(job)
        elif len(job.lane.waiting) < self._prefetch + max(free, 0):
            replica.observer.admitted(self._backend, replica.id)
            self.waiting.add(job)
            if free > 0:
                self._decide_later(job)
            else:
                self.waiting.note_crowd(self.limit)
                job.queued()
        else:
            self.waiting.note_crowd(self.limit)
            self._refuse(job, "full")
            self.notices.refused(job.lane)

    def take(self, job: Job) -> None:
        """The job has a slot from here on."""
        lane = job.lane
        self.running.add(job)
        lane.running += 1
        self.waiting.take_turn(lane)
        if lane.told and lane not in self.notices.lanes:
            self.notices.consider(lane)

    def release(self, job: Job) -> None:
        """Give its slot, if it has one, to the next. Before it is answered: what the answer says of the
        replica's load is then true."""
        if job not in self.running:
            return
        self.running.remove(job)
        job.lane.running -= 1
        if self.waiting:
            self._fill()
        if self.notices.lanes:
            self.notices.schedule()

    def close(self) -> None:
        """Refuse who waits, and who comes from here on."""
        self.closed = True
        while self.waiting:
            self._refuse(self.waiting.pop(), "draining")
        self.notices.close()

    @property
    def has_free_slot(self) -> bool:
        """Whether a job that came now would run: there is a slot, and nobody before it."""
        return len(self.running) < self.limit and not self.waiting

    def held_by_others(self, lane: Lane) -> int:
        """Slots that everybody else holds."""
        return len(self.running) - lane.running

    def others(self, lane: Lane) -> int:
        """The same, for the lane to hear; travels back on every answer. Hot path."""
        others = lane.told = len(self.running) - lane.running
        if others and lane not in self.notices.lanes:
            self.notices.consider(lane)
        return others

    def _fill(self) -> None:
        """Give free slots to who waits."""
        replica = self._replica
        while self.waiting and len(self.running) < self.limit:
            following = self.waiting.pop()
            if late := replica.late(following, "in the waiting room"):
                replica.end(following, late)
                continue
            if following not in self._undecided:  # and so was told that it is queued
                following.started()
            replica.begin(following)

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
                self.waiting.note_crowd(self.limit)
                job.queued()
        if self.notices.lanes:
            self.notices.schedule()

    def _refuse(self, job: Job, reason: str) -> None:
        job.state = JobState.DONE
        self._replica.observer.refused(self._backend, self._replica.id, reason)
        job.refuse(reason)

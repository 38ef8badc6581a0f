"""The one hook on which metrics and tracing hang, so that the logic holds no lines of theirs."""

from __future__ import annotations

from typing import Protocol


class Observer(Protocol):
    """What replicas and routers report. Called on the event loop; it must not block or raise."""

    def admitted(self, backend: str, replica: str) -> None:
        """A request got a place in the replica's waiting room or a slot."""

    def started(self, backend: str, replica: str, waited_s: float) -> None:
        """A request begins to run, this long after it was admitted. Of a function that takes a thread it is
        told when the function has returned: before, nobody on the event loop knows."""

    def batch(self, backend: str, replica: str, size: int) -> None:
        """A batch of that many items goes to user code."""

    def finished(self, backend: str, replica: str, ran_s: float, error: BaseException | None) -> None:
        """A request that was started ended and left its slot; `error` is None if it was answered."""

    def failed(self, backend: str, replica: str, error: BaseException) -> None:
        """A request that was admitted ends with an error, started or not."""

    def refused(self, backend: str, where: str, reason: str) -> None:
        """A router ("router") or replica (its id) refused a request: "full", "draining"."""

    def replica_event(self, backend: str, replica: str, event: str) -> None:
        """A replica changed: "started", "unhealthy", "draining", "stopped"."""


class NullObserver:
    """The default: sees nothing."""

    def admitted(self, backend: str, replica: str) -> None: ...

    def started(self, backend: str, replica: str, waited_s: float) -> None: ...

    def batch(self, backend: str, replica: str, size: int) -> None: ...

    def finished(self, backend: str, replica: str, ran_s: float, error: BaseException | None) -> None: ...

    def failed(self, backend: str, replica: str, error: BaseException) -> None: ...

    def refused(self, backend: str, where: str, reason: str) -> None: ...

    def replica_event(self, backend: str, replica: str, event: str) -> None: ...

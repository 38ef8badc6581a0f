"""What the handles of one app share in one event loop: the names, the loop, the ways in and out.

The base is for one process without Ray; `cluster/` has the kind that joins an instance.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol

from anyio.from_thread import BlockingPortal

from serveit.exceptions import NeedsRay

if TYPE_CHECKING:
    import contextlib

    from serveit.calling.directory import Directory
    from serveit.calling.handle import HandleOptions
    from serveit.control.snapshot import ReplicaInfo


async def open_portal(stack: contextlib.AsyncExitStack) -> BlockingPortal:
    """The way to the running event loop from other threads, until `stack` is closed.

    It lives in a task of its own: whoever closes it may be another.
    """
    loop = asyncio.get_running_loop()
    opened: asyncio.Future[BlockingPortal] = loop.create_future()

    async def hold() -> None:
        async with BlockingPortal() as portal:
            opened.set_result(portal)
            await portal.sleep_until_stopped()

    holder = loop.create_task(hold())

    async def stop() -> None:
        await (await opened).stop(cancel_remaining=True)
        await holder

    stack.push_async_callback(stop)
    return await asyncio.shield(opened)


class Tasks(Protocol):
    """What of a call is Ray's: tasks and ObjectRefs. Only `cluster/` knows how."""

    def are_among(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether some argument is an ObjectRef."""

    async def fetch(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with the values of ObjectRefs in their places."""

    async def wait(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Wait until the ObjectRefs among the arguments can be had, without fetching them."""

    async def start(
        self, replica: ReplicaInfo, request_id: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Start the actor task for a slot that is held, and give its ObjectRef."""


class Gateway:
    """The way of one event loop to one app.

    Attributes:
        app: its name.
        directory: names to routers.
        loop: the event loop that the routers live in.
        portal: the way to that loop from other threads.
        tasks: behind `Handle.remote` and ObjectRef arguments; None where Ray does not run.
    """

    def __init__(
        self,
        directory: Directory,
        loop: asyncio.AbstractEventLoop,
        portal: BlockingPortal,
        tasks: Tasks | None = None,
    ) -> None:
        self.app = directory.app
        self.directory = directory
        self.loop = loop
        self.portal = portal
        self.tasks = tasks

    @property
    def closed(self) -> bool:
        return self.directory.closed

    def is_here(self) -> bool:
        """Whether the running event loop may use it as it is. Hot path: once per call."""
        return asyncio.get_running_loop() is self.loop

    async def enter(self, who: object) -> Gateway:
        """The gateway to the same app for the running event loop.

        Raises:
            RuntimeError: there is none.
        """
        raise RuntimeError(
            f"{who!r} belongs to another event loop: get one in this loop, "
            "or use its blocking form `handle.sync` from a thread"
        )

    def needs_tasks(self) -> Tasks:
        """Raises NeedsRay where there are none."""
        if self.tasks is None:
            raise NeedsRay(
                f"handle.remote() gives a ray.ObjectRef and {self.app!r} runs "
                "without Ray: use `await handle.call(...)`, which gives the value"
            )
        return self.tasks

    def reduce(self, name: str, options: HandleOptions, *, sync: bool) -> tuple[Any, ...]:
        """What pickles a handle; see `object.__reduce__`."""
        raise TypeError(
            f"a handle on {name!r} cannot be pickled: without Ray it stays in its process; "
            "inside a backend use `app.handle(...)`"
        )

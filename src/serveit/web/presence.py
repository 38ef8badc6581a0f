"""Whether the client is still there while its answer is made, and how it is shown a broken answer.

serveit's protocol class calls back when its connection is lost, which costs nothing; under other
ASGI servers (and in tests) a task waits for `http.disconnect`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Receive, Scope

EXTENSION = "serveit"
"""The key in `scope["extensions"]` under which serveit's protocol class gives itself."""


class AnswerBroken(RuntimeError):
    """An answer failed after its head was sent. Told to an ASGI server, which then has to cut it off."""


class Presence(Protocol):
    """The client of one request."""

    is_lost: bool
    """It has gone."""
    announces_bodies: bool
    """A body follows only where the header says so, as in HTTP/1.1."""

    def watch(self, on_lost: Callable[[], None]) -> None:
        """Call `on_lost` once, when the client leaves; at once if it has left."""

    def unwatch(self, on_lost: Callable[[], None]) -> None:
        """Nobody wants to know any more."""

    def cut(self) -> None:
        """End the connection without the end of the answer, which the client can see.

        Raises:
            AnswerBroken: only the server could do that, and this tells it.
        """


def presence_of(scope: Scope, receive: Receive) -> Presence:
    """The connection itself if it is serveit's own, else what ASGI offers."""
    extensions = scope.get("extensions")
    found: Any = extensions.get(EXTENSION) if extensions else None
    return found if found is not None else AsgiPresence(receive)


class AsgiPresence:
    """Goes by `receive`; watch only after the body has been read."""

    announces_bodies = False

    def __init__(self, receive: Receive) -> None:
        self.is_lost = False
        self._receive = receive
        self._task: asyncio.Task[None] | None = None

    def watch(self, on_lost: Callable[[], None]) -> None:
        self._task = asyncio.get_running_loop().create_task(self._wait(on_lost))

    def unwatch(self, on_lost: Callable[[], None]) -> None:
        if self._task is not None:
            self._task.cancel()

    def cut(self) -> None:
        raise AnswerBroken("the answer failed after its head was sent")

    async def _wait(self, on_lost: Callable[[], None]) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.is_lost = True
        on_lost()

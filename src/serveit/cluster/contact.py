"""How a process speaks with the controller: calls, and a line whose end tells that the process is gone."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

import msgspec
import ray

from serveit.control.orders import CONTROLLER, NAMESPACE, Joined, parse_place
from serveit.exceptions import NotServing
from serveit.wire.channel import connect

if TYPE_CHECKING:
    from collections.abc import Callable

    from serveit.wire.channel import Channel
    from serveit.wire.frames import Frame

logger = logging.getLogger("serveit.watch")

CONTROL_S = 5.0
"""What the controller gets to answer."""
RESTART_S = 20.0
"""What Ray gets to start a controller that died anew; it takes 1 to 2 s."""
LOOK_S = 0.2
AGAIN_S = (0.0, 0.1, 0.3, 0.6, 1.0, 3.0, 10.0)
"""Pauses before the attempts to open a line again; those within 2 s keep an owner's apps."""
GONE = "the controller is gone: requests go on, but nothing can be changed before the app is served anew"


def find_controller() -> Any:
    """The controller of the instance in this process's Ray.

    Raises:
        NotServing: there is none.
    """
    if not ray.is_initialized():
        raise NotServing("this process is not connected to Ray: ray.init(address=...) comes first")
    try:
        return ray.get_actor(CONTROLLER, namespace=NAMESPACE)
    except ValueError:
        raise NotServing(
            "no serveit instance runs in this Ray cluster: `serveit deploy module:app` starts one, "
            "as does `async with serveit.serve(app)`"
        ) from None


async def ask(controller: Any, method: str, *args: Any, timeout_s: float | None = CONTROL_S) -> Any:
    """What the controller answers. If it dies meanwhile, the one that Ray starts in its place is asked: all
    that can be asked of it can be asked twice.

    Args:
        controller: its actor.
        method: of that.
        args: for it.
        timeout_s: what it gets; None for as long as it takes, if only it shows that it lives.

    Raises:
        NotServing: it is gone, or says nothing for so long, or Ray has been shut down.
        Exception: what it refuses the request with.
    """
    lost_at: float | None = None
    while True:
        if not ray.is_initialized():  # or Ray would start itself anew
            raise NotServing("Ray has been shut down in this process, and the app's client with it")
        began = time.monotonic()
        try:
            return await _answer(controller, getattr(controller, method).remote(*args), timeout_s)
        except TimeoutError:
            silent_s = CONTROL_S if timeout_s is None else timeout_s
            raise NotServing(
                f"the controller has not answered for {silent_s:g} s; what it was asked for may go on: "
                "`serveit status` shows",
                executed="maybe",
            ) from None
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.ActorUnavailableError as error:
            now = time.monotonic()
            if lost_at is None or now - began > RESTART_S:
                lost_at = now
            if now - lost_at > RESTART_S:
                raise NotServing(f"{GONE} ({type(error).__name__})", executed="maybe") from None
            await asyncio.sleep(LOOK_S)
        except ray.exceptions.RayActorError as error:
            raise NotServing(f"{GONE} ({type(error).__name__})", executed="maybe") from None


async def _answer(controller: Any, ref: Any, timeout_s: float | None) -> Any:
    """Raises TimeoutError; without a limit, where the controller does not say either that it is there."""
    if timeout_s is not None:
        return await asyncio.wait_for(ref, timeout_s)
    waiting = asyncio.ensure_future(_result(ref))
    try:
        while not (await asyncio.wait((waiting,), timeout=CONTROL_S))[0]:
            await asyncio.wait_for(controller.is_there.remote(), CONTROL_S)
        return waiting.result()
    finally:
        waiting.cancel()


async def _result(ref: Any) -> Any:
    return await ref


async def join(controller: Any, timeout_s: float = CONTROL_S) -> Joined:
    """What the controller tells those who take part. Raises NotServing as `ask` does."""
    return msgspec.msgpack.decode(await ask(controller, "join", timeout_s=timeout_s), type=Joined)


class Line:
    """A connection to the controller, whose end tells it that a watcher or an owner of apps is gone.

    It is opened again where it breaks while this process lives.
    """

    def __init__(self, find: Callable[[], Any], role: str, **who: str) -> None:
        """
        Args:
            find: gives the controller's actor.
            role: of this process.
            who: "member", a watcher's name, or "owner".
        """
        self._find = find
        self._role = role
        self._who = who
        self._channel: Channel | None = None
        self._opening: asyncio.Task[None] | None = None
        self._closed = False

    async def open(self, joined: Joined) -> None:
        """Connect. Raises OSError."""
        place = parse_place(joined.lines)
        near = place.node == ray.get_runtime_context().get_node_id()
        address = place.unix if near else place.tcp
        if not address:
            raise OSError("the controller is on another node and listens on none of its addresses")
        self._channel = await connect(address, self, role=self._role, secret=joined.secret, extra=self._who)
        if self._closed:
            self._channel.close()

    def close(self) -> None:
        self._closed = True
        if self._opening is not None:
            self._opening.cancel()
        if self._channel is not None:
            self._channel.close()

    # -- wire.link.Receiver ------------------------------------------------------------------

    def frame_received(self, frame: Frame) -> None:
        """Nothing is said here."""

    def link_lost(self, error: BaseException | None) -> None:
        if not self._closed:
            self._opening = asyncio.get_running_loop().create_task(self._again())

    async def _again(self) -> None:
        for pause_s in AGAIN_S:
            await asyncio.sleep(pause_s)
            try:
                await self.open(await join(self._find()))
            except (NotServing, OSError) as error:
                logger.debug("the line to the controller cannot be opened: %s", error)
            else:
                return
        logger.warning("the connection to the controller is lost")

"""What carries frames between a caller and a replica, whatever it is made of.

Two kinds: `memory` (both ends in one event loop) and `channel` (sockets). Both keep the order, lose
nothing while they are open, and hand over octets rather than objects. The same tests run on both
(`tests/test_link.py`), and both leave it to `receive` and `lose` here what a receiver sees.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

from serveit.exceptions import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from serveit.wire.frames import Buffer, Decoder, Frame

logger = logging.getLogger("serveit.wire")


class Receiver(Protocol):
    """Who sits at one end of a link. Called on the event loop; must not block."""

    def frame_received(self, frame: Frame) -> None:
        """Frames in the order they were sent. A ProtocolError closes the link."""

    def link_lost(self, error: BaseException | None) -> None:
        """Called once, last: the link was closed (None) or broke."""


class Link(Protocol):
    """One end of a connection."""

    closed: bool
    """This end was closed or lost: nothing is sent any more, and no frame handed over."""

    stale: bool
    """Nothing was heard from the other end for several heartbeats: it hangs or cannot be reached. Turns
    False again, before the frame is handed over, when something comes after all."""

    def send(self, kind: int, stream: int, meta: bytes = b"", body: Buffer = b"", flags: int = 0) -> None:
        """Queue a frame; all frames of one loop tick go out in one write. Silent once closed.

        Raises:
            ProtocolError: the frame is too long; nothing was sent.
        """

    def flush(self) -> None:
        """Write what is queued now rather than at the end of the tick."""

    def close(self) -> None:
        """The other end still gets what was sent before; then both receivers get `link_lost`.

        What is on its way from the other end is dropped.
        """


def receive(data: Buffer, decoder: Decoder, receiver: Receiver, link: Link) -> None:
    """Octets came in: hand over the frames in them. What is not serveit's ends the link, after the
    frames that came whole before it."""
    try:
        frames = decoder.feed(data)
    except ProtocolError as error:
        _refuse(link, error)
        return
    deliver(frames, receiver, link)
    if decoder.error is not None and not link.closed:
        _refuse(link, decoder.error)


def deliver(frames: Iterable[Frame], receiver: Receiver, link: Link) -> None:
    """Hand decoded frames to a receiver until it closes the link.

    An exception in the handling of one frame must not cost the others theirs: it is logged. A
    `ProtocolError` is the peer's fault and ends the link.
    """
    for frame in frames:
        if link.closed:
            return
        try:
            receiver.frame_received(frame)
        except ProtocolError as error:
            _refuse(link, error)
            return
        except Exception:
            logger.exception("a frame of type %d could not be handled", frame.type)


def lose(receiver: Receiver, error: BaseException | None) -> None:
    """Tell a receiver that its link is gone; what it makes of that must not keep others from hearing."""
    try:
        receiver.link_lost(error)
    except Exception:
        logger.exception("the loss of a link could not be handled")


def _refuse(link: Link, error: ProtocolError) -> None:
    logger.warning("closing a link: %s", error)
    link.close()

"""What carries frames between a caller and a replica, whatever it is made of.

Two kinds: `memory` (both ends in one event loop) and `channel` (sockets). Both keep the order, lose
nothing while they are open, and hand over octets rather than objects. The same tests run on both.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

from serveit.exceptions import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from serveit.wire.frames import Buffer, Frame

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

    def send(self, kind: int, stream: int, meta: bytes = b"", body: Buffer = b"", flags: int = 0) -> None:
        """Queue a frame; all frames of one loop tick go out in one write. Silent once closed.

        Raises:
            ProtocolError: the frame is too long; nothing was sent.
        """

    def flush(self) -> None:
        """Write what is queued now rather than at the end of the tick."""

    def close(self) -> None:
        """Both receivers get `link_lost` once what is queued has been handed over."""


def deliver(frames: Iterable[Frame], receiver: Receiver, link: Link) -> None:
    """Hand decoded frames to a receiver.

    An exception in the handling of one frame must not cost the others theirs: it is logged. A
    `ProtocolError` is the peer's fault and ends the link.
    """
    for frame in frames:
        try:
            receiver.frame_received(frame)
        except ProtocolError as error:
            logger.warning("closing a link: %s", error)
            link.close()
            return
        except Exception:
            logger.exception("a frame of type %d could not be handled", frame.type)

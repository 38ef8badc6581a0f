"""Python values to octets and back: pickle 5, large buffers out of band.

Used only between authenticated Python callers and replicas; a proxy never imports this.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

from serveit.exceptions import EncodingError, RemoteError, RemoteTraceback

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serveit.types import Executed
    from serveit.wire.frames import Buffer, Failure


def dump(
    value: Any, what: str, executed: Executed = "no", *, inline: bool = False
) -> tuple[list[int], list[Buffer]]:
    """Pickle a value.

    Args:
        value: anything that pickles.
        what: how the error names it: "the arguments of 'classify'".
        executed: what the error says of user code.
        inline: keep large buffers in the pickle; it is then the only buffer.

    Returns:
        The sizes of the buffers, and the buffers: first the pickle, then what it refers to.

    Raises:
        EncodingError: it does not pickle.
    """
    outside: list[pickle.PickleBuffer] = []
    try:
        head = pickle.dumps(value, protocol=5, buffer_callback=None if inline else outside.append)
        buffers: list[Buffer] = [head, *(buffer.raw() for buffer in outside)]
    except Exception as error:
        raise EncodingError(
            f"{what} cannot be pickled ({type(error).__name__}: {error})", executed=executed
        ) from error
    return [buffer.nbytes if isinstance(buffer, memoryview) else len(buffer) for buffer in buffers], buffers


def load(sizes: Sequence[int], body: Buffer) -> Any:
    """The value again. Arrays in it own their memory and are writable, as after a plain pickle."""
    if len(sizes) <= 1:
        return pickle.loads(body)
    view = memoryview(body if isinstance(body, bytearray) else bytearray(body))
    buffers: list[memoryview] = []
    position = sizes[0]
    for size in sizes[1:]:
        buffers.append(view[position : position + size])
        position += size
    return pickle.loads(view[: sizes[0]], buffers=buffers)


def dump_exception(error: BaseException, limit: int) -> bytes:
    """The pickled exception; empty if it does not pickle, or not into `limit` octets, or does not
    come back from its pickle."""
    try:
        pickled = pickle.dumps(error, protocol=5)
        pickle.loads(pickled)
    except Exception:
        return b""
    return pickled if len(pickled) <= limit else b""


def load_exception(failure: Failure, body: bytes) -> BaseException:
    """What a replica's ERROR means here: the original exception, or a RemoteError that describes it.

    The replica's traceback is its cause, and `executed` is what the replica said, whatever the
    exception's class: a QueueFull that user code raised is not one of this caller's router.
    """
    error: Any = None
    if body:
        try:
            error = pickle.loads(body)
        except Exception:
            error = None
    if not isinstance(error, BaseException):
        error = RemoteError(f"{failure.kind}: {failure.text}", failure.traceback)
    rebuilt: BaseException = error
    if failure.traceback:
        rebuilt.__cause__ = RemoteTraceback(failure.traceback)
    try:
        error.executed = failure.executed
    except AttributeError:
        pass  # an exception with __slots__
    return rebuilt

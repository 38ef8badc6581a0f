"""Python values to octets and back: pickle 5, large buffers out of band.

Used only between authenticated Python callers and replicas; a proxy never imports this. What some types
need beyond plain pickle (Ray's, which rooms down here do not know) is registered: see `register`.
"""

from __future__ import annotations

import io
import pickle
from types import FunctionType, WrapperDescriptorType
from typing import TYPE_CHECKING, Any

from serveit.exceptions import EncodingError, ProtocolError, RemoteError, RemoteTraceback

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from serveit.types import Executed
    from serveit.wire.frames import Buffer, Failure

MIN_OUTSIDE = 4 * 1024
"""Smaller buffers stay in the pickle: copying them costs less than a frame of their own, and their
sizes have to fit the metadata, were there a hundred thousand."""

MAX_OUTSIDE = 1_000
"""So many buffers out of band at most, for the same reason."""

_reducers: dict[type, Callable[[Any], tuple[Any, ...]]] = {}


def register(kind: type, reducer: Callable[[Any], tuple[Any, ...]]) -> None:
    """Pickle values of exactly this type with `reducer` wherever they stand in what is sent. Only here:
    `copyreg` would change the user's own pickles, and copies, too.

    Args:
        kind: the type.
        reducer: gives what `__reduce__` would. The EncodingError that it raises is the one that is seen.
    """
    _reducers[kind] = reducer


class _Pickler(pickle.Pickler):
    """A pickler that asks `_reducers` first."""

    def reducer_override(self, value: Any) -> Any:
        reducer = _reducers.get(type(value))
        return NotImplemented if reducer is None else reducer(value)


def _dumps(value: Any, outside: Callable[[pickle.PickleBuffer], Any] | None = None) -> bytes:
    """Hot path: once per call and result. A pickler of our own costs 0.7 µs more than `pickle.dumps`."""
    if not _reducers:
        return pickle.dumps(value, protocol=5, buffer_callback=outside)
    file = io.BytesIO()
    # By place, which is faster: protocol, fix_imports (of no effect from 3 on), buffer_callback.
    _Pickler(file, 5, True, outside).dump(value)
    return file.getvalue()


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
        The sizes of the buffers, and the buffers: first the pickle, then what it refers to. These
        are the value's own memory, not copies.

    Raises:
        EncodingError: it does not pickle.
    """
    outside: list[memoryview] = []

    def stays(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < MIN_OUTSIDE or len(outside) >= MAX_OUTSIDE:
            return True
        outside.append(raw)
        return False

    try:
        head = _dumps(value, None if inline else stays)
    except EncodingError as error:
        raise EncodingError(f"{what} cannot be sent: {error}", executed=executed) from error
    except Exception as error:
        raise EncodingError(
            f"{what} cannot be pickled ({type(error).__name__}: {error})", executed=executed
        ) from error
    return [len(head), *(raw.nbytes for raw in outside)], [head, *outside]


def load(sizes: Sequence[int], body: Buffer) -> Any:
    """The value again; arrays that were writable are so here too, and share `body` if it is a bytearray.

    Args:
        sizes: as `dump` gave them; none for a pickle alone.
        body: the buffers, one after the other.

    Raises:
        ProtocolError: the sizes contradict the body.
        Exception: whatever unpickling raises, with a note that says so.
    """
    if not sizes:
        return _loads(body, ())
    if min(sizes) < 0 or sum(sizes) != len(body):
        raise ProtocolError(
            f"a pickle and its buffers are said to have {list(sizes)[:8]} octets, but {len(body):,} came"
        )
    if len(sizes) == 1:
        return _loads(body, ())
    view = memoryview(body if isinstance(body, bytearray) else bytearray(body))
    buffers: list[memoryview] = []
    position = sizes[0]
    for size in sizes[1:]:
        buffers.append(view[position : position + size])
        position += size
    return _loads(view[: sizes[0]], buffers)


def _loads(octets: Buffer, buffers: Sequence[memoryview]) -> Any:
    try:
        return pickle.loads(octets, buffers=buffers)
    except Exception as error:
        error.add_note("(while unpickling what came from the other process: its classes have to exist here)")
        raise


def dump_exception(error: BaseException, limit: int) -> bytes:
    """The pickled exception; empty if it does not pickle, or not into `limit` octets, or does not
    come back from its pickle as what it was.

    Plain pickle calls the class with `args` again, which is what its constructor gave to
    `Exception.__init__` and seldom what it takes itself. Where that fails, or makes another text of it,
    the exception is given a way of its own to be pickled, which whoever pickles it next takes, too: Ray.
    """
    if isinstance(error, BaseExceptionGroup):
        for member in error.exceptions:
            dump_exception(member, limit)
    pickled, is_same = _there_and_back(error, limit)
    if is_same or not _is_remade_by_its_class(error):
        return pickled
    reduced = (remade, (type(error), error.args), dict(vars(error)))
    BaseException.__setattr__(error, "__reduce_ex__", lambda protocol: reduced)
    whole, _ = _there_and_back(error, limit)
    if not whole:
        BaseException.__delattr__(error, "__reduce_ex__")
    return whole or pickled


def _there_and_back(error: BaseException, limit: int) -> tuple[bytes, bool]:
    """Its pickle, if an exception of its class comes out of that; and whether its text is the same."""
    try:
        pickled = _dumps(error)
        back = pickle.loads(pickled) if len(pickled) <= limit else None
        return (pickled, str(back) == str(error)) if type(back) is type(error) else (b"", False)
    except BaseException:  # whatever user code's `__reduce__` and constructor do, a SystemExit too
        return b"", False


def _is_remade_by_its_class(error: BaseException) -> bool:
    """Whether pickle leaves it to a constructor written in Python."""
    kind = type(error)
    is_plain = kind.__reduce__ is BaseException.__reduce__ and kind.__reduce_ex__ is object.__reduce_ex__
    return is_plain and isinstance(kind.__init__, FunctionType)


def remade(kind: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    """An exception with these `args`, without its class's own constructor. Pickles refer to it."""
    base: Any = next(
        base for base in kind.__mro__ if isinstance(vars(base).get("__init__"), WrapperDescriptorType)
    )
    error: BaseException = base.__new__(kind, *args)
    base.__init__(error, *args)
    return error


def load_exception(failure: Failure, body: bytes) -> Exception:
    """What a replica's ERROR means here: the original exception, or a RemoteError that describes it.

    The replica's traceback is its cause, and `executed` is what the replica said, whatever the
    exception's class: a QueueFull that user code raised is not one of this caller's router. What
    would do something else here than fail the call (SystemExit and CancelledError; StopIteration,
    which no future takes) is described.
    """
    error = _rebuild(body) if body else None
    if error is None:
        error = RemoteError(f"{failure.kind}: {failure.text}", failure.traceback)
    try:
        # Past a `__setattr__` of its class's own.
        if failure.traceback:
            Exception.__setattr__(error, "__cause__", RemoteTraceback(failure.traceback))
        Exception.__setattr__(error, "executed", failure.executed)
    except AttributeError:
        pass  # a read-only property of that name
    return error


def _rebuild(body: bytes) -> Exception | None:
    try:
        error = pickle.loads(body)
    except BaseException:  # a peer's octets must not end this process, whatever they unpickle to
        return None
    return error if isinstance(error, Exception) and not isinstance(error, StopIteration) else None

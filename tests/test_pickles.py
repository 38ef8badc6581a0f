"""Values and exceptions across processes: what comes back, and what is said of what does not."""

from __future__ import annotations

import asyncio
import copyreg
import os
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serveit.exceptions import (
    EncodingError,
    InvalidRequest,
    ProtocolError,
    QueueFull,
    RemoteError,
    RemoteTraceback,
    ServeitError,
)
from serveit.types import Executed
from serveit.wire import pickles
from serveit.wire.frames import MAX_FRAME, CallAnswer, Failure, encode_message
from serveit.wire.pickles import MAX_OUTSIDE, MIN_OUTSIDE, dump, dump_exception, load, load_exception

LIMIT = 64 * 1024


def there_and_back(value: Any, body: type = bytes) -> Any:
    sizes, buffers = dump(value, "the value")
    assert [len(buffer) for buffer in buffers] == sizes
    return load(sizes, body(b"".join(buffers)))


# -- values ---------------------------------------------------------------------------------------


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.binary(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner),
        max_leaves=5,
    )
)
def test_plain_values_come_back(value: Any) -> None:
    assert there_and_back(value) == value
    assert load((), dump(value, "it", inline=True)[1][0]) == value


@pytest.mark.parametrize("body", [bytes, bytearray, memoryview])
def test_large_arrays_travel_out_of_band_and_come_back_writable(body: type) -> None:
    array = np.arange(10_000, dtype=np.float64).reshape(100, 100)
    sizes, buffers = dump({"a": array, "b": [array[:50], 1]}, "it")
    assert len(sizes) == 3
    assert sizes[0] < 1_000, "the arrays are not in the pickle"
    assert np.shares_memory(np.frombuffer(buffers[1]), array), "they are not copied"
    value = there_and_back({"a": array, "b": [array[:50], 1]}, body)
    assert np.array_equal(value["a"], array) and np.array_equal(value["b"][0], array[:50])
    value["a"][0, 0] = 7
    value["b"][0][0, 0] = 8
    assert array[0, 0] == 0 and value["a"][0, 0] == 7


@pytest.mark.parametrize(
    "array",
    [
        np.arange(20_000)[::3],
        np.arange(20_000).reshape(100, 200).T,
        np.asfortranarray(np.arange(20_000).reshape(100, 200)),
        np.arange(20_000).reshape(100, 200)[:, 5:90],
        np.zeros((0, 3)),
        np.array(5.0),
        np.array([["a", None], [1, 2]], dtype=object),
        np.zeros(3000, dtype=[("x", "i4"), ("y", "f8")]),
        np.arange(10),
    ],
    ids=["strided", "transposed", "fortran", "window", "empty", "scalar", "objects", "records", "small"],
)
def test_arrays_of_any_layout_come_back_writable(array: np.ndarray[Any, Any]) -> None:
    back = there_and_back(array)
    assert back.dtype == array.dtype and np.array_equal(back, array)
    assert back.flags.writeable
    inline = load((), dump(array, "it", inline=True)[1][0])
    assert np.array_equal(inline, array)


def test_a_read_only_array_comes_back() -> None:
    array = np.arange(10_000)
    array.flags.writeable = False
    assert np.array_equal(there_and_back(array), array)


def test_an_array_from_a_bytearray_is_not_copied_again() -> None:
    array = np.arange(10_000)
    sizes, buffers = dump(array, "it")
    body = bytearray(b"".join(buffers))
    assert np.shares_memory(np.frombuffer(body, dtype=np.uint8), load(sizes, body))


def test_small_buffers_stay_in_the_pickle() -> None:
    sizes, _ = dump([np.zeros(MIN_OUTSIDE - 1, np.uint8), np.zeros(MIN_OUTSIDE, np.uint8)], "it")
    assert len(sizes) == 2
    assert sizes[1] == MIN_OUTSIDE


def test_the_sizes_of_any_number_of_arrays_fit_a_frame() -> None:
    big = np.zeros(MIN_OUTSIDE, np.uint8)
    many = [big[:] for _ in range(MAX_OUTSIDE + 100)] + [np.zeros(3) for _ in range(20_000)]
    sizes, buffers = dump(many, "it")
    assert len(sizes) == 1 + MAX_OUTSIDE
    assert len(encode_message(CallAnswer(0, sizes))) < MAX_FRAME / 10
    back = load(sizes, b"".join(buffers))
    assert len(back) == len(many)
    assert all(np.array_equal(one, other) for one, other in zip(back, many, strict=True))


def test_inline_is_one_pickle() -> None:
    sizes, buffers = dump(np.zeros(100_000), "it", inline=True)
    assert len(sizes) == len(buffers) == 1
    assert np.array_equal(load((), buffers[0]), np.zeros(100_000))


class Failing:
    def __reduce__(self) -> Any:
        raise OSError("the file is open")


@pytest.mark.parametrize("executed", ["no", "yes"])
def test_what_does_not_pickle_is_named(executed: Executed) -> None:
    with pytest.raises(EncodingError, match=r"the result of 'f' cannot be pickled \(.*lambda") as caught:
        dump(lambda: 0, "the result of 'f'", executed)
    assert caught.value.executed == executed
    with pytest.raises(EncodingError, match=r"it cannot be pickled \(OSError: the file is open\)") as caught:
        dump([Failing()], "it")
    assert isinstance(caught.value.__cause__, OSError)


def test_what_is_nested_too_deep_is_an_encoding_error() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(EncodingError, match="RecursionError"):
        dump(value, "it")
    while value:  # a list this deep must be taken apart by hand
        value = value[0]


@pytest.mark.parametrize(
    "change", [[1, 0], [-1, 0], [0, 1], [0, -1], [10, -10], [-(10**9), 10**9], [0, 0, 1]]
)
def test_sizes_that_contradict_the_body_are_refused(change: list[int]) -> None:
    sizes, buffers = dump(np.arange(1_000), "it")
    body = b"".join(buffers)
    wrong = [size + more for size, more in zip([*sizes, 0], [*change, 0], strict=False)][: len(change)]
    if sum(change) == 0 and min(wrong) >= 0:
        # They fit the body, but not the pickle.
        with pytest.raises((pickle.UnpicklingError, ValueError, EOFError)) as caught:
            load(wrong, body)
        assert "while unpickling what came from the other process" in caught.value.__notes__[0]
    else:
        with pytest.raises(ProtocolError, match=r"said to have \[.*\] octets, but 8,\d+ came"):
            load(wrong, body)


def test_a_body_cut_short_or_missing_buffers_is_refused() -> None:
    sizes, buffers = dump(np.arange(1_000), "it")
    with pytest.raises(ProtocolError):
        load(sizes, b"".join(buffers)[:-1])
    with pytest.raises(ProtocolError):
        load(sizes, b"")
    with pytest.raises(pickle.UnpicklingError):
        load((), buffers[0])
    with pytest.raises(EOFError):
        load((), b"")


@given(st.lists(st.integers(-5, 2**64 - 1), max_size=4), st.binary(max_size=30))
def test_wild_sizes_raise_an_exception_and_take_no_memory(sizes: list[int], tail: bytes) -> None:
    body = pickle.dumps(None) + tail
    if sum(sizes) != len(body) or any(size < 0 for size in sizes):
        if sizes:
            with pytest.raises(ProtocolError):
                load(sizes, body)
        else:
            assert load(sizes, body) is None


def test_a_class_that_does_not_exist_here_says_that_this_was_unpickling() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module") as caught:
        load((), b"cno_such_module\nThing\n.")
    assert caught.value.__notes__ == [
        "(while unpickling what came from the other process: its classes have to exist here)"
    ]


# -- types that plain pickle does not do justice to -----------------------------------------------


class Remote:
    """Stands for an ObjectRef: plain pickle loses its owner."""

    def __init__(self, number: int, owner: str = "") -> None:
        self.number = number
        self.owner = owner

    def __reduce__(self) -> Any:
        return Remote, (self.number,)


class Special(Remote):
    """A subclass is another type."""


class Local:
    """Stands for what cannot be sent, and says what can."""


class Old:
    """Known to `copyreg`."""

    def __init__(self, text: str = "plain") -> None:
        self.text = text


def refuse(value: Any) -> tuple[Any, ...]:
    raise EncodingError("send what it yields")


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pickles, "_reducers", {})
    monkeypatch.setitem(copyreg.dispatch_table, Old, lambda old: (Old, ("copyreg's",)))
    pickles.register(Remote, lambda remote: (Remote, (remote.number, "known")))
    pickles.register(Local, refuse)
    yield


@pytest.mark.usefixtures("registered")
def test_a_registered_type_is_reduced_wherever_it_stands() -> None:
    array = np.arange(10_000)
    remote = Remote(1)
    sizes, buffers = dump(([remote], {"r": remote, "a": array}), "it")
    assert np.shares_memory(np.frombuffer(buffers[1]), array), "arrays travel beside it as ever"
    (first,), named = load(sizes, b"".join(buffers))
    assert (first.number, first.owner) == (1, "known") and named["r"] is first
    assert load((), dump([remote], "it", inline=True)[1][0])[0].owner == "known"
    assert there_and_back(Special(1)).owner == ""
    assert there_and_back(Old()).text == "copyreg's"
    assert pickle.loads(pickle.dumps(remote)).owner == "", "only what is sent"


@pytest.mark.usefixtures("registered")
@given(st.recursive(st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)))
def test_plain_values_come_back_the_same_way(value: Any) -> None:
    assert there_and_back(value) == value


@pytest.mark.usefixtures("registered")
def test_an_exception_may_hold_one() -> None:
    back = load_exception(failure(), dump_exception(Custom(Remote(5)), LIMIT))  # type: ignore[arg-type]
    assert isinstance(back, Custom) and back.args[0].owner == "known"


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("executed", ["no", "yes"])
def test_what_a_reducer_refuses_is_refused_in_its_words(executed: Executed) -> None:
    with pytest.raises(
        EncodingError, match="^the result of 'f' cannot be sent: send what it yields$"
    ) as caught:
        dump([Local()], "the result of 'f'", executed)
    assert caught.value.executed == executed


# -- exceptions -----------------------------------------------------------------------------------


class NeedsTwo(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")
        self.one = one


class Worded(ValueError):
    def __init__(self, name: str) -> None:
        super().__init__(f"no {name}")
        self.name = name


class Undecodable(UnicodeDecodeError):
    def __init__(self, octets: bytes) -> None:
        super().__init__("utf-8", octets, 0, 1, "is none")


class Group(ExceptionGroup[Exception]):
    def __init__(self, text: str, members: list[Exception]) -> None:
        super().__init__(text, members)


class Slotted(Exception):
    __slots__ = ("code",)

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Reducing(Exception):
    """Its own way to be pickled is wrong."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(one, two)

    def __reduce__(self) -> Any:
        return Reducing, (1,)


class Misworded(Reducing):
    """Comes back as another text. That is better than nothing."""

    def __reduce__(self) -> Any:
        return Misworded, (3, 4)


class Custom(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code
        self.hint = "try less"


class Refusing(Exception):
    def __setattr__(self, name: str, value: object) -> None:
        raise TypeError(f"no {name} here")


class ReadOnly(Exception):
    @property
    def executed(self) -> str:
        return "mine"


class Lying(Exception):
    """Comes back from its pickle as something else."""

    lie: tuple[Any, ...] = ()

    def __reduce__(self) -> Any:
        return self.lie


def lying(*lie: Any) -> Lying:
    error = Lying()
    error.lie = lie
    return error


def leave(*_: object) -> None:
    raise SystemExit(3)


def failure(
    kind: str = "Custom", text: str = "text", traceback: str = "", executed: Executed = "yes"
) -> Failure:
    return Failure(
        others=0, status=500, kind=kind, detail="", text=text, executed=executed, traceback=traceback
    )


def test_an_exception_comes_back_as_what_it_was() -> None:
    error = Custom(5)
    error.add_note("a note")
    back = load_exception(failure(traceback="Traceback: line 3"), dump_exception(error, LIMIT))
    assert type(back) is Custom
    assert (back.code, back.hint, back.args, back.__notes__) == (5, "try less", (5,), ["a note"])
    assert isinstance(back.__cause__, RemoteTraceback)
    assert "Traceback: line 3" in str(back.__cause__)
    assert back.executed == "yes"  # type: ignore[attr-defined]


def there_and_back_again(error: Exception) -> Exception:
    return load_exception(failure(), dump_exception(error, LIMIT))


def test_an_exception_whose_constructor_takes_something_else_comes_back_as_it_was() -> None:
    two = NeedsTwo(1, 2)
    two.add_note("a note")
    for _ in range(2):  # one exception may fail several items
        back = there_and_back_again(two)
        assert type(back) is NeedsTwo
        assert (back.one, back.args, back.__notes__) == (1, ("1 and 2",), ["a note"])
    worded = there_and_back_again(Worded("fish"))
    assert isinstance(worded, Worded) and (str(worded), worded.name) == ("no fish", "fish")
    undecodable = there_and_back_again(Undecodable(b"\xff"))
    assert isinstance(undecodable, Undecodable) and (undecodable.object, undecodable.end) == (b"\xff", 1)
    slotted = there_and_back_again(Slotted(5))
    assert isinstance(slotted, Slotted) and slotted.code == 5
    misworded = there_and_back_again(Misworded(1, 2))
    assert isinstance(misworded, Misworded) and misworded.args == (3, 4)


def test_so_do_those_of_a_group() -> None:
    group = there_and_back_again(Group("several", [Worded("fish"), NeedsTwo(1, 2)]))
    assert isinstance(group, Group) and [*map(str, group.exceptions)] == ["no fish", "1 and 2"]
    assert [*map(type, group.exceptions)] == [Worded, NeedsTwo]


def test_whoever_pickles_it_next_pickles_it_so_too() -> None:
    error = NeedsTwo(1, 2)
    dump_exception(error, LIMIT)
    back = pickle.loads(pickle.dumps(error))
    assert isinstance(back, NeedsTwo) and vars(back) == {"one": 1}


@pytest.mark.parametrize("executed", ["no", "maybe", "yes"])
def test_executed_is_what_the_replica_said(executed: Executed) -> None:
    back = load_exception(failure(executed=executed), dump_exception(QueueFull("nested"), LIMIT))
    assert isinstance(back, QueueFull)
    assert back.executed == executed
    assert back.__cause__ is None
    described = load_exception(failure(executed=executed), b"")
    assert isinstance(described, RemoteError) and described.executed == executed


def test_serveits_own_attributes_travel() -> None:
    error = InvalidRequest("bad", errors=[{"loc": ["query", "x"], "msg": "no"}])
    back = load_exception(failure(executed="no"), dump_exception(error, LIMIT))
    assert isinstance(back, InvalidRequest)
    assert back.errors == error.errors


def test_exceptions_that_refuse_attributes_come_back_all_the_same() -> None:
    refusing = load_exception(failure(traceback="tb"), dump_exception(Refusing(5), LIMIT))
    assert isinstance(refusing, Refusing) and refusing.args == (5,)
    assert isinstance(refusing.__cause__, RemoteTraceback)
    assert refusing.executed == "yes"  # type: ignore[attr-defined]
    read_only = load_exception(failure(traceback="tb"), dump_exception(ReadOnly(), LIMIT))
    assert isinstance(read_only, ReadOnly) and read_only.executed == "mine"
    assert isinstance(read_only.__cause__, RemoteTraceback)


@pytest.mark.parametrize(
    "error",
    [
        Reducing(1, 2),
        Custom(lambda: 0),  # type: ignore[arg-type]
        ValueError("x" * LIMIT),
        lying(int, ("5",)),
        lying(ValueError, ("not what it was",)),
        lying(leave, ()),
        lying("not even a pickle"),
        lying(),
    ],
    ids=[
        "reduces itself",
        "holds a lambda",
        "too long",
        "an int",
        "another class",
        "leaves",
        "a text",
        "nothing",
    ],
)
def test_an_exception_that_does_not_come_back_is_not_sent(error: Exception) -> None:
    assert dump_exception(error, LIMIT) == b""


def test_an_exception_whose_pickling_leaves_is_not_sent() -> None:
    class Leaving(Exception):
        def __reduce__(self) -> Any:
            raise SystemExit(3)

    assert dump_exception(Leaving(), LIMIT) == b""


def test_what_cannot_be_rebuilt_is_described_with_its_traceback() -> None:
    for body in (b"", b"garbage", pickle.dumps(5), b"cno_such_module\nThing\n."):
        error = load_exception(failure("NeedsTwo", "1 and 2", "Traceback: line 3"), body)
        assert isinstance(error, RemoteError)
        assert str(error) == "NeedsTwo: 1 and 2\n\nTraceback: line 3"
        assert isinstance(error.__cause__, RemoteTraceback)


@pytest.mark.parametrize(
    "body",
    [
        pickle.dumps(SystemExit(3)),
        pickle.dumps(KeyboardInterrupt()),
        pickle.dumps(asyncio.CancelledError()),
        pickle.dumps(GeneratorExit()),
        pickle.dumps(StopIteration(5)),
        pickle.dumps(lying(leave, ())),
    ],
    ids=["SystemExit", "KeyboardInterrupt", "CancelledError", "GeneratorExit", "StopIteration", "leaves"],
)
async def test_no_exception_of_a_replica_ends_or_cancels_its_caller(body: bytes) -> None:
    error = load_exception(failure("SystemExit", "3"), body)
    assert type(error) is RemoteError
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.set_exception(error)
    with pytest.raises(RemoteError, match="SystemExit: 3"):
        await future


def test_every_error_of_serveits_comes_back_as_itself() -> None:
    pending = [ServeitError]
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        if kind.__module__ != "serveit.exceptions":
            continue
        back = load_exception(failure(executed="maybe"), dump_exception(kind(), LIMIT))
        assert type(back) is kind
        assert back.executed == "maybe"


def test_os_errors_keep_their_number() -> None:
    back = load_exception(failure(), dump_exception(FileNotFoundError(2, os.strerror(2), "model.bin"), LIMIT))
    assert isinstance(back, FileNotFoundError)
    assert (back.errno, back.filename) == (2, "model.bin")

"""Who may speak: proofs, and the handshake without a socket."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serveit.exceptions import ProtocolError
from serveit.wire import auth
from serveit.wire.auth import Handshake, Side, check, new_nonce, prove
from serveit.wire.frames import (
    HEADER,
    MAGIC,
    Decoder,
    FrameType,
    Hello,
    decode_message,
    encode_frame,
    encode_message,
)

ONE, OTHER = b"1" * 32, b"2" * 32
SECRET = b"hush"
FIELDS: dict[str, Any] = {
    "secret": SECRET,
    "side": "caller",
    "role": "proxy",
    "caller_nonce": ONE,
    "replica_nonce": OTHER,
}


# -- proofs ---------------------------------------------------------------------------------------


def test_nonces_differ() -> None:
    nonces = {new_nonce() for _ in range(100)}
    assert len(nonces) == 100
    assert {len(nonce) for nonce in nonces} == {auth.NONCE_SIZE}


def test_a_proof_holds_for_what_it_was_made_for() -> None:
    proof = prove(**FIELDS)
    assert check(proof, **FIELDS)
    assert len(proof) == 32
    assert SECRET not in proof


@pytest.mark.parametrize(
    "other",
    [
        {"secret": b"Hush"},
        {"side": "replica"},
        {"role": "handle"},
        {"caller_nonce": OTHER},
        {"replica_nonce": ONE},
        {"caller_nonce": OTHER, "replica_nonce": ONE},
        {"side": "replica", "caller_nonce": OTHER, "replica_nonce": ONE},
    ],
    ids=lambda other: "+".join(other),
)
def test_a_proof_is_no_use_for_anything_else(other: dict[str, Any]) -> None:
    assert not check(prove(**FIELDS), **(FIELDS | other))


def test_fields_cannot_be_shifted_into_each_other() -> None:
    assert prove(SECRET, "caller", "ab", b"c", b"d") != prove(SECRET, "caller", "a", b"bc", b"d")
    assert prove(SECRET, "caller", "a", b"bc", b"d") != prove(SECRET, "caller", "a", b"b", b"cd")


@pytest.mark.parametrize("proof", [None, "", "é", b"", 7, [b"x"], prove(**FIELDS)[:-1]])
def test_a_proof_may_be_anything_that_a_peer_sends(proof: object) -> None:
    assert not check(proof, **FIELDS)


# -- the handshake --------------------------------------------------------------------------------


def shake(caller: Handshake, replica: Handshake, size: int = 10_000) -> None:
    """Carry the octets between them, at most `size` at a time."""
    to_replica, to_caller = caller.opening, b""
    while to_replica or to_caller:
        for start in range(0, len(to_replica), size):
            to_caller += replica.feed(to_replica[start : start + size])
        to_replica = b""
        for start in range(0, len(to_caller), size):
            to_replica += caller.feed(to_caller[start : start + size])
        to_caller = b""


def hello(octets: bytes) -> Hello:
    (frame,) = Decoder().feed(octets)
    return decode_message(Hello, frame)


def greeting(*, magic: bytes = MAGIC, versions: tuple[int, int] = (1, 1), **extra: object) -> bytes:
    return encode_frame(
        FrameType.HELLO, 0, encode_message(Hello(magic, versions, "proxy", ["later"], dict(extra)))
    )


@pytest.mark.parametrize("secret", [b"", SECRET])
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_both_ends_get_to_know_each_other(secret: bytes, size: int) -> None:
    caller = Handshake("caller", "proxy", secret, {"instance": "x", "pid": 7})
    replica = Handshake("replica", "replica-1", secret)
    assert replica.opening == b""
    shake(caller, replica, size)
    assert caller.done and replica.done
    assert replica.peer == Hello(MAGIC, (1, 1), "proxy", [], {"instance": "x", "pid": 7})
    assert caller.peer == Hello(MAGIC, (1, 1), "replica-1", [], {})
    assert caller.rest == replica.rest == b""


def test_the_secret_never_travels() -> None:
    caller, replica = Handshake("caller", "proxy", SECRET), Handshake("replica", "r", SECRET)
    answer = replica.feed(caller.opening)
    proof = caller.feed(answer)
    replica.feed(proof)
    assert replica.done
    assert SECRET not in caller.opening + answer + proof


def test_what_comes_behind_the_last_word_is_kept() -> None:
    caller, replica = Handshake("caller", "proxy"), Handshake("replica", "r")
    caller.feed(replica.feed(caller.opening) + b"behind it")
    assert caller.rest == b"behind it"
    caller, replica = Handshake("caller", "proxy", SECRET), Handshake("replica", "r", SECRET)
    replica.feed(caller.feed(replica.feed(caller.opening)) + b"behind it")
    assert replica.rest == b"behind it"


@pytest.mark.parametrize("secret", [b"", SECRET])
def test_a_caller_that_does_not_wait_for_the_answer_is_refused(secret: bytes) -> None:
    replica = Handshake("replica", "r", secret)
    with pytest.raises(ProtocolError, match="sent more before it was answered"):
        replica.feed(Handshake("caller", "proxy", secret).opening + b"x")
    assert not replica.done


def test_a_wrong_secret_is_found_by_the_caller_first() -> None:
    caller, replica = Handshake("caller", "proxy", b"another"), Handshake("replica", "r", SECRET)
    answer = replica.feed(caller.opening)
    with pytest.raises(ProtocolError, match="wrong secret"):
        caller.feed(answer)
    assert not caller.done


def test_a_caller_that_only_claims_to_know_the_secret_is_refused() -> None:
    replica = Handshake("replica", "r", SECRET)
    replica.feed(Handshake("caller", "proxy", SECRET).opening)
    with pytest.raises(ProtocolError, match="wrong secret"):
        replica.feed(encode_frame(FrameType.AUTH, 0, b"", bytes(32)))
    assert not replica.done


def test_a_reflected_proof_is_refused() -> None:
    """Without the secret: send the replica's own nonce and proof back to it."""
    first, second = Handshake("replica", "r", SECRET), Handshake("replica", "r", SECRET)
    nonce = hello(first.feed(greeting(nonce=ONE))).extra["nonce"]
    answer = hello(second.feed(greeting(nonce=nonce)))
    for replica, proof in ((first, answer.extra["proof"]), (second, answer.extra["proof"])):
        with pytest.raises(ProtocolError, match="wrong secret"):
            replica.feed(encode_frame(FrameType.AUTH, 0, b"", proof))


def test_a_replica_that_reflects_the_caller_is_refused() -> None:
    caller = Handshake("caller", "proxy", SECRET)
    nonce = hello(caller.opening).extra["nonce"]
    proof = prove(b"guess", "replica", "proxy", nonce, nonce)
    with pytest.raises(ProtocolError, match="wrong secret"):
        caller.feed(greeting(nonce=nonce, proof=proof))


def test_a_recorded_handshake_cannot_be_replayed() -> None:
    caller = Handshake("caller", "proxy", SECRET)
    replica = Handshake("replica", "r", SECRET)
    answer = replica.feed(caller.opening)
    proof = caller.feed(answer)
    again = Handshake("replica", "r", SECRET)
    again.feed(caller.opening)
    with pytest.raises(ProtocolError, match="wrong secret"):
        again.feed(proof)
    with pytest.raises(ProtocolError, match="wrong secret"):
        Handshake("caller", "proxy", SECRET).feed(answer)


@pytest.mark.parametrize("nonce", [None, b"", bytes(31), bytes(33), "x" * 32, 5])
@pytest.mark.parametrize("side", ["caller", "replica"])
def test_a_nonce_that_is_none_is_refused(side: Side, nonce: object) -> None:
    extra: dict[str, Any] = {} if nonce is None else {"nonce": nonce}
    with pytest.raises(ProtocolError, match="no nonce of 32 octets"):
        Handshake(side, "r", SECRET).feed(greeting(**extra))


@pytest.mark.parametrize("theirs", [(1, 1), (0, 3), (1, 9)])
def test_versions_that_overlap_will_do(theirs: tuple[int, int]) -> None:
    replica = Handshake("replica", "r")
    replica.feed(greeting(versions=theirs))
    assert replica.done
    assert replica.peer.features == ["later"]


@pytest.mark.parametrize("theirs", [(2, 3), (0, 0), (3, 2)])
@pytest.mark.parametrize("secret", [b"", SECRET])
def test_no_common_version_is_told_to_both_ends(theirs: tuple[int, int], secret: bytes) -> None:
    text = rf"no common version: this end speaks 1 to 1, the other {theirs[0]} to {theirs[1]}"
    replica = Handshake("replica", "r", secret)
    with pytest.raises(ProtocolError, match=text):
        replica.feed(greeting(versions=theirs, nonce=ONE))
    assert hello(replica.farewell).versions == (1, 1)
    caller = Handshake("caller", "proxy", secret)
    with pytest.raises(ProtocolError, match=text):
        caller.feed(greeting(versions=theirs, nonce=ONE))
    assert caller.farewell == b""


@pytest.mark.parametrize("side", ["caller", "replica"])
def test_another_magic_is_another_protocol(side: Side) -> None:
    with pytest.raises(ProtocolError, match="wrong magic b'serverless'"):
        Handshake(side, "r").feed(greeting(magic=b"serverless"))


def test_a_replica_that_does_not_want_a_caller_can_say_so() -> None:
    replica, caller = Handshake("replica", "r"), Handshake("caller", "proxy")
    replica.feed(caller.opening)
    replica.refuse(ProtocolError("a proxy is not wanted here" + "!" * 1000))
    with pytest.raises(ProtocolError, match="refused: a proxy is not wanted here"):
        caller.feed(replica.farewell)
    late = Handshake("replica", "r", SECRET)
    late.refuse(ProtocolError("its HELLO is gone already"))
    assert late.farewell == b""


@pytest.mark.parametrize(
    "octets",
    [
        b"GET / HTTP/1.1\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        HEADER.pack(auth.MAX_UNSHAKEN, FrameType.HELLO, 0, 0),
        HEADER.pack(100, FrameType.CALL, 0, 0),
        HEADER.pack(100, FrameType.HELLO, 0, 1),
        HEADER.pack(0, FrameType.HELLO, 0, 0),
        HEADER.pack(4, FrameType.HELLO, 0, 0) + b"\xff\xff\xff\xff",
        encode_frame(FrameType.HELLO, 0, b"\xc1"),
        encode_frame(FrameType.HELLO, 0, b"\x91" * 2000),
        encode_frame(FrameType.PING, 0),
        encode_frame(FrameType.AUTH, 0, b"", bytes(32)),
    ],
)
@pytest.mark.parametrize("side", ["caller", "replica"])
def test_what_is_no_handshake_is_refused_at_once(side: Side, octets: bytes) -> None:
    handshake = Handshake(side, "r", SECRET)
    with pytest.raises(ProtocolError):
        handshake.feed(octets)
    assert not handshake.done


def test_an_unfinished_frame_is_waited_for_and_stays_small() -> None:
    replica = Handshake("replica", "r")
    octets = HEADER.pack(auth.MAX_UNSHAKEN - HEADER.size, FrameType.HELLO, 0, 0)
    for octet in octets + bytes(auth.MAX_UNSHAKEN - HEADER.size - 1):
        assert replica.feed(bytes([octet])) == b""
    assert len(replica.rest) < auth.MAX_UNSHAKEN
    with pytest.raises(ProtocolError):
        replica.feed(b"\0")


@pytest.mark.parametrize("secret", [b"", SECRET])
@pytest.mark.parametrize("side", ["caller", "replica"])
def test_any_octet_changed_is_an_error_or_harmless(side: Side, secret: bytes) -> None:
    """Nothing but ProtocolError, whichever octet; and a replica's changed proof or nonce never passes."""
    for position in range(len(_valid(side, secret)[1])):
        handshake, octets = _valid(side, secret)
        changed = bytearray(octets)
        changed[position] ^= 0xFF
        try:
            handshake.feed(bytes(changed))
        except ProtocolError:
            assert not handshake.done


def _valid(side: Side, secret: bytes) -> tuple[Handshake, bytes]:
    caller, replica = Handshake("caller", "proxy", secret), Handshake("replica", "r", secret)
    if side == "replica":
        return replica, caller.opening
    return caller, replica.feed(caller.opening)


def test_any_octet_changed_in_the_callers_proof_is_refused() -> None:
    for position in range(32):
        caller, replica = Handshake("caller", "proxy", SECRET), Handshake("replica", "r", SECRET)
        proof = bytearray(caller.feed(replica.feed(caller.opening)))
        proof[-1 - position] ^= 1
        with pytest.raises(ProtocolError, match="wrong secret"):
            replica.feed(bytes(proof))


@given(st.binary(max_size=200), st.sampled_from(["caller", "replica"]), st.booleans())
def test_no_octets_do_more_harm_than_an_error(octets: bytes, side: Side, framed: bool) -> None:
    handshake = Handshake(side, "r", SECRET)
    try:
        handshake.feed(encode_frame(FrameType.HELLO, 0, octets) if framed else octets)
    except ProtocolError:
        pass
    assert not handshake.done


@pytest.mark.parametrize("key", ["nonce", "proof", "refused"])
def test_extra_must_leave_the_handshakes_keys_alone(key: str) -> None:
    with pytest.raises(ValueError, match=f"the handshake's own keys: {key}"):
        Handshake("caller", "proxy", b"", {key: 1, "fine": 2})


def test_extra_must_fit() -> None:
    with pytest.raises(ValueError, match=r"role and extra are 5,\d{3} octets; 4,096 are allowed"):
        Handshake("caller", "proxy", b"", {"x": "y" * 5000})

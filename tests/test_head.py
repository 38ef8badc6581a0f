from __future__ import annotations

import pytest

from serveit.exceptions import InvalidRequest
from serveit.web.head import are_sendable, read_head, request_id_of


def test_a_plain_header_is_passed_on_as_it_is() -> None:
    headers = [(b"host", b"a"), (b"accept", b"*/*")]
    head = read_head(headers)
    assert head.headers is headers
    assert (head.has_body, head.content_length, head.shard_key, head.timeout_s) == (False, None, None, None)
    assert head.request_id != read_head(headers).request_id


def test_serveits_own_names_cannot_be_forged() -> None:
    headers = [(b"x-serveit-executed", b"no"), (b"x-service", b"kept"), (b"x-serveit-x", b"1")]
    assert read_head(headers).headers == [(b"x-service", b"kept")]


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        (b"abc-1", True),
        (b"a" * 128, True),
        (b"a" * 129, False),
        (b"", False),
        (b"a\tb", False),
        (b"\xe9", False),
        (b"a\x00", False),
    ],
)
def test_a_request_id_is_taken_over_if_it_can_be_logged(value: bytes, taken: bool) -> None:
    headers = [(b"x-request-id", value)]
    assert (read_head(headers).request_id == value.decode("latin-1")) is taken
    assert (request_id_of(headers) == value.decode("latin-1")) is taken
    assert request_id_of([]) != request_id_of([])


@pytest.mark.parametrize(
    ("headers", "has_body", "length"),
    [
        ([(b"content-length", b"5")], True, 5),
        ([(b"content-length", b"0")], False, 0),
        ([(b"content-length", b"x")], True, None),
        ([(b"content-length", b"9" * 20)], True, None),
        ([(b"transfer-encoding", b"chunked")], True, None),
        ([(b"expect", b"100-continue")], False, None),
    ],
)
def test_bodies(headers: list[tuple[bytes, bytes]], has_body: bool, length: int | None) -> None:
    head = read_head(headers)
    assert (head.has_body, head.content_length) == (has_body, length)
    assert head.expects_continue is (headers[0][0] == b"expect")


def test_shard_key_and_timeout() -> None:
    head = read_head([(b"x-serve-shard-key", "ué".encode()), (b"x-request-timeout-ms", b"250")])
    assert (head.shard_key, head.timeout_s) == ("ué", 0.25)


@pytest.mark.parametrize("value", [b"0", b"-1", b"1.5", b"", b"1e3", b"9" * 11])
def test_a_bad_timeout_is_named(value: bytes) -> None:
    with pytest.raises(InvalidRequest, match="x-request-timeout-ms") as caught:
        _ = read_head([(b"x-request-timeout-ms", value)]).timeout_s
    assert caught.value.errors[0]["loc"] == ["header", "x-request-timeout-ms"]


def test_fields_that_would_start_another_one_are_not_sendable() -> None:
    assert are_sendable([])
    assert are_sendable([(b"set-cookie", b"a=1; path=/"), (b"x", b"tab\tand \xff")])
    assert not are_sendable([(b"x", b"a\r\nset-cookie: b")])
    assert not are_sendable([(b"x", b"a\x00")])
    assert not are_sendable([(b"a b", b"c")])
    assert not are_sendable([(b"a:", b"c")])
    assert not are_sendable([(b"", b"c")])
    assert all(are_sendable([(b"x-%d" % number, b"c")]) for number in range(1000))


def test_a_client_waits_a_day_at_most() -> None:
    asked = {b"86400000": 86_400, b"86400001": 86_400, b"9999999999": 86_400, b"1500": 1.5}
    for value, timeout_s in asked.items():
        assert read_head([(b"x-request-timeout-ms", value)]).timeout_s == timeout_s

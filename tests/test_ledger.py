"""The ledger, against small servers that misbehave on purpose."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tests.account import note, recorded
from tests.ledger import Ledger, take_answers
from tests.support import wait_until

RATE = 500.0
ENOUGH = 20

Respond = Callable[[int, str, asyncio.StreamWriter], Awaitable[None]]
"""What a server does with a request: its number, from 1; its id; and where answers go."""


def answer(id: str, *, status: int = 200, executed: str = "", version: str = "v1", more: str = "") -> bytes:
    body = f'{{"id":"{id}","pid":7,"version":"{version}"}}' if status == 200 else "no"
    said = f"x-serveit-executed: {executed}\r\n" if executed else ""
    return f"HTTP/1.1 {status} OK\r\ncontent-length: {len(body)}\r\n{said}{more}\r\n{body}".encode()


class Server:
    """Answers as `respond` says.

    Attributes:
        num_connections: ever accepted.
        num_requests: ever read.
    """

    def __init__(self, respond: Respond, log: Path | None) -> None:
        self.num_connections = self.num_requests = 0
        self.url = ""
        self._respond = respond
        self._log = log

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError), contextlib.closing(writer):
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                found = re.match(rb"GET /route\?id=(\S+) HTTP/1.1\r\n", head)
                assert found is not None, head
                self.num_requests += 1
                id = found[1].decode()
                if self._log is not None:
                    note(self._log, f"start {id} 7 v1")
                await self._respond(self.num_requests, id, writer)


@contextlib.asynccontextmanager
async def serving(respond: Respond, log: Path | None = None) -> AsyncIterator[Server]:
    server = Server(respond, log)
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.ensure_future(server.serve(reader, writer)))

    listening = await asyncio.start_server(accept, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listening.close()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def only(misbehave: Respond, which: int = 5) -> Respond:
    """One request is treated so, all others well."""

    async def respond(number: int, id: str, writer: asyncio.StreamWriter) -> None:
        await (misbehave if number == which else well)(number, id, writer)

    return respond


async def well(number: int, id: str, writer: asyncio.StreamWriter) -> None:
    writer.write(answer(id))


async def asked(server: Server, log: Path | None = None, *, patience_s: float = 5.0) -> Ledger:
    """The ledger, after some requests."""
    async with Ledger(server.url, path="/route", rate=RATE, log=log, patience_s=patience_s) as ledger:
        await wait_until(lambda: server.num_requests >= ENOUGH, 5, "enough is sent")
    return ledger


async def test_all_is_well(tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with serving(well, log) as server:
        report = (await asked(server, log)).report().check()
    assert report.sent == report.ok >= ENOUGH
    assert report.versions == {"v1": report.sent} and report.pids == {7: report.sent}
    assert 0 < report.p50_ms <= report.p99_ms <= report.max_ms
    assert report.longest_gap_s < 1
    assert server.num_connections < ENOUGH, "connections are used again"


async def test_the_rate_is_kept_whatever_the_answers_do() -> None:
    hold = asyncio.Event()

    async def held(number: int, id: str, writer: asyncio.StreamWriter) -> None:
        await hold.wait()
        writer.write(answer(id))

    async with serving(held) as server:
        loop = asyncio.get_running_loop()
        async with Ledger(server.url, path="/route", rate=RATE) as ledger:
            begun = loop.time()
            await wait_until(lambda: ledger.mark > 50, 5, "requests are sent while none is answered")
            took_s = loop.time() - begun
            await wait_until(lambda: server.num_connections >= 50, 5, "each has a connection of its own")
            hold.set()
        report = ledger.report().check()
    assert took_s >= 49 / RATE
    assert report.max_ms >= 1000 * 40 / RATE, "latency counts from when a request was due"


async def test_a_lost_answer_is_unanswered() -> None:
    async def lose(number: int, id: str, writer: asyncio.StreamWriter) -> None:
        pass

    async with serving(only(lose)) as server:
        report = (await asked(server, patience_s=0.2)).report()
    assert len(report.unanswered) == 1 and report.ok == report.sent - 1
    with pytest.raises(AssertionError, match=r"^1 unanswered\n(.|\n)*unanswered: 1 \["):
        report.check(max_failed=100)


async def test_a_doubled_answer_is_found_on_the_idle_connection_too() -> None:
    async def double(number: int, id: str, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(id) + answer(id))

    async with serving(only(double)) as server:
        report = (await asked(server)).report()
    assert len(report.answered_twice) == 1 and report.ok == report.sent
    assert report.broken == ["1 answered twice"]


async def test_an_answer_that_comes_late_a_second_time() -> None:
    repeated: list[bytes] = []

    async def again(number: int, id: str, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(id))
        await asyncio.sleep(0.01)
        writer.write(answer(id))
        repeated.append(id.encode())

    async with serving(only(again)) as server:
        report = (await asked(server)).report()
    assert [id.encode() for id in report.answered_twice] == repeated


async def test_mixed_up_answers() -> None:
    async def mix(number: int, id: str, writer: asyncio.StreamWriter) -> None:
        writer.write(answer("somebody-else"))

    async with serving(only(mix)) as server:
        report = (await asked(server)).report()
    assert len(report.mismatched) == 1 and report.ok == report.sent - 1
    assert report.broken == ["1 mismatched"] and report.num_failed == 0


async def test_a_request_that_ran_twice(tmp_path: Path) -> None:
    log = tmp_path / "log"

    async def run_again(number: int, id: str, writer: asyncio.StreamWriter) -> None:
        note(log, f"start {id} 8 v1")
        writer.write(answer(id))

    async with serving(only(run_again), log) as server:
        report = (await asked(server, log)).report()
    assert len(report.started_twice) == 1
    with pytest.raises(AssertionError, match="1 started twice"):
        report.check()


async def test_answers_that_no_handler_has_given(tmp_path: Path) -> None:
    async with serving(well) as server:
        report = (await asked(server, tmp_path / "log")).report()
    assert len(report.never_started) == report.sent


@pytest.mark.parametrize(("executed", "belied"), [("no", 1), ("maybe", 0)])
async def test_failures_are_counted_by_status_with_examples(
    executed: str, belied: int, tmp_path: Path
) -> None:
    async def refuse(number: int, id: str, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(id, status=503, executed=executed))

    log = tmp_path / "log"
    async with serving(only(refuse), log) as server:
        report = (await asked(server, log)).report()
    kind = f"503, executed: {executed}"
    assert report.failed == {kind: 1} and report.examples[kind][0].endswith(" no")
    assert len(report.belied) == belied, "whoever says no must not have begun"
    with pytest.raises(AssertionError, match=rf"1 failed \(at most 0 may\)\n(.|\n)*1 × {kind}"):
        report.check()


async def test_an_ok_that_no_handler_wrote() -> None:
    async def empty(number: int, id: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    async with serving(only(empty)) as server:
        report = (await asked(server)).report()
    assert report.failed == {"not a handler's answer (200)": 1}


async def test_connections_that_break() -> None:
    async def close(number: int, id: str, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async def cut(number: int, id: str, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(id)[:30])
        writer.close()

    async def babble(number: int, id: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b"who are you?\r\n\r\n")

    async def unknown_length(number: int, id: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")

    for respond, text in (
        (close, "closed without an answer"),
        (cut, "closed inside an answer"),
        (babble, "unreadable: no answer: 'who are you?'"),
        (unknown_length, "unreadable: a 200 without content-length"),
    ):
        async with serving(only(respond)) as server:
            report = (await asked(server)).report()
        assert report.failed == {text: 1}
        report.check(max_failed=1)


@pytest.mark.parametrize("says_so", [True, False])
async def test_connections_closed_while_idle_are_no_failures(says_so: bool) -> None:
    async def close_after(number: int, id: str, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(id, more="connection: close\r\n" if says_so else ""))
        await writer.drain()
        writer.close()

    async with serving(close_after) as server:
        report = (await asked(server)).report()
        report.check()
    assert server.num_connections >= report.sent


async def test_nobody_listens() -> None:
    async with serving(well) as server:
        url = server.url
    async with Ledger(url, path="/route", rate=RATE) as ledger:
        await ledger.more(5)
    report = ledger.report()
    assert report.failed == {"ConnectionRefusedError while connecting": report.sent}
    assert math.isnan(report.p50_ms)
    with pytest.raises(AssertionError, match="not one was answered"):
        report.check(max_failed=report.sent)


async def test_gaps() -> None:
    async def sleep(number: int, id: str, writer: asyncio.StreamWriter) -> None:
        if number in range(5, 15):
            writer.write(answer(id, status=503))
        else:
            writer.write(answer(id))

    async with serving(sleep) as server, Ledger(server.url, path="/route", rate=100) as ledger:
        await ledger.more(20)
    report = ledger.report()
    assert report.longest_gap_s >= 0.08
    with pytest.raises(AssertionError, match=r"s without an ok answer \(at most 0.05\)"):
        report.check(max_failed=10, max_gap_s=0.05)


async def test_reports_of_parts() -> None:
    version = "v1"

    async def versioned(number: int, id: str, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(id, version=version))

    async with serving(versioned) as server, Ledger(server.url, path="/route", rate=RATE) as ledger:
        await ledger.more(10)
        version = "v2"
        mark = ledger.mark
        await ledger.more(10)
    assert set(ledger.report().versions) == {"v1", "v2"}
    assert ledger.versions(since=mark) == {"v2"}
    assert ledger.report(until=mark).sent + ledger.report(since=mark).sent == ledger.report().sent


async def test_what_a_handler_notes(tmp_path: Path) -> None:
    log = tmp_path / "log"
    echo = await recorded(str(log), "some-id", "v3", work_s=0.001)
    assert (echo.id, echo.pid, echo.version) == ("some-id", os.getpid(), "v3")
    assert log.read_text().splitlines() == [f"start some-id {os.getpid()} v3", "end some-id"]


def test_answers_in_any_pieces() -> None:
    octets = b"HTTP/1.1 100 Continue\r\n\r\n" + answer("one", executed="no") + answer("two", status=503)
    for size in (1, 7, len(octets)):
        buffer, seen = bytearray(), []
        for start in range(0, len(octets), size):
            buffer += octets[start : start + size]
            seen += list(take_answers(buffer))
        assert [(each.status, each.body[:10]) for each in seen] == [(200, b'{"id":"one'), (503, b"no")]
        assert seen[0].headers["x-serveit-executed"] == "no" and not buffer

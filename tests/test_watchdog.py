from __future__ import annotations

import asyncio
import logging
import threading
import time

import pytest

from serveit.running.watchdog import Watchdog
from tests.support import wait_until


class Noted(logging.Handler):
    """Opens a gate when a record comes."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.gate = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self.gate.set()


@pytest.fixture
def noted() -> object:
    handler = Noted()
    logger = logging.getLogger("serveit.watchdog")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def block_here(gate: threading.Event, and_then_s: float) -> None:
    assert gate.wait(10)
    time.sleep(and_then_s)


async def test_a_blocked_loop_is_reported_once_with_its_stack(noted: Noted) -> None:
    watchdog = Watchdog(threshold_s=0.04)
    watchdog.start(asyncio.get_running_loop())
    try:
        block_here(noted.gate, and_then_s=0.1)
        (record,) = noted.records
        text = record.getMessage()
        assert "the event loop has been blocked for" in text
        assert "block_here" in text
        answered = watchdog.num_answered
        await wait_until(lambda: watchdog.num_answered > answered, 5, "the loop is seen alive again")
        await asyncio.sleep(0.05)
        assert len(noted.records) == 1
        noted.gate.clear()
        block_here(noted.gate, and_then_s=0)
        assert len(noted.records) == 2
    finally:
        watchdog.stop()


async def test_a_loop_that_turns_is_not_reported(noted: Noted) -> None:
    watchdog = Watchdog(threshold_s=0.2)
    watchdog.start(asyncio.get_running_loop())
    await wait_until(lambda: watchdog.num_answered > 0, 5, "an answer")
    watchdog.stop()
    watchdog.stop()
    assert noted.records == []
    assert not [thread for thread in threading.enumerate() if thread.name == "serveit-watchdog"]


def test_it_ends_with_its_loop() -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    watchdog = Watchdog(threshold_s=0.02)
    watchdog.start(loop)
    assert watchdog._thread is not None
    watchdog._thread.join(5)
    assert not watchdog._thread.is_alive()
    watchdog.stop()


def test_a_thread_that_is_gone_has_no_stack(noted: Noted) -> None:
    Watchdog()._report(1.0, loop_thread=0)
    assert "(no stack)" in noted.records[0].getMessage()

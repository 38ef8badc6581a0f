"""The app of test_metrics.py: nobody else asks it, so that its counts are exact."""

from __future__ import annotations

import time

from serveit import App

measured = App()


@measured.route("/hello/<name>")
@measured.backend(num_replicas=2)
async def hello(name: str, times: int = 1) -> str:
    return name * times


@measured.route("/fails")
@measured.backend
async def fails() -> str:
    raise RuntimeError("it does")


@measured.route("/half", methods=["POST"])
@measured.backend(max_batch_size=4, batch_wait_timeout_s=0.5)
async def half(numbers: list[int]) -> list[int]:
    return [number // 2 for number in numbers]


@measured.backend
async def shade(name: str) -> str:
    return name


measured.add_route("/shadowed/<name>", traffic={"hello": 1.0}, shadow={"shade": 1.0}, name="shadowed")


@measured.backend
async def blocks(seconds: float) -> None:
    time.sleep(seconds)  # noqa: ASYNC251

"""The benchmarks run, and the tables in their README are those of the newest results."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(script: str, *options: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *options]
    environment = None if path is None else {"PATH": path}
    return subprocess.run(command, capture_output=True, text=True, timeout=50, env=environment)


def table_rows(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]


def figure(cell: str) -> float:
    return float(cell.strip("*").replace(",", ""))


def newest(name: str) -> Path:
    return max((BENCHMARKS / "results").glob(f"*-{name}.md"))


@pytest.mark.slow
def test_handle_call_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    finished = run("handle_call.py", "--seconds", "1", "--rounds", "1", "--json", str(target))
    assert finished.returncode == 0, finished.stderr
    head, _, *rows = table_rows(finished.stdout)
    assert head == ["in flight", "calls/s", "p50 ms", "p99 ms"]
    assert [row[0] for row in rows] == ["1", "100"]
    document = json.loads(target.read_text())
    assert [one["in_flight"] for one in document["measured"]] == [1, 100]
    assert all(one["per_second"] > 0 for one in document["measured"])
    assert {"cores", "CPU", "Python", "uvicorn"} <= set(document["machine"])


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed: apt-get install wrk")
def test_http_noop_asks_all_servers_and_prints_the_ratios() -> None:
    finished = run("http_noop.py", "--seconds", "1", "--rounds", "1", "--connections", "2")
    assert finished.returncode == 0, finished.stderr
    _, _, *rows = table_rows(finished.stdout)
    assert [row[1] for row in rows] == [
        "uvicorn + Starlette",
        "serveit on Ray",
        "serveit --local",
        "**serveit on Ray / bare**",
        "**serveit --local / bare**",
    ]
    assert all(figure(row[2]) > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.cluster
def test_ray_calls_compares_three_ways() -> None:
    finished = run("ray_calls.py", "--seconds", "1", "--rounds", "1")
    assert finished.returncode == 0, finished.stderr
    _, _, *rows = table_rows(finished.stdout)
    ways = ["plain actor call", "handle.call", "handle.remote, awaited"]
    ratios = [f"**{way} / plain**" for way in ways[1:]]
    assert [row[1] for row in rows] == [*ways, *ratios] * 2
    assert all(figure(row[2]) > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.cluster
def test_startup_tells_rays_share() -> None:
    finished = run("startup.py", "--rounds", "1")
    assert finished.returncode == 0, finished.stderr
    _, _, on_ray, local = table_rows(finished.stdout)
    assert on_ray[0] == "serveit run" and local[0] == "serveit run --local"
    assert figure(on_ray[1]) == pytest.approx(figure(on_ray[2]) + figure(on_ray[3]), abs=0.02)
    assert figure(local[1]) < figure(on_ray[1])


@pytest.mark.slow
@pytest.mark.cluster
def test_memory_compares_a_replica_with_an_actor() -> None:
    finished = run("memory.py")
    assert finished.returncode == 0, finished.stderr
    _, _, actor, replica, difference = table_rows(finished.stdout)
    assert figure(difference[1]) == pytest.approx(figure(replica[1]) - figure(actor[1]), abs=0.11)


def test_http_noop_says_what_is_missing(tmp_path: Path) -> None:
    finished = run("http_noop.py", path=str(tmp_path))
    assert finished.returncode != 0
    assert "apt-get install wrk" in finished.stderr


@pytest.mark.parametrize("name", ["http_noop", "handle_call", "ray_calls", "startup", "memory"])
def test_readme_shows_the_newest_results(name: str) -> None:
    readme = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert newest(name).name in readme
    kept = table_rows(newest(name).read_text(encoding="utf-8"))
    assert len(kept) > 2
    shown = table_rows(readme)
    assert [row for row in kept if row not in shown] == []


def test_results_name_the_command_and_no_machine() -> None:
    results = sorted((BENCHMARKS / "results").glob("*.md"))
    assert results
    for result in results:
        text = result.read_text(encoding="utf-8")
        assert re.search(r"^`python benchmarks/\w+\.py --seconds \d+ --rounds \d+`$", text, re.MULTILINE)
        assert re.search(r"^cores \d+; CPU .+; Python \d", text, re.MULTILINE)
        assert not re.search(r"(?<![\w*<])/(home|root|work|tmp|usr|opt)/", text)

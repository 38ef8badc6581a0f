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
@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed: apt-get install wrk")
def test_http_noop_asks_both_servers_and_prints_the_ratio() -> None:
    finished = run("http_noop.py", "--seconds", "1", "--rounds", "1", "--connections", "2")
    assert finished.returncode == 0, finished.stderr
    _, _, *rows = table_rows(finished.stdout)
    assert [row[1] for row in rows] == ["uvicorn + Starlette", "serveit --local", "**serveit / bare**"]
    assert all(float(row[2].strip("*").replace(",", "")) > 0 for row in rows)


def test_http_noop_says_what_is_missing(tmp_path: Path) -> None:
    finished = run("http_noop.py", path=str(tmp_path))
    assert finished.returncode != 0
    assert "apt-get install wrk" in finished.stderr


@pytest.mark.parametrize("name", ["http_noop", "handle_call"])
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

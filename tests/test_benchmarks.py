"""The benchmarks run, and the tables in their README are those of the newest results."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
RESULTS = [
    "http_noop",
    "handle_call",
    "ray_calls",
    "handle_kinds",
    "traffic_change",
    "startup",
    "reload",
    "memory",
]
"""Those whose tables the README shows."""

FAKE_WRK = """
import sys
from pathlib import Path
from urllib.request import Request, urlopen

script = Path(sys.argv[sys.argv.index("--script") + 1]).read_text()
body = script.partition("[==[")[2].partition("]==]")[0].encode()
with urlopen(Request(sys.argv[-1], body, {"content-type": "application/json"}), timeout=5) as answer:
    assert answer.read() == body
print("  Latency Distribution\\n     50%    1.50ms\\n     99%  900.00us\\nRequests/sec:   2000.00")
"""


def run(script: str, *options: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *options]
    environment = None if path is None else os.environ | {"PATH": path}
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
def test_handle_kinds_compares_two_kinds_in_each_way() -> None:
    finished = run("handle_kinds.py", "--rounds", "1", "--calls", "200")
    assert finished.returncode == 0, finished.stderr
    _, _, *rows = table_rows(finished.stdout)
    assert [row[:2] for row in rows] == [
        [function, way] for function in ("`async def`", "`def`") for way in ("call", "map", "remote")
    ]
    for _, _, async_rate, blocking_rate, ratio in rows:
        assert figure(ratio) == pytest.approx(figure(async_rate) / figure(blocking_rate), abs=0.02)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.0.1 is the only address on loopback")
def test_traffic_change_waits_for_everybody_on_three_nodes() -> None:
    finished = run("traffic_change.py", "--rounds", "4")
    assert finished.returncode == 0, finished.stderr
    _, _, *rows = table_rows(finished.stdout)
    assert [name for name, *_ in rows] == [
        *(f"server on 127.0.0.{number}" for number in (2, 3, 4)),
        "handle in the driver",
        "handle on another node",
        "the last of all",
        "returned",
    ]
    longest = {name: figure(cell) for name, _, cell in rows}
    assert max(list(longest.values())[:5]) <= longest["the last of all"] + 1


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
def test_reload_tells_how_long_new_code_takes() -> None:
    finished = run("reload.py", "--seconds", "1", "--rounds", "2")
    assert finished.returncode == 0, finished.stderr
    _, _, noticed, new, old, failed = table_rows(finished.stdout)
    assert figure(noticed[1]) < figure(new[1]) and figure(old[1]) > 0
    assert failed[1].startswith("0 of ")


@pytest.mark.slow
@pytest.mark.cluster
def test_memory_compares_a_replica_with_an_actor() -> None:
    finished = run("memory.py")
    assert finished.returncode == 0, finished.stderr
    _, _, actor, replica, difference = table_rows(finished.stdout)
    assert figure(difference[1]) == pytest.approx(figure(replica[1]) - figure(actor[1]), abs=0.11)


@pytest.mark.slow
@pytest.mark.cluster
def test_peers_measures_who_is_there_and_names_who_is_not(tmp_path: Path) -> None:
    """No peer is installed in an empty folder; a `wrk` that asks once takes the place of the real one."""
    fake = tmp_path / "wrk"
    fake.write_text(f"#!{sys.executable}\n{FAKE_WRK}", encoding="utf-8")
    fake.chmod(0o755)
    target = tmp_path / "figures.json"
    options = ["--quick", "--environments", str(tmp_path / "none"), "--json", str(target)]
    finished = run("peers.py", *options, path=f"{tmp_path}:{os.environ['PATH']}")
    assert finished.returncode == 0, finished.stderr
    head, _, *rows = table_rows(finished.stdout)
    assert head[:4] == ["server", "version", "64 connections: requests/s", "of Starlette"]
    ours = ["uvicorn + Starlette", "serveit on Ray", "serveit --local"]
    assert [row[0] for row in rows[:3]] == ours
    assert [row[2:5] for row in rows[:3]] == [["2,000", "1.00", "1.500"]] * 3
    peers = [row[0] for row in rows[3:]]
    assert {"FastAPI", "LitServe", "BentoML", "Ray Serve, defaults", "Ray Serve, HAProxy"} <= set(peers)
    for row in rows[3:]:
        assert re.match(r"\d+\.\d", row[1]) and set(row[2:]) == {"–"}
        assert f"**{row[0]}**: in round 1, not installed" in finished.stdout
    assert "python benchmarks/peers.py --install" in finished.stdout
    measured = json.loads(target.read_text())["measured"]
    assert [one["peer"] for one in measured] == ours
    assert all(one["start_s"] > 0 for one in measured)


def test_peers_keeps_whole_runs_only() -> None:
    finished = run("peers.py", "--save", "--quick")
    assert finished.returncode == 2
    assert "without --quick and --only" in finished.stderr


def test_the_comparison_shows_what_was_measured() -> None:
    """README.md's two rows of figures are those of the kept results."""
    results = (BENCHMARKS / "results/peers.md").read_text(encoding="utf-8")
    measured = {row[0]: row for row in table_rows(results)}
    columns = [["serveit on Ray", "serveit --local"], ["Ray Serve, defaults", "Ray Serve, HAProxy"]]
    columns += [["FastAPI"], ["LitServe"], ["BentoML"]]
    shown = {row[0]: row[1:] for row in table_rows((ROOT / "README.md").read_text(encoding="utf-8"))}
    ratios = [", ".join(measured[name][3] for name in column) for column in columns]
    assert shown["JSON echo, of Starlette's rate¹"] == ratios
    starts = [", ".join(f"{measured[name][-1]} s" for name in column) for column in columns]
    assert shown["command to first answer¹"] == starts


def test_http_noop_says_what_is_missing(tmp_path: Path) -> None:
    finished = run("http_noop.py", path=str(tmp_path))
    assert finished.returncode != 0
    assert "apt-get install wrk" in finished.stderr


@pytest.mark.parametrize("name", RESULTS)
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
        command = r"^`python (benchmarks/\w+\.py --seconds \d+ --rounds \d+|scripts/chaos\.py[ \w-]*)`$"
        assert re.search(command, text, re.MULTILINE)
        assert re.search(r"^cores \d+; CPU .+; Python \d", text, re.MULTILINE)
        assert not re.search(r"(?<![\w*<])/(home|root|work|tmp|usr|opt)/", text)

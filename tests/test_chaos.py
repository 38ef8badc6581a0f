"""The chaos script runs, and its table says that everything held."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "chaos.py"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=90)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(100)
def test_a_quick_run_holds() -> None:
    finished = run("--quick", "--rate", "200")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = [line.strip("| ").split(" | ") for line in finished.stdout.splitlines() if line.startswith("|")][
        2:
    ]
    assert [row[0] for row in rows] == [
        "2 rolling updates, num_replicas=1",
        "2 rolling updates, num_replicas=2",
        "2 controller kills, num_replicas=2",
        "2 replica kills, num_replicas=2",
    ]
    assert {row[-1] for row in rows} == {"held"}
    unanswered_twice_mixed_up = {tuple(row[3:6]) for row in rows}
    assert unanswered_twice_mixed_up == {("0", "0", "0")}
    assert "`python scripts/chaos.py --quick --rate 200`" in finished.stdout


def test_unknown_kinds_are_refused() -> None:
    finished = run("--only", "nothing")
    assert finished.returncode == 2 and "updates" in finished.stderr

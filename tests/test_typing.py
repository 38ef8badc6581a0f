"""Typing is part of the API: `tests/typing/` under strict mypy, and at run time."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tests" / "typing"
_IGNORE = re.compile(r"  # type: ignore\[([a-z-]+)\]$")
_ERROR = re.compile(r"^(.*):(\d+): error: .* \[([a-z-]+)\]$", re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_type_checkers_see(tmp_path: Path) -> None:
    lines = (FOLDER / "mistakes.py").read_text().splitlines()
    expected = [(number, mark[1]) for number, line in enumerate(lines, 1) if (mark := _IGNORE.search(line))]
    unmarked = tmp_path / "unmarked.py"
    unmarked.write_text("\n".join(_IGNORE.sub("", line) for line in lines) + "\n")
    command = [sys.executable, "-m", "mypy", "--strict", str(FOLDER), str(unmarked)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = [(Path(file).name, int(line), code) for file, line, code in _ERROR.findall(result.stdout)]
    assert found == [("unmarked.py", *entry) for entry in expected], result.stdout + result.stderr
    assert len(expected) >= 10


@pytest.mark.parametrize("name", ["backends", "handles"])
def test_it_is_registered_as_it_is_typed(name: str) -> None:
    module = importlib.import_module(f"tests.typing.{name}")
    assert {"plain", "awaited", "sizes", "Model", "Batched"} <= module.app.backends.keys()

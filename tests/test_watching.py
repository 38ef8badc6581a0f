"""What `--reload` watches, and that what was saved is what is imported."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import os
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from serveit.command import watching


def test_what_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = tmp_path / "here" / "inner" / "app.py", tmp_path / "there" / "app.py"
    for file in (inside, outside):
        file.parent.mkdir(parents=True)
        file.touch()
    here = tmp_path / "here"
    monkeypatch.chdir(here)
    assert watching.folders("app:app") == [here]
    assert watching.folders("inner/app.py:app") == [here]
    assert watching.folders("../there/app.py") == [here, outside.parent]
    assert watching.folders("nothing.py") == [here]


AT = 1_700_000_000
STALE, FRESH = "stale", "fresh"  # of one size


def written(path: Path, version: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"VERSION = {version!r}")
    os.utime(path, (AT, AT))
    return path


def imported(path: Path) -> object:
    """The version that an import finds."""
    code = importlib.machinery.SourceFileLoader("saved", str(path)).get_code("saved")
    assert code is not None
    found: dict[str, object] = {}
    exec(code, found)
    return found["VERSION"]


@pytest.fixture
def _compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)


@pytest.mark.usefixtures("_compiling")
def test_a_file_of_the_same_size_and_second_is_seen(tmp_path: Path) -> None:
    path = written(tmp_path / "app.py", STALE)
    assert imported(path) == STALE
    written(path, FRESH)
    assert imported(path) == STALE  # the trap
    watching.distrust_bytecode([path])
    assert imported(path) == FRESH


@pytest.mark.usefixtures("_compiling")
def test_from_then_on_bytecode_goes_by_the_source(tmp_path: Path) -> None:
    path = written(tmp_path / "app.py", STALE)
    watching.distrust_bytecode([path])
    assert imported(path) == STALE
    kept = Path(importlib.util.cache_from_source(path))
    assert len(kept.read_bytes()) > 16  # compiled, and kept
    written(path, FRESH)
    assert imported(path) == FRESH
    before = kept.read_bytes()
    assert imported(path) == FRESH and kept.read_bytes() == before
    assert [one.name for one in kept.parent.iterdir()] == [kept.name]


@pytest.mark.usefixtures("_compiling")
def test_who_imported_the_old_code_late_is_not_believed(tmp_path: Path) -> None:
    """A process that has read the old source keeps its bytecode after the new source is there."""
    path = written(tmp_path / "app.py", STALE)
    watching.distrust_bytecode([path])
    kept = Path(importlib.util.cache_from_source(path))
    assert imported(path) == STALE
    late = kept.read_bytes()
    written(path, FRESH)
    watching.distrust_bytecode([path])
    assert imported(path) == FRESH
    kept.write_bytes(late)
    assert imported(path) == FRESH


def test_what_cannot_be_written_or_is_gone_is_left(tmp_path: Path) -> None:
    path = written(tmp_path / "app.py", STALE)
    (tmp_path / "__pycache__").write_text("a file where the folder should be")
    watching.distrust_bytecode([path, tmp_path / "gone.py"])
    assert imported(path) == STALE
    assert sorted(one.name for one in tmp_path.iterdir()) == ["__pycache__", "app.py"]


def test_the_names_of_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changed = [tmp_path / "b" / "c.py", tmp_path / "a.py", tmp_path / "a.py"]
    assert watching.describe(changed) == "a.py, b/c.py"


async def test_python_files_are_told_as_they_are_saved(tmp_path: Path) -> None:
    async with contextlib.aclosing(watching.changes_async([tmp_path])) as batches:
        assert await anext(batches) == []  # nothing is missed any more
        (tmp_path / "notes.txt").touch()
        path = written(tmp_path / "app.py", STALE)
        told = [batch async for batch in _until_told(batches)]
    assert told[-1] == [path]


async def _until_told(batches: AsyncIterator[list[Path]]) -> AsyncIterator[list[Path]]:
    async for batch in batches:
        yield batch
        if batch:
            return


def test_a_folder_in_which_something_else_always_changes(tmp_path: Path) -> None:
    """Whoever follows hears of nothing, again and again, rather than nothing."""
    stop = threading.Event()
    batches = watching.changes([tmp_path], stop)
    assert next(batches) == []
    for number in range(3):
        (tmp_path / "app.log").write_text(str(number))
        assert next(batches) == []
    stop.set()
    assert list(batches) == []

"""What `--reload` waits for: Python files that are saved. Their old bytecode is not to be trusted then."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import watchfiles

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence

LOOK_S = 0.25
"""How often to hear of nothing."""
_HOW: dict[str, Any] = {
    "watch_filter": None,  # ours: with theirs, files of other kinds that change all the time hold the rest up
    "debounce": 100,
    "step": 20,
    "rust_timeout": int(LOOK_S * 1000),
    "yield_on_timeout": True,
}
_CHECKED_HASH = 0b11
"""The flags of bytecode that is valid as long as the hash of its source is the one it tells."""


def folders(target: str) -> list[Path]:
    """Where the app's code is: the working directory, and a file's own where it is elsewhere."""
    here = Path.cwd()
    file = Path(target.partition(":")[0]).resolve()
    if file.suffix != ".py" or not file.is_file() or here in file.parents:
        return [here]
    return [here, file.parent]


def changes(watched: Sequence[Path], stop: Any) -> Iterator[list[Path]]:
    """Python files as they are saved; every `LOOK_S` an empty list, from when none can be missed any more.

    Args:
        watched: folders, with those in them.
        stop: an event that ends it.
    """
    for batch in watchfiles.watch(*watched, stop_event=stop, raise_interrupt=False, **_HOW):
        yield _python_files(batch)


async def changes_async(watched: Sequence[Path]) -> AsyncGenerator[list[Path], None]:
    """The same on an event loop."""
    async with contextlib.aclosing(watchfiles.awatch(*watched, **_HOW)) as batches:
        async for batch in batches:
            yield _python_files(batch)


def describe(changed: Iterable[Path]) -> str:
    """For messages: "app.py, models/small.py"."""
    return ", ".join(sorted({os.path.relpath(path) for path in changed}))


def distrust_bytecode(changed: Iterable[Path]) -> None:
    """See to it that the next import of these files compiles what is in them.

    Python takes bytecode for a file's if that has the size that it had then, and was saved in the same
    second: an editor's second save within it would go unseen. What is put in place of the bytecode says
    that it goes by the source's hash, and the hash is none: an import compiles the source, and, by
    that sign, keeps the result with its hash from then on. So no process that imports the file late,
    and has read what was in it before, leaves anything that another believes.
    """
    distrusted = importlib.util.MAGIC_NUMBER + _CHECKED_HASH.to_bytes(4, "little") + bytes(8)
    for path in changed:
        if not path.is_file():
            continue
        kept = Path(importlib.util.cache_from_source(path))
        written = kept.with_name(f"{kept.name}.{os.getpid()}")
        with contextlib.suppress(OSError):  # where this cannot write, nor can who imports
            kept.parent.mkdir(parents=True, exist_ok=True)
            written.write_bytes(distrusted)
            written.replace(kept)


_is_python = watchfiles.PythonFilter()


def _python_files(batch: Iterable[tuple[watchfiles.Change, str]]) -> list[Path]:
    return sorted({Path(path) for change, path in batch if _is_python(change, path)})

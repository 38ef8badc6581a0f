"""What test_from_ray_serve runs: the page's rows, the app that they use, and what runs a snippet."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import re
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import pytest

import serveit
from serveit import App, BackendConfig, testing
from serveit.command import cli

PAGE = (Path(__file__).parent.parent / "docs" / "from-ray-serve.md").read_text(encoding="utf-8")
APP = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[0]
MODULE = "app_of_moving_page"
TABLES = {"2021": "## From the Ray Serve of 2021", "today": "## From today's Ray Serve"}
BODY = '    seen = await client.get_handle("hello").call("Ada")'
"""Of blocks that the page shows the head of: the app answers inside."""
DECLARED = """
class Declared:
    def __init__(self, version=1): ...
    def reconfigure(self, user_config): ...
    async def __call__(self, {parameter}): return {result}
"""

Names = dict[str, Any]


class Row(NamedTuple):
    """A row: whose table, its name (the first code in its first cell), and its cells."""

    table: str
    name: str
    theirs: str
    ours: str
    note: str

    @property
    def snippet(self) -> str:
        """The code in the second cell."""
        return spans(self.ours)[0]


Check = Callable[[Row], Coroutine[Any, Any, None]]


def spans(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def page_rows() -> list[Row]:
    rows = []
    for table, heading in TABLES.items():
        lines = PAGE.split(heading)[1].split("\n## ")[0].strip().splitlines()
        for line in lines[2:]:
            theirs, ours, note = (
                cell.strip() for cell in line.removeprefix("|").removesuffix("|").split(" | ")
            )
            rows.append(Row(table, spans(theirs)[0], theirs, ours, note))
    return rows


@contextlib.contextmanager
def page_module(folder: Path) -> Iterator[Any]:
    """The page's app as a module that replicas can import, too."""
    (folder / f"{MODULE}.py").write_text(APP, encoding="utf-8")
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module(MODULE)
    finally:
        sys.path.remove(str(folder))
        del sys.modules[MODULE]


def page_names() -> Names:
    """What the snippets find: a new app, like each test's, and what is imported on the page."""
    names: Names = {"__name__": MODULE, "serveit": serveit}
    exec(compile(APP, "docs/from-ray-serve.md", "exec"), names)
    return names


@contextlib.asynccontextmanager
async def running(names: Names | None = None) -> AsyncIterator[Names]:
    """The page's app, served in this process: with `client` and `handle`."""
    names = page_names() if names is None else names
    async with testing.local(names["app"]) as client:
        yield names | {"client": client, "handle": client.get_handle("v1")}


async def evaluate(snippet: str, names: Names) -> Any:
    """The value of an expression. A block is executed around `BODY`, and gives what that has seen."""
    if snippet.endswith(":"):
        await _result(_compiled(f"{snippet}\n{BODY}", "exec"), names)
        return names["seen"]
    return await _result(_compiled(snippet, "eval"), names)


def _compiled(source: str, mode: str) -> CodeType:
    code: CodeType = compile(source, "docs/from-ray-serve.md", mode, flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    return code


async def _result(code: CodeType, names: Names) -> Any:
    value = eval(code, names)
    return await value if code.co_flags & inspect.CO_COROUTINE else value


def declared(snippet: str, names: Names | None = None) -> App:
    """The app with just the backend that the snippet declares; a decorator gets a class to decorate."""
    app = App()
    names = (page_names() if names is None else names) | {"app": app}
    source = snippet
    if snippet.startswith("@"):
        parameter, result = ("xs: list[int]", "xs") if "max_batch_size" in snippet else ("x: int = 0", "x")
        source += DECLARED.format(parameter=parameter, result=result)
    exec(compile(source, "docs/from-ray-serve.md", "exec"), names)
    return app


def declares(**expected: Any) -> Check:
    """The snippet declares a backend with these options, and it runs."""

    async def check(row: Row) -> None:
        app = declared(row.snippet)
        [record] = app.backends.values()
        assert {name: getattr(record.config, name) for name in expected} == expected
        async with testing.local(app) as client:
            assert len((await client.status())["backends"][record.name]) == record.config.num_replicas

    return check


def has_no_option(*options: str) -> Check:
    """Refused, by name, where backends' options stand; and the row says so."""

    async def check(row: Row) -> None:
        assert "None" in (row.ours, row.note.split(" ")[0].rstrip(":"))
        for option in options:
            assert option in row.theirs
            with pytest.raises(TypeError, match=repr(option)):
                BackendConfig.from_options(None, {option: 1})

    return check


def can_be_typed(*ours: str) -> Check:
    """These commands are in the row, and there are such commands, with such options and arguments."""

    async def check(row: Row) -> None:
        assert {*ours} <= {*spans(f"{row.ours} {row.note}")}
        for command in ours:
            _, name, *arguments = command.split()
            cli.main.commands[name].make_context(name, arguments).close()

    return check


def serves(name: str = "default", prefix: str = "", **http: Any) -> Check:
    """`serveit.serve(...)` with these options; the app answers a call inside. Without Ray, on any port."""

    async def check(row: Row) -> None:
        names = page_names()
        local = names["serveit"] = Local()
        snippet = row.snippet if row.snippet.endswith(":") else f"async with {row.snippet} as client:"
        assert await evaluate(snippet, names) == "Hello, Ada!"
        assert (local.asked.pop("name", "default"), local.asked.pop("prefix", "")) == (name, prefix)
        assert {field: getattr(local.http, field) for field in http} == http
        assert [*local.asked] in ([], ["local"])

    return check


class Local:
    """`serveit`, except that `serve` does without Ray, on any free port. Keeps what it was asked."""

    def __init__(self) -> None:
        self.http = serveit.HTTPOptions()
        self.asked: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(serveit, name)

    def serve(self, app: App, **options: Any) -> Any:
        self.http = serveit.HTTPOptions.parse(options.pop("http", None))
        self.asked = dict(options)
        return serveit.serve(app, **{**options, "local": True}, http=replace(self.http, port=0))

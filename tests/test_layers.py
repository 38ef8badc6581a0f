"""The layer test: who may import whom, read from the list of rooms in docs/architecture.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONTRACT = "docs/architecture.md"


@dataclass(frozen=True)
class Layout:
    """The rooms from top to bottom, each with the full names of its modules."""

    package: str
    rooms: tuple[tuple[str, ...], ...]

    @classmethod
    def parse(cls, markdown: str, package: str) -> Layout:
        """Read the fenced block under "Layout".

        A line is a room: `wire/  frames  link` for a directory, `cli.py  reload.py` for modules at the
        top of the package; `#` starts a remark.
        """
        block = re.search(r"^## Layout\n.*?^```\w*\n(.*?)^```", markdown, re.DOTALL | re.MULTILINE)
        if block is None:
            raise ValueError(f"{CONTRACT} has no fenced block under '## Layout'")
        lines = (line.partition("#")[0].split() for line in block[1].splitlines())
        return cls(package, tuple(cls._room(words, package) for words in lines if words))

    @staticmethod
    def _room(words: list[str], package: str) -> tuple[str, ...]:
        if words[0].endswith("/"):
            room = f"{package}.{words[0].rstrip('/')}"
            return (room, *(f"{room}.{word}" for word in words[1:]))
        for word in words:
            if not word.endswith(".py"):
                raise ValueError(f"{word!r} in the layout of {CONTRACT} is neither 'room/' nor 'module.py'")
        return tuple(package if word == "__init__.py" else f"{package}.{word[:-3]}" for word in words)

    def depth(self, module: str) -> int:
        """The number of rooms above; a module that is not listed counts with its directory."""
        for depth, room in enumerate(self.rooms):
            if module in room or module.rpartition(".")[0] == room[0] != self.package:
                return depth
        raise LookupError(module)


@dataclass(frozen=True)
class Import:
    line: int
    name: str
    """Full name of what is imported: "serveit.wire.frames.Frame", "ray"."""


@dataclass(frozen=True)
class Module:
    name: str
    path: str
    imports: tuple[Import, ...]
    relative: tuple[int, ...]
    """Lines with a relative import."""


class ImportFinder(ast.NodeVisitor):
    """Every import that can run, wherever in the module it stands."""

    def __init__(self) -> None:
        self.found: list[Import] = []

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.orelse:
                self.visit(child)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [Import(node.lineno, alias.name) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if not node.level:
            self.found += [Import(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]

    def visit_Call(self, node: ast.Call) -> None:
        if ast.unparse(node.func) in ("import_module", "importlib.import_module", "__import__"):
            match node.args:
                case [ast.Constant(value=str(name)), *_]:
                    self.found.append(Import(node.lineno, name))
        self.generic_visit(node)


def read_package(directory: Path) -> dict[str, Module]:
    """The modules of the package in `directory`, by name."""
    modules = {}
    for path in sorted(directory.rglob("*.py")):
        parts = (directory.name, *path.relative_to(directory).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        finder = ImportFinder()
        finder.visit(tree)
        relative = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        shown = path.relative_to(directory.parent.parent).as_posix()
        modules[name] = Module(name, shown, tuple(finder.found), tuple(relative))
    return modules


def target(name: str, modules: dict[str, Module]) -> str:
    """The module that an import leads to: the longest part of its name that is one."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def unlisted(modules: dict[str, Module], layout: Layout) -> Iterator[str]:
    listed = {name for room in layout.rooms for name in room}
    for name in sorted(modules.keys() - listed):
        yield f"{modules[name].path} is not in the layout of {CONTRACT}: add it to the line of its room"
    for name in sorted(listed - modules.keys()):
        yield f"{name} is in the layout of {CONTRACT} but not in the package: write it or take it out"


def relative_imports(modules: dict[str, Module], layout: Layout) -> Iterator[str]:
    for module in modules.values():
        for line in module.relative:
            yield f"{module.path}:{line}: a relative import; write it out from {layout.package!r}"


def upward_imports(modules: dict[str, Module], layout: Layout) -> Iterator[str]:
    for module in modules.values():
        for used in module.imports:
            found = target(used.name, modules)
            try:
                upward = bool(found) and layout.depth(found) < layout.depth(module.name)
            except LookupError:  # told by `unlisted`
                continue
            if upward:
                yield f"{module.path}:{used.line}: imports {found}, above it in the layout of {CONTRACT}"


def foreign_ray(modules: dict[str, Module], layout: Layout) -> Iterator[str]:
    cluster = f"{layout.package}.cluster"
    for module in modules.values():
        for used in module.imports:
            if used.name.split(".")[0] == "ray" and not f"{module.name}.".startswith(f"{cluster}."):
                yield f"{module.path}:{used.line}: imports ray, which only cluster/ may"


def leaf_cycles(modules: dict[str, Module], layout: Layout) -> Iterator[str]:
    """Modules of the bottom room that lead back to themselves."""
    leaves = [name for name in layout.rooms[-1] if name in modules]
    reached = {
        name: {target(used.name, modules) for used in modules[name].imports} & set(leaves) for name in leaves
    }
    for _ in leaves:
        for direct in reached.values():
            direct |= {further for name in direct for further in reached[name]}
    for name in leaves:
        if name in reached[name]:
            yield f"{modules[name].path}: imports itself by way of {', '.join(sorted(reached[name]))}"


Rule = Callable[[dict[str, Module], Layout], Iterator[str]]
RULES: list[Rule] = [unlisted, relative_imports, upward_imports, foreign_ray, leaf_cycles]


def broken_rules(directory: Path, markdown: str) -> list[str]:
    modules, layout = read_package(directory), Layout.parse(markdown, directory.name)
    return [problem for rule in RULES for problem in rule(modules, layout)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_serveit_keeps_its_layers(rule: Rule) -> None:
    layout = Layout.parse((ROOT / CONTRACT).read_text(encoding="utf-8"), "serveit")
    problems = list(rule(read_package(ROOT / "src" / "serveit"), layout))
    assert not problems, "\n".join(["", *problems])


# The checker itself, on a small tree.

MARKDOWN = """\
## Before
```text
elsewhere.py
```
## Layout
What a line means.
```text
__init__.py                 # the package
top.py                      # remarks / and words.py do not count
cluster/  session
middle/   one  two          # two/ modules

leaf.py  other.py
```
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A package that keeps the rules."""
    package = tmp_path / "src" / "pack"
    for name in ("cluster/session", "middle/one", "middle/two", "leaf", "other", "top"):
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        path.with_name("__init__.py").touch()
    (package / "__init__.py").write_text("from pack.top import x\n")
    (package / "top.py").write_text("import pack.middle.one\nfrom pack import leaf, middle\n")
    (package / "cluster/session.py").write_text("import ray.util\nfrom ray import remote\n")
    (package / "middle/one.py").write_text("from pack.middle import two\nimport os, rays\n")
    (package / "leaf.py").write_text("from pack.other import x\n")
    return package


def test_a_tree_that_keeps_the_rules_passes(tree: Path) -> None:
    assert broken_rules(tree, MARKDOWN) == []


@pytest.mark.parametrize(
    ("path", "source", "problem"),
    [
        ("leaf.py", "import pack.middle.one", "src/pack/leaf.py:1: imports pack.middle.one, above it"),
        ("middle/two.py", "from pack.top import x", "two.py:1: imports pack.top, above it"),
        ("middle/two.py", "from pack import top", "two.py:1: imports pack.top, above it"),
        ("middle/two.py", "from pack import App", "two.py:1: imports pack, above it"),
        ("middle/__init__.py", "import pack.cluster", "__init__.py:1: imports pack.cluster, above it"),
        ("middle/two.py", "\ndef f():\n    if x:\n        import pack.top", "two.py:4: imports pack.top, "),
        ("middle/two.py", "class A:\n    from pack.top import x", "two.py:2: imports pack.top, above it"),
        ("middle/two.py", "try:\n    a\nexcept A:\n    import pack.top", "two.py:4: imports pack.top, "),
        ("middle/two.py", "if TYPE_CHECKING:\n    a\nelse:\n    import pack.top", "two.py:4: imports "),
        ("middle/two.py", "importlib.import_module('pack.top').x()", "two.py:1: imports pack.top, above it"),
        ("middle/two.py", "import ray", "src/pack/middle/two.py:1: imports ray, which only cluster/ may"),
        ("top.py", "def f():\n    from ray.util import x", "top.py:2: imports ray"),
        ("middle/two.py", "from . import one", "src/pack/middle/two.py:1: a relative import"),
        ("middle/two.py", "if TYPE_CHECKING:\n    from .one import x", "two.py:2: a relative import"),
        ("other.py", "from pack import leaf", "pack/leaf.py: imports itself by way of pack.leaf, pack.other"),
        ("middle/three.py", "", "src/pack/middle/three.py is not in the layout of docs/architecture.md"),
        ("loft/__init__.py", "import pack.top", "src/pack/loft/__init__.py is not in the layout"),
    ],
)
def test_a_planted_mistake_is_found(tree: Path, path: str, source: str, problem: str) -> None:
    (tree / path).parent.mkdir(exist_ok=True)
    (tree / path).write_text(source)
    assert any(problem in found for found in broken_rules(tree, MARKDOWN))


@pytest.mark.parametrize(
    "source",
    [
        "if TYPE_CHECKING:\n    from pack.top import x\n    import ray",
        "import typing\nif typing.TYPE_CHECKING:\n    from pack import App",
        "import_module(name)\nprint('pack.top')",
    ],
)
def test_what_never_runs_does_not_count(tree: Path, source: str) -> None:
    (tree / "middle/two.py").write_text(source)
    assert broken_rules(tree, MARKDOWN) == []


@pytest.mark.parametrize(("line", "name"), [("leaf.py  attic.py", "attic"), ("attic/\nleaf.py", "attic")])
def test_what_is_listed_but_not_there_is_found(tree: Path, line: str, name: str) -> None:
    (found,) = broken_rules(tree, MARKDOWN.replace("leaf.py", line))
    assert found.startswith(f"pack.{name} is in the layout of docs/architecture.md but not in the package")


@pytest.mark.parametrize(
    ("markdown", "problem"),
    [("## Layout\nno block", "no fenced block"), ("## Layout\n```\ncli.py wire\n```", "neither 'room/' nor")],
)
def test_a_layout_that_cannot_be_read_says_so(markdown: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Layout.parse(markdown, "pack")

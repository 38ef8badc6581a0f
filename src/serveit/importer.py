"""From what a user typed ("app:app", "examples/hello/app.py", "package.module") to the object."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from serveit.config import did_you_mean
from serveit.exceptions import ImportFailed


def import_from_string(text: str) -> Any:
    """The attribute that "package.module:attribute.path" names.

    Raises:
        ImportFailed: no colon, no such module, no such attribute.
        Exception: whatever the module raised while it was imported, an ImportError of its own too.
    """
    module_name, _, attributes = text.partition(":")
    if not module_name or not attributes:
        raise ImportFailed(f"{text!r} is no import string: write 'package.module:attribute', like 'app:app'")
    return _attribute(import_module(module_name), attributes, "")


def import_module(name: str) -> Any:
    """The module; a missing one is told apart from one that misses something else."""
    if not all(part.isidentifier() for part in name.split(".")):
        raise ImportFailed(f"{name!r} is no module's name: write it with dots, like 'package.module'")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise
        looked = f"(looked in {os.getcwd()} and the installed packages)"
        raise ImportFailed(f"there is no module {name!r} {looked}{_nearest(name)}") from None


def import_target(text: str, kind: type[Any]) -> Any:
    """The object of type `kind` that a command's argument means.

    Args:
        text: "module:attribute", "path/to/file.py", "path/to/file.py:attribute", or "module"; without
            an attribute the module has to hold exactly one object of the kind.
        kind: the wanted class.

    Raises:
        ImportFailed: it leads nowhere, to several, or to something else.
        Exception: whatever the module raised while it was imported.
    """
    location, colon, attribute = text.partition(":")
    if location.endswith(".py") or "/" in location:
        module = _import_file(location)
    else:
        _put_first(os.getcwd())
        module = import_module(location)
    named = {name: value for name, value in vars(module).items() if isinstance(value, kind)}
    if attribute:
        found = _attribute(module, attribute, _suggest(location, named))
        if not isinstance(found, kind):
            raise ImportFailed(
                f"{text!r} is of type {type(found).__name__}, not {kind.__name__}{_suggest(location, named)}"
            )
        return found
    if not named:
        raise ImportFailed(
            f"{location!r} holds no {kind.__name__}: write `app = serveit.{kind.__name__}()` in it"
        )
    if colon or len({id(value) for value in named.values()}) > 1:
        raise ImportFailed(f"{text!r} does not say which {kind.__name__}{_suggest(location, named)}")
    return next(iter(named.values()))


def _attribute(module: Any, path: str, hint: str) -> Any:
    found: Any = module
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            known = [known for known in dir(found) if not known.startswith("_")]
            if not hint and (near := did_you_mean(name, known)).startswith("did"):
                hint = f": {near}"
            raise ImportFailed(f"module {module.__name__!r} has no attribute {path!r}{hint}") from None
    return found


def _nearest(module: str) -> str:
    """What was meant by the name of a module that is not there, as far as the working directory tells."""
    parent, _, last = module.rpartition(".")
    if _is_here(parent):
        return f": write '{parent}:{last}' if {last} is what the module {parent} holds"
    here = [path.stem for path in Path.cwd().glob("*.py") if path.stem.isidentifier()]
    near = did_you_mean(module, here)
    return f": {near}" if near.startswith("did") else ""


def _is_here(module: str) -> bool:
    """Whether there is a module of that name, as a file, below the working directory."""
    return bool(module) and Path(*module.split(".")).with_suffix(".py").is_file()


def _suggest(location: str, named: dict[str, Any]) -> str:
    return f": there is {', '.join(f'{location}:{name}' for name in named)}" if named else ""


def _import_file(location: str) -> Any:
    """Import a file as `python -m` would from the folder above its packages."""
    path = Path(location).resolve()
    if not path.is_file():
        raise ImportFailed(f"there is no file {location!r} (looked in {os.getcwd()}){_nearest_file(path)}")
    names = [path.stem]
    folder = path.parent
    while (folder / "__init__.py").is_file():
        names.insert(0, folder.name)
        folder = folder.parent
    name = ".".join(names)
    if path.suffix != ".py" or not all(part.isidentifier() for part in names):
        raise ImportFailed(f"{location!r} can't be imported: a module's file is named like 'app.py'")
    _put_first(str(folder))
    module = import_module(name)
    other = getattr(module, "__file__", None)
    if other is None or not path.samefile(other):
        raise ImportFailed(
            f"{location!r} can't be imported as {name!r}: that is {other or 'built into Python'}; "
            "give the file another name"
        )
    return module


def _nearest_file(path: Path) -> str:
    """What was meant by the path of a file that is not there."""
    whole, parent = path.with_name(f"{path.name}.py"), path.parent.with_suffix(".py")
    if whole.is_file():
        return f": write '{os.path.relpath(whole)}'"
    if parent.is_file() and not path.suffix:
        return f": write '{os.path.relpath(parent)}:{path.name}'"
    folder = path.parent if path.parent.is_dir() else Path.cwd()
    here = {other.stem: os.path.relpath(other) for other in folder.glob("*.py")}
    if near := difflib.get_close_matches(path.stem, here, n=1):
        return f": did you mean {here[near[0]]!r}?"
    return ": write 'package.module:app' or 'path/to/file.py:app'"


def _put_first(folder: str) -> None:
    if sys.path[:1] != [folder]:
        sys.path.insert(0, folder)

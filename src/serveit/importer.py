"""From what a user typed ("app:app", "examples/hello/app.py", "package.module") to the object."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

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
    found: Any = import_module(module_name)
    for attribute in attributes.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError:
            raise ImportFailed(f"module {module_name!r} has no attribute {attributes!r}") from None
    return found


def import_module(name: str) -> Any:
    """The module; a missing one is told apart from one that misses something else."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise
        raise ImportFailed(
            f"there is no module {name!r} (looked in {os.getcwd()} and the installed packages)"
        ) from None


def import_target(text: str, kind: type[Any]) -> Any:
    """The object of type `kind` that a command's argument means.

    Args:
        text: "module:attribute", "path/to/file.py", "path/to/file.py:attribute", or "module"; without
            an attribute the module has to hold exactly one object of the kind.
        kind: the wanted class.

    Raises:
        ImportFailed: it leads nowhere, to several, or to something else.
    """
    location, colon, attribute = text.partition(":")
    if location.endswith(".py") or "/" in location:
        module_name = _enter_folder(location)
    else:
        module_name = location
        _put_first(os.getcwd())
    if colon:
        found = import_from_string(f"{module_name}:{attribute}")
        if not isinstance(found, kind):
            raise ImportFailed(f"{text!r} is {type(found).__name__}, not {kind.__name__}")
        return found
    module = import_module(module_name)
    names = [name for name, value in vars(module).items() if isinstance(value, kind)]
    if len({id(getattr(module, name)) for name in names}) == 1:
        return getattr(module, names[0])
    if not names:
        raise ImportFailed(
            f"{text!r} holds no {kind.__name__}: write `app = serveit.{kind.__name__}()` in it"
        )
    raise ImportFailed(f"{text!r} holds {', '.join(names)}: say which one, like '{text}:{names[0]}'")


def _enter_folder(location: str) -> str:
    """Put a file's folder on the path, as `python file.py` does; its module name."""
    path = Path(location)
    if not path.is_file():
        raise ImportFailed(f"there is no file {location!r}")
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise ImportFailed(f"{location!r} can't be imported: a module's file is named like 'app.py'")
    _put_first(str(path.resolve().parent))
    return path.stem


def _put_first(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)

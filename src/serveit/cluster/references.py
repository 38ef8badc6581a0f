"""Names under which two processes find the same thing: looked up in the driver, followed in the replica.

What pickle and cloudpickle take for importable is "in sys.modules"; here it is what an import would
find again, under the same name and in the same file.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import site
import socket
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from serveit.declare.app import App
from serveit.declare.backend import BackendRecord
from serveit.exceptions import ImportFailed

MAIN = ("__main__", "__mp_main__")
"""The script or notebook: another process has another one."""

MAX_WRAPPERS = 16


class Reference(NamedTuple):
    """An attribute of a module that a replica can import."""

    module: str
    attribute: str


class Hidden(NamedTuple):
    """A function or class that decorators put something else in place of.

    Attributes:
        module: which holds what the decorators made.
        qualname: the name there.
        depth: how often to take `__wrapped__`.
    """

    module: str
    qualname: str
    depth: int


class References:
    """What can be imported, as it stands at one time; asked while one app is packed."""

    def __init__(self) -> None:
        self._importable: dict[str, bool] = {}
        self._held: dict[int, list[Reference]] = {}
        for module_name, attribute, value in _module_attributes():
            if issubclass(type(value), (App, BackendRecord)) and attribute.isidentifier():
                self._held.setdefault(id(value), []).append(Reference(module_name, attribute))

    def can_import(self, name: str) -> bool:
        """Whether an import of that name leads, elsewhere, to the module that it means here."""
        known = self._importable.get(name)
        if known is None:
            module = sys.modules.get(name)
            known = name not in MAIN and isinstance(module, ModuleType)
            if known:
                spec = find_spec(name)
                known = spec is not None and is_file_of(module, spec)
            self._importable[name] = known
        return known

    def is_in_memory(self, name: Any) -> bool:
        """Whether it names a module that was made here, of no file, and no import makes again.

        A package's parts go by the package, which may make them when it is imported.
        """
        return isinstance(name, str) and name in sys.modules and not self.can_import(name.partition(".")[0])

    def finds(self, target: Any, module: Any, qualname: Any) -> bool:
        """Whether a replica that follows these names gets to the target's like."""
        if self.is_in_memory(module):
            return False
        try:
            return next(_layers(sys.modules[module], qualname, 0)) is target
        except Exception:  # whatever the user's attributes and descriptors do
            return False

    def holder(self, held: App | BackendRecord) -> Reference | None:
        """The module-level name of an app or backend: where its functions are, else the shortest."""
        homes = Counter(_homes(held))
        return min(
            self._holders(held),
            key=lambda found: (-homes[found.module], found.attribute[0] == "_", *map(len, found), *found),
            default=None,
        )

    def others(self, app: App, besides: str) -> tuple[str, ...]:
        """Modules that may declare a part of the app: those with its functions, then those that hold it."""
        holders = (held.module for held in self._holders(app))
        names = dict.fromkeys([*_homes(app), *holders])
        return tuple(name for name in names if name != besides and self.can_import(name))

    def _holders(self, held: App | BackendRecord) -> list[Reference]:
        return [found for found in self._held.get(id(held), ()) if self.can_import(found.module)]

    def home(self, function: FunctionType) -> str | None:
        """The module whose globals are the function's, if a replica can import it."""
        name = function.__globals__.get("__name__")
        if not isinstance(name, str) or not self.can_import(name):
            return None
        return name if vars(sys.modules[name]) is function.__globals__ else None

    def hidden(self, target: Any) -> Hidden | None:
        """Where a function or class is, if its own name leads to what decorators made of it."""
        module, qualname = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
        if not isinstance(module, str) or not isinstance(qualname, str) or "<" in qualname:
            return None
        if not self.can_import(module):
            return None
        try:
            layers = list(_layers(sys.modules[module], qualname, MAX_WRAPPERS))
        except Exception:  # whatever the user's attributes and descriptors do
            return None
        depth = next((depth for depth, layer in enumerate(layers) if layer is target), 0)
        return Hidden(module, qualname, depth) if depth else None


def _module_attributes() -> Iterator[tuple[str, str, Any]]:
    for module_name, module in list(sys.modules.items()):
        if module_name not in MAIN and issubclass(type(module), ModuleType):
            # Past the `__getattribute__` of modules that load at first use.
            for attribute, value in list(object.__getattribute__(module, "__dict__").items()):
                yield module_name, attribute, value


def _homes(held: App | BackendRecord) -> list[str]:
    records = held.backends.values() if isinstance(held, App) else [held]
    names = [getattr(record.target, "__module__", None) for record in records]
    return [name for name in names if isinstance(name, str)]


def _layers(found: Any, qualname: str, depth: int) -> Iterator[Any]:
    for name in qualname.split("."):
        found = getattr(found, name)
    yield found
    for _ in range(depth):
        found = getattr(found, "__wrapped__", None)
        if found is None:
            return
        yield found


# -- the other end -------------------------------------------------------------------------------


def import_module(name: str, absent: Iterable[str] = ()) -> ModuleType:
    """The driver's module, imported here.

    Args:
        name: of the module.
        absent: folders that the driver has on its path and this machine has not.

    Raises:
        ImportFailed: there is none, or another file of that name was imported before.
        Exception: whatever the module raised while it was imported.
    """
    _refuse_another(name)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise
        entries = (entry or os.getcwd() for entry in sys.path)
        folders = ", ".join(entry for entry in entries if os.path.exists(entry) and not is_installed(entry))
        looked = f"{folders} and the installed packages" if folders else "the installed packages"
        lost = ", ".join(absent)
        raise ImportFailed(
            f"there is no module {name!r} on {socket.gethostname()}, where the app's replicas import it "
            f"(looked in {looked}{f'; the driver also has {lost}, not to be found here' if lost else ''}): "
            "install its package on every node where replicas run, or send the folder along with "
            'ray.init(runtime_env={"working_dir": "."}); a module that only the driver has in memory '
            "has to become a file"
        ) from None


def attribute(module: str, name: str) -> Any:
    """A `Reference` followed."""
    try:
        return getattr(import_module(module), name)
    except AttributeError:
        raise holds_no(module, name) from None


def unwrapped(module: str, qualname: str, depth: int) -> Any:
    """A `Hidden` function or class, from behind what its decorators made of it.

    The last layer if there are fewer: the driver may have decorated it from outside.
    """
    try:
        return list(_layers(import_module(module), qualname, depth))[-1]
    except AttributeError:
        raise holds_no(module, qualname) from None


def backend_of(app: App, name: str, where: str) -> BackendRecord:
    """A backend of an app that was imported anew.

    Args:
        app: the app.
        name: of the backend.
        where: the app's import string, for the message.
    """
    record = app.backends.get(name)
    if record is None:
        known = ", ".join(map(repr, sorted(app.backends))) or "none"
        raise ImportFailed(
            f"{where} was imported anew on {socket.gethostname()} and holds no backend {name!r} "
            f"(there is {known}): what a driver adds later does not travel; declare it at module level"
        )
    return record


def holds_no(module: str, name: str) -> ImportFailed:
    """What to say of an attribute that the driver's module has and the one here has not."""
    return ImportFailed(
        f"module {module!r} ({_file(sys.modules[module])}) was imported anew on {socket.gethostname()} and "
        f"holds no {name!r}: define it at module level, not only when the file runs as a script or "
        "by assignment from outside; and make sure that the replicas have the same version of it"
    )


def _refuse_another(name: str) -> None:
    """ImportFailed if a process that was used for something else has a module of the same name already."""
    parts = name.split(".")
    if parts[0] in MAIN or parts[0] in ("serveit", "ray") or parts[0] in sys.stdlib_module_names:
        return
    for length in range(1, len(parts) + 1):
        part = ".".join(parts[:length])
        module = sys.modules.get(part)
        spec = find_spec(part) if module is not None else None
        if spec is not None and not is_file_of(module, spec):
            raise ImportFailed(
                f"the app needs the module {part!r} from {spec.origin or 'a folder without __init__.py'}, "
                f"but this process imported another of that name before, {_file(module)}: rename one of them"
            )


# -- files and folders ---------------------------------------------------------------------------


def find_spec(name: str) -> importlib.machinery.ModuleSpec | None:
    """What an import would find now, whatever is in sys.modules; None if nothing."""
    parent = name.rpartition(".")[0]
    path = getattr(sys.modules.get(parent), "__path__", None)
    if parent and path is None:
        return None
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, path, None)
        except Exception:  # one of the old kind, or one that breaks: it finds nothing
            continue
        if spec is not None:
            return spec
    return None


def is_file_of(module: Any, spec: importlib.machinery.ModuleSpec) -> bool:
    """Whether the module was loaded from where the spec leads."""
    if spec.origin is None:
        return hasattr(module, "__path__")  # a folder without __init__.py
    if not spec.has_location:
        return True  # built into Python
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and os.path.realpath(file) == os.path.realpath(spec.origin)


def is_installed(entry: str) -> bool:
    """Whether each Python of this installation has that folder on its path: it need not travel."""
    found = os.path.realpath(entry)
    return found in _installation() or found.startswith(_folder_of_ray())


def _installation() -> set[str]:
    standard = [sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders = [*standard, *site.getsitepackages(), site.getusersitepackages()]
    folders += [os.path.join(folder, "lib-dynload") for folder in standard[:2]]
    return {os.path.realpath(folder) for folder in folders}


def _folder_of_ray() -> str:
    """What Ray adds for itself when it is imported lies in its package."""
    file = getattr(sys.modules.get("ray"), "__file__", None)
    return os.path.join(os.path.realpath(os.path.dirname(file)), "") if file else "\0"


def _file(module: Any) -> str:
    return getattr(module, "__file__", None) or "of no file"

"""What travels to a replica: a reference to the app wherever it can be imported, by value only where not.

`pack` runs in the driver, when it deploys, or in a process that it starts for that, and which need not
load Ray; `unpack` in the replica's process, before anything else of the user's.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import TYPE_CHECKING

import msgspec

from serveit.cluster.references import References, backend_of, holds_no, import_module, is_installed
from serveit.config import did_you_mean
from serveit.control.orders import encode
from serveit.control.spec import app_spec
from serveit.declare.app import App
from serveit.exceptions import ImportFailed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from serveit.control.spec import AppSpec
    from serveit.declare.backend import BackendRecord


class Shipment(msgspec.Struct, frozen=True):
    """An app on its way to replicas.

    Attributes:
        reference: "package.module:attribute" of the app; empty if it travels by value.
        pickled: the app by value; empty if it travels by reference.
        paths: the driver's `sys.path`, absolute, without what every Python of its installation has.
        cwd: the driver's; empty if it was deleted.
        script: the file of the driver's `__main__`, for messages; empty if there is none.
        modules: others that may declare parts of the app; imported if some are missing.
        declared: how many backends and routes the driver's app has.
    """

    reference: str
    pickled: bytes
    paths: tuple[str, ...]
    cwd: str
    script: str = ""
    modules: tuple[str, ...] = ()
    declared: tuple[int, int] = (0, 0)


def pack(app: App) -> Shipment:
    """What a replica needs to have the app.

    Raises:
        ValueError: it cannot be imported, and is too large to travel by value.
        TypeError: it cannot be imported, and something in it cannot be pickled.
    """
    references = References()
    held = references.holder(app)
    pickled = b""
    if held is None:
        from serveit.cluster.byvalue import dump  # and with it Ray

        pickled = dump(app, references)
    main_file = getattr(sys.modules.get("__main__"), "__file__", None)
    return Shipment(
        reference="" if held is None else f"{held.module}:{held.attribute}",
        pickled=pickled,
        paths=_paths(),
        cwd=_cwd(),
        script=os.path.abspath(main_file) if isinstance(main_file, str) else "",
        modules=() if held is None else references.others(app, held.module),
        declared=_declared(app),
    )


def spec_of(
    app: App, *, name: str, prefix: str = "", owner: str = "", deploy_timeout_s: float = 60.0
) -> AppSpec:
    """What the controller is told of an app; see `app_spec`, and `pack` for what it raises."""
    code = encode(pack(app))
    return app_spec(app, name=name, prefix=prefix, code=code, owner=owner, deploy_timeout_s=deploy_timeout_s)


def unpack(shipment: Shipment, environment: Mapping[str, Any] | None = None) -> App:
    """The app, in the replica's process.

    Sets the process's `sys.path` and working directory: it may have been started for another
    driver, whose folder has an `app.py` as well. What its environment brings comes before that.

    Args:
        shipment: of `pack`.
        environment: the `runtime_env` that the process was started in, if any.

    Raises:
        ImportFailed: something is not here that the driver has; the text says what, and where it
            was looked for.
        Exception: whatever the user's module raised while it was imported.
    """
    absent = _go_where_the_driver_was(shipment, environment or {})
    if not shipment.reference:
        from serveit.cluster.byvalue import load

        return load(shipment.pickled)
    module_name, _, attribute = shipment.reference.partition(":")
    module = import_module(module_name, absent)
    try:
        app = getattr(module, attribute)
    except AttributeError:
        raise holds_no(module_name, attribute) from None
    if not isinstance(app, App):
        raise ImportFailed(
            f"{shipment.reference!r} was imported anew and is of type {type(app).__name__}, not App: "
            "make the app at module level, when the module is imported"
        )
    _complete(app, shipment)
    return app


def find(app: App, backend_name: str, shipment: Shipment) -> BackendRecord:
    """A backend of the unpacked app.

    Raises:
        ImportFailed: the app holds none of that name here, though the driver's did.
    """
    if shipment.reference:
        return backend_of(app, backend_name, shipment.reference)
    record = app.backends.get(backend_name)
    if record is None:
        raise ImportFailed(
            f"the {describe(shipment)}, holds no backend {backend_name!r}: "
            f"{did_you_mean(backend_name, list(app.backends))}; deploy it anew after declaring one"
        )
    return record


def describe(shipment: Shipment) -> str:
    """How logs name it: "app:app", or "app by value, 3,412 bytes"."""
    return shipment.reference or f"app by value, {len(shipment.pickled):,} bytes"


def _complete(app: App, shipment: Shipment) -> None:
    """Import what else declares parts of the app: one of its modules need not import the others."""
    for name in shipment.modules:
        if _declared(app) == shipment.declared:
            return
        with contextlib.suppress(ImportFailed):  # it need not be what is missing; `find` says what is
            import_module(name)


def _declared(app: App) -> tuple[int, int]:
    return len(app.backends), len(app.routes)


def _paths() -> tuple[str, ...]:
    entries = (os.path.abspath(entry or ".") for entry in sys.path if isinstance(entry, str))
    found = dict.fromkeys(entry for entry in entries if os.path.exists(entry) and not is_installed(entry))
    return tuple(found)


def _cwd() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return ""


def _go_where_the_driver_was(shipment: Shipment, environment: Mapping[str, Any]) -> list[str]:
    """Set path and working directory; the folders of the driver's that are not on this machine."""
    here = [path for path in shipment.paths if os.path.exists(path)]
    first = [*_brought(environment, shipment.paths), *here]
    sys.path[:] = [*first, *(entry for entry in sys.path if entry not in first)]
    if not environment.get("working_dir"):
        with contextlib.suppress(OSError):  # the driver's folder need not exist here, nor be ours to enter
            os.chdir(shipment.cwd)
    importlib.invalidate_caches()
    return [path for path in shipment.paths if path not in here]


def _brought(environment: Mapping[str, Any], paths: tuple[str, ...]) -> list[str]:
    """The folders on this process's import path that its environment has put there.

    Args:
        environment: its own.
        paths: the driver's: what both have is the driver's.
    """
    if not (environment.get("working_dir") or environment.get("py_modules")):
        return []
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [entry for entry in dict.fromkeys(entries) if os.path.isdir(entry) and entry not in paths]

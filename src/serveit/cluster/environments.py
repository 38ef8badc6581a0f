"""Runtime environments: what replicas find beside the driver's folders, and why Ray could not make one.

`packed` runs in the driver, which has the folders and files that are named; Ray itself takes local ones
from a whole job only, not for an actor. From then on they are addresses, that any node can read from.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import ray

from serveit.resources import check_actor_options

if TYPE_CHECKING:
    from serveit.control.spec import AppSpec

INSTALLERS = ("pip", "uv", "conda")
"""Fields of which an environment has one."""
KEPT_S = 10 * 365 * 24 * 3600
"""So long the cluster keeps what was sent there: a replica that dies is to be followed by another, and Ray
would forget a package with the last actor that uses it. It is named by its content, and held once."""
MAX_REASON = 4_000


def packed(spec: AppSpec) -> AppSpec:
    """The same app, with environments that any node can make; blocking. See `packed_options`."""
    backends = (
        msgspec.structs.replace(
            backend,
            config=backend.config.merge(
                ray_actor_options=packed_options(backend.name, backend.ray_actor_options) or None
            ),
        )
        for backend in spec.backends
    )
    return msgspec.structs.replace(spec, backends=tuple(backends))


def packed_options(backend: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A backend's `ray_actor_options`, with an environment that any node can make.

    What the driver's own job has (`ray.init(runtime_env=...)`) its replicas have, too: a backend's fields
    win, and of `env_vars` each by itself.

    Raises:
        TypeError, ValueError: what `check_actor_options` refuses; the environment names what is not there, or
            Ray does not take it.
    """
    check_actor_options(options)
    if not ray.is_initialized():
        return dict(options)  # asking would start a Ray; who is to be asked next says that it has ended
    environment = merged(ray.get_runtime_context().runtime_env, options.get("runtime_env", {}))
    if not environment:
        return dict(options)
    try:
        return {**options, "runtime_env": _packed(environment)}
    except Exception as error:
        raise ValueError(
            f"backend {backend!r}: its runtime_env cannot be sent to the cluster: {error}"
        ) from error


def merged(jobs: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A backend's environment in a job that has one."""
    if any(name in own for name in INSTALLERS):
        jobs = {name: value for name, value in jobs.items() if name not in INSTALLERS}
    both = {name: value for name, value in {**jobs, **own}.items() if not name.startswith("_")}
    if "env_vars" in both:
        both["env_vars"] = {**jobs.get("env_vars", {}), **own.get("env_vars", {})}
    return both


def _packed(environment: dict[str, Any]) -> dict[str, Any]:
    # Private, and what `ray.init` does with a job's: nothing public sends a folder for an actor.
    from ray._private.runtime_env.py_modules import upload_py_modules_if_needed
    from ray._private.runtime_env.working_dir import upload_working_dir_if_needed
    from ray.experimental.internal_kv import _pin_runtime_env_uri

    send_folder: Any = upload_working_dir_if_needed
    send_modules: Any = upload_py_modules_if_needed
    keep: Any = _pin_runtime_env_uri
    with tempfile.TemporaryDirectory(prefix="serveit-") as folder:
        sent = send_folder(dict(environment), include_gitignore=True, scratch_dir=folder)
        sent = send_modules(sent, include_gitignore=True, scratch_dir=folder)
    sent.pop("excludes", None)  # they have been
    make: Any = ray.runtime_env.RuntimeEnv
    plain: dict[str, Any] = make(**sent).to_dict()  # files with requirements have been read
    for uri in [plain.get("working_dir", ""), *plain.get("py_modules", ())]:
        if uri.startswith("gcs://"):
            keep(uri, expiration_s=KEPT_S)
    return {name: value for name, value in plain.items() if not name.startswith("_")}


def reason(error: BaseException) -> str:
    """Of what Ray says of an environment that it could not make, what helps: the last exception's text."""
    text = str(error).strip()
    found = list(re.finditer(r"^[\w.]*?(\w+(?:Error|Exception): .*)", text, re.MULTILINE))
    if found:
        text = text[found[-1].start(1) :]
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("Command '[")]
    return "\n".join(lines)[-MAX_REASON:]

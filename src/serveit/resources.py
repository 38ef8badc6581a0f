"""What a replica's actor may ask of the cluster: `ray_actor_options`, checked when they are declared.

Ray would refuse the same later, in the controller, or quietly do something else. It is not imported here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from serveit.nearest import did_you_mean

FINEST = 0.0001
"""Ray counts resources in steps of this."""
MOST = 2**63 * FINEST
"""It cannot count as many, and takes them for nothing."""

TAKEN: Mapping[str, str] = {
    "name": "names its actors",
    "namespace": "has one of its own",
    "lifetime": "ends replicas itself",
    "get_if_exists": "starts replicas itself",
    "max_restarts": "starts others in the place of those that die",
    "max_task_retries": "decides what is sent again: see idempotent",
    "max_concurrency": "has max_ongoing_requests",
    "max_pending_calls": "has max_queued_requests",
    "concurrency_groups": "has a group of its own for control",
}
"""Options that would take replicas out of its hands; why."""

NAMED_RESOURCES: Mapping[str, str] = {
    "CPU": "say num_cpus",
    "GPU": "say num_gpus",
    "memory": "say memory, beside resources",
    "object_store_memory": "Ray does not reserve it for actors",
}
"""Resources that are no custom ones; what to do instead."""

ENVIRONMENT = (
    "env_vars",
    "pip",
    "uv",
    "conda",
    "working_dir",
    "py_modules",
    "excludes",
    "py_executable",
    "container",
    "image_uri",
    "worker_process_setup_hook",
    "config",
)
"""The fields of a runtime environment."""

_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_LABEL_KEY = re.compile(rf"(?:{_LABEL}/)?{_LABEL}")
_LABEL_VALUE = re.compile(rf"|!?{_LABEL}|!?in\({_LABEL}(?:, ?{_LABEL})*\)")


def check_actor_options(options: Any) -> None:
    """TypeError or ValueError for what cannot be asked of Ray, or is serveit's to decide."""
    if not isinstance(options, Mapping):
        raise TypeError(f"ray_actor_options must be a dict, got {options!r}")
    for name, value in options.items():
        if name in TAKEN:
            raise ValueError(f"ray_actor_options must not set {name!r}: serveit {TAKEN[name]}")
        if name not in _CHECKS:
            raise TypeError(f"ray_actor_options has no {name!r}: {did_you_mean(str(name), list(_CHECKS))}")
        _CHECKS[name](f"ray_actor_options[{name!r}]", value)


def plain(value: Any) -> Any:
    """An option's value as it travels: numbers and dicts of other kinds (numpy's, read-only ones) as those of
    Python, and a copy, so that nobody changes it later."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else value
    if isinstance(value, float):
        return float(value)
    return value


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node with these labels is one that a `label_selector` asks for."""
    return all(_is_meant(labels.get(key), wanted) for key, wanted in selector.items())


def _is_meant(label: str | None, wanted: str) -> bool:
    plain = wanted.removeprefix("!")
    listed = re.fullmatch(r"in\((.*)\)", plain)
    values = re.split(", ?", listed[1]) if listed else [plain]
    return (label in values) != wanted.startswith("!")


# -- one option each -----------------------------------------------------------------------------


def _check_amount(where: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{where} must be a number, got {value!r}{_leave_out(value)}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{where} must be ≥ 0 and finite, got {value!r}")
    if value >= MOST:
        raise ValueError(f"{where} must be < {MOST:.1e}, which is as far as Ray counts, got {value!r}")
    if 0 < value < FINEST:
        raise ValueError(f"{where} must be 0 or ≥ {FINEST}, the steps in which Ray counts, got {value!r}")


def _check_gpus(where: str, value: Any) -> None:
    _check_amount(where, value)
    if value > 1 and value != int(value):
        raise ValueError(
            f"{where} must be whole above 1, got {value!r}: a replica gets a share of one GPU (0.5) or whole "
            f"ones ({math.floor(value)} or {math.ceil(value)})"
        )


def _check_memory(where: str, value: Any) -> None:
    _check_amount(where, value)
    if value != int(value):
        raise ValueError(f"{where} is in bytes and must be whole, got {value!r}: write int(...)")


def _check_resources(where: str, value: Any) -> None:
    _check_dict(where, value)
    for name, amount in value.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"{where} has names of resources as keys, got {name!r}")
        if name in NAMED_RESOURCES:
            raise ValueError(f"{where} is for custom resources, got {name!r}: {NAMED_RESOURCES[name]}")
        _check_amount(f"{where}[{name!r}]", amount)


def _check_accelerator(where: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{where} must be the name of a type, like 'T4', got {value!r}{_leave_out(value)}")


def _check_labels(where: str, value: Any) -> None:
    _check_dict(where, value)
    for key, wanted in value.items():
        if not isinstance(key, str) or not isinstance(wanted, str):
            raise TypeError(f"{where} must lead from str to str, got {key!r}: {wanted!r}")
        if not _LABEL_KEY.fullmatch(key):
            raise ValueError(
                f"{where}: {key!r} is no label: it has letters, digits, '-', '_' and '.', and may have "
                "one prefix with a '/'"
            )
        if not _LABEL_VALUE.fullmatch(wanted):
            raise ValueError(f"{where}[{key!r}] must be 'a', '!a', 'in(a, b)' or '!in(a, b)', got {wanted!r}")


def _check_strategy(where: str, value: Any) -> None:
    if value not in ("DEFAULT", "SPREAD"):
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(
            f"{where} must be 'DEFAULT' or 'SPREAD', got {value!r}: to choose nodes use label_selector "
            "or resources"
        )


def _check_environment(where: str, value: Any) -> None:
    _check_dict(where, value)
    for name, given in value.items():
        if name not in ENVIRONMENT:
            raise TypeError(f"{where} has no {name!r}: {did_you_mean(str(name), ENVIRONMENT)}")
        if name in _ENVIRONMENT_CHECKS:
            _ENVIRONMENT_CHECKS[name](f"{where}[{name!r}]", given)
    installers = [name for name in ("pip", "uv", "conda") if name in value]
    if len(installers) > 1:
        raise ValueError(f"{where} can have only one of {' and '.join(map(repr, installers))}")


def _check_variables(where: str, value: Any) -> None:
    _check_dict(where, value)
    for name, text in value.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise TypeError(f"{where} must lead from str to str, got {name!r}: {text!r}")


def _check_packages(where: str, value: Any) -> None:
    """A list of requirements, the path of a file with them, or a dict with "packages"."""
    if isinstance(value, Mapping):
        if "packages" not in value:
            raise ValueError(f"{where} as a dict needs 'packages', got {value!r}")
    elif not isinstance(value, str):
        _check_texts(where, value)


def _check_texts(where: str, value: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise TypeError(f"{where} must be a list of str, got {value!r}")


def _check_folder(where: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{where} must be a str, the path of a folder or a URI, got {value!r}")


def _check_dict(where: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"{where} must be a dict, got {value!r}{_leave_out(value)}")


def _leave_out(value: Any) -> str:
    return ": leave it out" if value is None else ""


Check = Callable[[str, Any], None]

_CHECKS: Mapping[str, Check] = {
    "num_cpus": _check_amount,
    "num_gpus": _check_gpus,
    "memory": _check_memory,
    "resources": _check_resources,
    "accelerator_type": _check_accelerator,
    "label_selector": _check_labels,
    "runtime_env": _check_environment,
    "scheduling_strategy": _check_strategy,
}
"""All that may be set, and how it is checked."""

_ENVIRONMENT_CHECKS: Mapping[str, Check] = {
    "env_vars": _check_variables,
    "pip": _check_packages,
    "uv": _check_packages,
    "working_dir": _check_folder,
    "py_modules": _check_texts,
    "excludes": _check_texts,
    "config": _check_dict,
}

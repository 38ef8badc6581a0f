"""Structs of a script or notebook, taken apart so that a replica can make them again.

A Struct's fields are fixed when it is made: cloudpickle's way, an empty class that is filled later,
gives one without any. Used by `byvalue` alone.
"""

from __future__ import annotations

from typing import Any

import msgspec
from ray.cloudpickle import cloudpickle as _cloudpickle

cloudpickle: Any = _cloudpickle  # untyped


class _Example(msgspec.Struct):
    items: list[int] = []


_FACTORY = type(_Example.__struct_defaults__[0])
"""How a Struct keeps a `default_factory`."""


def reduce_struct(struct: type[msgspec.Struct]) -> Any:
    """What pickle is told of it."""
    annotations = vars(struct).get("__annotations__", {})
    own = [name for name in annotations if name in struct.__struct_fields__]
    made_by_msgspec = {*own, *vars(struct)["__slots__"], "__slots__", "__weakref__", "__dict__"}
    body = {name: value for name, value in vars(struct).items() if name not in made_by_msgspec}
    body.pop("__msgspec_cache__", None)
    body.update(__qualname__=struct.__qualname__, __annotations__=annotations)
    config = struct.__struct_config__
    options = {name: getattr(config, name) for name in dir(config) if name[0] != "_"}
    options["kw_only"] = bool(own) and own[0] not in struct.__match_args__
    known = _fields(struct)
    fields = {name: known[name] for name in own}
    tracker = cloudpickle._get_or_create_tracker_id(struct)
    return make_struct, (type(struct), struct.__name__, struct.__bases__, body, fields, options, tracker)


def make_struct(
    kind: Any,
    name: str,
    bases: tuple[type, ...],
    body: dict[str, Any],
    fields: dict[str, dict[str, Any]],
    options: dict[str, Any],
    tracker: str,
) -> Any:
    """The Struct again, or what was made of it before."""
    annotations = body["__annotations__"]
    defaults = {name: msgspec.field(**arguments) for name, arguments in fields.items()}
    # Without the ClassVars: what is text would be looked up in a module that is not there yet.
    of_fields = {"__annotations__": {name: annotations[name] for name in fields}}
    made = kind(name, bases, {**body, **of_fields, **defaults}, **options)
    made.__annotations__ = annotations
    return cloudpickle._lookup_class_or_track(tracker, made)


def _fields(struct: type[msgspec.Struct]) -> dict[str, dict[str, Any]]:
    """The arguments of `msgspec.field`, by the field's name. Not `msgspec.structs.fields`, which
    evaluates annotations."""
    known: dict[str, dict[str, Any]] = {
        name: {"name": encoded}
        for name, encoded in zip(struct.__struct_fields__, struct.__struct_encode_fields__, strict=True)
    }
    defaults = struct.__struct_defaults__
    with_default = struct.__struct_fields__[len(known) - len(defaults) :]
    for name, default in zip(with_default, defaults, strict=True):
        if type(default) is _FACTORY:
            known[name]["default_factory"] = default.factory
        elif default is not msgspec.NODEFAULT:
            known[name]["default"] = default
    return known

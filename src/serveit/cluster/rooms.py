"""Where there is room for a replica: what the nodes have, and what is free there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ray

from serveit.resources import matches

ACCELERATOR, ACCELERATOR_SHARE = "accelerator_type:", 0.001
"""How Ray counts a type of accelerator: a node that has it, has one of a resource of that name."""
GIB = 2**30


class Room(NamedTuple):
    """One node."""

    labels: Mapping[str, str]
    total: Mapping[str, float]
    free: Mapping[str, float]


def wanted(options: Mapping[str, Any]) -> dict[str, float]:
    """The resources that an actor with these options needs to be placed."""
    resources = {"CPU": options.get("num_cpus", 0 if options else 1), "GPU": options.get("num_gpus", 0)}
    resources |= {"memory": options.get("memory", 0), **options.get("resources", {})}
    if accelerator := options.get("accelerator_type"):
        resources[f"{ACCELERATOR}{accelerator}"] = ACCELERATOR_SHARE
    return {name: float(amount) for name, amount in resources.items() if amount}


def lacking(options: Mapping[str, Any], rooms: Sequence[Room]) -> str:
    """What keeps an actor from being placed, in a line that goes on from "it"; empty if nothing does.

    Tells what is taken just now from what no node has, however long one waits.
    """
    selector = options.get("label_selector", {})
    fitting = [room for room in rooms if matches(room.labels, selector)]
    with_labels = " with label " + " and ".join(f"{key}={value}" for key, value in selector.items())
    if selector and not fitting:
        return f"needs a node{with_labels}, and there is none"
    asked = wanted(options)
    if any(_holds(room.free, asked) for room in fitting):
        return ""
    where = "free" if len(fitting) == 1 else "free on one node"
    parts = [_part(name, amount, fitting, where) for name, amount in asked.items()]
    text = f"needs {' and '.join(parts)}" + (with_labels if selector else "")
    each_is_somewhere = all(_most(name, fitting, "total") >= amount for name, amount in asked.items())
    if each_is_somewhere and not any(_holds(room.total, asked) for room in fitting):
        text += " (no node has all of that)"
    return text


def _part(name: str, amount: float, rooms: Sequence[Room], where: str) -> str:
    most = _most(name, rooms, "total")
    never = ""
    if most < amount:
        never = f" (no node has {f'more than {_quantity(name, most)}' if most else 'any'})"
    if name.startswith(ACCELERATOR):
        return f"accelerator_type {name.removeprefix(ACCELERATOR)}{never}"
    free = _most(name, rooms, "free")
    return f"{_quantity(name, amount)} {name}, {_quantity(name, free)} {where}{never}"


def _quantity(name: str, amount: float) -> str:
    return f"{amount / GIB:.3g} GiB" if name == "memory" else f"{amount:g}"


def _holds(had: Mapping[str, float], asked: Mapping[str, float]) -> bool:
    return all(had.get(name, 0) >= amount for name, amount in asked.items())


def _most(name: str, rooms: Sequence[Room], which: str) -> float:
    return max((getattr(room, which).get(name, 0) for room in rooms), default=0)


def rooms() -> list[Room]:
    """The nodes of the cluster; blocking."""
    # Private, but the only one that tells nodes apart: four nodes with one CPU each are no four CPUs.
    from ray._private.state import available_resources_per_node

    per_node: Any = available_resources_per_node
    list_nodes: Any = ray.nodes  # typed by nobody
    free = per_node()
    return [
        Room(node.get("Labels", {}), node["Resources"], free.get(node["NodeID"], {}))
        for node in list_nodes()
        if node["Alive"]
    ]

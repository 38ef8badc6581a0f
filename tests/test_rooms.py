"""Where there is room for a replica, and what is said where there is none."""

from __future__ import annotations

from typing import Any

import pytest

from serveit.cluster.rooms import GIB, Room, lacking, wanted


def room(total: dict[str, float], taken: dict[str, float] | None = None, **labels: str) -> Room:
    used = taken or {}
    return Room(labels, total, {name: amount - used.get(name, 0) for name, amount in total.items()})


SMALL = room({"CPU": 2, "memory": 4 * GIB}, {"CPU": 1.5})
LARGE = room({"CPU": 8, "GPU": 2, "accelerator_type:T4": 1}, {"CPU": 8, "GPU": 0.5}, zone="a")


def test_what_an_actor_needs() -> None:
    assert wanted({}) == {"CPU": 1}, "to be placed; it holds none then"
    assert wanted({"num_gpus": 0.5, "runtime_env": {}}) == {"GPU": 0.5}
    asked = {"num_cpus": 2, "memory": 100, "resources": {"tpu": 1}, "accelerator_type": "T4"}
    assert wanted(asked) == {"CPU": 2, "memory": 100, "tpu": 1, "accelerator_type:T4": 0.001}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_cpus": 0.5}, ""),
        ({"num_gpus": 1, "accelerator_type": "T4"}, ""),
        ({"num_cpus": 1}, "needs 1 CPU, 0.5 free on one node"),
        ({"num_cpus": 64}, "needs 64 CPU, 0.5 free on one node (no node has more than 8)"),
        (
            {"num_gpus": 2, "num_cpus": 0.1},
            "needs 0.1 CPU, 0.5 free on one node and 2 GPU, 1.5 free on one node",
        ),
        ({"resources": {"tpu": 1}}, "needs 1 tpu, 0 free on one node (no node has any)"),
        ({"memory": 6 * GIB}, "needs 6 GiB memory, 4 GiB free on one node (no node has more than 4 GiB)"),
        (
            {"num_gpus": 1, "memory": GIB},
            "needs 1 GPU, 1.5 free on one node and 1 GiB memory, 4 GiB free on one node "
            "(no node has all of that)",
        ),
        ({"accelerator_type": "H100"}, "needs accelerator_type H100 (no node has any)"),
        ({"label_selector": {"zone": "b"}}, "needs a node with label zone=b, and there is none"),
        ({"num_cpus": 1, "label_selector": {"zone": "a"}}, "needs 1 CPU, 0 free with label zone=a"),
        ({"label_selector": {"zone": "!b"}, "num_gpus": 1}, ""),
    ],
)
def test_what_is_lacking(options: dict[str, Any], text: str) -> None:
    assert lacking(options, [SMALL, LARGE]) == text


def test_one_node_alone() -> None:
    assert lacking({"num_cpus": 4}, [room({"CPU": 4}, {"CPU": 2})]) == "needs 4 CPU, 2 free"
    assert lacking({}, []) == "needs 1 CPU, 0 free on one node (no node has any)"

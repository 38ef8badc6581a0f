"""What may be asked of the cluster, and what is refused when it is declared."""

from __future__ import annotations

import math
from typing import Any

import pytest

from serveit import BackendConfig
from serveit.resources import check_actor_options, matches


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (["num_gpus"], TypeError, r"ray_actor_options must be a dict, got \['num_gpus'\]"),
        ({"num_gpu": 1}, TypeError, "no 'num_gpu': did you mean 'num_gpus'?"),
        ({"object_store_memory": 1}, TypeError, "no 'object_store_memory'"),
        ({"name": "x"}, ValueError, "must not set 'name': serveit names its actors"),
        ({"max_restarts": 3}, ValueError, "serveit starts others in the place of those that die"),
        ({"max_concurrency": 3}, ValueError, "serveit has max_ongoing_requests"),
        ({"num_cpus": "1"}, TypeError, r"\['num_cpus'\] must be a number, got '1'"),
        ({"num_cpus": True}, TypeError, r"\['num_cpus'\] must be a number, got True"),
        ({"num_cpus": None}, TypeError, "a number, got None: leave it out"),
        ({"num_cpus": -1}, ValueError, r"\['num_cpus'\] must be ≥ 0 and finite, got -1"),
        ({"num_cpus": 0.00001}, ValueError, "must be 0 or ≥ 0.0001, the steps in which Ray counts"),
        (
            {"num_gpus": 1.5},
            ValueError,
            r"whole above 1, got 1.5: .* share of one GPU \(0.5\) or .* \(1 or 2\)",
        ),
        ({"num_gpus": math.nan}, ValueError, "finite, got nan"),
        ({"memory": math.inf}, ValueError, "finite, got inf"),
        ({"memory": 2**50}, ValueError, r"\['memory'\] must be < 9.2e\+14, which is as far as Ray counts"),
        ({"memory": 0.5}, ValueError, r"\['memory'\] is in bytes and must be whole, got 0.5"),
        ({"resources": "tpu"}, TypeError, r"\['resources'\] must be a dict, got 'tpu'"),
        ({"resources": {"CPU": 1}}, ValueError, "for custom resources, got 'CPU': say num_cpus"),
        ({"resources": {"GPU": 1}}, ValueError, "got 'GPU': say num_gpus"),
        ({"resources": {"memory": 1}}, ValueError, "got 'memory': say memory, beside resources"),
        ({"resources": {"tpu": -1}}, ValueError, r"\['resources'\]\['tpu'\] must be ≥ 0"),
        ({"resources": {3: 1}}, TypeError, "names of resources as keys, got 3"),
        ({"accelerator_type": ""}, TypeError, "the name of a type, like 'T4', got ''"),
        ({"label_selector": {"zone": 3}}, TypeError, "from str to str, got 'zone': 3"),
        ({"label_selector": {"a zone": "b"}}, ValueError, "'a zone' is no label"),
        ({"label_selector": {"zone": "a|b"}}, ValueError, r"\['zone'\] must be 'a', '!a', 'in\(a, b\)'"),
        ({"scheduling_strategy": "NEAR"}, ValueError, "'DEFAULT' or 'SPREAD', got 'NEAR': .* label_selector"),
        ({"scheduling_strategy": object()}, TypeError, "must be 'DEFAULT' or 'SPREAD'"),
        ({"runtime_env": "env"}, TypeError, r"\['runtime_env'\] must be a dict"),
        ({"runtime_env": {"wroking_dir": "."}}, TypeError, "no 'wroking_dir': did you mean 'working_dir'?"),
        ({"runtime_env": {"env_vars": {"A": 1}}}, TypeError, "from str to str, got 'A': 1"),
        ({"runtime_env": {"pip": ("a",)}}, TypeError, r"\['pip'\] must be a list of str, got \('a',\)"),
        ({"runtime_env": {"pip": {"package": []}}}, ValueError, "as a dict needs 'packages'"),
        ({"runtime_env": {"pip": ["a"], "conda": "b"}}, ValueError, "only one of 'pip' and 'conda'"),
        ({"runtime_env": {"working_dir": 3}}, TypeError, "the path of a folder or a URI, got 3"),
        ({"runtime_env": {"py_modules": "farm"}}, TypeError, r"\['py_modules'\] must be a list of str"),
    ],
)
def test_what_is_refused(options: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        check_actor_options(options)


def test_what_may_be_asked() -> None:
    options: dict[str, Any] = {
        "num_cpus": 0.5,
        "num_gpus": 1 / 3,
        "memory": 2e9,
        "resources": {"tpu": 1, "node:10.0.0.1": 0.001},
        "accelerator_type": "T4",
        "label_selector": {"zone": "a", "ray.io/accelerator-type": "!in(A, B)", "empty": ""},
        "runtime_env": {
            "env_vars": {"A": "b"},
            "pip": "requirements.txt",
            "working_dir": "s3://bucket/code.zip",
            "py_modules": ["farm"],
            "excludes": ["data"],
            "config": {"setup_timeout_seconds": 5},
        },
        "scheduling_strategy": "SPREAD",
    }
    assert BackendConfig(ray_actor_options=options).ray_actor_options == options
    for other in ({}, {"num_gpus": 2.0}, {"num_cpus": 0}, {"runtime_env": {"uv": {"packages": ["a"]}}}):
        check_actor_options(other)


@pytest.mark.parametrize(
    ("wanted", "is_meant"),
    [("a", True), ("!a", False), ("b", False), ("in(a, b)", True), ("in(b,c)", False), ("!in(b)", True)],
)
def test_labels_of_nodes(wanted: str, is_meant: bool) -> None:
    assert matches({"zone": "a", "more": "x"}, {"zone": wanted}) == is_meant
    assert matches({}, {"zone": wanted}) == wanted.startswith("!")

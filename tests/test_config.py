"""The records of options: defaults, checks, and what they are made from."""

from __future__ import annotations

import dataclasses
import math
import re
from types import MappingProxyType
from typing import Any

import msgspec
import pytest

from serveit import BackendConfig, HTTPOptions
from serveit.config import FOREIGN_OPTIONS, MAX_SECONDS


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"num_replicas": 0}, ValueError, "num_replicas must be ≥ 1, got 0"),
        ({"num_replicas": 10_001}, ValueError, "num_replicas must be ≤ 10000, got 10001"),
        ({"max_ongoing_requests": 2**63}, ValueError, "max_ongoing_requests must be ≤ 9223372036854775807"),
        ({"num_replicas": True}, TypeError, "num_replicas must be an int, got True"),
        ({"num_threads": 1.5}, TypeError, "num_threads must be an int, got 1.5"),
        ({"max_batch_size": 0}, ValueError, "max_batch_size must be ≥ 1, got 0"),
        ({"max_ongoing_requests": "3"}, TypeError, "max_ongoing_requests must be an int, got '3'"),
        ({"max_queued_requests": -1}, ValueError, "max_queued_requests must be ≥ 0, got -1"),
        ({"graceful_shutdown_timeout_s": math.inf}, ValueError, "≥ 0 and finite, got inf"),
        ({"request_timeout_s": 0}, ValueError, "request_timeout_s must be > 0 and finite"),
        ({"request_timeout_s": math.nan}, ValueError, "finite, got nan"),
        ({"batch_wait_timeout_s": "1"}, TypeError, "a number of seconds, got '1'"),
        ({"batch_wait_timeout_s": 1}, ValueError, "batch_wait_timeout_s needs max_batch_size"),
        ({"max_concurrent_batches": 2}, ValueError, "max_concurrent_batches needs max_batch_size"),
        ({"batch_methods": ["x"]}, ValueError, "batch_methods needs max_batch_size"),
        ({"batch_methods": "x"}, TypeError, "a sequence of method names, got 'x'"),
        ({"batch_methods": 3}, TypeError, "a sequence of method names, got 3"),
        ({"batch_methods": [3]}, TypeError, "a sequence of method names"),
        ({"max_batch_size": 2, "batch_methods": []}, ValueError, "leave max_batch_size out"),
        ({"health_check_period_s": 0}, ValueError, "health_check_period_s must be > 0 and finite, got 0"),
        ({"health_check_timeout_s": -1}, ValueError, "health_check_timeout_s must be > 0 and finite, got -1"),
        ({"health_check_timeout_s": None}, TypeError, "must be a number of seconds, got None"),
        ({"idempotent": 1}, TypeError, "idempotent must be True or False, got 1"),
        ({"max_surge": -1}, ValueError, "max_surge must be ≥ 0, got -1"),
        ({"max_surge": 0.5}, TypeError, "max_surge must be an int, got 0.5"),
        ({"ray_actor_options": {"num_gpu": 1}}, TypeError, "no 'num_gpu': did you mean 'num_gpus'?"),
        ({"max_batch_size": 4, "max_ongoing_requests": 3}, ValueError, r"≥ max_batch_size \(4\), got 3"),
    ],
)
def test_what_a_backend_refuses(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        BackendConfig(**options)


def test_batch_methods_are_kept_as_a_tuple() -> None:
    methods: Any = ["one", "two"]
    assert BackendConfig(max_batch_size=1, batch_methods=methods).batch_methods == ("one", "two")


def test_what_a_backend_may_ask_of_the_cluster() -> None:
    options: dict[str, Any] = {
        "num_cpus": 0.5,
        "num_gpus": 1,
        "memory": 2**30,
        "resources": {"tpu": 1},
        "accelerator_type": "T4",
        "label_selector": {"zone": "a"},
        "runtime_env": {"env_vars": {"A": "b"}},
        "scheduling_strategy": "SPREAD",
    }
    config = BackendConfig(ray_actor_options=options, max_surge=0)
    assert (config.ray_actor_options, config.max_surge) == (options, 0)
    assert BackendConfig().merge(ray_actor_options={"num_gpus": 1}).ray_actor_options == {"num_gpus": 1}
    assert (BackendConfig().ray_actor_options, BackendConfig().max_surge) == (None, 1)


def test_limits_that_are_none() -> None:
    config = BackendConfig(max_queued_requests=0, request_timeout_s=None)
    assert (config.max_queued_requests, config.request_timeout_s) == (0, None)


def test_the_limit_of_running_requests() -> None:
    assert BackendConfig().ongoing_limit(is_async=True) == 100
    assert BackendConfig(num_threads=3).ongoing_limit(is_async=False) == 3
    assert BackendConfig(max_batch_size=8, max_concurrent_batches=2).ongoing_limit(is_async=True) == 32
    assert BackendConfig(max_ongoing_requests=7).ongoing_limit(is_async=False) == 7
    assert BackendConfig().prefetch == 1 and BackendConfig(max_batch_size=8).prefetch == 8


def test_merge_checks_the_whole() -> None:
    config = BackendConfig(max_batch_size=4)
    assert config.merge(num_replicas=2) == BackendConfig(max_batch_size=4, num_replicas=2)
    with pytest.raises(ValueError, match="max_ongoing_requests"):
        config.merge(max_ongoing_requests=1)
    with pytest.raises(TypeError, match="did you mean 'num_replicas'?"):
        config.merge(replicas=1)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"host": ""}, TypeError, "host must be an address, a name or 'node', got ''"),
        ({"host": None}, TypeError, "got None: for no HTTP server at all there is location=None"),
        ({"host": 3}, TypeError, "host must be"),
        ({"port": -1}, ValueError, "port must be ≥ 0"),
        ({"port": 65_536}, ValueError, "port must be ≤ 65535"),
        ({"port": "80"}, TypeError, "port must be an int"),
        ({"location": "Everywhere"}, ValueError, "'HeadOnly', 'EveryNode', 'NoServer', None"),
        ({"root_path": "api"}, ValueError, "root_path must start with '/'"),
        ({"root_path": "/api/"}, ValueError, "not end with one"),
        ({"middlewares": "a:b"}, TypeError, "a list of factories, got 'a:b'"),
        ({"middlewares": 3}, TypeError, "a list of factories"),
        ({"middlewares": [3]}, TypeError, "a middleware is a factory, .* got 3"),
        ({"ssl_keyfile": "key.pem"}, ValueError, "needs ssl_certfile"),
        ({"max_body_bytes": 0}, ValueError, "max_body_bytes must be ≥ 1"),
        ({"keep_alive_s": -1}, ValueError, "keep_alive_s must be ≥ 0"),
    ],
)
def test_what_a_server_refuses(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        HTTPOptions.parse(options)


def test_http_options_from_what_is_given() -> None:
    options = HTTPOptions(port=0)
    assert HTTPOptions.parse(None) == HTTPOptions()
    assert HTTPOptions.parse(options) is options
    assert HTTPOptions.parse({"port": 0}) == options
    wrong: Any = "8000"
    with pytest.raises(TypeError, match="HTTPOptions or a dict, got str"):
        HTTPOptions.parse(wrong)
    with pytest.raises(TypeError, match="HTTPOptions has no option 'prot': did you mean 'port'?"):
        HTTPOptions.parse({"prot": 1})


def test_whether_there_is_a_server() -> None:
    assert HTTPOptions().serves and HTTPOptions(location="EveryNode").serves
    assert not HTTPOptions(location=None).serves and not HTTPOptions(location="NoServer").serves


def test_no_time_is_longer_than_a_year() -> None:
    for name in ("request_timeout_s", "graceful_shutdown_timeout_s"):
        with pytest.raises(ValueError, match=f"{name} must be ≤ 31536000 seconds, a year, got 1e.17"):
            BackendConfig().merge(**{name: 1e17})
    assert BackendConfig(request_timeout_s=MAX_SECONDS).request_timeout_s == MAX_SECONDS


@pytest.mark.parametrize("name", FOREIGN_OPTIONS)
def test_who_comes_from_ray_serve_is_told_what_to_write(name: str) -> None:
    assert name not in {field.name for field in dataclasses.fields(BackendConfig)}
    with pytest.raises(TypeError, match=f"no option '{name}': {re.escape(FOREIGN_OPTIONS[name])}"):
        BackendConfig.from_options(None, {name: 1})


def test_what_travels_is_plain() -> None:
    class Seconds(float):
        """As numpy has them."""

    options = {"num_cpus": Seconds(0.5), "runtime_env": {"pip": ["a"], "env_vars": {"A": "b"}}}
    config = BackendConfig(request_timeout_s=Seconds(2.5), ray_actor_options=MappingProxyType(options))
    plain = msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=BackendConfig)
    assert plain == config
    assert (config.request_timeout_s, config.ray_actor_options) == (2.5, options)
    options["num_cpus"] = 4
    assert config.ray_actor_options == plain.ray_actor_options

"""Runtime environments of backends in jobs that have one; why one could not be made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
import ray

from serveit import App
from serveit.cluster import instance
from serveit.cluster.environments import merged, packed, reason
from serveit.control.orders import BackendChange, Deployed, encode
from serveit.control.spec import app_spec

SAID = """Failed to set up runtime environment.
Could not create the actor because its associated runtime env failed to be created.
[Node 10.0.0.1] Traceback (most recent call last):
  File "agent.py", line 561, in create
    raise FirstError("one")
pkg.FirstError: one

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "utils.py", line 105, in check_output_cmd
    raise SubprocessCalledProcessError(
ray._private.runtime_env.utils.SubprocessCalledProcessError: Run cmd[9] failed with the following details.
Command '['python', '-m', 'pip', 'install']' returned non-zero exit status 1.
Last 50 lines of stdout:
    ERROR: No matching distribution found for nothing
"""


def test_why_one_could_not_be_made() -> None:
    assert reason(RuntimeError(SAID)) == (
        "SubprocessCalledProcessError: Run cmd[9] failed with the following details.\n"
        "Last 50 lines of stdout:\n"
        "    ERROR: No matching distribution found for nothing"
    )
    assert reason(RuntimeError("it did not say more")) == "it did not say more"


def test_a_backend_s_own_comes_before_its_job_s() -> None:
    job = {
        "env_vars": {"A": "job", "B": "job"},
        "working_dir": "gcs://job.zip",
        "pip": ["x"],
        "_ray_commit": "1",
    }
    own = {"env_vars": {"A": "own"}, "conda": "env"}
    assert merged(job, own) == {
        "env_vars": {"A": "own", "B": "job"},
        "working_dir": "gcs://job.zip",
        "conda": "env",
    }
    assert merged({}, {}) == {}


def test_ray_is_not_started_to_pack_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that outlives it is to say so, and not to join whatever cluster there is."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    app = App()
    app.backend("a:b", name="b", ray_actor_options={"runtime_env": {"working_dir": "/not/here"}})
    spec = app_spec(app, name="main", code=b"")
    assert packed(spec) == spec


@pytest.mark.parametrize("given", [None, {}, {"num_cpus": 1}])
async def test_a_job_s_stays_whatever_a_change_asks_for(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[BackendChange] = []

    async def ask(controller: object, what: str, *arguments: Any, **options: Any) -> bytes:
        asked.append(msgspec.msgpack.decode(arguments[2], type=BackendChange))
        return encode(Deployed((1, 1)))

    def with_a_job(backend: str, options: Mapping[str, Any]) -> dict[str, Any]:
        return {**options, "runtime_env": {"env_vars": {"A": "job"}}}

    monkeypatch.setattr(instance, "ask", ask)
    monkeypatch.setattr(instance, "packed_options", with_a_job)
    app = instance.InstanceApp(None, "main")
    await app.update("b", BackendChange({"num_replicas": 2}))
    await app.update("b", BackendChange({"ray_actor_options": given}))
    assert [change.options for change in asked] == [
        {"num_replicas": 2},
        {"ray_actor_options": {**(given or {}), "runtime_env": {"env_vars": {"A": "job"}}}},
    ]

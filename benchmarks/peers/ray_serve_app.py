"""The echo on Ray Serve, one replica: `python ray_serve_app.py PORT`. peers.py sets how requests travel."""

from __future__ import annotations

import sys
import threading

import orjson
import ray
from ray import serve
from starlette.requests import Request


@serve.deployment(
    num_replicas=1,
    max_ongoing_requests=1000,
    ray_actor_options={"num_cpus": 0},
    logging_config={"enable_access_log": False},
)
class Echo:
    async def __call__(self, request: Request) -> bytes:
        return orjson.dumps(orjson.loads(await request.body()))


if __name__ == "__main__":
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Echo.bind(), route_prefix="/echo")
    threading.Event().wait()

"""The echo on Mosec: `python mosec_app.py --address 127.0.0.1 --port PORT`. Its path is /inference."""

from __future__ import annotations

from typing import Any

import orjson
from mosec import Server, Worker


class Echo(Worker):
    def deserialize(self, data: bytes) -> Any:
        return orjson.loads(data)

    def serialize(self, data: Any) -> bytes:
        return orjson.dumps(data)

    def forward(self, data: Any) -> Any:
        return data


if __name__ == "__main__":
    server = Server()
    server.append_worker(Echo, num=1)
    server.run()

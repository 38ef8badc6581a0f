"""The echo on LitServe: `python litserve_app.py PORT`. Its path is /predict."""

from __future__ import annotations

import sys

import litserve


class Echo(litserve.LitAPI):
    def predict(self, body: dict) -> dict:
        return body


if __name__ == "__main__":
    server = litserve.LitServer(Echo(), accelerator="cpu", workers_per_device=1, timeout=False)
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        num_api_servers=1,
        log_level="warning",
        access_log=False,
        generate_client_file=False,
    )

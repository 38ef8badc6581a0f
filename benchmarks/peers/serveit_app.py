"""The echo on serveit: `serveit run benchmarks/peers/serveit_app.py`."""

from __future__ import annotations

from serveit import App

app = App()


@app.route("/echo", methods=["POST"])
async def echo(body: dict) -> dict:
    return body

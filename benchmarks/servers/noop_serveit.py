"""The no-op handler on serveit: `serveit run benchmarks/servers/noop_serveit.py --local`."""

from __future__ import annotations

from serveit import App

app = App()


@app.route("/")
async def noop() -> str:
    return "ok"

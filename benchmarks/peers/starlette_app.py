"""The echo on Starlette, the upper bound of what an ASGI framework can do on uvicorn."""

from __future__ import annotations

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


async def echo(request: Request) -> Response:
    body = msgspec.json.decode(await request.body())
    return Response(msgspec.json.encode(body), media_type="application/json")


app = Starlette(routes=[Route("/echo", echo, methods=["POST"])])

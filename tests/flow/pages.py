"""An app for tests over HTTP: parameters, answers, errors, streams. At module level: replicas import it."""

from __future__ import annotations

import asyncio
import datetime
import math
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)

from serveit import App, Header, Query, context
from serveit.exceptions import QueueFull
from tests.flow.gates import Gate

pages = App()


@dataclass
class Order:
    item: str
    count: int = 1


@pages.route("/hello/<name>")
async def hello(name: str, shout: bool = False) -> str:
    return f"Hello, {name.upper() if shout else name}!"


@pages.route("/raw/{user_id:int}/{number:float}")
def raw(request):  # type: ignore[no-untyped-def]
    return {name: [type(value).__name__, value] for name, value in request.path_params.items()}


class Model(msgspec.Struct):
    name: str
    size: int | None = None


VALUES: dict[str, Any] = {
    "dict": {"a": [1, 2], "b": {"c": None}},
    "list": [1, "a", None],
    "tuple": (1, 2.5),
    "set": {7},
    "int": 7,
    "float": 2.5,
    "bool": True,
    "numpy scalar": np.float32(0.5),
    "struct": Model("m"),
    "dataclass": Order("tea"),
    "datetime": datetime.datetime(2021, 2, 25, 12, tzinfo=datetime.UTC),
    "octets inside": {"a": b"\x00\xff"},
}


@pages.backend(request_timeout_s=20)
class Pages:
    """A process with many routes."""

    async def __call__(self) -> str:
        return "root"

    async def typed(self, user_id: int, number: float, words: Annotated[list[str], Query("q")]) -> list[Any]:
        return [user_id, number, words]

    async def agent(
        self, agent: Annotated[str, Header("user-agent")], trace: Annotated[str, Header()] = "none"
    ) -> str:
        return f"{agent} {trace}"

    async def order(self, user_id: int, order: Order) -> dict[str, Any]:
        return {"user": user_id, "item": order.item, "count": order.count}

    async def octets(self, body: bytes) -> bytes:
        return body

    async def data(self, data: dict[str, Any]) -> dict[str, Any]:
        return data

    async def answer(self, kind: str) -> Any:  # noqa: C901
        match kind:
            case "text":
                return "grüß Gott"
            case "octets":
                return b"\x00\xff"
            case "none":
                return None
            case "array":
                return {"array": np.arange(3, dtype=np.float32), "scalar": np.int64(7)}
            case "nan":
                return {"a": [1.0, math.nan]}
            case "nan array":
                return np.array([1.0, np.inf])
            case "object":
                return object()
            case "created":
                return JSONResponse({"id": 7}, status_code=201, headers={"x-own": "yes"})
            case "redirect":
                return RedirectResponse("/elsewhere?a=b")
            case "cookies":
                response = Response("two")
                response.set_cookie("one", "1")
                response.set_cookie("two", "2", httponly=True)
                return response
            case "streaming":
                return StreamingResponse(iter(["a", "b"]), media_type="text/csv", status_code=203)
            case "html":
                return HTMLResponse("<p>ü")
            case "plain":
                return PlainTextResponse("ü", status_code=202)
            case "file":
                return FileResponse(__file__, media_type="text/x-python")
            case "large":
                return b"x" * (16 * 1024 * 1024)
            case _:
                return VALUES[kind]

    async def fail(self, kind: str) -> None:
        match kind:
            case "own":
                raise ValueError("secret in /srv/app.py, pid 12345")
            case "http":
                raise HTTPException(418, "short and stout", headers={"x-pot": "tea"})
            case "serveit":
                raise QueueFull("of the user's code")

    async def fields(self, request: Request) -> dict[str, Any]:
        return {"headers": dict(request.headers), "id": context().request_id}

    async def form(self, request: Request) -> int:
        return len(await request.body())

    async def stream(self, folder: str) -> AsyncIterator[str]:
        gate = Gate(folder)
        yield "first"
        await gate.passed()
        yield "last"

    async def streamed(self, folder: str) -> StreamingResponse:
        return StreamingResponse(self.stream(folder), headers={"x-own": "yes"})

    async def records(self) -> AsyncIterator[dict[str, int]]:
        yield {"a": 1}
        yield {"a": 2}

    def thread_stream(self, end: int) -> Iterator[str]:
        for number in range(end):
            yield f"{number}\n"

    async def endless(self, folder: str, size: int = 1) -> AsyncIterator[bytes]:
        gate = Gate(folder)
        try:
            while True:
                gate.note("made")
                yield b"x" * size
                if size == 1:
                    await asyncio.sleep(0.01)
        finally:
            gate.note("closed")

    async def cut(self, at: int) -> AsyncIterator[str]:
        for number in range(at):
            yield f"{number}"
        raise ValueError("secret in the middle")

    async def wait(self, folder: str) -> str:
        gate = Gate(folder)
        with gate.inside():
            await gate.passed()
        return "done"


pages.add_route("/", Pages)
pages.add_route("/typed/<user_id:int>/<number:float>", Pages.typed)
pages.add_route("/agent", Pages.agent)
pages.add_route("/orders/<user_id:int>", Pages.order, methods=["POST", "PUT"])
pages.add_route("/octets", Pages.octets, methods=["POST"])
pages.add_route("/data", Pages.data, methods=["POST"])
pages.add_route("/answer/<kind>", Pages.answer)
pages.add_route("/fail/<kind>", Pages.fail)
pages.add_route("/fields", Pages.fields)
pages.add_route("/form", Pages.form, methods=["POST"])
pages.add_route("/stream", Pages.stream)
pages.add_route("/streamed", Pages.streamed)
pages.add_route("/records", Pages.records)
pages.add_route("/lines/<end:int>", Pages.thread_stream)
pages.add_route("/endless", Pages.endless)
pages.add_route("/cut/<at:int>", Pages.cut)
pages.add_route("/wait", Pages.wait)
pages.add_route("/slash/", Pages, name="slash")

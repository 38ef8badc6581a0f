"""docs/from-ray-serve.md: each row's code does what it is said to do, and what is left out is not there."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import re
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient as StarletteTestClient

import serveit
from serveit import App, HTTPOptions, SyncHandle, testing
from serveit.command import cli
from tests.cluster.instance import Instance
from tests.moving_rows import (
    PAGE,
    Check,
    Local,
    Names,
    Row,
    can_be_typed,
    declared,
    declares,
    evaluate,
    has_no_option,
    page_module,
    page_names,
    page_rows,
    running,
    serves,
    spans,
)

F = TypeVar("F", bound=Callable[..., Awaitable[None]])

ROWS = page_rows()
HI = {"text": "hi", "version": 1, "bar": 0.5}
"""What the page's model makes of "hi"."""
CHECKS: dict[tuple[str, str], Check] = {}
ON_RAY: dict[tuple[str, str], Callable[[Row, Names], Awaitable[None]]] = {}
"""What cannot be seen without Ray: told the names of an app that runs there."""


def check(
    name: str, *more: str, of: str = "2021", on: dict[tuple[str, str], Any] = CHECKS
) -> Callable[[F], F]:
    """This is how the rows of these names are tested."""

    def register(function: F) -> F:
        for each in (name, *more):
            assert (of, each) not in on
            on[of, each] = function
        return function

    return register


def named(row: Row) -> tuple[str, str]:
    return row.table, row.name


def parameters(checks: dict[tuple[str, str], Any]) -> list[Any]:
    return [pytest.param(row, id=" ".join(named(row))) for row in ROWS if named(row) in checks]


def test_every_row_is_tested() -> None:
    names = [named(row) for row in ROWS]
    assert len({*names}) == len(names) > 80
    assert {*names} == {*CHECKS, *ON_RAY}


def test_what_is_left_out_says_what_to_do_instead() -> None:
    left_out = [row for row in ROWS if "None" in (row.ours, row.note.split(":")[0])]
    assert left_out and all(len(row.note) > 10 for row in left_out)
    assert all(spans(row.ours) for row in ROWS if row.ours != "None")


async def test_what_is_named_is_there() -> None:
    """In notes and lists, too: commands, what `serveit` has, and what a client and an app have."""
    named = [span for row in ROWS for span in spans(f"{row.ours} {row.note}")]
    named += spans(PAGE.split("## What behaves differently")[1])
    assert {found for span in named for found in re.findall(r"^serveit (\w+)", span)} <= {*cli.main.commands}
    async with running() as names:
        for owner in ("serveit", "client", "app"):
            found = {word for span in named for word in re.findall(rf"\b{owner}\.(\w+)", span)}
            assert found and [word for word in found if not hasattr(names[owner], word)] == []


def test_links_lead_somewhere() -> None:
    anchors = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    }
    links = re.findall(r"\]\(#([^)]+)\)", PAGE)
    assert links and {*links} <= anchors


async def test_what_is_said_to_be_missing_is() -> None:
    """The long list at the end, as far as it has names in an API."""
    absent = ["multiplexed", "ingress", "start", "batch", "deployment", "accept_batch", "ServeRequest"]
    assert [name for name in absent if hasattr(serveit, name)] == []
    assert not callable(App())
    with pytest.raises(TypeError, match="grpc_options"):
        serveit.serve(App(), grpc_options={})  # type: ignore[call-arg]
    async with running() as names:
        assert (await names["client"].http.get("/docs")).status_code == 404
        assert (await names["client"].http.get("/openapi.json")).status_code == 404


# -- what several rows share -------------------------------------------------------------------


def gives(expected: Any) -> Check:
    """The snippet's value, with the page's app running."""

    async def give(row: Row) -> None:
        async with running() as names:
            assert await evaluate(row.snippet, names) == expected

    return give


def registers(name: str, expected: Any, num_replicas: int = 1) -> Check:
    """The snippet registers a backend of that name, which makes this of "hi"."""

    async def register(row: Row) -> None:
        names = page_names()
        await evaluate(row.snippet, names)
        async with running(names) as names:
            assert await names["client"].get_handle(name).call("hi") == expected
            assert len((await names["client"].status())["backends"][name]) == num_replicas

    return register


def answers(path: str, expected: Any, body: str = "", method: str = "GET") -> Check:
    """The snippet, with this body of a function where it decorates one, is a route that answers."""

    async def answer(row: Row) -> None:
        names = page_names()
        exec(compile(f"{row.snippet}\n{body}", "docs/from-ray-serve.md", "exec"), names)
        async with running(names) as names:
            response = await names["client"].http.request(method, path)
            assert (response.status_code, response.json()) == (200, expected)

    return answer


async def calls_a_handle(row: Row) -> None:
    async with running() as names:
        handle = await evaluate(row.snippet, names)
        assert (await handle.call("hi"))["text"] == "hi"


async def blocks(row: Row) -> None:
    """In a thread without an event loop."""
    async with running() as names:
        assert await asyncio.to_thread(eval, row.snippet, names) == HI


@contextlib.contextmanager
def importable(**attributes: Any) -> Iterator[None]:
    """`package.module` has these."""
    module = ModuleType("package.module")
    vars(module).update(attributes)
    sys.modules.update({"package": ModuleType("package"), "package.module": module})
    try:
        yield
    finally:
        del sys.modules["package.module"], sys.modules["package"]


def all_of(*checks: Check) -> Check:
    async def one_after_the_other(row: Row) -> None:
        for each in checks:
            await each(row)

    return one_after_the_other


async def versions_asked(client: Any) -> set[int]:
    """Of many users, those whose answers each version gave."""
    predict = client.get_handle("predict")
    values = [await predict.options(shard_key=f"user {n}").call("hi") for n in range(100)]
    return {value["version"] for value in values}


# -- 2021: starting and stopping ---------------------------------------------------------------

check("client = serve.start()")(serves())
check("serve.start(detached=True)")(can_be_typed("serveit deploy app:app"))
check("serve start --http-port 8001")(can_be_typed("serveit run app:app --port 8001"))
check("serve shutdown")(can_be_typed("serveit shutdown --yes"))


@check("client.create_backend(...)", on=ON_RAY)
async def _(row: Row, names: Names) -> None:
    other = App()
    other.backend(names["Model"], name="other", init_args=(7,))
    await evaluate(row.snippet, names | {"other": other})
    async with serveit.connect(address=None, app="other") as client:
        assert (await client.get_handle("other").explain.call("hi")).startswith("version 7")
        await client.delete()


@check("serve.connect()", on=ON_RAY)
async def _(row: Row, names: Names) -> None:
    class Here:
        """`serveit`, whose one cluster is this session's, with an app of a name of its own."""

        def connect(self) -> Any:
            return serveit.connect(address=None, app=names["app_name"])

    assert await evaluate(row.snippet, {**names, "serveit": Here()}) == "Hello, Ada!"


@check("client.shutdown()")
async def _(row: Row) -> None:
    async with running() as names:
        await evaluate(row.snippet, names)
        with pytest.raises(serveit.ServeitError):
            await names["handle"].call("hi")


# -- 2021: backends ----------------------------------------------------------------------------

check('client.create_backend("m", Model, 1)')(registers("m", HI))
check('client.create_backend("f", f)')(
    answers("/raw/Ada", {"name": "Ada"}, "def f(request): return request.path_params")
)


@check('client.create_backend("m", "package.module.Model")')
async def _(row: Row) -> None:
    class Model:
        async def __call__(self, text: str) -> str:
            return text.upper()

    with importable(Model=Model):
        await registers("m", "HI")(row)


@check('client.update_backend_config("v1", {"num_replicas": 3})')
async def _(row: Row) -> None:
    async with running() as names:
        await evaluate(row.snippet, names)
        assert len((await names["client"].status())["backends"]["v1"]) == 3


@check('client.delete_backend("v2")', 'client.delete_endpoint("e")')
async def _(row: Row) -> None:
    async with running() as names:
        assert not hasattr(names["client"], row.name.split("(")[0].removeprefix("client."))


@check('client.delete_endpoint("e")', on=ON_RAY)
async def _(row: Row, names: Names) -> None:
    """The next version has no route, and one backend less."""
    first, following = App(), App()
    for app in (first, following):
        app.backend(names["Model"], name="v1", init_args=(1,), user_config={"bar": 0.5})
    first.backend(names["Model"], name="v2", init_args=(2,), user_config={"bar": 0.5})
    first.add_route("/e/<text>", "v2", name="e")
    async with serveit.serve(first, name="shrinking", prefix="/shrinking") as client:
        handle = client.get_handle("e")
        assert (await handle.call("hi"))["version"] == 2
        await client.deploy(following, name="shrinking", prefix="/shrinking")
        async with asyncio.timeout(10):  # v2 ends what it runs
            while {*(await client.status())["backends"]} != {"v1"}:
                pass
        assert await client.routes() == {}
        with pytest.raises((KeyError, serveit.NotServing)):
            await handle.call("hi")


@check("client.list_backends()")
async def _(row: Row) -> None:
    async with running() as names:
        assert {*await evaluate(row.snippet, names)} == {"hello", "v1", "v2"}


@check('client.get_backend_config("v1")')
async def _(row: Row) -> None:
    async with running() as names:
        assert await evaluate(row.snippet, names) == serveit.BackendConfig()
        await names["client"].update("v1", max_ongoing_requests=7)
        assert (await evaluate(row.snippet, names)).max_ongoing_requests == 7


check("BackendConfig(num_replicas=2)")(declares(num_replicas=2))
check("BackendConfig(max_batch_size=8)")(declares(max_batch_size=8))
check("BackendConfig(batch_wait_timeout=0.1)")(declares(max_batch_size=8, batch_wait_timeout_s=0.1))
check("BackendConfig(max_concurrent_queries=4)")(declares(max_ongoing_requests=4))
check("experimental_graceful_shutdown_timeout_s")(declares(graceful_shutdown_timeout_s=20))
check("experimental_graceful_shutdown_wait_loop_s")(
    has_no_option("experimental_graceful_shutdown_wait_loop_s")
)
check('ray_actor_options={"num_gpus": 0.5}')(declares(ray_actor_options={"num_gpus": 0.5}))
check('env=CondaEnv("torch")')(declares(ray_actor_options={"runtime_env": {"conda": "torch"}}))


@check("BackendConfig(user_config=...)")
async def _(row: Row) -> None:
    await declares(user_config={"bar": 0.5})(row)
    with pytest.raises(TypeError, match="reconfigure"):
        App().backend(print, name="p", user_config={})


@check('update_backend_config("v1", {"user_config": ...})')
async def _(row: Row) -> None:
    async with running() as names:
        replicas = (await names["client"].status())["backends"]["v1"].keys()
        await evaluate(row.snippet, names)
        assert (await names["handle"].call("hi"))["bar"] == 0.9
        assert (await names["client"].status())["backends"]["v1"].keys() == replicas


@check("serve.get_current_backend_tag()")
@check("serve.get_replica_context()", of="today")
async def _(row: Row) -> None:
    names = page_names()
    source = f"async def who():\n    found = {row.snippet}\n    return str(getattr(found, 'backend', found))"
    exec(source, names)
    names["app"].backend(names["who"])
    async with running(names) as names:
        assert await names["client"].get_handle("who").call() == "who"
    with pytest.raises(serveit.NotServing):
        await evaluate(row.snippet, names)
    told = {
        span.rpartition(".")[2] for span in spans(f"{row.snippet} {row.note}") if "NotServing" not in span
    }
    assert told <= {*serveit.Context.__struct_fields__}


# -- 2021: routes ------------------------------------------------------------------------------

check('client.create_endpoint("e", backend="v1", route="/e")')(answers("/e/hi", HI))
check('create_endpoint(..., methods=["POST"])')(answers("/post?text=hi", HI, method="POST"))
check('client.create_endpoint("e", backend="v2")')(calls_a_handle)
check("client.list_endpoints()")(
    gives(
        {"/hello/<name>": ["/hello/<name>", ["GET", "HEAD"]], "/predict/<text>": ["predict", ["GET", "HEAD"]]}
    )
)
check('route="/api/{user_id:int}/{number:float}"')(
    answers("/api/123/3.14", [123, 3.14], "def f(user_id: int, number: float): return [user_id, number]")
)


@check('request.path_params["username"]')
async def _(row: Row) -> None:
    names = page_names()
    exec(f'@app.route("/api/{{username}}")\n{row.snippet}\n    return username', names)
    async with running(names) as names:
        assert (await names["client"].http.get("/api/scaly")).text == "scaly"


@check("GET /-/routes")
async def _(row: Row) -> None:
    async with running() as names:
        for path in spans(f"{row.snippet.removeprefix('GET ')} {row.note}"):
            assert (await names["client"].http.get(path)).status_code == 200
        routes = (await names["client"].http.get("/-/routes")).json()
        assert routes["/predict/<text>"] == ["predict", ["GET", "HEAD"]]


@check("X-SERVE-CALL-METHOD: explain")
async def _(row: Row) -> None:
    names = page_names()
    await evaluate(row.snippet, names)
    async with running(names) as names:
        http = names["client"].http
        assert (await http.get("/explain/hi")).text == "version 1 has read 'hi'"
        header, value = row.name.split(": ")
        assert (await http.get("/predict/hi", headers={header: value})).json() == HI


@check("X-SERVE-SHARD-KEY: ada")
async def _(row: Row) -> None:
    header, _, key = row.snippet.partition(": ")
    async with running() as names:
        await names["client"].set_traffic("predict", {"v1": 0.5, "v2": 0.5})
        by_key: dict[str, int] = {}
        for each in [key] * 20 + [f"{key} {n}" for n in range(20)]:
            answer = (await names["client"].http.get("/predict/hi", headers={header: each})).json()
            assert by_key.setdefault(each, answer["version"]) == answer["version"]
        assert {*by_key.values()} == {1, 2}


@check("return starlette.responses.Response(...)")
async def _(row: Row) -> None:
    names = page_names()
    source = "from starlette.responses import Response\n@app.route('/r')\ndef r():\n    "
    exec(source + row.snippet, names)
    async with running(names) as names:
        response = await names["client"].http.get("/r")
        assert (response.status_code, response.text) == (202, "done")


# -- 2021: handles -----------------------------------------------------------------------------


@check('client.get_handle("predict")')
async def _(row: Row) -> None:
    async with running() as names:
        handle = await evaluate(row.snippet, names)
        assert isinstance(handle, SyncHandle)
        assert await asyncio.to_thread(handle.call, "hi") == HI


check('client.get_handle("predict", sync=False)')(calls_a_handle)


@check('client.get_handle("later", missing_ok=True)')
async def _(row: Row) -> None:
    async with running() as names:
        with pytest.raises(KeyError):
            names["client"].get_handle("later")
        waiting = asyncio.ensure_future((await evaluate(row.snippet, names)).call("hi"))
        await names["client"].clock.settle()
        assert not waiting.done()
        waiting.cancel()
        await asyncio.wait((waiting,))


check('ray.get(handle.remote("hi"))')(blocks)
check('await (await handle.remote("hi"))')(gives(HI))
check("handle.remote(data, key=value)")(gives(HI))
check('handle.options(method_name="explain")')(gives("version 1 has read 'hi'"))
check('handle.options(shard_key="ada")')(gives(HI))


@check('await (await handle.remote("hi"))', on=ON_RAY)
async def _(row: Row, names: Names) -> None:
    assert await evaluate(row.snippet, names) == HI
    assert await evaluate(spans(row.note)[0], names) == HI


@check('handle.options(http_method="POST", http_headers={})')
async def _(row: Row) -> None:
    async with running() as names:
        with pytest.raises(TypeError, match="http_method"):
            await evaluate(row.name, names)


@check("RayTaskError(ValueError)")
async def _(row: Row) -> None:
    app = App()

    @app.backend
    async def fails() -> None:
        raise ValueError("no")

    async with testing.local(app) as client:
        with pytest.raises(ValueError, match="no") as raised:
            await client.get_handle("fails").call()
    assert type(raised.value).__name__ == row.snippet
    assert "in fails" in str(raised.value.__cause__)


# -- 2021: traffic, HTTP, metrics --------------------------------------------------------------


@check('client.set_traffic("predict", {"v1": 0.9, "v2": 0.1})')
async def _(row: Row) -> None:
    async with running() as names:
        assert await versions_asked(names["client"]) == {1}
        await evaluate(row.snippet, names)
        assert await versions_asked(names["client"]) == {1, 2}
    await can_be_typed("serveit traffic predict v1=0.9 v2=0.1")(row)


@check('client.shadow_traffic("predict", "v2", 0.1)')
async def _(row: Row) -> None:
    async with running() as names:
        await evaluate(row.snippet, names)
        shadows = {e.name: e.shadows for e in (await names["client"].runtime.spec()).endpoints}
        assert [tuple(shadow) for shadow in shadows["predict"]] == [("v2", 0.1)]
        assert await versions_asked(names["client"]) == {1}


check('http_options={"host": "0.0.0.0", "port": 8001}')(serves(host="0.0.0.0", port=8001))
check('http_options={"location": "EveryNode"}')(serves(location="EveryNode"))
check('http_options={"location": "NoServer"}')(serves(location=None))


@check('http_options={"middlewares": [...]}')
async def _(row: Row) -> None:
    wrapped = []

    def factory(app: Any) -> Any:
        wrapped.append(app)
        return app

    with importable(factory=factory):
        await serves(middlewares=["package.module:factory"])(row)
    assert wrapped


@check("serve_num_http_requests")
async def _(row: Row) -> None:
    path = row.snippet.removeprefix("GET ")
    async with running() as names:
        await names["client"].http.get("/predict/hi")
        response = await names["client"].http.get(path)
        assert response.status_code == 200
        assert "/predict/<text>" in response.text and "/predict/hi" not in response.text


# -- today: options of a deployment ------------------------------------------------------------

TODAY: dict[str, Check] = {
    "@serve.deployment": declares(num_replicas=1),
    "@serve.deployment(num_replicas=2)": declares(num_replicas=2),
    "max_ongoing_requests=5": declares(max_ongoing_requests=5),
    "max_queued_requests=100": declares(max_queued_requests=100),
    "user_config": declares(user_config={"bar": 0.5}),
    "health_check_period_s=5, health_check_timeout_s=30": declares(
        health_check_period_s=5, health_check_timeout_s=30
    ),
    "graceful_shutdown_timeout_s=20": declares(graceful_shutdown_timeout_s=20),
    "graceful_shutdown_wait_loop_s": has_no_option("graceful_shutdown_wait_loop_s"),
    'ray_actor_options={"num_gpus": 1}': declares(ray_actor_options={"num_gpus": 1}),
    "max_replicas_per_node": all_of(
        has_no_option("max_replicas_per_node", "placement_group_bundles"),
        declares(ray_actor_options={"scheduling_strategy": "SPREAD"}),
    ),
    "max_surge_percent": declares(max_surge=2),
    "max_constructor_retry_count": has_no_option("max_constructor_retry_count"),
    "request_router_config": has_no_option("request_router_config"),
    "@serve.batch(max_batch_size=8, batch_wait_timeout_s=0.1)": declares(
        max_batch_size=8, batch_wait_timeout_s=0.1
    ),
    # -- apps
    "Model.bind(1)": registers("m", HI),
    'Model.options(name="m", num_replicas=2)': registers("m", HI, num_replicas=2),
    "serve.run(app)": serves(),
    'serve.run(app, name="a", route_prefix="/a")': serves(name="a", prefix="/a"),
    "serve.run(app, _local_testing_mode=True)": serves(),
    'serve.start(proxy_location="EveryNode")': serves(location="EveryNode"),
    'serve.start(http_options={"port": 8001})': serves(port=8001),
    'http_options={"keep_alive_timeout_s": 30}': serves(keep_alive_s=30),
    # -- handles
    'handle.remote("hi").result()': blocks,
    'await handle.remote("hi")': gives(HI),
    'handle.options(stream=True).remote("hi")': gives(["h", "i"]),
    'handle.explain.remote("hi")': gives("version 1 has read 'hi'"),
    'serve.get_app_handle("default")': calls_a_handle,
    'serve.get_deployment_handle("v1", "default")': calls_a_handle,
    # -- operating
    'serve.delete("other")': can_be_typed("serveit delete other"),
    "serve.shutdown()": can_be_typed("serveit shutdown --yes"),
    "serve run app:app": can_be_typed("serveit run app:app"),
    "serve deploy config.yaml": can_be_typed("serveit deploy app:app --name other --prefix /other"),
}
for name, function in TODAY.items():
    check(name, of="today")(function)


@check('num_replicas="auto"', of="today")
async def _(row: Row) -> None:
    await has_no_option("autoscaling_config")(row)
    with pytest.raises(TypeError, match="num_replicas must be an int"):
        declared('app.backend(Model, name="m", init_args=(1,), num_replicas="auto")')
    await can_be_typed("serveit scale v1=3")(row)
    async with running() as names:
        await evaluate(spans(row.note)[0], names)
        assert len((await names["client"].status())["backends"]["v1"]) == 3


@check("BackPressureError", of="today")
async def _(row: Row) -> None:
    app, gate = App(), asyncio.Event()

    @app.backend(max_ongoing_requests=1, max_queued_requests=0)
    async def slow() -> None:
        await gate.wait()

    async with testing.local(app) as client:
        calls = [asyncio.ensure_future(client.get_handle("slow").call()) for _ in range(8)]
        done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        error = await evaluate(row.snippet, {"serveit": serveit})
        assert {type(call.exception()) for call in done} == {error} and error.status == 503
        gate.set()
        await asyncio.wait(calls)


@check("@serve.ingress(fastapi_app)", of="today")
async def _(row: Row) -> None:
    await answers("/items/7", 8, "async def following(item_id: int) -> int: return item_id + 1")(row)
    names = page_names() | {"serveit": Local()}
    block = f"    {spans(row.note)[0]}\n        handles['v1'] = client.get_handle('v1')\n        yield"
    handles: dict[str, Any] = {}
    exec(f"async def lifespan(_):\n{block}", names | {"handles": handles}, names)

    async def predict(request: Request) -> JSONResponse:
        return JSONResponse(await handles["v1"].call(request.path_params["text"]))

    lifespan = contextlib.asynccontextmanager(names["lifespan"])
    program = Starlette(routes=[Route("/{text}", predict)], lifespan=lifespan)
    with StarletteTestClient(program) as client:
        assert client.get("/hi").json() == HI


@check("Ingress.bind(Model.bind())", of="today")
async def _(row: Row) -> None:
    names = page_names()
    two = [row.snippet, spans(row.note)[0]]
    exec(f"@app.backend\nasync def both():\n    return [{', '.join(two)}]", names)
    async with running(names) as names:
        assert await names["client"].get_handle("both").call() == [HI, "Hello, Ada!"]


@check("serve.run(app, blocking=True)", of="today")
async def _(row: Row) -> None:
    """It blocks, so it is not for a program with an event loop, as this test is."""
    with pytest.raises(RuntimeError, match="event loop is running"):
        await evaluate(row.snippet, page_names())
    assert not inspect.iscoroutinefunction(serveit.run)


@check('http_options={"request_timeout_s": 10}', of="today")
async def _(row: Row) -> None:
    await declares(request_timeout_s=10)(row)
    with pytest.raises(TypeError, match="request_timeout_s"):
        HTTPOptions.parse({"request_timeout_s": 10})
    assert spans(row.note)[0] == "timeout_s"
    async with running() as names:
        assert await names["handle"].options(timeout_s=1).call("hi") == HI


@check('await handle.remote("hi")._to_object_ref()', of="today", on=ON_RAY)
async def _(row: Row, names: Names) -> None:
    import ray

    ref = await evaluate(row.snippet, names)
    assert isinstance(ref, ray.ObjectRef) and await ref == HI


@check("@serve.multiplexed", of="today")
async def _(row: Row) -> None:
    assert not hasattr(serveit, "multiplexed")
    async with running() as names:
        with pytest.raises(TypeError, match="multiplexed_model_id"):
            names["handle"].options(multiplexed_model_id="m")


@check("serve.status()", of="today")
async def _(row: Row) -> None:
    async with running() as names:
        assert (await evaluate(row.snippet, names))["state"] == "RUNNING"
    await can_be_typed("serveit status")(row)


@check("grpc_options", of="today")
async def _(row: Row) -> None:
    assert "None" in row.ours
    with pytest.raises(TypeError, match="grpc_options"):
        HTTPOptions.parse({"grpc_options": {}})


@check("RAY_SERVE_DEFAULT_HTTP_HOST", of="today")
async def _(row: Row) -> None:
    await can_be_typed("serveit run app:app --host 0.0.0.0")(row)
    sources = Path(serveit.__file__).parent.rglob("*.py")
    assert [path for path in sources if "RAY_SERVE" in path.read_text(encoding="utf-8")] == []


# -- all of them, at last -----------------------------------------------------------------------


async def test_answers_differ_as_is_said() -> None:
    """The list of differences, as far as no other test is about it."""
    app = App()
    for number, result in enumerate(["None", "b'octets'", "{'a': [1, 2]}", "float('nan')", "1 / 0"]):
        names: Names = {"app": app}
        exec(f"@app.route('/{number}')\nasync def f{number}(): return {result}", names)
    async with testing.local(app) as client:
        said = [await client.http.get(f"/{number}") for number in range(5)]
    assert [answer.text for answer in said[:3]] == ["null", "octets", '{"a":[1,2]}']
    assert said[1].headers["content-type"] == "application/octet-stream"
    for answer in said[3:]:
        assert (answer.status_code, answer.headers["x-serveit-executed"]) == (500, "yes")
        assert answer.headers["content-type"] == "application/problem+json"
        assert "Traceback" not in answer.text and "ZeroDivisionError" not in answer.text


@pytest.mark.parametrize("row", parameters(CHECKS))
async def test_row(row: Row) -> None:
    await CHECKS[named(row)](row)


@pytest.fixture(scope="module")
def page_on_ray(instance: Instance, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    with page_module(tmp_path_factory.mktemp("moving")) as module:
        yield module


@pytest.mark.cluster
@pytest.mark.parametrize("row", parameters(ON_RAY))
async def test_row_on_ray(row: Row, page_on_ray: ModuleType, instance: Instance) -> None:
    name = await instance.deployed(page_on_ray.app)
    async with serveit.connect(address=None, app=name) as client:
        names = {**vars(page_on_ray), "client": client, "handle": client.get_handle("v1")}
        await ON_RAY[named(row)](row, names | {"app_name": name, "serveit": serveit})

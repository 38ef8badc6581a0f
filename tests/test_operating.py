"""The commands that ask an instance, against a fake one: what they do, print, and end with."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from serveit import App, NotServing
from serveit.command import cli, operating
from tests.fake_instance import URL, FakeInstance

Ask = Callable[..., Result]

SHOP = """
from serveit import App

app = App()

@app.backend(name="v1")
async def first(x: int = 0) -> int:
    return 1

@app.backend(name="v2", num_replicas=2)
async def second(x: int = 0) -> int:
    return 2

app.add_route("/predict", traffic={"v1": 0.9, "v2": 0.1}, name="predict")
app.add_route("/second", "v2")
"""


def shop() -> App:
    module: dict[str, Any] = {"__name__": "shop"}
    exec(compile(SHOP, "shop.py", "exec"), module)
    app: App = module["app"]
    return app


@pytest.fixture
def instance(monkeypatch: pytest.MonkeyPatch) -> FakeInstance:
    """An instance with the app "shop" at /shop."""
    fake = FakeInstance()
    fake.add("shop", shop(), "/shop")
    monkeypatch.setattr("serveit.cluster.instance.open_instance", fake.open)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_LOG_TO_DRIVER", "0")
    return fake


@pytest.fixture
def ask(instance: FakeInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    (tmp_path / "shop_app.py").write_text(SHOP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "shop_app", raising=False)

    def run(*arguments: str, code: int = 0, **options: Any) -> Result:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        result = CliRunner().invoke(cli.main, arguments, **options)
        assert result.exit_code == code, (result.output, result.exception)
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
        return result

    return run


def refused(ask: Ask, *arguments: str) -> str:
    """The one message that it ends with; nothing is on standard output."""
    result = ask(*arguments, code=1)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


# -- status, routes ------------------------------------------------------------------------------


def test_status(ask: Ask, instance: FakeInstance) -> None:
    lines = ask("status").stdout.splitlines()
    assert lines[0] == f"serving {URL}" and lines[3].split() == [
        "shop",
        "RUNNING",
        "1",
        "v1",
        "1/1",
        "0",
        "0",
    ]
    assert instance.opened == [{"address": "auto", "http": None}]


def test_status_as_json_of_one_app(ask: Ask, instance: FakeInstance) -> None:
    instance.add("other", shop())
    told = json.loads(ask("status", "shop", "--json").stdout)
    assert list(told["apps"]) == ["shop"] and told["url"] == URL


def test_status_ends_with_1_where_something_is_missing(
    ask: Ask, instance: FakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def failed() -> dict[str, Any]:
        return {"url": URL, "apps": {"shop": {"state": "FAILED", "message": "no model", "backends": {}}}}

    monkeypatch.setattr(instance, "status", failed)
    assert "shop: no model" in ask("status", code=1).stdout
    assert json.loads(ask("status", "--json", code=1).stdout)["apps"]["shop"]["message"] == "no model"


def test_status_of_one_whose_first_deploy_failed(
    ask: Ask, instance: FakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance.failures["slow"] = "no model"
    assert "slow: no model" in ask("status", "slow", code=1).stdout
    assert "did you mean 'shop'" in ask("status", "shp", code=1).stderr


def test_routes(ask: Ask) -> None:
    assert ask("routes").stdout.splitlines() == [
        "PATH           METHODS   APP   LEADS TO",
        "/shop/predict  GET,HEAD  shop  v1 90%, v2 10%",
        "/shop/second   GET,HEAD  shop  v2",
    ]
    first, _ = json.loads(ask("routes", "--json").stdout)
    assert first["path"] == "/shop/predict" and first["weights"] == {"v1": 0.9, "v2": 0.1}


def test_the_address(ask: Ask, instance: FakeInstance) -> None:
    ask("routes", "--address", "10.0.0.1:6379")
    ask("routes", env={"RAY_ADDRESS": "10.0.0.2:6379"})
    assert [opened["address"] for opened in instance.opened] == ["10.0.0.1:6379", "10.0.0.2:6379"]


@pytest.mark.parametrize("command", ["status", "routes", "delete x", "scale v1=1", "traffic x v1=1"])
def test_nothing_runs(ask: Ask, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_none(address: str) -> Any:
        raise NotServing("no serveit instance runs: `serveit deploy`")

    monkeypatch.setattr("serveit.cluster.instance.open_instance", open_none)
    assert refused(ask, *command.split()) == "Error: no serveit instance runs: `serveit deploy`"


# -- changes -------------------------------------------------------------------------------------


def test_scale(ask: Ask, instance: FakeInstance) -> None:
    result = ask("scale", "v1=3", "v2=1", "--app", "shop")
    assert result.stdout.splitlines() == ["v1: 3 of 3 ready", "v2: 1 of 1 ready"]
    assert [backend.num_replicas for backend in instance.known["shop"].backends] == [3, 1]
    told = json.loads(ask("scale", "v1=1", "--app", "shop", "--json").stdout)
    assert told == {"app": "shop", "num_replicas": {"v1": 1, "v2": 1}}


def test_traffic(ask: Ask, instance: FakeInstance) -> None:
    result = ask("traffic", "predict", "v1=0.5", "v2=0.5", "--shadow", "v2=0.1", "--app", "shop")
    assert result.stdout == "/shop/predict: v1 50%, v2 50% (copies: v2 10%)\n"
    told = json.loads(ask("traffic", "/shop/predict", "--shadow", "v2=0", "--app", "shop", "--json").stdout)
    assert told["weights"] == {"v1": 0.5, "v2": 0.5} and told["shadows"] == {}


@pytest.mark.parametrize("endpoint", ["predict", "/predict", "/shop/predict"])
def test_an_endpoint_goes_by_its_name_and_its_path(ask: Ask, instance: FakeInstance, endpoint: str) -> None:
    """Forward, and back again."""
    for weights, shown in (("v1=0.9 v2=0.1", "v1 90%, v2 10%"), ("v1=1 v2=0", "v1 100%, v2 0%")):
        result = ask("traffic", endpoint, *weights.split(), "--app", "shop")
        assert result.stdout == f"/shop/predict: {shown}\n"
    assert instance.known["shop"].endpoint("predict").weights == (("v1", 1.0), ("v2", 0.0))


def test_traffic_that_does_not_fit(ask: Ask, instance: FakeInstance) -> None:
    app = App()

    async def shown(item: str) -> str:
        return item

    async def bought(item: str, body: bytes) -> str:
        return item

    app.backend(shown)
    app.backend(bought)
    app.add_route("/items/<item>", "shown", name="show")
    app.add_route("/items/<item>", "bought", methods=["POST"], name="buy")
    instance.add("items", app, "/shop")
    for path in ("/items/<item>", "/shop/items/<item>"):
        said = refused(ask, "traffic", path, "shown=1", "--app", "items")
        assert said.endswith("is several endpoints, by method: say 'show' or 'buy'")
    for given in (["shown=0.9", "bought=0.1"], ["--shadow", "bought=0.1"]):
        said = refused(ask, "traffic", "show", *given, "--app", "items")
        assert "endpoint 'show' cannot lead to backend 'bought': " in said and "add methods=[" in said
    ask("traffic", "buy", "shown=0.1", "bought=0.9", "--app", "items")


def test_delete(ask: Ask, instance: FakeInstance) -> None:
    instance.add("other", shop())
    assert ask("delete", "shop").stdout == "shop is deleted\n"
    assert json.loads(ask("delete", "other", "--json").stdout) == {"deleted": "other"}
    assert instance.known == {}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("status shpo", "no app 'shpo' runs: did you mean 'shop'?"),
        ("delete shpo", "no app 'shpo' runs: did you mean 'shop'?"),
        ("scale v1=2 --app shpo", "no app 'shpo' runs: did you mean 'shop'?"),
        ("scale v1=2", "no app 'default' runs: there is 'shop', 'two'"),
        ("scale v1=2 v9=2 --app shop", "app 'shop' has no backend 'v9': there is 'v1', 'v2'"),
        ("scale v2=1 v1=0 --app shop", "num_replicas must be ≥ 1, got 0"),
        ("traffic predct v1=1 --app shop", "app 'shop' has no endpoint 'predct': did you mean 'predict'?"),
        ("traffic predict v9=1 --app shop", "endpoint 'predict': unknown backend 'v9': there is 'v1', 'v2'"),
        ("traffic predict v1=0.5 --app shop", "the weights must sum to 1, got 0.5 (0.5 for 'v1')"),
        ("traffic /predct v1=1 --app shop", "app 'shop' has no endpoint '/predct': did you mean 'predict'?"),
        ("traffic /shop/predict v1=1 --app two", "has no endpoint '/shop/predict': it is of --app shop"),
        ("traffic predict v1=nan v2=1 --app shop", "the weight of 'v1' must be ≥ 0 and finite, got nan"),
        ("traffic predict v1=-1 v2=2 --app shop", "the weight of 'v1' must be ≥ 0 and finite, got -1"),
        ("traffic predict v1=1 --shadow v9=1 --app shop", "unknown backend 'v9'"),
        ("traffic predict --shadow v9=0 --app shop", "unknown backend 'v9'"),
        ("traffic predict --shadow v1=2 --app shop", "the shadow of 'v1' must be in [0, 1], got 2"),
    ],
)
def test_what_is_refused_changes_nothing(ask: Ask, instance: FakeInstance, command: str, said: str) -> None:
    instance.add("two", shop(), "/two")
    before = dict(instance.known)
    assert said in refused(ask, *command.split())
    assert instance.known == before


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("scale", "Missing argument"),
        ("scale v1", "'v1' is not of the form BACKEND=N, v1=3"),
        ("scale v1=many", "'v1=many' is not of the form"),
        ("scale =1", "'=1' is not of the form"),
        ("traffic predict", "nothing to change: give weights, as v1=0.9 v2=0.1, or --shadow v3=0.1"),
        ("traffic predict v1=x", "is not of the form BACKEND=WEIGHT, v1=0.9"),
        ("traffic predict v1=0.5 v1=1", "'v1' is given twice"),
        ("traffic predict --shadow v1=0.5 --shadow v1=1", "'v1' is given twice"),
        ("shutdown", "without a terminal to ask on it needs --yes"),
        ("deploy shop_app --prefix shop", "prefix must start with '/'"),
        ("deploy shop_app --host ''", "host must be"),
    ],
)
def test_wrong_usage(ask: Ask, command: str, said: str) -> None:
    arguments = [word.strip("'") for word in command.split()]
    assert said in " ".join(ask(*arguments, code=2).stderr.split())


def test_shutdown(ask: Ask, instance: FakeInstance) -> None:
    assert json.loads(ask("shutdown", "--yes", "--json").stdout) == {"ended": ["shop"]}
    assert instance.ended
    assert ask("shutdown", "--yes").stdout == "ended shop\n"
    instance.known.clear()
    assert ask("shutdown", "--yes").stdout == "ended: there were no apps\n"


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("n", 1)])
def test_a_terminal_is_asked_before_a_shutdown(
    ask: Ask, instance: FakeInstance, monkeypatch: pytest.MonkeyPatch, answer: str, code: int
) -> None:
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda _: True, raising=False)
    result = ask("shutdown", input=f"{answer}\n", code=code)
    assert "End shop?" in result.stderr
    assert instance.ended == (answer == "y")


# -- deploy --------------------------------------------------------------------------------------


def test_deploy(ask: Ask, instance: FakeInstance) -> None:
    result = ask("deploy", "shop_app:app", "--name", "two", "--prefix", "/two", "--deploy-timeout", "5")
    assert result.stdout.splitlines() == [
        f"serving {URL}  (2 backends, 3 replicas)",
        "  /two/predict  GET,HEAD  v1 90%, v2 10%",
        "  /two/second   GET,HEAD  v2",
    ]
    assert result.stderr.splitlines() == ["what a replica prints", "v1: 1 of 1 ready", "v2: 1 of 2 ready"]
    spec = instance.known["two"]
    assert spec.owner == "" and spec.deploy_timeout_s == 5
    assert instance.opened == [{"address": "auto", "http": None, "start": True}]


def test_deploy_as_json_prints_nothing_else(ask: Ask) -> None:
    told = json.loads(ask("deploy", "shop_app", "--json").stdout)
    assert told["app"] == "default" and told["url"] == URL and told["backends"] == {"v1": 1, "v2": 2}
    assert told["routes"][1]["path"] == "/second"


def test_http_options_are_passed_on_where_they_are_given(ask: Ask, instance: FakeInstance) -> None:
    ask("deploy", "shop_app", "--port", "8000")
    assert instance.opened[-1]["http"].port == 8000
    ask("deploy", "shop_app", "--no-http")
    assert not instance.opened[-1]["http"].serves
    assert instance.known["default"].routes == ()


def test_a_prefix_stays_unless_another_is_given(ask: Ask, instance: FakeInstance) -> None:
    for given, prefix in ((["--prefix", "/two"], "/two"), ([], "/two"), (["--prefix", ""], "")):
        ask("deploy", "shop_app", "--name", "two", *given)
        assert {route.prefix for route in instance.known["two"].routes} == {prefix}


def test_without_http_there_is_no_url(ask: Ask) -> None:
    assert ask("deploy", "shop_app", "--no-http").stdout.startswith("serving without HTTP  (2 backends")
    assert (
        "contradict each other"
        in ask("deploy", "shop_app", "--no-http", "--http-location", "EveryNode", code=2).stderr
    )


def test_a_deploy_that_fails(ask: Ask, instance: FakeInstance) -> None:
    instance.refuses = ValueError("GET /predict of app 'x' is taken by app 'shop': give one of them a prefix")
    result = ask("deploy", "shop_app", "--json", code=1)
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1] == f"Error: {instance.refuses}"


def test_a_deploy_of_nothing(ask: Ask, instance: FakeInstance) -> None:
    assert "there is no module 'shop_ap'" in refused(ask, "deploy", "shop_ap:app")
    assert instance.opened == []


# -- Ctrl-C --------------------------------------------------------------------------------------


def test_ctrl_c_ends_at_once(
    instance: FakeInstance, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    codes = []

    def end(code: int) -> None:
        codes.append(code)
        raise KeyboardInterrupt  # the process would be gone

    async def wait(_: Any) -> None:
        threading.Timer(0.01, signal.raise_signal, (signal.SIGINT,)).start()
        await asyncio.sleep(10)

    monkeypatch.setattr("os._exit", end)
    with pytest.raises(KeyboardInterrupt):
        operating.ask(wait, "auto", on_interrupt="it goes on")
    assert codes == [130]
    assert capfd.readouterr().err == "\ninterrupted: it goes on\n"

"""Registration: what `app.backend`, `app.route` and `app.add_route` make, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from serveit import App, Backend, BackendConfig
from serveit.declare.backend import BatchBackend
from serveit.types import DEFAULT_METHOD


def double(value: int) -> int:
    return 2 * value


async def triple(value: int) -> int:
    return 3 * value


async def nothing() -> None: ...


class Sentiment:
    def __init__(self, path: str = "model") -> None:
        self.path = path

    def __call__(self, text: str) -> str:
        return text

    def explain(self, label: str) -> str:
        return label

    @classmethod
    def version(cls) -> str:
        return cls.__name__

    @staticmethod
    def motto() -> str:
        return "m"

    def setup(self) -> None: ...

    def _hidden(self) -> str:
        return ""


class Milder(Sentiment):
    pass


class Mute:
    def explain(self, label: str) -> str:
        return label


class Batched:
    def __call__(self, items: list[int]) -> list[int]:
        return items


def state(app: App) -> tuple[Any, ...]:
    return dict(app.backends), list(app.routes)


# -- what works ------------------------------------------------------------------------------


def test_a_decorated_function_is_a_backend_and_still_the_function() -> None:
    app = App()
    backend = app.backend(num_replicas=2)(double)
    assert isinstance(backend, Backend) and backend(4) == 8
    assert app.backends == {"double": backend} and backend.config.num_replicas == 2
    assert backend.__name__ == "double" and backend.__wrapped__ is double  # type: ignore[attr-defined]


def test_the_bare_decorator_and_the_plain_form() -> None:
    app = App()
    bare = app.backend(double)
    named = app.backend(double, name="again", num_threads=3)
    assert list(app.backends) == ["double", "again"]
    assert bare.config == BackendConfig() and named.config.num_threads == 3


def test_a_class_stays_itself() -> None:
    app = App()
    assert app.backend(num_replicas=3)(Sentiment) is Sentiment
    assert app.backend(Sentiment, name="v2", init_args=("m2",), init_kwargs={}) is Sentiment
    assert app.backends["Sentiment"].config.num_replicas == 3
    assert app.backends["v2"].init_args == ("m2",)


def test_a_whole_config() -> None:
    app = App()
    config = BackendConfig(num_replicas=4)
    app.backend(config=config)(double)
    assert app.backends["double"].config is config


def test_a_batch_function() -> None:
    app = App()

    @app.backend(max_batch_size=8)
    def classify(items: list[int]) -> list[str]:
        return list(map(str, items))

    assert isinstance(classify, BatchBackend) and classify([1]) == ["1"]
    assert app.backends["classify"].method().is_batch


def test_the_short_spelling() -> None:
    app = App()
    backend, route = app.backend, app.route

    @route("/double/<value:int>")
    @backend
    def doubled(value: int) -> int:
        return 2 * value

    assert doubled(2) == 4 and [route.name for route in app.routes] == ["/double/<value:int>"]


def test_a_bare_function_and_class_become_backends_by_route() -> None:
    app = App()
    served = app.route("/triple/<value:int>")(triple)
    assert isinstance(served, Backend) and served.name == "triple"
    assert app.route("/s", methods=["POST"])(Sentiment) is Sentiment
    assert app.backends["Sentiment"].config == BackendConfig()


def test_two_routes_on_one_function() -> None:
    app = App()
    one = app.route("/a/<value:int>")(double)
    assert app.route("/b/<value:int>")(one) is one
    assert app.route("/c/<value:int>")(double) is one  # the function itself means its backend
    assert list(app.backends) == ["double"] and len(app.routes) == 3


@pytest.mark.parametrize("target", ["double", double])
def test_add_route_takes_a_name_or_the_function(target: Any) -> None:
    app = App()
    backend = app.backend(double)
    app.add_route("/x/<value:int>", target)
    app.add_route("/y/<value:int>", backend, name="y")
    assert [route.traffic.weights for route in app.routes] == [(("double", 1.0),)] * 2
    assert [route.name for route in app.routes] == ["/x/<value:int>", "y"]


@pytest.mark.parametrize(
    ("method", "name"),
    [(Sentiment.explain, "explain"), (Sentiment.version, "version"), (Sentiment.motto, "motto")],
)
def test_a_route_to_a_method(method: Any, name: str) -> None:
    app = App()
    app.backend(Sentiment)
    path = "/x/<label>" if name == "explain" else "/x"
    app.add_route(path, method)
    assert app.routes[0].target == name


def test_a_route_to_a_method_by_name() -> None:
    app = App()
    app.backend(Sentiment)
    app.backend(Milder)
    app.add_route("/one/<label>", Milder, method_name="explain")
    app.add_route("/both/<label>", traffic={"Milder": 0.5, "Sentiment": 0.5}, method_name="explain")
    assert [route.target for route in app.routes] == ["explain", "explain"]
    assert app.routes[0].traffic.weights == (("Milder", 1.0),)


def test_the_inherited_method_of_the_only_registered_class() -> None:
    app = App()
    app.backend(Milder)
    app.add_route("/x/<label>", Milder.explain)
    assert app.routes[0].traffic.weights == (("Milder", 1.0),)


def test_a_class_means_its_first_backend() -> None:
    app = App()
    app.backend(Sentiment)
    app.backend(Sentiment, name="v2")
    app.add_route("/s/<text>", Sentiment)
    app.add_route("/e/<label>", Sentiment.explain)
    assert {route.traffic.weights for route in app.routes} == {(("Sentiment", 1.0),)}


def test_traffic_and_shadows() -> None:
    app = App()
    app.backend(Sentiment)
    app.backend(Sentiment, name="v2")
    app.add_route("/s/<text>", traffic={"Sentiment": 0.9, "v2": 0.1}, shadow={"v2": 0.05})
    assert app.routes[0].traffic.weights == (("Sentiment", 0.9), ("v2", 0.1))
    assert app.routes[0].traffic.shadows == (("v2", 0.05),)


def test_methods_share_a_path() -> None:
    app = App()
    app.backend(double)
    app.add_route("/x/<value:int>", "double")
    app.add_route("/x/<value:int>", "double", methods=["put"])
    assert [route.name for route in app.routes] == ["/x/<value:int>", "PUT /x/<value:int>"]
    assert app.routes[0].methods == ("GET", "HEAD")


def test_an_import_string_is_not_imported() -> None:
    app = App()
    backend = app.backend("nowhere.at.all:model", name="late", init_args=(1,))
    app.add_route("/late", "late")
    assert backend.target == "nowhere.at.all:model" and backend.init_args == (1,)


def test_a_partial_needs_a_name() -> None:
    app = App()
    served: Backend[..., Any] = app.backend(partial(double, 3), name="six")
    assert served() == 6


def test_repr() -> None:
    app = App()
    app.route("/x/<value:int>")(double)
    assert repr(app) == "<App backends=['double'] routes=['/x/<value:int>']>"
    assert repr(app.backends["double"]) == "<Backend 'double' tests.test_app.double>"


# -- what is refused: what, where, and the way out; and the app stays as it was ---------------

Wrong = Callable[[Any], Any]


class Owner:
    def method(self, x: int) -> int:
        return x


def two(a: int, b: int) -> int:
    return a + b


def endless(items: list[int]) -> Any:
    yield items


def with_body(data: dict[str, int]) -> None: ...


def backend_over_route(app: App) -> None:
    @app.backend
    @app.route("/wrong/<value:int>")
    def wrong(value: int) -> int:
        return value


def backend_over_route_class(app: App) -> None:
    @app.backend
    @app.route("/wrong")
    class Wrong:
        def __call__(self) -> None: ...


def route_in_class(app: App) -> None:
    class Wrong:
        @app.route("/wrong")
        def method(self) -> None: ...


def backend_on_static(app: App) -> None:
    class Wrong:
        @app.backend
        @staticmethod
        def method() -> None: ...


def foreign(app: App) -> Backend[[int], int]:
    return App().backend(double)


REFUSED: list[tuple[str, Wrong, type[Exception], list[str]]] = [
    ("order", backend_over_route, TypeError, ["@app.route above @app.backend", "wrong"]),
    ("order of a class", backend_over_route_class, ValueError, ["@app.route above @app.backend", "Wrong"]),
    ("twice", lambda a: a.backend(a.backends["known"]), TypeError, ["is backend 'known' already"]),
    ("class body", route_in_class, TypeError, ["Wrong.method", "app.add_route(", "Wrong.method)"]),
    ("static method", backend_on_static, TypeError, ["Wrong.method", "on the class"]),
    ("plain method", lambda a: a.backend(Owner.method), TypeError, ["Owner.method", "on the class"]),
    ("option", lambda a: a.backend(num_replica=2)(double), TypeError, ["'num_replica'", "'num_replicas'"]),
    (
        "both",
        lambda a: a.backend(config=BackendConfig(), num_threads=2),
        TypeError,
        ["either", "num_threads"],
    ),
    ("no config", lambda a: a.backend(config={}), TypeError, ["BackendConfig", "dict"]),
    (
        "instance",
        lambda a: a.backend(Sentiment()),
        TypeError,
        ["instance", "its class, Sentiment", "init_args"],
    ),
    ("route to instance", lambda a: a.route("/x")(Sentiment()), TypeError, ["instance", "its class"]),
    ("number", lambda a: a.backend(3), TypeError, ["a function, a class", "3"]),
    ("function's args", lambda a: a.backend(double, init_args=(1,)), TypeError, ["for classes", "double"]),
    ("args in a str", lambda a: a.backend(Sentiment, init_args="m"), TypeError, ["init_args=('m',)"]),
    (
        "constructor",
        lambda a: a.backend(Sentiment, init_args=(1, 2)),
        TypeError,
        ["Sentiment cannot be", "too many", "init_args="],
    ),
    (
        "two batches",
        lambda a: a.backend(two, max_batch_size=2),
        TypeError,
        ["exactly one", "items: list[T]", "a: "],
    ),
    ("none batch", lambda a: a.backend(lambda: 1, name="f", max_batch_size=2), TypeError, ["it takes none"]),
    (
        "generator",
        lambda a: a.backend(endless, max_batch_size=2),
        TypeError,
        ["generator", "`return` a list"],
    ),
    (
        "batch option",
        lambda a: a.backend(double, batch_wait_timeout_s=1),
        ValueError,
        ["needs max_batch_size"],
    ),
    (
        "ongoing",
        lambda a: a.backend(Batched, max_batch_size=4, max_ongoing_requests=2),
        ValueError,
        ["≥ max_batch_size (4)"],
    ),
    (
        "batch methods",
        lambda a: a.backend(Batched, max_batch_size=4, batch_methods=["cal"]),
        TypeError,
        ["no method 'cal'"],
    ),
    (
        "batched function",
        lambda a: a.backend(double, max_batch_size=1, batch_methods=["x"]),
        ValueError,
        ["for classes"],
    ),
    (
        "batched nothing",
        lambda a: a.backend(Mute, max_batch_size=2),
        TypeError,
        ["'__call__'", "batch_methods"],
    ),
    (
        "user_config",
        lambda a: a.backend(double, user_config=1),
        TypeError,
        ["reconfigure(self, user_config)"],
    ),
    ("range", lambda a: a.backend(double, num_replicas=0), ValueError, ["num_replicas must be ≥ 1, got 0"]),
    (
        "name taken",
        lambda a: a.backend(triple, name="known"),
        ValueError,
        ["'known'", "test_app.double", "name="],
    ),
    ("route's name", lambda a: a.backend(triple, name="named"), ValueError, ["name of a route"]),
    ("bad name", lambda a: a.backend(triple, name="a b"), ValueError, ["'a b'", "letters"]),
    ("no str", lambda a: a.backend(triple, name=3), TypeError, ["name must be a str"]),
    ("lambda", lambda a: a.backend(lambda: 1), TypeError, ["name=", "lambda"]),
    ("routed lambda", lambda a: a.route("/l")(lambda: 1), TypeError, ["app.backend(..., name=...)"]),
    ("nameless import", lambda a: a.backend("a:b"), TypeError, ["name=", "'a:b'"]),
    ("no import", lambda a: a.backend("known", name="x"), TypeError, ["package.module:attribute"]),
    ("no path", lambda a: a.route(double), TypeError, ['@app.route("/path")']),
    ("methods", lambda a: a.route("/x", methods="GET"), TypeError, ['["GET", "POST"]']),
    ("method", lambda a: a.route("/x", methods=["FETCH"]), ValueError, ["'FETCH'", "DELETE, GET"]),
    (
        "equal",
        lambda a: a.route("/known/<v:int>")(nothing),
        ValueError,
        ["equal to '/known/<value:int>'", "GET, HEAD"],
    ),
    (
        "bad binding",
        lambda a: a.route("/b")(with_body),
        TypeError,
        ["'data'", "POST", "route '/b': with_body()"],
    ),
    (
        "method of none",
        lambda a: a.add_route("/m", Owner.method),
        TypeError,
        ["Owner.method", "on its class"],
    ),
    ("no call", lambda a: a.route("/m")(Mute), TypeError, ["no method '__call__'", "'explain'"]),
    (
        "lifecycle",
        lambda a: a.add_route("/m", "s", method_name="setup"),
        TypeError,
        ["setup()", "serveit itself"],
    ),
    ("hidden", lambda a: a.add_route("/m", Sentiment._hidden), TypeError, ["no method '_hidden'"]),
    ("unknown method", lambda a: a.add_route("/m", "s", method_name="explian"), TypeError, ["'explain'?"]),
    (
        "two methods",
        lambda a: a.add_route("/m", Sentiment.explain, method_name="motto"),
        TypeError,
        ["method itself"],
    ),
    ("unknown", lambda a: a.add_route("/m", "knwon"), ValueError, ["'knwon'", "did you mean 'known'?"]),
    ("unknown class", lambda a: a.add_route("/m", Owner), TypeError, ["Owner", "put @app.backend on it"]),
    ("foreign", lambda a: a.add_route("/m", foreign(a)), TypeError, ["another app"]),
    ("foreign backend", lambda a: a.backend(foreign(a)), TypeError, ["another app", "app.backend(function)"]),
    ("nothing", lambda a: a.add_route("/m"), TypeError, ["traffic={name: weight}"]),
    ("both targets", lambda a: a.add_route("/m", "known", traffic={"known": 1}), TypeError, ["either"]),
    (
        "weights",
        lambda a: a.add_route("/m/<value:int>", traffic={"known": 0.5}),
        ValueError,
        ["sum to 1, got 0.5"],
    ),
    (
        "traffic's names",
        lambda a: a.add_route("/m", traffic={"knwon": 1}),
        ValueError,
        ["did you mean 'known'?"],
    ),
    ("reserved", lambda a: a.add_route("/-/x", "known"), ValueError, ["/-/"]),
    (
        "endpoint's name",
        lambda a: a.add_route("/m/<value:int>", "known", name="named"),
        ValueError,
        ["taken"],
    ),
    ("backend's name", lambda a: a.add_route("/m/<value:int>", "known", name="s"), ValueError, ["taken"]),
    ("empty name", lambda a: a.add_route("/m/<value:int>", "known", name=""), TypeError, ["non-empty str"]),
]


@pytest.mark.parametrize(
    ("wrong", "error", "texts"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_a_refusal_says_what_to_do(wrong: Wrong, error: type[Exception], texts: list[str]) -> None:
    app = App()
    app.backend(double, name="known")
    app.backend(Sentiment, name="s")
    app.add_route("/known/<value:int>", "known", name="named")
    before = state(app)
    with pytest.raises(error) as caught:
        wrong(app)
    for text in texts:
        assert text in str(caught.value)
    if not wrong.__name__.startswith("backend_over"):  # the inner decorator was right by itself
        assert state(app) == before


def test_a_function_is_named_once() -> None:
    app = App()
    with pytest.raises(TypeError) as caught:
        app.route("/b")(with_body)
    assert str(caught.value).count("with_body") == 1
    app.backend(with_body, name="other")
    with pytest.raises(TypeError, match=r"route '/b', backend 'other': with_body\(\)"):
        app.add_route("/b", "other")


def test_a_method_of_two_registered_classes_is_ambiguous() -> None:
    app = App()
    app.backend(Sentiment)
    app.backend(Milder)
    with pytest.raises(TypeError, match="'Sentiment' and 'Milder'.*method_name='explain'"):
        app.add_route("/x/<label>", Milder.explain)


def test_a_taken_default_name() -> None:
    app = App()
    app.backend(double)
    app.add_route("/x/<value:int>", "double", name="PUT /y/<value:int>")
    app.add_route("/y/<value:int>", "double")
    with pytest.raises(ValueError, match="choose another name="):
        app.add_route("/y/<value:int>", "double", methods=["PUT"])


def test_the_attributes_of_a_function_do_not_hide_ours() -> None:
    def odd(value: int) -> int:
        return value

    odd.name = odd.config = odd.app = "odd"  # type: ignore[attr-defined]
    odd.extra = 3  # type: ignore[attr-defined]
    app = App()
    backend = app.backend(odd)
    assert (backend.name, backend.config, backend.app) == ("odd", BackendConfig(), app)
    assert backend.extra == 3  # type: ignore[attr-defined]


def test_the_default_method_is_the_call() -> None:
    app = App()
    app.backend(Sentiment)
    assert app.backends["Sentiment"].method().name == DEFAULT_METHOD


def test_twice_the_decorator() -> None:
    app = App()
    wrong: Any = app.backend(double)
    with pytest.raises(TypeError, match="'double' already: one @app.backend is enough"):
        app.backend(wrong)


def test_a_failed_route_leaves_a_known_backend() -> None:
    app = App()
    backend = app.backend(double)
    with pytest.raises(TypeError, match="reserved|never gives|annotated"):
        app.route("/x/<value:uuid>")(double)
    assert app.backends == {"double": backend} and app.routes == []

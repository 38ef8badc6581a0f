"""Which backends a route may lead to later: what is known of that when the app is handed over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from serveit import App, BackendConfig
from serveit.declare.fitting import MAX_PAIRS, MAX_TEXT, misfits


@dataclass
class Order:
    item: str


class Model:
    async def __call__(self, text: str) -> str:
        return text

    async def explain(self, text: str) -> str:
        return text


class WithoutExplain:
    async def __call__(self, text: str) -> str:
        return text


async def fits(text: str) -> str:
    return text


async def takes_another(word: str) -> str:
    return word


async def takes_an_int(text: int) -> int:
    return text


async def takes_a_body(text: str, order: Order) -> str:
    return text


async def takes_a_list(texts: list[str]) -> list[str]:
    return texts


def app_with(target: Any, **options: Any) -> App:
    """`target` is a backend, "later", that no route leads to."""
    app = App()
    app.backend(Model, name="model")
    app.add_route("/predict/<text>", "model", name="predict", **options)
    app.backend(
        target, name="later", config=BackendConfig(max_batch_size=4 if target is takes_a_list else None)
    )
    return app


@pytest.mark.parametrize("target", [fits, Model, WithoutExplain, "not.there:model"])
def test_what_fits_and_what_is_not_known(target: Any) -> None:
    assert misfits(app_with(target)) == {}


@pytest.mark.parametrize(
    ("target", "options", "why"),
    [
        (takes_another, {}, "takes_another(): parameter 'word' is not in the path '/predict/<text>'"),
        (takes_a_body, {}, "parameter 'order' (Order) is the body, which GET and HEAD requests do not have"),
        (takes_a_list, {}, "parameter 'texts' takes its items from bodies"),
        (WithoutExplain, {"method_name": "explain"}, "backend 'later' has no method 'explain'"),
        (fits, {"method_name": "explain"}, "backend 'later' is a function and has no method 'explain'"),
    ],
)
def test_what_does_not_fit(target: Callable[..., Any], options: dict[str, Any], why: str) -> None:
    (text,) = misfits(app_with(target, **options))["predict"].values()
    assert text.startswith("endpoint 'predict' cannot lead to backend 'later': ")
    assert why in text


def test_it_is_what_add_route_refuses() -> None:
    app = app_with(takes_an_int)
    assert misfits(app) == {}  # "7" can be one
    app = app_with(takes_a_body)
    with pytest.raises(TypeError, match="is the body"):
        app.add_route("/more/<text>", traffic={"model": 0.5, "later": 0.5})
    app.add_route("/more/<text>", traffic={"model": 0.5, "later": 0.5}, methods=["POST"], name="more")
    assert list(misfits(app)) == ["predict"]


def test_what_cannot_be_read_is_no_reason_to_refuse_the_app() -> None:
    async def unreadable(text: NotThere) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    assert "cannot be evaluated" in misfits(app_with(unreadable))["predict"]["later"]


def test_it_is_bounded() -> None:
    app = App()
    app.backend(takes_another)
    long = "x" * MAX_TEXT
    for number in range(MAX_PAIRS):
        app.backend(fits, name=f"v{number}")
        app.add_route(f"/{long}{number}/<text>", f"v{number}")
    found = misfits(app)
    texts = [text for texts in found.values() for text in texts.values()]
    assert 0 < len(texts) <= MAX_PAIRS
    assert max(map(len, texts)) <= MAX_TEXT

"""Mistakes that type checkers find: each line's `ignore` names the error, and strict mypy refuses an
`ignore` that hides none. tests/test_typing.py takes them out and expects exactly these errors."""

from __future__ import annotations

from serveit import App, BackendConfig, HTTPOptions

app = App()


@app.backend
def plain(x: int) -> float:
    return x


@app.backend(max_batch_size=8)
def sizes(texts: list[str]) -> list[int]:
    return [len(text) for text in texts]


@app.backend
class Model:
    def __call__(self, text: str) -> int:
        return len(text)


async def calls() -> None:
    plain("1")  # type: ignore[arg-type]
    await plain.call("1")  # type: ignore[arg-type]
    await plain.call()  # type: ignore[call-arg]
    plain.stream(1)  # type: ignore[misc]
    sizes("a")  # type: ignore[arg-type]
    await sizes.call(["a"])  # type: ignore[arg-type]
    await app.handle(plain).call("1")  # type: ignore[arg-type]
    await app.handle(sizes).call(["a"])  # type: ignore[arg-type]
    await app.handle(Model).call(1)  # type: ignore[arg-type]
    app.handle(Model, sync=True).call(1)  # type: ignore[arg-type]


def options() -> None:
    app.backend(num_replica=2)  # type: ignore[call-overload]
    app.backend(num_replicas="2")  # type: ignore[call-overload]
    app.backend("package.module:thing")  # type: ignore[call-overload]
    app.route("/x", method="GET")  # type: ignore[call-arg]
    BackendConfig(replicas=2)  # type: ignore[call-arg]
    HTTPOptions(location="Everywhere")  # type: ignore[arg-type]

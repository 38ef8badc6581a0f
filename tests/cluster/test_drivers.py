"""Programs that join the cluster: what they bring, and what goes with them."""

from __future__ import annotations

import contextlib
import signal
import textwrap
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.cluster.drivers import driver
from tests.cluster.instance import Instance

pytestmark = pytest.mark.cluster

GONE_S = 5.0

SERVE = """
    import sys
    import serveit
    {imports}

    with serveit.serve({app}, name=sys.argv[2], prefix="/" + sys.argv[2], address=sys.argv[1]) as client:
        print("url", client.url, flush=True)
        {more}
        input()
    print("ended", "well", flush=True)
"""


def script(imports: str = "from app import app", app: str = "app", more: str = "") -> str:
    return SERVE.format(imports=imports, app=app, more=more)


def module(answer: str, route: str = "/answer") -> str:
    return textwrap.dedent(f"""
        from serveit import App

        app = App()

        @app.route({route!r})
        async def answer() -> str:
            return {answer!r}
        """)


def status_and_text(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_two_drivers_with_modules_of_the_same_name(instance: Instance, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        for name in ("north", "south"):
            folder = tmp_path / name
            folder.mkdir()
            (folder / "app.py").write_text(module(f"of the {name}"))
            driving = driver(folder, script(), instance.address, name, environment=instance.environment)
            running = stack.enter_context(driving)
            url = running.says("url")
            assert url == instance.url
            assert status_and_text(f"{url}/{name}/answer") == (200, f"of the {name}")
        assert status_and_text(f"{url}/north/answer") == (200, "of the north")
        running.go_on()
        assert running.says("ended") == "well" and running.end() == 0
        assert status_and_text(f"{url}/south/answer")[0] == 404
        assert status_and_text(f"{url}/north/answer") == (200, "of the north")


def test_an_app_goes_with_the_driver_that_was_killed(instance: Instance, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(module("here"))
    with driver(tmp_path, script(), instance.address, "owned", environment=instance.environment) as running:
        url = running.says("url")
        assert status_and_text(f"{url}/owned/answer") == (200, "here")
        running.process.send_signal(signal.SIGKILL)
        begun = time.monotonic()
        while status_and_text(f"{url}/owned/answer")[0] != 404:
            assert time.monotonic() < begun + GONE_S, "the app is still there"
            time.sleep(0.05)


def test_a_script_brings_its_app_by_value(instance: Instance, tmp_path: Path) -> None:
    imports = """
    from dataclasses import dataclass
    from serveit import App

    app = App()
    GREETING = "hello from a script"

    class OwnError(Exception):
        pass

    @dataclass
    class Point:
        x: int

    @app.route("/answer")
    async def answer() -> str:
        return GREETING

    @app.backend
    def move(point: Point) -> Point:
        if point.x < 0:
            raise OwnError("too far left")
        return Point(point.x + 1)
    """
    more = """
        import ray
        move = client.get_handle("move")
        print("moved", move.call(Point(1)), ray.get(move.remote(Point(2))), flush=True)
        try:
            move.call(Point(-1))
        except OwnError as error:
            print("raised", error, flush=True)
    """
    text = script(textwrap.indent(textwrap.dedent(imports), "    ").strip(), "app", more.strip())
    with driver(tmp_path, text, instance.address, "script", environment=instance.environment) as running:
        url = running.says("url")
        assert running.says("moved") == "Point(x=2) Point(x=3)"
        assert running.says("raised") == "too far left"
        assert status_and_text(f"{url}/script/answer") == (200, "hello from a script")


def test_a_package_on_a_path_of_the_drivers(instance: Instance, tmp_path: Path) -> None:
    package = tmp_path / "elsewhere" / "shop"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "data.py").write_text("TABLE = bytes(50_000_000)\n")
    (package / "serving.py").write_text(
        "from shop.data import TABLE\n" + module("").replace("return ''", "return str(len(TABLE))")
    )
    folder = tmp_path / "here"
    folder.mkdir()
    imports = 'sys.path.insert(0, "../elsewhere"); from shop.serving import app'
    with driver(
        folder, script(imports), instance.address, "package", environment=instance.environment
    ) as running:
        assert status_and_text(f"{running.says('url')}/package/answer") == (200, "50000000")


def test_a_program_of_its_own_starts_and_ends_ray(instance: Instance, tmp_path: Path) -> None:
    """Without an address: an embedded Ray with this program's own options, and nothing left of it."""
    (tmp_path / "app.py").write_text(module("own") + FAILING)
    text = """
    import asyncio
    import os
    import serveit
    import ray
    from app import app

    async def main():
        async with serveit.serve(app, http={"port": 0, "debug": True}) as client:
            print("url", client.url, flush=True)
            print("ref", await (await client.get_handle("answer").remote()), flush=True)
            print("loaded", ray.is_initialized(), flush=True)
            await asyncio.to_thread(input)
        print("ray", ray.is_initialized(), flush=True)

    asyncio.run(main())
    """
    home = tmp_path / "home"
    home.mkdir()
    without_ray = {name: value for name, value in instance.environment.items() if name[:4] != "RAY_"}
    environment = {**without_ray, "HOME": str(home)}
    environment.pop("RAY_ADDRESS", None)
    with driver(tmp_path, text, environment=environment) as running:
        url = running.says("url")
        assert url != instance.url
        assert running.says("ref") == "own" and running.says("loaded") == "True"
        assert status_and_text(f"{url}/answer") == (200, "own")
        status, told = status_and_text(f"{url}/fail")
        assert status == 500 and "ValueError" in told and "in fail" in told
        running.go_on()
        assert running.says("ray") == "False" and running.end() == 0
    assert running.lines[-1] == "ray False"
    for token in home.rglob("auth_token"):
        assert token.stat().st_mode & 0o077 == 0


FAILING = """

@app.route("/fail")
async def fail() -> str:
    raise ValueError("shown")
"""

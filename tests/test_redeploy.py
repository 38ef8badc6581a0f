"""`--reload` on Ray: what the parent makes of changes, where tests end its children and deploys."""

from __future__ import annotations

import asyncio
import contextlib
import os
import textwrap
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from serveit import App
from serveit.cluster.shipping import spec_of
from serveit.command.redeploy import CannotImport, Importer, Redeployer, _serve, _show, _until_stopped
from serveit.control.spec import AppSpec
from serveit.exceptions import NotServing
from serveit.signals import StopSignals
from tests.support import wait_until

FIRST = "the app does not start: saving a file tries again"
KEPT = "the new code does not start: the old one goes on serving"


def spec(name: str) -> AppSpec:
    return AppSpec(name, (), (), (), b"")


class Steps:
    """Children and deploys: each is under way until the test says how it ends.

    Attributes:
        children, deploys: begun, and not ended yet, in that order.
        shown: what has come into force, and was said.
        killed: children that were stopped.
    """

    def __init__(self) -> None:
        self.children: list[asyncio.Future[AppSpec]] = []
        self.deploys: list[asyncio.Future[None]] = []
        self.deployed: list[str] = []
        self.shown: list[str] = []
        self.killed = 0
        self._changes: asyncio.Queue[list[Path]] = asyncio.Queue()

    async def spec(self) -> AppSpec:
        child: asyncio.Future[AppSpec] = asyncio.get_running_loop().create_future()
        self.children.append(child)
        try:
            return await child
        except asyncio.CancelledError:
            self.killed += 1
            raise
        finally:
            self.children.remove(child)

    async def deploy(self, spec: AppSpec) -> None:
        deploy: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.deploys.append(deploy)
        self.deployed.append(spec.name)
        try:
            await deploy
        finally:
            self.deploys.remove(deploy)

    def show(self, spec: AppSpec) -> None:
        self.shown.append(spec.name)

    async def changes(self) -> AsyncIterator[list[Path]]:
        while True:
            yield await self._changes.get()

    def save(self, *paths: Path) -> None:
        self._changes.put_nowait(list(paths))

    async def imports(self, name: str | None) -> None:
        """The child that is under way ends: with a spec, or with an error."""
        await wait_until(lambda: self.children, 1, "a child")
        (child,) = self.children
        if name is None:
            child.set_exception(CannotImport())
        else:
            child.set_result(spec(name))
        await wait_until(lambda: child not in self.children, 1, "its end")

    async def comes_up(self, name: str) -> None:
        """Imported, deployed, and in force."""
        await self.imports(name)
        await self.deploying(name)
        self.deploys[-1].set_result(None)
        await wait_until(lambda: name in self.shown, 1, "what is shown")

    async def deploying(self, name: str) -> None:
        await wait_until(lambda: name in self.deployed, 1, "the deploy")


@contextlib.asynccontextmanager
async def following() -> AsyncIterator[Steps]:
    """A parent that has started."""
    steps = Steps()
    redeployer = Redeployer(steps.spec, steps.deploy, steps.show)
    task = asyncio.ensure_future(redeployer.follow(steps.changes()))
    steps.save()
    await wait_until(lambda: steps.children, 1, "the first child")
    try:
        yield steps
    finally:
        task.cancel()
        await asyncio.wait((task,))
        assert task.cancelled()


async def test_a_change_is_deployed(capsys: pytest.CaptureFixture[str]) -> None:
    async with following() as steps:
        await steps.comes_up("one")
        steps.save()  # nothing
        steps.save(Path("app.py"), Path("models", "small.py"))
        await steps.comes_up("two")
        assert steps.shown == ["one", "two"] and steps.killed == 0
    assert capsys.readouterr().err == "app.py, models/small.py changed: starting the new code\n"


async def test_a_change_before_the_first_look(capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps()
    steps.save(Path("app.py"))
    task = asyncio.ensure_future(Redeployer(steps.spec, steps.deploy, steps.show).follow(steps.changes()))
    await steps.comes_up("one")
    task.cancel()
    await asyncio.wait((task,))
    assert steps.deployed == ["one"] and capsys.readouterr().err == ""


async def test_code_that_cannot_be_imported_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    async with following() as steps:
        await steps.imports(None)
        await wait_until(lambda: FIRST in capsys.readouterr().err, 1, "what is said")
        steps.save(Path("app.py"))
        await steps.comes_up("one")
        steps.save(Path("app.py"))
        await steps.imports(None)
        await wait_until(lambda: KEPT in capsys.readouterr().err, 1, "what is said")
        steps.save(Path("app.py"))
        await steps.comes_up("two")
        assert steps.deployed == ["one", "two"]


async def test_a_deploy_that_fails_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    async with following() as steps:
        await steps.imports("bad")
        await steps.deploying("bad")
        steps.deploys[0].set_exception(NotServing("no place for it"))
        await wait_until(lambda: not steps.deploys, 1, "its end")
        said = capsys.readouterr().err
        assert said == f"Error: no place for it\n{FIRST}\n"
        steps.save(Path("app.py"))
        await steps.comes_up("one")
        steps.save(Path("app.py"))
        await steps.imports("worse")
        await steps.deploying("worse")
        error = ValueError("no model")
        error.add_note("(while replica x#1 started)")
        steps.deploys[0].set_exception(error)
        await wait_until(lambda: not steps.deploys, 1, "its end")
        said = capsys.readouterr().err
        assert "ValueError: no model\n(while replica x#1 started)\n" in said
        assert said.endswith(f"Error: the app cannot be started\n{KEPT}\n")
        assert steps.shown == ["one"]


async def test_a_change_stops_the_child_before_it(tmp_path: Path) -> None:
    path = tmp_path / "app.py"
    path.touch()
    async with following() as steps:
        first = steps.children[0]
        steps.save(path)
        await wait_until(lambda: steps.killed == 1, 1, "its end")
        assert first.cancelled()
        await steps.comes_up("two")
        assert steps.deployed == ["two"]
    assert list((tmp_path / "__pycache__").iterdir())  # of what changed, nothing old is believed


@pytest.mark.parametrize("comes_up", [True, False])
async def test_a_newer_deploy_takes_the_place_of_one(
    comes_up: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever becomes of the older one is not said."""
    async with following() as steps:
        await steps.imports("one")
        await steps.deploying("one")
        steps.save(Path("app.py"))
        await steps.imports("two")
        await steps.deploying("two")
        one, two = steps.deploys
        if comes_up:
            one.set_result(None)
        else:
            one.set_exception(NotServing("another deploy of the app came in between"))
        await wait_until(lambda: one not in steps.deploys, 1, "its end")
        two.set_exception(NotServing("broken"))
        await wait_until(lambda: not steps.deploys, 1, "its end")
        said = capsys.readouterr().err.splitlines()[1:]
        assert said == ["Error: broken", KEPT if comes_up else FIRST]
        assert steps.shown == []


async def test_a_deploy_may_come_into_force_while_the_next_is_imported(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with following() as steps:
        await steps.imports("one")
        await steps.deploying("one")
        steps.save(Path("app.py"))
        await wait_until(lambda: steps.children, 1, "the next child")
        steps.deploys[0].set_result(None)
        await wait_until(lambda: steps.shown == ["one"], 1, "what is shown")
        await steps.imports(None)
        await wait_until(lambda: KEPT in capsys.readouterr().err, 1, "what is said")


async def test_a_stop_ends_what_is_under_way() -> None:
    async with following() as steps:
        await steps.imports("one")
        await steps.deploying("one")
        steps.save(Path("app.py"))
        await wait_until(lambda: steps.children, 1, "the next child")
    assert steps.killed == 1 and steps.children == [] and steps.deploys == []


def test_what_serves_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    app = App()
    app.backend(len, name="one", num_replicas=2)
    app.backend(len, name="two")
    app.add_route("/a", "one")
    app.add_route("/longer", traffic={"one": 0.9, "two": 0.1}, methods=["GET", "POST"])
    _show(spec_of(app, name="x", prefix="/x"), "http://h:1")
    assert capsys.readouterr().out.splitlines() == [
        "serving http://h:1  (2 backends, 3 replicas)",
        "  /x/a       GET,HEAD       one",
        "  /x/longer  GET,HEAD,POST  one 90%, two 10%",
    ]
    _show(AppSpec("x", (), (), (), b""), None)
    assert capsys.readouterr().out == "serving without HTTP  (0 backends, 0 replicas)\n"


# -- the whole, with an instance that is none -------------------------------------------------


class FakeApp:
    """Takes every deploy."""

    url = "http://h:1"

    def __init__(self) -> None:
        self.deployed: list[str] = []
        self.asked = 0

    async def deploy(self, spec: AppSpec) -> None:
        self.deployed.append(spec.name)

    async def status(self) -> dict[str, Any]:
        self.asked += 1
        return {"backends": {}}


class One(Importer):
    """Of an app that is always the same."""

    def __init__(self) -> None:
        super().__init__("", [], 0)
        self.imported = 0

    async def spec(self) -> AppSpec:
        self.imported += 1
        return spec("one")


async def test_the_first_deploy_waits_for_ray_and_a_stop_ends_the_app(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app, ended, up = FakeApp(), [], asyncio.Event()

    @contextlib.asynccontextmanager
    async def own() -> AsyncIterator[Any]:
        await up.wait()
        try:
            yield app, "http://h:1"
        finally:
            ended.append(app.asked)

    signals = StopSignals(1)
    stop = signals.attach()
    importer = One()
    running = asyncio.ensure_future(_until_stopped(_serve(importer, [tmp_path], own(), signals), signals))
    await wait_until(lambda: importer.imported, 3, "the child, which waits for nothing")
    assert app.deployed == []
    up.set()
    await wait_until(lambda: app.deployed, 3, "the deploy")
    stop.set()
    await running
    assert app.deployed == ["one"] and ended == [1]  # after it was asked what still runs
    assert capsys.readouterr().out == "serving http://h:1  (0 backends, 0 replicas)\n"


async def test_an_instance_that_cannot_be_had(tmp_path: Path) -> None:
    @contextlib.asynccontextmanager
    async def own() -> AsyncIterator[Any]:
        raise OSError("in use")
        yield

    signals = StopSignals(1)
    with pytest.raises(OSError, match="in use"):
        await _until_stopped(_serve(One(), [tmp_path], own(), signals), signals)


# -- children --------------------------------------------------------------------------------


@pytest.fixture
def importer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Importer]:
    monkeypatch.chdir(tmp_path)
    reader, writer = os.pipe()
    yield Importer("main:app", ["--log-level", "error"], reader)
    os.close(reader)
    os.close(writer)


def write(text: str) -> None:
    Path("main.py").write_text(textwrap.dedent(text))


async def test_a_child_tells_what_the_app_is_to_be_and_needs_no_ray(
    importer: Importer, capfd: pytest.CaptureFixture[str]
) -> None:
    write("""
        import atexit, sys
        from serveit import App
        app = App()
        atexit.register(lambda: print("with Ray" if "ray" in sys.modules else "without Ray"))

        @app.route("/answer")
        @app.backend(num_replicas=3)
        async def answer() -> int: ...
        """)
    told = await importer.spec()
    assert told.backend("answer").num_replicas == 3
    assert [route.pattern for route in told.routes] == ["/answer"]
    assert capfd.readouterr().out == "without Ray\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def (:", "SyntaxError"),
        ("import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("import os; os._exit(0)", ""),
        ("import serveit; app = serveit.App()", "has nothing to serve"),
    ],
)
async def test_a_child_says_itself_why_not(
    importer: Importer, capfd: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    write(text)
    with pytest.raises(CannotImport):
        await importer.spec()
    assert said in capfd.readouterr().err


def read(name: str) -> str:
    path = Path(name)
    return path.read_text() if path.exists() else ""


async def test_a_child_that_hangs_is_killed(importer: Importer) -> None:
    write("import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)")
    importing = asyncio.ensure_future(importer.spec())
    await wait_until(lambda: read("pid"), 10, "it to import")
    importing.cancel()
    await asyncio.wait((importing,))
    assert importing.cancelled()
    with pytest.raises(ProcessLookupError):
        os.kill(int(read("pid")), 0)

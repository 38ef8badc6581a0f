"""What replicas are given: resources, environments, folders. And how soon it is told what goes wrong with
their starts, and that nothing of them is left then."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import signal
import sys
import textwrap
import time
import zipfile
from pathlib import Path
from typing import Any

import httpx2
import pytest
import ray

import serveit
from serveit import App
from serveit.cluster.instance import open_instance
from serveit.exceptions import NotServing, RemoteTraceback
from tests.cluster.apps import add_one
from tests.cluster.instance import KEEPER, Instance
from tests.cluster.test_deploys import actors
from tests.support import wait_until

pytestmark = pytest.mark.cluster

TOLD_S = 5.0
"""So soon is it told what goes wrong."""


def free() -> dict[str, float]:
    ask: Any = ray.available_resources
    return {name: amount for name, amount in ask().items() if name in ("CPU", "GPU", "license")}


class Footprint:
    """What runs and is held at one moment, before a deploy."""

    def __init__(self) -> None:
        self._actors, self._free = actors(), free()

    async def nothing_more(self) -> None:
        """Wait until a deploy has left nothing. Ray's figures come late: what it had not noticed to be free
        before, may be now."""
        await wait_until(self._is_back, 10, f"nothing beside {self._actors}, {self._free}")

    def _is_back(self) -> bool:
        now = free()
        return actors() <= self._actors and all(now[name] >= amount for name, amount in self._free.items())


class Given:
    """Tells what its replica was given."""

    async def resources(self) -> dict[str, float]:
        here: Any = ray.get_runtime_context()
        return dict(here.get_assigned_resources())

    async def variable(self, name: str) -> str | None:
        return os.environ.get(name)


async def test_a_replica_has_what_it_asks_for(instance: Instance) -> None:
    before = Footprint()
    options: dict[str, Any] = {
        "num_cpus": 0.5,
        "num_gpus": 0.25,
        "memory": 2**20,
        "resources": {"license": 1},
        "runtime_env": {"env_vars": {"SHADE": "blue", "OMP_NUM_THREADS": "3"}},
        "scheduling_strategy": "SPREAD",
    }
    app = App()
    app.backend(Given, name="much", ray_actor_options=options)
    app.backend(Given, name="little")
    async with serveit.serve(app, name="given") as client:
        much, little = client.get_handle("much"), client.get_handle("little")
        assert await much.resources.call() == {"CPU": 0.5, "GPU": 0.25, "memory": 2**20, "license": 1}
        assert await little.resources.call() == {}
        assert await much.variable.call("SHADE") == "blue"
        assert await much.variable.call("OMP_NUM_THREADS") == "3"
        assert await little.variable.call("OMP_NUM_THREADS") == "1", "Ray's own, where no CPUs are asked for"
        assert await much.variable.call("CUDA_VISIBLE_DEVICES") == "0"
    await before.nothing_more()


FARM = """
    from pathlib import Path

    import helpers_of_the_farm

    class Farm:
        def reconfigure(self, user_config):
            self.size = user_config

        async def __call__(self, name: str):
            return [name, self.size, Path("data.txt").read_text(), helpers_of_the_farm.WORD]

        async def pid(self):
            import os
            return os.getpid()
"""


async def test_folders_that_only_replicas_have(
    instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the replica in the place of one that died, when no other holds on to them."""
    working, modules = tmp_path / "working", tmp_path / "helpers_of_the_farm"
    for folder in (working, modules):
        folder.mkdir()
    (working / "a_farm.py").write_text(textwrap.dedent(FARM))
    (working / "data.txt").write_text("hay")
    (modules / "__init__.py").write_text("WORD = 'helped'\n")
    monkeypatch.chdir(tmp_path)
    environment = {"working_dir": "working", "py_modules": [str(modules)]}
    app = App()
    app.backend("a_farm:Farm", name="farm", user_config=4, ray_actor_options={"runtime_env": environment})
    app.add_route("/farm/<name>", "farm")
    async with serveit.serve(app, name="farm") as client:
        assert importlib.util.find_spec("a_farm") is None
        handle = client.get_handle("farm")
        async with httpx2.AsyncClient(base_url=str(client.url), timeout=20) as http:
            assert (await http.get("/farm/x")).json() == ["x", 4, "hay", "helped"]
        pid = await handle.pid.call()
        os.kill(pid, signal.SIGKILL)
        await _another(client, pid)
        assert await handle.call("y") == ["y", 4, "hay", "helped"]
        pid = await handle.pid.call()
        await client.update("farm", user_config=5)
        assert (await handle.call("z"), await handle.pid.call()) == (["z", 5, "hay", "helped"], pid)
        (working / "data.txt").write_text("straw")
        await client.update("farm", ray_actor_options={"runtime_env": environment})
        assert await handle.call("z") == ["z", 5, "straw", "helped"]
    lost = App()
    lost.backend("a_farm:Farm", name="farm", ray_actor_options={"runtime_env": {"working_dir": "elsewhere"}})
    with pytest.raises(ValueError, match=r"backend 'farm': its runtime_env cannot be sent .*elsewhere"):
        async with serveit.serve(lost, name="farm"):
            pytest.fail("there is no such folder")


async def _another(client: Any, pid: int) -> None:
    """Wait for the replica in the place of one."""
    begun = time.monotonic()
    pids = {pid}
    while not pids - {pid}:
        assert time.monotonic() - begun <= 20
        backends = (await client.status())["backends"]
        pids = {replica.get("pid", pid) for backend in backends.values() for replica in backend.values()}


async def test_an_environment_that_cannot_be_made(instance: Instance) -> None:
    before = Footprint()
    app = App()
    environment = {"working_dir": "local:///nowhere/at/all"}
    app.backend(Given, name="given", ray_actor_options={"runtime_env": environment})
    with pytest.raises(
        NotServing, match=r"replica given#\d+ cannot start: its runtime_env cannot be set up: "
    ) as raised:
        async with serveit.serve(app, name="made"):
            pytest.fail("there is no such folder")
    assert "points to '/nowhere/at/all', which must already exist on every node" in str(raised.value)
    assert "Traceback" not in str(raised.value)
    await before.nothing_more()


WHEEL_NAME, WHEEL_INFO = "tinything-1.0-py3-none-any.whl", "tinything-1.0.dist-info"


def make_wheel(folder: Path) -> Path:
    """A package of one line."""
    files = {
        "tinything.py": "WORD = 'installed'\n",
        f"{WHEEL_INFO}/METADATA": "Metadata-Version: 2.1\nName: tinything\nVersion: 1.0\n",
        f"{WHEEL_INFO}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{WHEEL_INFO}/RECORD"])
    with zipfile.ZipFile(folder / WHEEL_NAME, "w") as wheel:
        for name, text in {**files, f"{WHEEL_INFO}/RECORD": record}.items():
            wheel.writestr(name, text)
    return folder / WHEEL_NAME


async def test_packages_that_pip_installs(instance: Instance, tmp_path: Path) -> None:
    """Where Ray can: it needs virtualenv for that, and where that is missing, who deploys is told."""
    app = App()

    @app.backend(
        ray_actor_options={
            "runtime_env": {
                "pip": {"packages": [str(make_wheel(tmp_path))], "pip_install_options": ["--no-index"]}
            }
        }
    )
    async def word() -> str:
        import tinything  # type: ignore[import-not-found]

        return str(tinything.WORD)

    async def serve() -> str:
        async with serveit.serve(app, name="packages") as client:
            return str(await client.get_handle("word").call())

    if importlib.util.find_spec("virtualenv") is not None:
        assert await serve() == "installed"
    else:
        with pytest.raises(NotServing, match="cannot be set up: RuntimeError: Please install virtualenv"):
            await serve()


# -- what goes wrong -----------------------------------------------------------------------------


class Fails:
    """Raises at one of the stages of its start, and notes when."""

    def __init__(self, stage: str, note: str) -> None:
        self.stage, self.note = stage, note
        self._fail_at("__init__")

    def _fail_at(self, stage: str) -> None:
        if stage == self.stage:
            with open(self.note, "a") as note:
                note.write(f"{time.time()}\n")
            raise LookupError(f"{stage} found nothing")

    async def __call__(self) -> str:
        return "works"

    async def setup(self) -> None:
        self._fail_at("setup")

    def reconfigure(self, user_config: Any) -> None:
        self._fail_at("reconfigure")

    def check_health(self) -> None:
        self._fail_at("check_health")


def failing(stage: str, note: Path) -> App:
    app = App()
    options = {"num_cpus": 1, "resources": {"license": 0.5}}
    app.backend(Fails, init_args=(stage, str(note)), user_config=1, num_replicas=2, ray_actor_options=options)
    return app


@pytest.mark.parametrize("stage", ["__init__", "setup", "reconfigure", "check_health"])
async def test_what_raises_at_the_start_is_told_within_seconds(
    instance: Instance, tmp_path: Path, stage: str
) -> None:
    before = Footprint()
    note = tmp_path / "raised"
    with pytest.raises(LookupError, match=f"{stage} found nothing") as caught:
        async with serveit.serve(failing(stage, note), name="failing"):
            pytest.fail("it cannot start")
    assert time.time() - min(map(float, note.read_text().split())) <= TOLD_S
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert f"in {stage}" in str(caught.value.__cause__)
    await before.nothing_more()
    if stage == "__init__":
        async with serveit.serve(failing("", note), name="failing") as client:
            assert await client.get_handle("Fails").call() == "works"


async def test_an_import_that_raises_is_told_within_seconds(
    instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    note = tmp_path / "raised"
    code = f"import time\nwith open({str(note)!r}, 'a') as note:\n    note.write(f'{{time.time()}}\\n')\n"
    (tmp_path / "raises_on_import.py").write_text(f"{code}raise OSError('no GPU')\n")
    app = App()
    app.backend("raises_on_import:Model", name="late", num_replicas=2)
    with pytest.raises(OSError, match="no GPU") as caught:
        async with serveit.serve(app, name="importing"):
            pytest.fail("it cannot start")
    assert time.time() - min(map(float, note.read_text().split())) <= TOLD_S
    assert 'raises_on_import.py", line 4' in str(caught.value.__cause__)
    assert "raises_on_import" not in sys.modules


async def test_a_shortage_is_told_within_seconds(
    instance: Instance, caplog: pytest.LogCaptureFixture
) -> None:
    """And fails the deploy after its time, not before; the next one has all there is."""
    app = App()
    asked = {"num_cpus": 0, "resources": {"license": 1.5}}
    app.backend(Given, name="given", num_replicas=2, ray_actor_options=asked)
    before = Footprint()
    begun = time.monotonic()

    async def waiting_for() -> str:
        async with open_instance(None) as running:
            app = (await running.status())["apps"].get("short", {"backends": {}})
        replicas = app["backends"].get("given", {}).values()
        return next((replica["waiting_for"] for replica in replicas if "waiting_for" in replica), "")

    async with serveit.connect(None, app=KEEPER) as keeper:
        deploying = asyncio.ensure_future(keeper.deploy(app, name="short", deploy_timeout_s=4))
        while not (told := await waiting_for()):
            assert time.monotonic() - begun <= TOLD_S
            await asyncio.sleep(0.1)
        assert time.monotonic() - begun <= TOLD_S
        assert re.fullmatch(r"replica given#\d+ needs 1.5 license, 0.5 free; waiting for \d s", told)
        async with serveit.connect(None, app="short") as other:
            assert (await other.status())["state"] == "DEPLOYING"
        with pytest.raises(NotServing, match=r"waited 4 s .* it needs 1.5 license, 0.5 free; give"):
            await deploying
        assert 4 <= time.monotonic() - begun
    (logged,) = [record.getMessage() for record in caplog.records if record.name == "serveit.client"]
    assert re.fullmatch(
        r"app 'short': replica given#\d+ needs 1.5 license, 0.5 free; waiting for \d s", logged
    )
    with pytest.raises(NotServing, match=r"app 'short' did not come up: .* needs 1.5 license, 0.5 free"):
        await serveit.connect(None, app="short").__aenter__()
    await before.nothing_more()
    app.backends["given"].config = app.backends["given"].config.merge(num_replicas=1)
    async with serveit.serve(app, name="short") as client:
        assert await client.get_handle("given").resources.call() == {"license": 1.5}
        caplog.clear()
        with pytest.raises(NotServing, match="waited 4 s"):
            await client.update("given", num_replicas=2, deploy_timeout_s=4)
    (logged,) = [record.getMessage() for record in caplog.records if record.name == "serveit.client"]
    assert re.fullmatch(
        r"app 'short': replica given#\d+ needs 1.5 license, 0.5 free; waiting for \d s", logged
    )


class Meets:
    """Its constructor waits for that of another replica."""

    def __init__(self, folder: str) -> None:
        Path(folder, str(os.getpid())).touch()
        end = time.monotonic() + 20
        while len(list(Path(folder).iterdir())) < 2:
            assert time.monotonic() < end, "it is alone"
            time.sleep(0.01)

    def __call__(self) -> None: ...


async def test_replicas_start_at_the_same_time(instance: Instance, tmp_path: Path) -> None:
    app = App()
    app.backend(Meets, init_args=(str(tmp_path),), num_replicas=2)
    async with serveit.serve(app, name="meeting") as client:
        assert len((await client.status())["backends"]["Meets"]) == 2


async def test_a_client_stays_where_it_is(instance: Instance) -> None:
    task: Any = add_one
    async with serveit.connect(None, app=KEEPER) as client:
        with pytest.raises(TypeError, match=r"a Client cannot be pickled.*get_handle\(.*serveit.connect\(\)"):
            await asyncio.to_thread(task.remote, client)

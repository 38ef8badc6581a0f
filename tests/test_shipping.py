"""Shipping: what a driver packs, and a replica's process finds again.

A "replica" here is this process once it has forgotten the driver's modules; where the script's own
`__main__` is the point, it is another process.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from serveit.cluster import byvalue, references
from serveit.cluster.shipping import Shipment, describe, find, pack, unpack
from serveit.context import serving
from serveit.declare.app import App
from serveit.declare.backend import Backend, BatchBackend
from serveit.exceptions import ImportFailed

HELLO = """
    from serveit import App
    app = App()

    @app.route("/hello")
    @app.backend(num_replicas=2)
    def hello() -> str:
        return "hello"
    """


class Driver:
    """A driver's folder, and this process as the driver and then, `forget`ful, as its replica."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, source: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
        importlib.invalidate_caches()
        return path

    def load(self, name: str) -> Any:
        return importlib.import_module(name)

    def module(self, name: str, source: str) -> Any:
        self.write(f"{name.replace('.', '/')}.py", source)
        return self.load(name)

    def forget(self) -> None:
        """Become another process: none of the driver's modules, paths and folders."""
        for name in [name for name in sys.modules if self._is_mine(name)]:
            del sys.modules[name]
        sys.path[:] = [entry for entry in sys.path if not entry.startswith(str(self.folder.parent))]

    def _is_mine(self, name: str) -> bool:
        module = sys.modules[name]
        places = [getattr(module, "__file__", None) or "", *getattr(module, "__path__", ())]
        return any(place.startswith(str(self.folder.parent)) for place in places)

    def ship(self, app: App) -> App:
        shipment = pack(app)
        self.forget()
        return unpack(over_the_wire(shipment))


@pytest.fixture(autouse=True)
def process_as_it_was() -> Iterator[None]:
    path, cwd, main = list(sys.path), os.getcwd(), vars(sys.modules["__main__"])
    names = dict(main)
    yield
    main.clear()
    main.update(names)
    os.chdir(cwd)
    sys.path[:] = path
    importlib.invalidate_caches()


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a module is written twice within a second
    for name, module in list(sys.modules.items()):  # other tests have an `app` or hello_app as well
        if name == "app" or str(getattr(module, "__file__", None)).startswith(str(tmp_path.parent)):
            monkeypatch.delitem(sys.modules, name)
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    driver = Driver(folder)
    yield driver
    driver.forget()


def over_the_wire(shipment: Shipment) -> Shipment:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(shipment), type=Shipment)


def script(source: str) -> types.SimpleNamespace:
    """What a script or notebook defines: its functions say they are `__main__`'s."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(textwrap.dedent(source), namespace)
    return types.SimpleNamespace(**namespace)


def size(shipment: Shipment) -> int:
    return len(msgspec.msgpack.encode(shipment))


# -- by reference --------------------------------------------------------------------------------


def test_a_module_in_the_folder_goes_by_reference(driver: Driver) -> None:
    app = driver.module("hello_app", HELLO).app
    shipment = pack(app)
    assert shipment.reference == describe(shipment) == "hello_app:app"
    assert shipment.pickled == b""
    assert shipment.paths[0] == str(driver.folder)
    assert shipment.cwd == str(driver.folder)

    driver.forget()
    os.chdir("/")
    found = unpack(over_the_wire(shipment))
    assert found is not app
    assert found is sys.modules["hello_app"].app
    assert os.getcwd() == str(driver.folder)
    record = find(found, "hello", shipment)
    assert record.load()() == "hello"
    assert record.config.num_replicas == 2


def test_a_function_with_a_50_mb_global_ships_in_under_1_kb(driver: Driver) -> None:
    app = driver.module(
        "heavy",
        """
        from serveit import App
        app = App()
        BIG = bytearray(50_000_000)
        @app.backend
        def size(): return len(BIG)
        """,
    ).app
    assert size(pack(app)) < 1_000
    assert driver.ship(app).backends["size"].load()() == 50_000_000


def test_a_package_on_a_path_that_was_inserted_by_hand(driver: Driver, tmp_path: Path) -> None:
    sys.path.insert(0, str(tmp_path / "elsewhere"))
    driver.write("../elsewhere/by_hand/__init__.py", "")
    driver.write("../elsewhere/by_hand/serving.py", HELLO)
    app = driver.load("by_hand.serving").app
    shipment = pack(app)
    assert shipment.reference == "by_hand.serving:app"
    assert shipment.paths[:2] == (str(tmp_path / "elsewhere"), str(driver.folder))
    assert driver.ship(app).backends["hello"].load()() == "hello"


def test_a_module_that_runs_with_the_folder_as_an_empty_path_entry(driver: Driver) -> None:
    sys.path[0] = ""
    app = driver.module("hello_app", HELLO).app
    assert pack(app).paths[0] == str(driver.folder)


@pytest.mark.parametrize(
    "init",
    ["from shop.api import app", "from shop.api import app as _hidden, app"],
)
def test_an_app_that_a_package_exports_again_goes_by_the_module_of_its_functions(
    driver: Driver, init: str
) -> None:
    driver.write("shop/__init__.py", init)
    driver.write("shop/api.py", HELLO)
    app = driver.load("shop").app
    assert pack(app).reference == "shop.api:app"
    assert driver.ship(app) is sys.modules["shop"].app


def test_of_several_names_the_shortest_without_an_underscore(driver: Driver) -> None:
    module = driver.module("names", "from serveit import App\n_a = application = app = App()\n")
    assert pack(module.app).reference == "names:app"


def test_an_app_in_a_namespace_package(driver: Driver) -> None:
    driver.write("space/inner/app.py", HELLO)
    app = driver.load("space.inner.app").app
    assert pack(app).reference == "space.inner.app:app"
    assert driver.ship(app).backends["hello"].load()() == "hello"


def test_parts_that_other_modules_declare_are_imported_too(driver: Driver) -> None:
    driver.write("parts/__init__.py", "")
    driver.write("parts/core.py", "from serveit import App\napp = App()\n")
    for name in "ab":
        driver.write(
            f"parts/{name}.py",
            f"from parts.core import app as _app\n@_app.backend\ndef {name}(): return {name!r}\n",
        )
    driver.write(
        "parts/main.py", "from parts import a, b\nfrom parts.core import app\napp.add_route('/a', a.a)\n"
    )
    app = driver.load("parts.main").app
    found = driver.ship(app)
    assert sorted(found.backends) == ["a", "b"]
    assert [route.pattern.text for route in found.routes] == ["/a"]


def test_what_is_complete_imports_no_more(driver: Driver) -> None:
    driver.write("complete.py", HELLO)
    driver.write("user_of_it.py", "from complete import app\n")
    driver.load("user_of_it")
    driver.ship(driver.load("complete").app)
    assert "user_of_it" not in sys.modules


def test_a_backend_that_the_driver_added_later(driver: Driver) -> None:
    app = driver.module("hello_app", HELLO).app
    app.backend(len, name="later")
    shipment = pack(app)
    driver.forget()
    found = unpack(shipment)
    with pytest.raises(ImportFailed) as caught:
        find(found, "later", shipment)
    text = str(caught.value)
    assert "hello_app:app was imported anew" in text
    assert "holds no backend 'later' (there is 'hello')" in text
    assert "declare it at module level" in text


def test_a_part_in_a_module_that_is_not_here(driver: Driver) -> None:
    app = driver.module("hello_app", HELLO).app
    extra = driver.module("more_of_it", "from hello_app import app\n@app.backend\ndef more(): ...\n")
    shipment = pack(extra.app)
    driver.forget()
    (driver.folder / "more_of_it.py").unlink()
    found = unpack(shipment)
    with pytest.raises(ImportFailed, match="no backend 'more'"):
        find(found, "more", shipment)
    assert app is not found


# -- what the replica's process is like ----------------------------------------------------------


def test_the_drivers_folders_come_first_and_only_those_that_exist(driver: Driver, tmp_path: Path) -> None:
    app = driver.module("hello_app", HELLO).app
    shipment = pack(app)
    there = str(driver.folder)
    gone = str(tmp_path / "gone")
    driver.forget()
    sys.path[:] = ["/someone/else", there, *sys.path]
    unpack(
        msgspec.structs.replace(
            shipment, paths=(gone, str(tmp_path), there, *shipment.paths[1:]), cwd="/no/such"
        )
    )
    assert sys.path[:2] == [str(tmp_path), there]
    assert gone not in sys.path
    assert sys.path.count(there) == 1
    assert sys.path.index("/someone/else") > sys.path.index(there)


def test_what_every_python_has_does_not_travel(driver: Driver) -> None:
    import ray

    folder = os.path.dirname(ray.__file__)
    sys.path[:0] = [os.path.join(folder, "thirdparty_files"), "/no/such/folder", os.path.dirname(os.__file__)]
    sys.path.append(b"bytes")  # type: ignore[arg-type]  # Python's import passes over it, too
    paths = pack(driver.module("hello_app", HELLO).app).paths
    sys.path.pop()
    assert paths[0] == str(driver.folder)
    assert not [path for path in paths if "site-packages" in path or "lib/python3" in path]


def test_ray_need_not_be_there_to_know_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert references.is_installed(os.path.dirname(os.__file__))
    assert not references.is_installed("/")


def test_a_working_directory_that_was_deleted(driver: Driver, tmp_path: Path) -> None:
    app = driver.module("hello_app", HELLO).app
    (tmp_path / "short").mkdir()
    os.chdir(tmp_path / "short")
    (tmp_path / "short").rmdir()
    shipment = pack(app)
    os.chdir(tmp_path)
    assert shipment.cwd == ""
    unpack(shipment)
    assert os.getcwd() == str(tmp_path)


def test_the_drivers_script_is_named(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    app = driver.module("hello_app", HELLO).app
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "run_it.py")
    assert pack(app).script == str(driver.folder / "run_it.py")
    monkeypatch.delattr(sys.modules["__main__"], "__file__")
    assert pack(app).script == ""


# -- what is not there ---------------------------------------------------------------------------


def test_a_module_that_is_not_there(driver: Driver) -> None:
    app = driver.module("hello_app", HELLO).app
    shipment = msgspec.structs.replace(pack(app), paths=("/only/on/the/driver", str(driver.folder)))
    driver.forget()
    (driver.folder / "hello_app.py").unlink()
    with pytest.raises(ImportFailed) as caught:
        unpack(shipment)
    text = str(caught.value)
    assert "no module 'hello_app' on " in text
    assert os.uname().nodename in text
    assert f"looked in {driver.folder}" in text
    assert "the driver also has /only/on/the/driver" in text
    assert "install its package" in text
    assert 'runtime_env={"working_dir": "."}' in text
    assert "only the driver has in memory" in text


def test_a_parent_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if references.is_installed(entry)])
    with pytest.raises(ImportFailed, match=r"'nowhere.at.all' on .*looked in the installed packages\)"):
        references.import_module("nowhere.at.all")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import a_missing_dependency", ModuleNotFoundError),
        ("raise ModuleNotFoundError('by hand')", ModuleNotFoundError),
        ("1 / 0", ZeroDivisionError),
    ],
)
def test_what_the_users_module_raises_passes_as_it_is(
    driver: Driver, source: str, expected: type[Exception]
) -> None:
    shipment = pack(driver.module("hello_app", HELLO).app)
    driver.forget()
    driver.write("hello_app.py", source)
    with pytest.raises(expected) as caught:
        unpack(shipment)
    assert not isinstance(caught.value, ImportFailed)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("", "holds no 'app': define it at module level"),
        ("app = None", "'hello_app:app' was imported anew and is of type NoneType, not App"),
    ],
)
def test_an_attribute_that_is_missing_or_no_app(driver: Driver, source: str, text: str) -> None:
    shipment = pack(driver.module("hello_app", HELLO).app)
    driver.forget()
    driver.write("hello_app.py", source)
    with pytest.raises(ImportFailed, match=text):
        unpack(shipment)


def test_another_drivers_module_of_the_same_name(driver: Driver, tmp_path: Path) -> None:
    shipment = pack(driver.module("app", HELLO).app)
    driver.forget()
    driver.write("../other/app.py", "mine = 1\n")
    sys.path.insert(0, str(tmp_path / "other"))
    driver.load("app")
    with pytest.raises(ImportFailed) as caught:
        unpack(shipment)
    assert f"'app' from {driver.folder / 'app.py'}" in str(caught.value)
    assert str(tmp_path / "other" / "app.py") in str(caught.value)

    del sys.modules["app"]  # not imported before: the driver's own is found, though the other was first
    assert "hello" in unpack(shipment).backends


def test_a_package_of_the_same_name(driver: Driver, tmp_path: Path) -> None:
    driver.write("pack/serving.py", HELLO)  # a folder without __init__.py
    shipment = pack(driver.load("pack.serving").app)
    driver.forget()
    sys.modules["pack"] = types.ModuleType("pack")
    with pytest.raises(
        ImportFailed, match=r"'pack' from a folder without __init__.py, .* before, of no file"
    ):
        unpack(shipment)
    del sys.modules["pack"]


def test_what_an_environment_brings_comes_first(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the working directory stays, if that is among it."""
    app = driver.module("hello_app", HELLO).app
    driver.write("shared.py", "WORD = 'driver'")
    shipment = pack(app)
    driver.forget()
    brought = tmp_path / "brought"
    brought.mkdir()
    (brought / "shared.py").write_text("WORD = 'brought'")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(brought), str(driver.folder), "", "/not/here"]))
    for environment, first, cwd in (
        ({"py_modules": ["gcs://a.zip"]}, brought, driver.folder),
        ({"working_dir": "gcs://a.zip"}, brought, brought),
        ({"env_vars": {"A": "b"}}, driver.folder, driver.folder),
    ):
        os.chdir(brought)
        unpack(over_the_wire(shipment), environment)
        assert (sys.path[0], os.getcwd()) == (str(first), str(cwd))
        sys.path[:] = [entry for entry in sys.path if entry != str(brought)]


# -- by value ------------------------------------------------------------------------------------


def test_an_app_made_in_a_function_comes_back_whole() -> None:
    app = App()
    offset = [3]

    @app.route("/double/<x:int>")
    @app.backend(num_replicas=2, max_ongoing_requests=7)
    def double(x: int, by: Any = lambda x: 2 * x) -> Any:
        return by(x) + offset[0]

    @app.backend(max_batch_size=4)
    async def batch(items: list[int]) -> list[Any]:
        return [await double.call(item) for item in items]

    @app.backend(init_args=(10,), init_kwargs={"names": ["a"]}, user_config={"level": 1})
    class Model:
        def __init__(self, base: int, names: list[str]) -> None:
            self.base = base
            self.names = names

        def __call__(self) -> int:
            return self.base

        def reconfigure(self, user_config: Any) -> None: ...

    app.backend(Model, name="v2", init_args=(20, ()))
    app.backend("json:dumps", name="by_name")
    app.backends["by_name"].load()
    app.add_route("/models", traffic={"Model": 0.5, "v2": 0.5}, shadow={"double": 0.1}, methods=["POST"])

    shipment = pack(app)
    assert shipment.reference == ""
    assert describe(shipment) == f"app by value, {len(shipment.pickled):,} bytes"
    found = unpack(over_the_wire(shipment))

    assert found is not app
    assert list(found.backends) == list(app.backends)
    assert found.routes == app.routes
    assert all(record.app is found for record in found.backends.values())
    assert {name: r.config for name, r in found.backends.items()} == {
        name: r.config for name, r in app.backends.items()
    }
    twin = found.backends["double"]
    assert isinstance(twin, Backend)
    assert twin is not double
    assert twin(4) == 11
    assert repr(twin) == repr(double)
    assert twin.load() is twin.target
    batched = found.backends["batch"]
    assert isinstance(batched, BatchBackend)
    assert inspect.getclosurevars(batched.load()).nonlocals == {"double": twin}
    v1, v2 = found.backends["Model"], found.backends["v2"]
    assert v1.load() is v2.load()
    assert (v1.init_args, v1.init_kwargs, v2.init_args) == ((10,), {"names": ["a"]}, (20, ()))
    assert vars(found.backends["by_name"])["_loaded"] is None  # until a replica loads it
    assert found.backends["by_name"].load() is msgspec.json.encode or callable(
        found.backends["by_name"].load()
    )
    assert find(found, "v2", shipment) is v2
    with pytest.raises(ImportFailed, match="app by value, .* bytes, holds no backend 'doubel': did you mean"):
        find(found, "doubel", shipment)


async def test_a_scripts_functions_reach_the_apps_own_backends() -> None:
    app = script(
        """
        from serveit import App
        app = App()

        @app.backend
        def double(x): return 2 * x

        @app.backend
        async def quadruple(x): return await double.call(await double.call(x))

        @app.backend
        class Model:
            async def __call__(self, x): return await app.handle(double).call(x)
        """
    ).app
    found = unpack(pack(app))
    quadruple: Any = found.backends["quadruple"].target
    model: Any = found.backends["Model"].target
    double = quadruple.__globals__["double"]
    assert double is found.backends["double"]
    assert model.__call__.__globals__["app"] is found

    class Calls:
        app = found

        def get_handle(self, name: str, *, sync: bool = False) -> Any:
            return self

        async def call(self, x: int) -> int:
            return int(double(x))

    with serving(found, Calls()):
        assert await quadruple(3) == 12
        assert await model()(3) == 6


def test_a_real_script(driver: Driver) -> None:
    driver.write(
        "helper.py",
        "BIG = bytes(50_000_000)\ndef add(x): return x + len(BIG)\n",
    )
    driver.write(
        "main.py",
        """
        import functools, sys
        import msgspec
        from serveit import App
        from serveit.cluster.shipping import pack
        import helper

        app = App()
        LABELS = {"one": 1}

        @functools.cache
        def start(): return LABELS["one"] - 1

        def twice(function):
            @functools.wraps(function)
            def wrapper(*args): return 2 * function(*args)
            return wrapper

        @app.route("/value/<name>")
        @app.backend
        @twice
        def value(name: str) -> int: return LABELS[name]

        @app.backend(max_batch_size=8)
        async def batch(items: list[int]) -> list[int]: return [helper.add(value(i)) for i in items]

        class Base:
            def __init__(self, start): self.start = start

        @app.backend(init_args=(5,))
        class Model(Base):
            def __init__(self, start): super().__init__(start)
            def __call__(self): return self.start + value("one") + start()

        if __name__ == "__main__":
            sys.stdout.buffer.write(msgspec.msgpack.encode(pack(app)))
        """,
    )
    replica = """
        import asyncio, os, sys
        import msgspec
        from serveit.cluster.shipping import Shipment, find, unpack
        shipment = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Shipment)
        app = unpack(shipment)
        print(find(app, "value", shipment).load()("one"))
        batch = find(app, "batch", shipment).load()
        batch.__globals__["LABELS"][7] = 7
        print(asyncio.run(batch([7])))
        model = find(app, "Model", shipment)
        print(model.load()(*model.init_args)(), os.getcwd(), os.path.basename(shipment.script))
        """
    packed = run([sys.executable, "main.py"], driver.folder)
    assert len(packed) < 10_000
    answer = run([sys.executable, "-c", textwrap.dedent(replica)], Path("/"), packed)
    assert answer.decode().splitlines() == ["2", "[50000014]", f"7 {driver.folder} main.py"]


def run(command: list[str], cwd: Path, stdin: bytes = b"") -> bytes:
    done = subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def test_functions_behind_backends_of_a_module_go_by_reference(driver: Driver) -> None:
    """cloudpickle would copy them, and the 50 MB that they read."""
    lib = driver.module(
        "lib",
        """
        import functools
        from serveit import App
        app = App()
        BIG = bytes(50_000_000)

        def same(function):
            @functools.wraps(function)
            def wrapper(): return function()
            return wrapper

        @app.backend
        def size(): return len(BIG)

        @app.backend
        @same
        def wrapped(): return len(BIG)

        class Names:
            @staticmethod
            @same
            def inner(): return len(BIG)
        """,
    )
    mine = App()
    mine.backend(lib.size.target, name="size")
    mine.backend(lib.wrapped.target, name="wrapped")
    mine.backend(lib.wrapped.target.__wrapped__, name="innermost")
    shipment = pack(mine)
    assert len(shipment.pickled) < 3_000
    driver.forget()
    found = unpack(shipment)
    lib = driver.load("lib")
    assert found.backends["size"].load() is lib.size.target
    assert found.backends["wrapped"].load() is lib.wrapped.target
    assert found.backends["innermost"].load() is inspect.unwrap(lib.wrapped.target)

    driver.forget()
    driver.write("lib.py", "")
    with pytest.raises(ImportFailed, match="module 'lib' .* holds no 'size'"):
        unpack(shipment)


def test_references_to_an_importable_app(driver: Driver) -> None:
    lib = driver.module(
        "lib",
        """
        from serveit import App
        app = App()
        @app.backend
        def double(x): return 2 * x
        @app.backend
        class Model:
            def __call__(self): ...
        loose = App().backend(len, name="loose")
        """,
    )
    mine = App()
    other = App()
    hidden = other.backend(abs, name="hidden")
    things = [lib.app, lib.double, lib.app.backends["Model"], lib.loose, other, hidden]

    @mine.backend
    def show() -> list[Any]:
        return things

    shipment = pack(mine)
    driver.forget()
    app, double, model, loose, copied, shown = unpack(shipment).backends["show"].load()()
    lib = sys.modules["lib"]
    assert app is lib.app
    assert double is lib.double
    assert model is lib.app.backends["Model"]
    assert loose is lib.loose
    assert copied.backends["hidden"] is shown
    assert shown.app is copied

    driver.forget()
    driver.write("lib.py", "from serveit import App\napp = App()\n")
    with pytest.raises(ImportFailed, match="module 'lib' .* holds no 'double'"):
        unpack(shipment)
    driver.forget()
    driver.write("lib.py", "from serveit import App\napp = App()\ndouble = 1\n")
    with pytest.raises(ImportFailed, match="lib:app was imported anew .* no backend 'Model' .there is none"):
        unpack(shipment)


def test_a_backend_of_the_shipped_app_that_a_module_holds_stays_the_apps_own(driver: Driver) -> None:
    lib = driver.module("lib", "def attach(app):\n    global double\n    double = app.backend(double)\n"
                               "def double(x): return 2 * x\n")  # fmt: skip
    app = App()
    lib.attach(app)
    found = driver.ship(app)
    record = found.backends["double"]
    assert record.app is found
    assert record.load()(2) == 4


def test_local_functions_share_the_globals_of_their_module(driver: Driver) -> None:
    """A factory's app: its functions travel, the module's data and locks do not."""
    module = driver.module(
        "factory",
        """
        import threading
        from serveit import App
        BIG = bytes(50_000_000)
        LOCK = threading.Lock()
        count = 0
        log = []

        def note(value): log.append(value)

        def make(start):
            app = App()

            @app.backend
            def work():
                global count, fresh
                with LOCK:
                    count += start
                fresh = count
                note(len(BIG))
                return count

            @app.backend
            def plain(): return note(1)

            return app
        """,
    )
    shipment = pack(module.make(5))
    assert shipment.reference == ""
    assert len(shipment.pickled) < 3_000
    driver.forget()
    found = unpack(shipment)
    work: Any = found.backends["work"].target
    factory = sys.modules["factory"]
    assert (work(), work()) == (5, 10)
    assert factory.count == factory.fresh == 10
    assert factory.log == [50_000_000] * 2
    assert work.__globals__ is vars(factory)


CACHED = """
    import functools, typing
    from serveit import App
    app = App()
    CALLS = []
    UserId = typing.NewType("UserId", int)

    @functools.cache
    def fibonacci(n):
        CALLS.append(n)
        return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

    @functools.lru_cache(maxsize=2, typed=True)
    def label(id: UserId) -> str:
        "Of a user."
        return f"user {id}"
    label.source = "here"

    def factory(step):
        @functools.lru_cache
        def add(x): return x + step
        return add

    plus = factory(5)

    class Model:
        @functools.cache
        def twice(self, x): return 2 * x
        def __call__(self, x): return self.twice(x)

    @app.backend
    def answer(n: int) -> list: return [fibonacci(n), label(UserId(n)), plus(n), Model()(n)]
    """


def test_cached_functions_of_a_script() -> None:
    app = script(CACHED).app
    app.backends["answer"].load()(7)  # fills the caches
    answer = unpack(over_the_wire(pack(app))).backends["answer"].load()
    names = answer.__globals__
    fibonacci, label = names["fibonacci"], names["label"]
    assert fibonacci.cache_info() == (0, 0, None, 0), "what they hold does not travel"
    names["fibonacci"].__wrapped__.__globals__["CALLS"].clear()
    assert answer(20) == [6765, "user 20", 25, 40]
    assert sorted(fibonacci.__wrapped__.__globals__["CALLS"]) == list(range(21)), "it calls itself, cached"
    assert fibonacci.__wrapped__.__globals__["fibonacci"] is fibonacci
    assert label.cache_parameters() == {"maxsize": 2, "typed": True}
    assert (label.__name__, label.__doc__, label.source) == ("label", "Of a user.", "here")
    kind = names["UserId"]
    assert (kind.__name__, kind.__supertype__, kind.__module__) == ("UserId", int, "__main__")


def test_a_cached_function_is_a_backend() -> None:
    app = App()
    app.backend(script(CACHED).label, name="label")
    assert unpack(pack(app)).backends["label"].load()(1) == "user 1"


def test_cached_functions_of_a_module_go_by_reference(driver: Driver) -> None:
    module = driver.module("caches", CACHED)
    label, plus = module.label, module.plus
    app = App()
    app.backend(lambda: [label, plus], name="call")
    found = driver.ship(app).backends["call"].load()()
    import caches  # type: ignore[import-not-found]

    assert found[0] is caches.label is not label
    assert found[1] not in (caches.plus, plus), "its name, factory.<locals>.add, leads nowhere"
    assert found[1](1) == 6


def test_what_would_go_by_a_name_in_the_script() -> None:
    app = script(
        """
        import typing
        from serveit import App
        app = App()
        P = typing.ParamSpec("P")
        @app.backend
        def f(): return P
        """
    ).app
    with pytest.raises(
        TypeError, match=r"the global 'P' of the function __main__.f .*by its name, 'P', which"
    ):
        pack(app)


def test_named_things_that_need_no_name() -> None:
    app = script(
        """
        import typing
        from serveit import App
        app = App()
        T = typing.TypeVar("T")
        class Tool:
            def __init__(self): self.__name__ = "tool"
            def use(self): return 5
            @staticmethod
            def static(): return 6
            @classmethod
            def of_class(cls): return cls.static()
        tool, use, of_class = Tool(), Tool().use, Tool.of_class
        @app.backend
        def f(): return [tool.__name__, use(), of_class(), T.__name__]
        """
    ).app
    assert unpack(pack(app)).backends["f"].load()() == ["tool", 5, 6, "T"]


def test_a_module_that_only_the_driver_has_in_memory(driver: Driver) -> None:
    """By value with everything that it defines; as a module it cannot be had."""
    module = types.ModuleType("in_memory")
    sys.modules["in_memory"] = module
    exec(
        "from serveit import App\napp = App()\n"
        "class Item:\n    value = 4\n"
        "def four(): return Item.value\n"
        "@app.backend\ndef serve(): return four()\n",
        vars(module),
    )
    app, other = module.app, App()
    other.backend(eval("lambda: module", {"module": module}), name="module")
    packed, with_module = pack(app), pack(other)
    del sys.modules["in_memory"]
    assert packed.reference == ""
    with pytest.raises(ImportFailed, match="no module 'in_memory' on"):
        unpack(with_module)
    found = unpack(packed)
    assert found.backends["serve"].load()() == 4
    again = sys.modules.pop("in_memory")
    assert (again.four(), again.Item.__name__, hasattr(again, "app")) == (4, "Item", False)


def test_a_module_in_memory_that_a_file_hides(driver: Driver) -> None:
    driver.write("twofold.py", "other = 1")
    app = App()
    for name in ("twofold", "twofold.part"):
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name])["app"] = app
    packed = pack(app)
    del sys.modules["twofold"], sys.modules["twofold.part"]
    assert packed.reference == ""


def test_a_module_that_is_in_no_table_at_all() -> None:
    module = types.ModuleType("nobodys")
    module.number = 5  # type: ignore[attr-defined]
    app = App()

    @app.backend
    def number() -> int:
        return int(module.number)

    assert unpack(pack(app)).backends["number"].load()() == 5


DATA = """
    from __future__ import annotations
    import dataclasses, enum, threading
    from typing import ClassVar, Generic, NamedTuple, TypedDict, TypeVar
    import msgspec, pydantic
    from serveit import App

    T = TypeVar("T")

    class Color(enum.Enum):
        RED = 1
        def twin(self): return Color.RED

    class Base(msgspec.Struct, frozen=True, tag="base", rename="camel"):
        first_one: int
        items: list[int] = []
        table: dict[str, int] = msgspec.field(default_factory=lambda: {"a": 1})
        color: Color = Color.RED
        LIMIT: ClassVar[int] = 4
        def again(self): return Base(self.first_one + self.LIMIT)
        def who(self): return "base"

    class Item(Base, Generic[T], kw_only=True, dict=True, weakref=True, forbid_unknown_fields=True):
        must: T
        may: str = msgspec.field(default="x", name="MAY")
        next: Item | None = None
        def who(self): return f"item of {super().who()}"
        def __post_init__(self): MADE.append(self.may)

    MADE = []

    class Empty(msgspec.Struct): ...

    @dataclasses.dataclass(slots=True)
    class Point:
        x: int
        color: Color = Color.RED

    class Pair(NamedTuple):
        left: int

    class Table(TypedDict):
        a: int

    class Model(pydantic.BaseModel):
        x: int

    app = App()

    @app.route("/item", methods=["POST"])
    @app.backend
    def take(item: Item) -> Base: return item

    @app.route("/point", methods=["POST"])
    @app.backend
    def point(point: Point): return Base, Item, Empty, Color, Point, Pair, Table, Model
    """


def test_data_of_a_script(driver: Driver) -> None:
    """The classes that a body is made into; cloudpickle alone gives Structs without fields."""
    driver.write("main.py", DATA + "\n    import sys\n    from serveit.cluster.shipping import pack\n"
                 "    sys.stdout.buffer.write(msgspec.msgpack.encode(pack(app)))\n")  # fmt: skip
    shipment = msgspec.msgpack.decode(run([sys.executable, "main.py"], driver.folder), type=Shipment)
    there = driver.module("the_same", DATA)
    app = unpack(shipment)
    twice = unpack(shipment)
    take: Any = app.backends["take"].target
    base, item, empty, color, point, pair, table, model = app.backends["point"].load()(None)
    signature = inspect.signature(take, eval_str=True)
    assert signature.parameters["item"].annotation is item
    assert signature.return_annotation is base
    assert twice.backends["point"].load()(None)[1] is item

    assert base(1) == base(1, [], {"a": 1}, color.RED)
    assert base(1).again() == base(5)
    assert base(1).items is not base(1).items
    assert base.__struct_config__.frozen
    for mine, theirs in ((base(1), there.Base(1)), (item(1, must=2), there.Item(1, must=2))):
        assert repr(mine) == repr(theirs)
        assert msgspec.json.encode(mine) == msgspec.json.encode(theirs)
        assert type(mine).__struct_fields__ == type(theirs).__struct_fields__
        assert type(mine).__struct_encode_fields__ == type(theirs).__struct_encode_fields__
        assert type(mine).__match_args__ == type(theirs).__match_args__
        assert (
            inspect.signature(type(mine)).parameters.keys()
            == inspect.signature(type(theirs)).parameters.keys()
        )
    found = item(1, must=2)
    assert "x" in item.__post_init__.__globals__["MADE"]
    assert found.who() == "item of base"
    assert isinstance(found, base)
    assert item[int].__origin__ is item
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.convert({"type": "base", "firstOne": 1, "must": 2, "other": 1}, item)
    assert empty() == empty()

    main: Any = sys.modules["__main__"]
    assert (main.Item, main.Color, main.T) == (item, color, typing.get_type_hints(item)["must"])
    assert pickle.loads(pickle.dumps(base(7))) == base(7)

    assert color.RED.twin() is color.RED
    assert msgspec.convert({"x": 1, "color": 1}, point) == point(1, color.RED)
    assert pair(left=1) == (1,)
    assert msgspec.convert({"a": 1}, table) == {"a": 1}
    assert model(x="3").x == 3


def test_annotations_of_local_classes_are_looked_up_in_their_module(driver: Driver) -> None:
    module = driver.module(
        "models",
        """
        from __future__ import annotations
        import dataclasses
        from typing import Annotated, Optional
        from serveit import App, Query

        Count = Annotated[int, Query("n")]

        @dataclasses.dataclass
        class Part:
            size: int

        def make():
            app = App()

            @dataclasses.dataclass
            class Whole:
                parts: list["Part"]
                one: "Optional['Part']" = None
                note: Annotated[int, "not an expression"] = 0

            Whole.__annotations__["more"] = Optional["Part"]

            @app.backend
            def whole(count: Count) -> None: ...

            @app.backend
            def parts(): return Whole

            return app
        """,
    )
    found = driver.ship(module.make())
    assert "models" in sys.modules
    whole = found.backends["parts"].load()()
    part: Any = driver.load("models").Part
    hints = typing.get_type_hints(whole)
    assert hints == {"parts": list[part], "one": hints["more"], "note": int, "more": part | None}
    signature = inspect.signature(found.backends["whole"].load(), eval_str=True)
    assert signature.parameters["count"].annotation.__origin__ is int


def test_what_a_driver_has_and_its_replica_lacks(driver: Driver) -> None:
    helper = driver.module("helper", "def f(): ...\nclass Thing: ...\n")
    app = App()
    app.backend(helper.Thing, name="thing")
    shipment = pack(app)
    driver.forget()
    (driver.folder / "helper.py").write_text("")
    with pytest.raises(ImportFailed, match=r"module 'helper' \(.*\) was imported anew .* holds no 'Thing'"):
        unpack(shipment)
    driver.forget()
    (driver.folder / "helper.py").unlink()
    with pytest.raises(ImportFailed, match="no module 'helper'"):
        unpack(shipment)


# -- what cannot travel --------------------------------------------------------------------------


def test_too_large_names_what_is_and_whose_it_is() -> None:
    namespace = script(
        """
        import sys
        from serveit import App
        app = App()
        BIG = bytes(50_000_000)
        SMALL = bytes(1_000_000)
        TINY = b"1"
        @app.backend
        def classify(): return BIG, SMALL, TINY, AROUND
        AROUND = [app, classify, lambda: BIG]
        """
    )
    with pytest.raises(ValueError, match=r"^<App backends=\['classify'\]") as caught:
        pack(namespace.app)
    text = str(caught.value)
    assert "too large for that: 48.6 MiB, at most 1 MiB" in text
    assert "the largest in it: the global 'BIG' of the function __main__.classify (47.7 MiB): load it" in text
    assert "in the class's __init__" in text
    assert "serve it as 'module:app'" in text


def test_the_app_is_named_as_the_script_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    app = App()
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "my_app", app, raising=False)
    monkeypatch.setattr(main, "__file__", "/srv/main.py")
    large = bytes(2_000_000)
    app.backend(lambda: large, name="f")
    with pytest.raises(ValueError, match=r"^the app 'my_app' of /srv/main.py cannot be imported"):
        pack(app)


def _closure(app: App) -> None:
    big = bytes(2_000_000)
    if not app:
        later = 1
    app.backend(lambda: (big, later), name="f")


def _default(app: App) -> None:
    app.backend(eval("lambda a=0, *, big=bytes(2_000_000): big"), name="f")


def _argument(app: App) -> None:
    app.backend(threading.local, name="model", init_args=(1, bytes(2_000_000)))


def _keyword(app: App) -> None:
    app.backend(threading.local, name="model", init_kwargs={"data": bytes(2_000_000)})


def _attribute(app: App) -> None:
    @app.backend
    class Model:
        WEIGHTS = bytes(2_000_000)

        def __call__(self) -> int:
            return len(self.WEIGHTS)


def _config(app: App) -> None:
    @app.backend(user_config={"data": bytes(2_000_000)})
    class Model:
        def reconfigure(self, user_config: Any) -> None: ...


@pytest.mark.parametrize(
    ("declare", "name"),
    [
        (
            _closure,
            "the closure variable 'big' of the function tests.test_shipping._closure.<locals>.<lambda>",
        ),
        (_default, "the default 'big' of the function tests.test_shipping.<lambda>"),
        (_argument, r"the argument init_args\[1\] of backend 'model'"),
        (_keyword, r"the argument init_kwargs\['data'\] of backend 'model'"),
        (_attribute, "the attribute 'WEIGHTS' of the class tests.test_shipping._attribute.<locals>.Model"),
        (_config, "the user_config of backend 'Model'"),
    ],
)
def test_whatever_is_too_large_is_named(declare: Callable[[App], None], name: str) -> None:
    app = App()
    declare(app)
    with pytest.raises(ValueError, match=rf"the largest in it: {name} \(1.9 MiB\)"):
        pack(app)


def test_much_code_and_nothing_else() -> None:
    app = script(
        "from serveit import App\napp = App()\n@app.backend\ndef f():\n" + f"    return {'x' * 1_100_000!r}\n"
    ).app
    with pytest.raises(ValueError, match="at most 1 MiB; the largest in it: "):
        pack(app)


class Endless:
    """Its pickle has no end."""

    def __reduce__(self) -> Any:
        return list, (), None, iter(lambda: bytes(100_000), None)


class Slow:
    def __reduce__(self) -> Any:
        return list, (), None, iter(lambda: bytes(1_000), None)


class Unwilling:
    def __reduce__(self) -> Any:
        raise RuntimeError("not me")


def test_a_pickle_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byvalue, "MAX_MEASURED", 2**23)
    app = script("from serveit import App\napp = App()\n@app.backend\ndef f(): return endless\n").app
    app.backends["f"].target.__globals__["endless"] = [Endless()]
    with pytest.raises(ValueError, match=r"over 8\..* MiB.*the global 'endless' .* \(over 8\..* MiB\)"):
        pack(app)


def test_a_slow_pickle_is_cut_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byvalue, "MAX_MEASURING_S", 0.05)
    app = script("from serveit import App\napp = App()\n@app.backend\ndef f(): return slow\n").app
    app.backends["f"].target.__globals__["slow"] = Slow()
    with pytest.raises(ValueError, match=r"over \d+.\d MiB"):
        pack(app)


def test_no_time_to_weigh_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byvalue, "MAX_MEASURING_S", 0.0)
    app = App()
    _closure(app)
    with pytest.raises(ValueError, match="the largest in it: its code: load it"):
        pack(app)


def test_a_lock_in_a_global() -> None:
    app = script(
        """
        import threading
        from serveit import App
        app = App()
        FINE, LOCK = [1], threading.Lock()
        @app.backend
        def careful():
            with LOCK: return FINE
        """
    ).app
    with pytest.raises(TypeError) as caught:
        pack(app)
    text = str(caught.value)
    assert "the global 'LOCK' of the function __main__.careful is of type lock" in text
    assert "cannot be pickled (cannot pickle '_thread.lock' object): make it in the class's __init__" in text
    assert "module:app" in text


@pytest.mark.parametrize("mode", ["r", "rb", "w"])
def test_an_open_file_in_a_closure(tmp_path: Path, mode: str) -> None:
    (tmp_path / "lines.txt").write_text("one\ntwo\n")
    app = App()
    with open(tmp_path / "lines.txt", mode) as lines:
        app.backend(lambda: lines, name="read")
        with pytest.raises(
            TypeError, match=r"the closure variable 'lines' .* cannot be pickled \(cannot pickle"
        ):
            pack(app)


def test_what_refuses_is_named_beside_what_has_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byvalue, "MAX_MEASURED", 2**21)
    namespace: dict[str, Any] = {"__name__": "__main__", "endless": Endless(), "unwilling": Unwilling()}
    exec("def f(one=unwilling): return endless\ndef g(one=endless): return unwilling", namespace)
    refused, large = App(), App()
    refused.backend(namespace["f"], name="f")
    large.backend(namespace["g"], name="g")
    with pytest.raises(TypeError, match="the default 'one' of the function __main__.f .*not me"):
        pack(refused)
    with pytest.raises(ValueError, match="the largest in it: the default 'one' of the function __main__.g"):
        pack(large)


def test_what_belongs_to_no_function() -> None:
    app = App()
    app.secret = threading.Lock()  # type: ignore[attr-defined]
    with pytest.raises(
        TypeError, match=r"cannot be pickled \(TypeError: cannot pickle '_thread.lock' object\)"
    ):
        pack(app)


def test_standard_output_may_be_used() -> None:
    app = script(
        "import sys\nfrom serveit import App\napp = App()\nout = sys.__stdout__\n"
        "@app.backend\ndef f(): return sys.stdout\n"
    ).app
    assert unpack(pack(app)).backends["f"].load()() is sys.stdout


# -- hostile surroundings ------------------------------------------------------------------------


def test_modules_that_load_late_or_are_none_stay_as_they_are(driver: Driver) -> None:
    class Late(types.ModuleType):
        def __getattribute__(self, name: str) -> Any:
            raise AssertionError(f"{name} was asked for")

    sys.modules["late"] = Late("late")
    sys.modules["no_module"] = None  # type: ignore[assignment]
    sys.modules["an_object"] = object()  # type: ignore[assignment]
    try:
        assert pack(driver.module("hello_app", HELLO).app).reference == "hello_app:app"
    finally:
        for name in ("late", "no_module", "an_object"):
            del sys.modules[name]


def test_finders_that_raise_are_passed_over(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    class Finder:
        def find_spec(self, *args: Any) -> Any:
            raise RuntimeError("no")

    app = driver.module("hello_app", HELLO).app
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    assert pack(app).reference == "hello_app:app"


def test_decorators_that_raise_are_no_place_to_look(driver: Driver) -> None:
    module = driver.module(
        "strange",
        """
        class Strange:
            def __init__(self, function): self.function = function
            def __getattr__(self, name): raise RuntimeError(name)

        @Strange
        def f(): return 6
        """,
    )
    app = App()
    app.backend(module.f.function, name="f")
    found = driver.ship(app)
    assert found.backends["f"].load()() == 6


def test_functions_without_a_module_or_globals_of_their_own() -> None:
    app = App()
    namespace: dict[str, Any] = {"__name__": None, "data": [1]}
    exec("def f(): return data", namespace)
    app.backend(namespace["f"], name="f")
    namespace = {"__name__": "json", "data": [2]}
    exec("def g(): return data", namespace)
    app.backend(namespace["g"], name="g")
    found = unpack(pack(app))
    assert found.backends["f"].load()() == [1]
    assert found.backends["g"].load()() == [2]


def test_importing_it_does_not_import_ray() -> None:
    code = "import sys, serveit.cluster.shipping; print('ray' in sys.modules)"
    assert run([sys.executable, "-c", code], Path("/")).strip() == b"False"

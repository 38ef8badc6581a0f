"""From text to an object: modules, files, attributes, and what is said where they are missing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serveit import App, ImportFailed
from serveit.importer import import_from_string, import_module, import_target

ONE = "from serveit import App\napp = App()\nalso = app\nnumber = 3\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    before = dict(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.chdir(tmp_path)
    files = {
        "one_app.py": ONE,
        "two_apps.py": "from serveit import App\nfirst = App()\nsecond = App()\n",
        "no_app.py": "number = 3\n",
        "missing.py": "import nothing_like_it\n",
        "broken.py": "1 / 0\n",
        "json.py": ONE,
        "sys.py": ONE,
        "not-a-name.py": ONE,
        "text.txt": "",
        "inner/package/__init__.py": "",
        "inner/package/module.py": f"from . import other\n{ONE}",
        "inner/package/other.py": "",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    yield tmp_path
    for name in sys.modules.keys() - before.keys():
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)) or name == "inner":
            del sys.modules[name]


@pytest.mark.parametrize(
    "text",
    [
        "one_app:app",
        "one_app",
        "one_app:also",
        "one_app.py",
        "./one_app.py:app",
        "inner/package/module.py",
        "inner.package.module:app",
    ],
)
def test_what_leads_to_an_app(folder: Path, text: str) -> None:
    assert isinstance(import_target(text, App), App)


def test_a_file_in_a_package_has_its_package(folder: Path) -> None:
    import_target("inner/package/module.py", App)
    assert "package.module" in sys.modules and sys.path[0] == str(folder / "inner")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nowhere:app", "there is no module 'nowhere' (looked in "),
        ("nowhere.deep", "there is no module 'nowhere.deep'"),
        ("one_app.deep:app", "there is no module 'one_app.deep'"),
        ("one_app.app", ": write 'one_app:app' if app is what the module one_app holds"),
        ("one_ap:app", "there is no module 'one_ap' (looked in "),
        ("one_ap", "the installed packages): did you mean 'one_app'?"),
        ("one_app/app", "): write 'one_app.py:app'"),
        ("./one_app", "): write 'one_app.py'"),
        ("./one_ap.py", "): did you mean 'one_app.py'?"),
        ("one_app/one_app.py", "): did you mean 'one_app.py'?"),
        ("inner/package/modul.py", "): did you mean 'inner/package/module.py'?"),
        ("x/y/z", "): write 'package.module:app' or 'path/to/file.py:app'"),
        ("nowhere.py", "there is no file 'nowhere.py' (looked in "),
        ("a/b", "there is no file 'a/b'"),
        ("./text.txt", "a module's file is named like 'app.py'"),
        ("not-a-name.py", "'not-a-name.py' can't be imported"),
        ("not-a-name", "'not-a-name' is no module's name"),
        (".one_app", "is no module's name"),
        ("one_app:ap", "module 'one_app' has no attribute 'ap': there is one_app:app, one_app:also"),
        ("no_app:nubmer", "has no attribute 'nubmer': did you mean 'number'?"),
        ("no_app:xyz", "module 'no_app' has no attribute 'xyz'"),
        ("one_app:number", "is of type int, not App: there is one_app:app"),
        ("no_app:number", "'no_app:number' is of type int, not App"),
        ("no_app", "'no_app' holds no App: write `app = serveit.App()` in it"),
        ("no_app:", "'no_app' holds no App"),
        ("two_apps", "does not say which App: there is two_apps:first, two_apps:second"),
        ("one_app:", "does not say which App: there is one_app:app"),
        (":app", "'' is no module's name"),
        ("json.py", "can't be imported as 'json': that is "),
        ("sys.py", "that is built into Python; give the file another name"),
    ],
)
def test_what_leads_nowhere(folder: Path, text: str, said: str) -> None:
    with pytest.raises(ImportFailed) as caught:
        import_target(text, App)
    assert said in str(caught.value)


@pytest.mark.parametrize(("text", "error"), [("missing", ModuleNotFoundError), ("broken", ZeroDivisionError)])
def test_a_module_s_own_errors_are_its_own(folder: Path, text: str, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        import_target(text, App)
    assert not isinstance(caught.value, ImportFailed)


def test_import_strings() -> None:
    assert import_from_string("serveit.config:BackendConfig.merge").__name__ == "merge"
    assert import_module("serveit.config").__name__ == "serveit.config"
    for text in ("serveit.config", "serveit.config:", ":x"):
        with pytest.raises(ImportFailed, match="write 'package.module:attribute'"):
            import_from_string(text)
    with pytest.raises(ImportFailed, match="did you mean 'HTTPOptions'?"):
        import_from_string("serveit.config:HTTPOption")

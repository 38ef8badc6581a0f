"""Environments of the peers: a venv each, with the versions that `peers/requirements-*.txt` pin."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "peers"
STAMP = "installed.txt"


def requirements(name: str) -> Path:
    return REQUIREMENTS / f"requirements-{name}.txt"


def names() -> list[str]:
    found = (re.fullmatch(r"requirements-(\w+)", path.stem) for path in REQUIREMENTS.glob("*.txt"))
    return sorted(match[1] for match in found if match is not None)


def pinned(name: str, package: str) -> str:
    """The version of a package that the environment has."""
    found = re.search(rf"^{re.escape(package)}==(\S+)", requirements(name).read_text("utf-8"), re.MULTILINE)
    if found is None:
        raise LookupError(f"{requirements(name).name} does not pin {package}")
    return found[1]


def python(folder: Path, name: str) -> Path:
    return folder / name / "bin" / "python"


def installed(folder: Path, name: str) -> bool:
    """Whether the environment is whole and has what the requirements say now."""
    stamp = folder / name / STAMP
    return stamp.is_file() and stamp.read_bytes() == requirements(name).read_bytes()


def install(folder: Path, name: str) -> None:
    """Make the environment anew, unless it is there. Bytecode is compiled, so that start-up times are fair.

    Raises:
        subprocess.CalledProcessError: there is no such version here, for this Python or on this system.
    """
    if installed(folder, name):
        return
    target = folder / name
    shutil.rmtree(target, ignore_errors=True)
    listed = ["-r", str(requirements(name))]
    if shutil.which("uv") is not None:
        subprocess.run(["uv", "venv", "--quiet", "--python", sys.executable, str(target)], check=True)
        pip = ["uv", "pip", "install", "--quiet", "--python", str(python(folder, name)), "--compile-bytecode"]
    else:
        subprocess.run([sys.executable, "-m", "venv", str(target)], check=True)
        pip = [str(python(folder, name)), "-m", "pip", "install", "--quiet", "--compile"]
    subprocess.run([*pip, *listed], check=True)
    shutil.copyfile(requirements(name), target / STAMP)

"""What all benchmarks share: the command line, what machine it was, tables, and where results are kept."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"
PACKAGES = ("serveit", "ray", "starlette", "uvicorn", "uvloop", "httptools", "msgspec")


@dataclass(frozen=True)
class Report:
    """What a run came to.

    Attributes:
        title: the question.
        command: how it was run.
        notes: what has to be known to read the figures, a paragraph each.
        head: the table's first line.
        rows: the table.
        measured: every single figure, for `--json`.
    """

    title: str
    command: str
    notes: Sequence[str]
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    measured: Any

    def table(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)

    def markdown(self) -> str:
        machine = "; ".join(f"{name} {value}" for name, value in describe_machine().items())
        parts = [f"# {self.title}", f"`{self.command}`", machine + ".", self.table(), *self.notes]
        return "\n\n".join(parts) + "\n"

    def publish(self, name: str, options: argparse.Namespace) -> None:
        """Show it, and keep it where the command line says so."""
        self.show(options)
        if options.save:
            self._save(name)

    def show(self, options: argparse.Namespace) -> None:
        """Print it, and write every figure where the command line says so."""
        print(self.markdown())
        if options.json is not None:
            document = {"command": self.command, "machine": describe_machine(), "measured": self.measured}
            options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    def _save(self, name: str) -> None:
        """Keep it as a file of its own, and show its table in the README between this benchmark's marks."""
        target = RESULTS / f"{date.today().isoformat()}-{name}.md"
        target.write_text(self.markdown(), encoding="utf-8")
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = README.read_text(encoding="utf-8").partition(begin)
        after = rest.partition(end)[2]
        shown = f"From [{target.name}](results/{target.name}):\n\n{self.table()}"
        README.write_text(f"{before}{begin}\n{shown}\n{end}{after}", encoding="utf-8")
        print(f"written to benchmarks/results/{target.name} and benchmarks/README.md")


def command_line(description: str | None, *, seconds: int, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark takes.

    Args:
        description: a module's docstring; its first sentence is shown.
        seconds: default of `--seconds`.
        rounds: default of `--rounds`.
    """
    parser = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    parser.add_argument("--seconds", type=_positive, default=seconds, help="per measurement (%(default)s)")
    parser.add_argument("--rounds", type=_positive, default=rounds, help="medians are of these (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single figure there")
    parser.add_argument(
        "--save", action="store_true", help="keep the table in benchmarks/results/ and README.md"
    )
    return parser


def command_of(script: str, options: argparse.Namespace) -> str:
    return f"python benchmarks/{script} --seconds {options.seconds} --rounds {options.rounds}"


def describe_machine() -> Mapping[str, str]:
    """What the figures depend on; nothing that names the machine itself."""
    facts = {
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "CPU": _cpu_model(),
        "system": platform.system(),
        "Python": platform.python_version(),
    }
    return facts | {package: version(package) for package in PACKAGES}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value

"""HAProxy and nginx in front of servers of a test, with the configurations of docs/load-balancer.md."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "load-balancer.md").read_text(encoding="utf-8")
NODES = ("10.0.0.11:8000", "10.0.0.12:8000", "10.0.0.13:8000")
"""The servers of the page's configurations."""
START_S = 10.0

PLACES = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
HAPROXY, NGINX = (shutil.which(name, path=PLACES) for name in ("haproxy", "nginx"))
needs_haproxy = pytest.mark.skipif(
    HAPROXY is None, reason="haproxy is missing: the Debian package haproxy has it"
)
needs_nginx = pytest.mark.skipif(
    NGINX is None, reason="nginx is missing: the Debian package nginx-light has it"
)


def blocks(language: str) -> list[str]:
    """The page's fenced blocks of a language."""
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return found


class Balancer(NamedTuple):
    """A running load balancer.

    Attributes:
        url: where it answers.
        log: what it says.
        admin: HAProxy's socket for commands.
    """

    url: str
    log: Path
    admin: Path

    def sent_to(self) -> dict[str, str]:
        """By the `id` in a request's query, the server that HAProxy gave it to; "<NOSRV>" for none."""
        lines = self.log.read_text(encoding="utf-8", errors="replace")
        return {id: server for server, id in re.findall(r" \w+/(\S+) .*?[?&]id=([\w-]+)", lines)}

    def command(self, line: str) -> str:
        """What HAProxy answers to a command."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self.admin))
            sock.sendall(f"{line}\n".encode())
            answer = b""
            while octets := sock.recv(65_536):
                answer += octets
        return answer.decode()


@contextlib.contextmanager
def haproxy(
    folder: Path, servers: Sequence[str], changes: Mapping[str, str] | None = None
) -> Iterator[Balancer]:
    """HAProxy in front of three servers, "host:port" each, with further changes to the page's text."""
    admin = folder / "admin.sock"
    changes = {
        **dict(zip(NODES, servers, strict=True)),
        "/run/haproxy/admin.sock": str(admin),
        **(changes or {}),
    }
    with _running("haproxy", [HAPROXY or "", "-db", "-f"], folder, ":80", changes) as (url, log):
        yield Balancer(url, log, admin)


@contextlib.contextmanager
def nginx(folder: Path, servers: Sequence[str]) -> Iterator[Balancer]:
    """nginx in front of three servers, as the main file of its own that needs no privileges."""
    temporary = " ".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    changes = dict(zip(NODES, servers, strict=True))
    around = (
        f"daemon off; pid {folder}/nginx.pid; error_log stderr warn; events {{}}\n"
        f"http {{ access_log off; {temporary}\n%s}}\n"
    )
    command = [NGINX or "", "-e", "stderr", "-p", str(folder), "-c"]
    with _running("nginx", command, folder, "80", changes, around) as (url, log):
        yield Balancer(url, log, folder)


@contextlib.contextmanager
def _running(
    language: str, command: list[str], folder: Path, port: str, changes: Mapping[str, str], around: str = "%s"
) -> Iterator[tuple[str, Path]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    directive = {"haproxy": "bind", "nginx": "listen"}[language]
    text = blocks(language)[0]
    for there, here in {f"{directive} {port}": f"{directive} {address}", **changes}.items():
        assert there in text, f"the page's configuration for {language} has no {there!r}"
        text = text.replace(there, here)
    file, log = folder / f"{language}.cfg", folder / f"{language}.log"
    file.write_text(around.replace("%s", text), encoding="utf-8")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, str(file)], cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        _wait_for(address, process, log)
        yield f"http://{address}", log
    finally:
        process.terminate()
        process.wait()


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    host, port = address.split(":")
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)

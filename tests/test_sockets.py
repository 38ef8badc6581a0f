"""Unix sockets that are nobody else's."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serveit.wire.sockets import bind_private, check_peer, peer_uid


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:  # short, unlike pytest's
        yield Path(path)


def test_a_socket_file_is_for_its_owner_only(directory: Path) -> None:
    path = directory / "deep" / "er" / "s"
    with bind_private(str(path)) as sock:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        with socket.socket(socket.AF_UNIX) as other:
            assert other.connect_ex(str(path)) == errno.ECONNREFUSED, "nobody listens yet"
        assert sock.getsockname() == str(path)


def test_the_working_directory_counts_too(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory)
    bind_private("s").close()
    directory.chmod(0o755)
    with pytest.raises(PermissionError, match=r"^\. is to hold sockets and has mode 755"):
        bind_private("t")


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o777])
def test_a_directory_that_others_can_enter_is_refused(directory: Path, mode: int) -> None:
    (directory / "open").mkdir()
    (directory / "open").chmod(mode)
    with pytest.raises(PermissionError, match=rf"{directory}/open .* has mode {mode:o}; only 700"):
        bind_private(f"{directory}/open/s")


def test_a_link_and_a_file_are_no_directory(directory: Path) -> None:
    (directory / "real").mkdir(0o700)
    (directory / "link").symlink_to(directory / "real")
    (directory / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(PermissionError, match=f"{directory}/{name} .* is no directory"):
            bind_private(f"{directory}/{name}/s")


def test_a_directory_of_somebody_else_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: directory.stat().st_uid + 1)
    with pytest.raises(PermissionError, match=f"{directory} .* belongs to uid {directory.stat().st_uid}"):
        bind_private(f"{directory}/s")


def test_a_dead_processs_socket_is_replaced(directory: Path) -> None:
    path = str(directory / "s")
    bind_private(path).close()
    assert os.path.exists(path)
    with bind_private(path) as sock:
        sock.listen()
        with socket.socket(socket.AF_UNIX) as other:
            assert other.connect_ex(path) == 0


def test_a_live_processs_socket_is_not(directory: Path) -> None:
    path = str(directory / "s")
    with bind_private(path) as sock:
        sock.listen()
        with pytest.raises(OSError, match=f"Address already in use: unix:{path}"):
            bind_private(path)
        with socket.socket(socket.AF_UNIX) as other:
            assert other.connect_ex(path) == 0


def test_what_is_no_socket_is_left_alone(directory: Path) -> None:
    (directory / "s").write_text("precious")
    with pytest.raises(OSError, match=f"Address already in use: unix:{directory}/s"):
        bind_private(f"{directory}/s")
    assert (directory / "s").read_text() == "precious"


def test_a_peer_of_the_same_user_is_welcome_and_another_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        assert peer_uid(one) == os.geteuid()
        check_peer(one)
        monkeypatch.setattr(os, "geteuid", lambda: 54321)
        with pytest.raises(PermissionError, match=rf"runs as uid {os.getuid()}, this one as 54321"):
            check_peer(one)


class FakeSocket:
    """Of a platform that has LOCAL_PEERCRED."""

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        assert (level, option) == (0, 1)
        return struct.pack("2Ih", 0, 501, 1).ljust(size, b"\0")


def test_the_peer_is_found_on_every_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    fake: Any = FakeSocket()
    monkeypatch.delattr(socket, "SO_PEERCRED", raising=False)
    monkeypatch.setattr(socket, "LOCAL_PEERCRED", 1, raising=False)
    assert peer_uid(fake) == 501
    monkeypatch.delattr(socket, "LOCAL_PEERCRED")
    assert peer_uid(fake) is None
    check_peer(fake)

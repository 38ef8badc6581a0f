from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from serveit.cluster import session
from serveit.cluster.reaper import VARIABLE
from serveit.cluster.session import open_session

GCS = "10.0.0.1:6379"
OLD = 1_000_000.0


class FakeRay:
    """What `ray.init` was called with, and in which environment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.connected = False
        self.calls: list[dict[str, Any]] = []
        self.environment: dict[str, str] = {}
        self.refuses: Exception | None = None
        self.name = "session_2026-11-23_02-07-47_123456_7890"
        monkeypatch.setattr(session, "find_cluster", lambda address: address)
        self.said: list[str] = []
        monkeypatch.setattr(session, "Reaper", lambda: FakeReaper(self.said))
        monkeypatch.setattr(ray, "init", self.init)
        monkeypatch.setattr(ray, "shutdown", self.shutdown)
        monkeypatch.setattr(ray, "is_initialized", lambda: self.connected)
        monkeypatch.setattr(ray, "get_runtime_context", self.context)

    def init(self, **options: Any) -> None:
        self.said.append("Ray is started")
        self.calls.append(options)
        self.environment = dict(os.environ)
        if self.refuses is not None:
            raise self.refuses
        self.connected = True

    def shutdown(self) -> None:
        self.said.append("Ray is shut down")
        self.connected = False

    def context(self) -> Any:
        assert self.connected
        return SimpleNamespace(gcs_address=GCS, get_session_name=lambda: self.name)


class FakeReaper:
    """What it was told, and when."""

    marker = "marker"

    def __init__(self, said: list[str]) -> None:
        self._said = said

    def start(self) -> None:
        self._said.append("the reaper is started")

    def remove(self, folder: str) -> None:
        self._said.append(f"the reaper removes {Path(folder).name}")

    def close(self) -> None:
        self._said.append("the reaper is closed")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    monkeypatch.setattr(session, "_connection", None)
    return FakeRay(monkeypatch)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a folder for temporary files of the test's own."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where sockets are kept; short, since their paths may not be long."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        kept = Path(folder) / f"serveit-{os.getuid()}"
        kept.mkdir()
        yield kept


@pytest.fixture(autouse=True)
def no_others(sockets: Path) -> None:
    """Sweeps look at the test's own folder only."""


def bind(path: Path, *, age_s: float = OLD) -> socket.socket:
    path.parent.mkdir(exist_ok=True)
    bound = socket.socket(socket.AF_UNIX)
    bound.bind(str(path))
    age(path, age_s)
    return bound


def age(path: Path, age_s: float = OLD) -> None:
    then = path.lstat().st_mtime - age_s
    os.utime(path, (then, then))


class TestEmbedded:
    def test_is_started_with_what_is_needed(self, fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        opened = open_session()
        assert opened.embedded
        assert repr(opened) == "<Session embedded>"
        [options] = fake.calls
        assert options["address"] == "local"
        assert options["include_dashboard"] is False
        assert "PYTHONDONTWRITEBYTECODE" not in fake.environment
        assert fake.environment["RAY_USAGE_STATS_ENABLED"] == "0"
        assert fake.environment[VARIABLE] == "marker"
        assert os.environ["PYTHONDONTWRITEBYTECODE"] == "1"
        assert not os.environ.keys() & {"RAY_USAGE_STATS_ENABLED", VARIABLE}

    def test_what_the_user_set_stays(self, fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
        monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        open_session()
        assert fake.environment["RAY_USAGE_STATS_ENABLED"] == "1"
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"
        assert "PYTHONDONTWRITEBYTECODE" not in os.environ

    def test_ends_with_its_session_and_its_sockets(self, fake: FakeRay, sockets: Path) -> None:
        opened = open_session()
        folder = Path(opened.folder)
        assert folder.parent == sockets
        bind(folder / "1.sock", age_s=0).close()
        opened.close()
        assert not fake.connected
        assert not folder.exists()
        assert fake.said == [
            "the reaper is started",
            "Ray is started",
            f"the reaper removes {folder.name}",
            "Ray is shut down",
            "the reaper is closed",
        ]
        opened.close()
        assert fake.said[-2:] == ["Ray is shut down", "the reaper is closed"]

    def test_one_that_does_not_start_leaves_the_environment(
        self, fake: FakeRay, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        fake.refuses = RuntimeError("no memory")
        with pytest.raises(RuntimeError, match="no memory"):
            open_session()
        assert os.environ["PYTHONDONTWRITEBYTECODE"] == "1"
        assert VARIABLE not in os.environ
        assert fake.said == ["the reaper is started", "Ray is started", "the reaper is closed"]

    def test_of_a_driver_that_another_one_started(
        self, fake: FakeRay, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(VARIABLE, "others")
        open_session()
        assert fake.environment[VARIABLE] == "marker" and os.environ[VARIABLE] == "others"

    def test_folders_are_short_and_of_one_cluster_each(self, fake: FakeRay) -> None:
        opened = open_session()
        first = opened.folder
        fake.name = "session_2026-11-23_02-07-47_123456_7891"
        assert opened.folder != first
        assert len(Path(first).name) <= 24


class TestToken:
    def test_nobody_else_can_read_it(self, fake: FakeRay, home: Path) -> None:
        open_session()
        path = home / ".ray" / "auth_token"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert len(path.read_text()) == 64

    def test_one_that_is_there_stays(self, fake: FakeRay, home: Path) -> None:
        path = home / ".ray" / "auth_token"
        path.parent.mkdir(parents=True)
        path.write_text("mine")
        open_session()
        assert path.read_text() == "mine"

    @pytest.mark.parametrize("name", ["RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
    def test_who_decides_otherwise_gets_none(
        self, name: str, fake: FakeRay, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(name, "x")
        open_session()
        assert not (home / ".ray").exists()

    def test_a_home_that_cannot_be_written_is_rays_to_report(self, fake: FakeRay, home: Path) -> None:
        home.write_text("not a directory")
        assert open_session().embedded


class TestOthers:
    def test_the_one_that_is_connected_is_taken_and_left(self, fake: FakeRay) -> None:
        fake.connected = True
        for address in (None, "auto", GCS):
            opened = open_session(address)
            assert repr(opened) == "<Session joined>"
            opened.close()
        assert fake.connected
        assert fake.said == []

    def test_two_at_once_are_refused(self, fake: FakeRay) -> None:
        fake.connected = True
        with pytest.raises(RuntimeError, match=f"cluster at {GCS} already, not to 'else:1'"):
            open_session("else:1")

    @pytest.mark.parametrize("form", ["{}:{}", "ray://{}:{}"])
    def test_one_is_joined_and_left(self, fake: FakeRay, home: Path, form: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as gcs:
            address = form.format(*gcs.getsockname())
            opened = open_session(address)
        assert fake.calls[0]["address"] == address
        assert not opened.embedded
        assert not (home / ".ray").exists()
        opened.close()
        assert not fake.connected
        assert fake.said == ["Ray is started", "Ray is shut down"]

    def test_one_is_joined_twice_by_the_same_name(self, fake: FakeRay) -> None:
        """Which is not Ray's: of 127.0.0.1 it makes the machine's address on the network."""
        sessions = [open_session("localhost:6379"), open_session("localhost:6379"), open_session(GCS)]
        assert fake.said == ["Ray is started"]
        with pytest.raises(RuntimeError, match="already, not to 'else:1'"):
            open_session("else:1")
        for opened in sessions:
            assert fake.connected
            opened.close()
        assert not fake.connected

    @pytest.mark.parametrize("error", [ConnectionError("nobody there"), ValueError("no such form")])
    def test_none_at_the_address(self, error: Exception, fake: FakeRay) -> None:
        fake.refuses = error
        with pytest.raises(ConnectionError, match="no Ray cluster at 'auto': no.*ray start --head"):
            open_session("auto")

    def test_where_none_is_found_ray_is_not_asked(
        self, fake: FakeRay, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def find_none(address: str) -> str:
            raise ConnectionError("none at all")

        monkeypatch.setattr(session, "find_cluster", find_none)
        with pytest.raises(ConnectionError, match="^none at all$"):
            open_session("127.0.0.1:1")
        assert fake.calls == []


class TestSweep:
    def test_the_dead_go_the_living_stay(self, fake: FakeRay, sockets: Path) -> None:
        bind(sockets / "dead" / "1.sock").close()
        age(sockets / "dead")
        bind(sockets / "both" / "1.sock").close()
        with bind(sockets / "both" / "2.sock") as living:
            living.listen()
            (sockets / "both" / "note.txt").write_text("a file")
            age(sockets / "both")
            open_session()
            assert not (sockets / "dead").exists()
            assert sorted(path.name for path in (sockets / "both").iterdir()) == ["2.sock", "note.txt"]

    def test_who_is_just_starting_is_left_alone(self, fake: FakeRay, sockets: Path) -> None:
        (sockets / "empty").mkdir()
        with bind(sockets / "bound" / "1.sock", age_s=1.0):
            open_session()
            assert (sockets / "empty").exists()
            assert (sockets / "bound" / "1.sock").exists()

    def test_one_with_a_full_backlog_lives(self, sockets: Path) -> None:
        with bind(sockets / "busy" / "1.sock") as busy:
            busy.listen(0)
            waiting = [socket.socket(socket.AF_UNIX) for _ in range(4)]
            try:
                for client in waiting:
                    client.setblocking(False)
                    client.connect_ex(str(sockets / "busy" / "1.sock"))
                session._sweep()
                assert (sockets / "busy" / "1.sock").exists()
            finally:
                for client in waiting:
                    client.close()

    def test_no_folder_is_no_trouble(self, fake: FakeRay, sockets: Path) -> None:
        sockets.rmdir()
        assert open_session().embedded


def test_the_address_of_this_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.1.2.3")
    assert session.node_address() == "10.1.2.3"


class TestSeveral:
    def test_the_last_one_shuts_it_down(self, fake: FakeRay) -> None:
        first = open_session()
        second = open_session()
        assert first.embedded and second.embedded
        assert not first.is_last
        first.close()
        assert fake.connected and second.is_last
        first.close()
        assert fake.connected
        second.close()
        assert not fake.connected
        assert fake.said[-2:] == ["Ray is shut down", "the reaper is closed"]

    def test_one_after_the_other(self, fake: FakeRay) -> None:
        for _ in range(2):
            opened = open_session()
            assert opened.is_last
            opened.close()
        assert fake.said.count("the reaper is started") == fake.said.count("the reaper is closed") == 2

    def test_one_that_the_user_has_shut_down(self, fake: FakeRay) -> None:
        first = open_session()
        ray.shutdown()
        fake.name += "1"
        second = open_session()
        first.close()
        assert fake.connected and fake.said[-1] == "the reaper is closed"
        assert second.is_last
        second.close()
        assert not fake.connected

    def test_one_that_the_user_has_replaced(self, fake: FakeRay) -> None:
        first = open_session()
        ray.shutdown()
        fake.name += "1"
        ray.init()
        assert not open_session().embedded
        first.close()
        assert fake.connected

    def test_what_the_user_started_is_the_users(self, fake: FakeRay) -> None:
        fake.connected = True
        one, other = open_session(), open_session()
        assert not (one.embedded or one.is_last)
        one.close()
        other.close()
        assert fake.connected

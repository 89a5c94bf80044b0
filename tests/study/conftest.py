"""The study on each kind of database, PostgreSQL a server of the tests' own."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sql

from rewardiv.study.build import build_study
from rewardiv.study.design import StudyConfig, read_study
from rewardiv.study.storage import Store, open_engine
from study.stage import PROMPTS, Stage, sample_folder


@pytest.fixture(scope="session")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of three methods, two prompts, two sets each: 12 pairs."""
    place = tmp_path_factory.mktemp("study")
    folders = [sample_folder(place / str(k), prompt) for k, prompt in enumerate(PROMPTS)]
    build_study(folders, place / "study", StudyConfig(num_ballots=9, check_every=4))
    return place / "study"


class Server:
    """A PostgreSQL server of our own on a socket; run as another user where we are root, which it refuses.

    A database of a test is a schema. Without fsync it survives the end of its processes, though not that of the machine.
    """

    def __init__(self, programs: Path, place: Path) -> None:
        self.programs, self.place = programs, place
        user = next((name for name in ("postgres", "nobody") if _is_user(name)), "")
        self.prefix = ["runuser", "-u", user, "--"] if os.geteuid() == 0 else []
        if self.prefix:
            shutil.chown(place, user)
        self.run("initdb", "--pgdata", place / "data", "--username", "study", "--auth", "trust", "--no-sync")
        self.start()

    def run(self, program: str, *arguments: object) -> None:
        subprocess.run([*self.prefix, str(self.programs / program), *map(str, arguments)], cwd=self.place, check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60)

    def start(self) -> None:
        self.run("pg_ctl", "start", "--wait", "--pgdata", self.place / "data", "--log", self.place / "log",
                 "--options", f"-c listen_addresses='' -c fsync=off -c unix_socket_directories={self.place}")

    def stop(self, mode: str) -> None:
        self.run("pg_ctl", "stop", "--mode", mode, "--pgdata", self.place / "data")

    def url(self, schema: str) -> str:
        return f"postgresql://study@/postgres?host={self.place}&options=-csearch_path%3D{schema}"


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A running PostgreSQL; skipped where it isn't installed."""
    programs = [path.parent for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))]
    if not programs:
        pytest.skip("PostgreSQL is not installed")
    place = Path(tempfile.mkdtemp(prefix="pg"))
    server = Server(programs[-1], place)
    yield server
    server.stop("immediate")
    shutil.rmtree(place)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'votes.db'}"
    server, name = request.getfixturevalue("server"), f"study_{uuid.uuid4().hex}"
    engine = open_engine(server.url("public"))
    with engine.begin() as connection:
        connection.execute(sql.text(f"CREATE SCHEMA {name}"))
    engine.dispose()
    return server.url(name)


@pytest.fixture
def stage(study_folder: Path, url: str) -> Iterator[Stage]:
    """The study on each kind of database."""
    yield from _staged(study_folder, url)


@pytest.fixture
def on_sqlite(study_folder: Path, tmp_path: Path) -> Iterator[Stage]:
    """The study on SQLite alone, where the kind of database doesn't matter."""
    yield from _staged(study_folder, f"sqlite:///{tmp_path / 'votes.db'}")


def _staged(folder: Path, url: str) -> Iterator[Stage]:
    store = Store(url)
    yield Stage(read_study(folder), store, folder)
    store.close()


def _is_user(name: str) -> bool:
    return name in {user.pw_name for user in pwd.getpwall()}

"""The study on each kind of database, PostgreSQL a server of the tests' own."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sql

from rewardiv.bench.study.cluster import PLACES, Cluster, running
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


@pytest.fixture(scope="session")
def server() -> Iterator[Cluster]:
    """A running PostgreSQL, where a test's database is a schema; skipped where it isn't installed."""
    if not any(Path(PLACES).glob("*/bin/initdb")):
        pytest.skip("PostgreSQL is not installed")
    with running(flush=False) as cluster:
        yield cluster


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'votes.db'}"
    server, name = request.getfixturevalue("server"), f"study_{uuid.uuid4().hex}"
    engine = open_engine(server.url)
    with engine.begin() as connection:
        connection.execute(sql.text(f"CREATE SCHEMA {name}"))
    engine.dispose()
    return f"{server.url}&options=-csearch_path%3D{name}"


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

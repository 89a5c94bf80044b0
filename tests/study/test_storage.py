"""Laws of keeping votes: the schema grows by steps, nothing changes afterwards, one vote a ballot, what was kept survives."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sql
from huggingface_hub import CommitScheduler, HfApi

from rewardiv.bench.study.cluster import Cluster
from rewardiv.errors import UserError
from rewardiv.study.design import read_study
from rewardiv.study.journal import PRIVATE, Journal, open_on_hub, open_store, restore
from rewardiv.study.results import results
from rewardiv.study.service import Refused
from rewardiv.study.storage import (
    BALLOTS,
    MIGRATIONS,
    PATIENCE,
    RATERS,
    STUDIES,
    TABLES,
    TOKENS,
    VOTES,
    WITHDRAWALS,
    Store,
    Unavailable,
    database_url,
    migrate,
    open_engine,
)
from study.stage import Stage

ROOT = Path(__file__).resolve().parents[2]
RATER = {"id": "r", "study_id": "s", "token_hash": "t", "withdrawal_hash": "w", "address_hash": "a", "consent_hash": "c",
         "version": "1", "seed": 2**62, "created_at": 1.5}
BALLOT = {"id": "b", "study_id": "s", "rater_id": "r", "kind": "vote", "question": "fit", "item": "i", "left_image": "x",
          "right_image": "y", "expected": None, "position": 0, "swapped": 1, "prepared_at": 1_700_000_000.123456}
VOTE = {"ballot_id": "b", "rater_id": "r", "study_id": "s", "answer": "left", "address_hash": "a", "version": "1",
        "cast_at": 1_700_000_001.25, "server_s": 1.0, "shown_s": 0.9, "window_width": 800, "window_height": 600}
KILLED = """
import json, os, signal, sys
from rewardiv.study.storage import BALLOTS, Store
store, ballot, vote = Store(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
for k in range(20):
    store.add(BALLOTS, ballot | {"id": f"b{k}", "position": k + 1, "item": str(k)})
    store.add_vote(vote | {"ballot_id": f"b{k}"})
    print(f"b{k}", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def fill(store: Store) -> None:
    store.add(STUDIES, {"id": "s", "design": "{}", "created_at": 1.0})
    store.add(RATERS, RATER)
    store.add(BALLOTS, BALLOT)


def test_the_schema_is_brought_up_to_date_once_and_keeps_its_rows(url: str) -> None:
    engine = open_engine(url)
    assert migrate(engine) == len(MIGRATIONS) and migrate(engine) == 0
    inspector = sql.inspect(engine)
    assert {*inspector.get_table_names()} == {*TABLES, "migrations"}
    for name, table in TABLES.items():
        assert {column["name"] for column in inspector.get_columns(name)} == {column.name for column in table.c}
    store = Store(url)
    fill(store)
    later = (*MIGRATIONS, ("ALTER TABLE votes ADD COLUMN note TEXT", "CREATE TABLE notes (id TEXT PRIMARY KEY)"))
    broken = (*MIGRATIONS, ("CREATE TABLE half (id TEXT)", "CREATE TABLE half (id TEXT)"))
    with pytest.raises(sql.exc.DBAPIError):
        migrate(engine, broken)
    assert "half" not in sql.inspect(engine).get_table_names()
    assert migrate(engine, later) == 1 and dict(store.one(RATERS)) == RATER
    with pytest.raises(sql.exc.DBAPIError, match="append-only"), engine.begin() as connection:
        connection.execute(sql.text("INSERT INTO notes VALUES ('n')"))
        connection.execute(sql.text("DELETE FROM notes"))
    with pytest.raises(UserError, match="update it"):
        Store(url)
    store.close()
    engine.dispose()


def test_votes_in_the_first_schema_are_there_and_their_raters_go_on(url: str, study_folder: Path, tmp_path: Path) -> None:
    first = Stage(read_study(study_folder), Store(f"sqlite:///{tmp_path / 'source.db'}"), study_folder)
    ticket, _ = first.session(first.attentive(), num=3)
    gone, _ = first.session(first.attentive(), num=2)
    first.service.withdraw(gone.withdrawal_code)
    engine = open_engine(url)
    assert migrate(engine, MIGRATIONS[:1]) == 1
    with engine.begin() as connection:
        for table in TABLES.values():
            connection.execute(table.insert(), [dict(row) for row in first.store.all(table)])
    engine.dispose()
    now = Stage(first.study, Store(url), study_folder, first.clock)
    assert migrate(now.store.engine) == 0 and results(now.study, now.store) == results(first.study, first.store)
    assert now.service.next_ballot(ticket.rater_token).number == 4
    _, seen = now.session(now.attentive(), ticket=ticket)
    assert now.store.count(VOTES) == 3 + 2 + len(seen) and now.service.next_ballot(ticket.rater_token) is None
    for stage in (first, now):
        stage.store.close()


def test_nothing_that_was_kept_can_be_changed(url: str) -> None:
    store = Store(url)
    fill(store)
    assert store.add_vote(VOTE) == VOTE
    changes = [table.update().values({next(iter(table.c)): "z"}) for table in TABLES.values()]
    changes += [table.delete() for table in TABLES.values()]
    changes += [sql.text("UPDATE migrations SET version = 7"), sql.text("UPDATE votes SET answer = 'right'")]
    changes += [sql.text("TRUNCATE votes")] * (store.engine.dialect.name == "postgresql")
    empty = {"tokens", "withdrawals"} if store.engine.dialect.name == "sqlite" else set()  # there a trigger fires by row
    for change in changes:
        if getattr(getattr(change, "table", None), "name", "") in empty:
            continue
        with pytest.raises(sql.exc.DBAPIError, match="append-only"), store.engine.begin() as connection:
            connection.execute(change)
    assert dict(store.one(VOTES)) == VOTE and dict(store.one(BALLOTS)) == BALLOT and dict(store.one(RATERS)) == RATER
    store.close()


def test_the_database_itself_refuses_what_must_not_be(url: str) -> None:
    store = Store(url)
    fill(store)
    store.add(RATERS, RATER | {"id": "r2", "token_hash": "t2", "withdrawal_hash": "w2"})
    for wrong in ({"ballot_id": "none"}, {"rater_id": "r2"}, {"study_id": "other"}, {"answer": "both"}):
        with pytest.raises(ValueError, match="fits no ballot"):
            store.add_vote(VOTE | wrong)
    taken = BALLOT | {"id": "b2", "position": 1}
    for row in (taken, BALLOT | {"id": "b2", "item": "j"}, taken | {"kind": "odd"}, taken | {"item": "j", "rater_id": "none"}):
        assert not store.add(BALLOTS, row)
    assert store.add(BALLOTS, taken | {"kind": "repeat"})
    with ThreadPoolExecutor(8) as threads:
        votes = [VOTE | {"answer": ("left", "right")[k % 2], "cast_at": float(k)} for k in range(16)]
        kept = list(threads.map(store.add_vote, votes))
    assert store.count(VOTES) == 1 and len({row["cast_at"] for row in kept}) == 1
    store.close()


def test_sqlite_writes_through_and_reads_without_waiting(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'votes.db'}")
    levels: dict[str, int] = {}

    @sql.event.listens_for(store.engine, "before_cursor_execute")
    def note(connection: sql.Connection, cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("INSERT INTO"):
            levels[statement.split()[2]] = connection.connection.execute("PRAGMA synchronous").fetchone()[0]

    fill(store)
    store.add(TOKENS, {"hash": "h", "ballot_id": "b", "issued_at": 1.0})
    store.add(WITHDRAWALS, {"rater_id": "r", "withdrawn_at": 1.0})
    with store.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
    full, normal = 2, 1
    assert levels == {"studies": full, "raters": full, "withdrawals": full, "ballots": normal, "tokens": normal}
    with store.engine.begin() as writer:
        writer.execute(VOTES.insert().values(**VOTE))
        assert store.count(VOTES) == 0  # while another writes
    assert store.count(VOTES) == 1
    store.add(BALLOTS, BALLOT | {"id": "b2", "kind": "check", "position": 1})
    store.add_vote(VOTE | {"ballot_id": "b2"})
    assert levels["votes"] == full
    store.close()


def test_what_was_acknowledged_survives_a_killed_server(url: str) -> None:
    store = Store(url)
    fill(store)
    command = [sys.executable, "-c", KILLED, url, json.dumps(BALLOT), json.dumps(VOTE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {row["ballot_id"] for row in store.all(VOTES)} == {*done.stdout.split()} and store.count(VOTES) == 20
    store.close()


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_what_was_acknowledged_survives_a_killed_postgresql(stage: Stage, server: Cluster) -> None:
    ticket, _ = stage.session(stage.attentive(), num=4)
    server.stop()  # no checkpoint, no farewell
    with pytest.raises(Unavailable, match="try again"):
        stage.service.next_ballot(ticket.rater_token)
    server.start()
    assert stage.store.count(VOTES) == 4 and stage.service.next_ballot(ticket.rater_token).number == 5


def test_a_full_disk_is_said_and_what_was_kept_stays(on_sqlite: Stage) -> None:
    ballot = on_sqlite.service.next_ballot(on_sqlite.join().rater_token)

    def pages(limit: int) -> None:
        with on_sqlite.store.engine.connect() as connection:  # the only one there is: the next call has it too
            connection.exec_driver_sql(f"PRAGMA max_page_count = {limit}")

    pages(1)
    kept = 1
    with pytest.raises(Unavailable, match="try again"):
        for k in range(500):
            on_sqlite.join(str(k))
            kept += 1
    assert on_sqlite.store.count(RATERS) == kept and on_sqlite.store.count(VOTES) == 0
    pages(10**6)
    on_sqlite.cast(ballot, "left")
    assert on_sqlite.store.count(VOTES) == 1


def test_urls_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REWARDIV_DATABASE_URL", raising=False)
    assert database_url(tmp_path) == f"sqlite:///{tmp_path / 'votes.db'}"
    store = open_store(tmp_path)
    assert store.engine.dialect.name == "sqlite" and (tmp_path / "votes.db").exists()
    store.close()
    for bad, words in (("nonsense", "no database URL"), ("mysql://a/b", "sqlite and postgresql are known"),
                       ("postgresql://nobody:hidden@localhost:1/none", "cannot use the database"),
                       (f"sqlite:///{tmp_path}/no/such/folder/x.db", "cannot use the database")):
        monkeypatch.setenv("REWARDIV_DATABASE_URL", bad)
        with pytest.raises(UserError, match=words) as caught:
            open_store(tmp_path)
        assert "hidden" not in str(caught.value)


def test_a_postgresql_that_does_not_answer_is_not_waited_for_long() -> None:
    plain, own = open_engine("postgresql://somewhere/votes"), open_engine("postgresql://somewhere/votes?connect_timeout=60")
    assert plain.url.query == PATIENCE and own.url.query == PATIENCE | {"connect_timeout": "60"}


def test_a_journal_rebuilds_the_votes(on_sqlite: Stage, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    on_sqlite.store.added = journal.append
    on_sqlite.store.add(STUDIES, {"id": "other", "design": "{}", "created_at": 1.0})
    study = {"table": "studies", "row": dict(on_sqlite.store.one(STUDIES, STUDIES.c.id == on_sqlite.study.id))}
    _, seen = on_sqlite.session(on_sqlite.attentive())
    on_sqlite.service.withdraw(on_sqlite.session(on_sqlite.attentive(), num=2)[0].withdrawal_code)
    on_sqlite.service.cast(seen[0].token, on_sqlite.attentive()(seen[0]), shown_s=1.0, window=(1, 1), address="again")
    lines = journal.path.read_text()
    journal.path.write_text(json.dumps(study) + "\n" + lines + '{"table": "votes", "ro')  # killed while writing
    store = Store(f"sqlite:///{tmp_path / 'rebuilt.db'}")
    rows = sum(on_sqlite.store.count(table) for table in TABLES.values())
    assert restore(store, [journal.path, journal.path]) == rows and restore(store, [journal.path]) == 0
    assert results(on_sqlite.study, store) == results(on_sqlite.study, on_sqlite.store)
    assert all(row[name] == "" for name in PRIVATE for row in store.all(RATERS))
    assert Journal(tmp_path).path != Journal(tmp_path).path
    journal.path.write_text('{"table": "passwords", "row": {}}\n')
    with pytest.raises(UserError, match="no row of a study"):
        restore(store, [journal.path])
    store.close()


class FolderHub:
    """A hub that keeps a dataset in a folder: what CommitScheduler and a restart ask of HfApi."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run_as_future = folder, HfApi().run_as_future
        self.private: bool | None = None

    def create_repo(self, repo_id: str, private: bool, repo_type: str, exist_ok: bool) -> object:
        self.private = private
        return type("Url", (), {"repo_id": repo_id})

    def create_commit(self, operations: list, **_: object) -> None:
        for operation in operations:
            path = self.folder / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                path.write_bytes(file.read())

    def snapshot_download(self, repo_id: str, **_: object) -> str:
        return str(self.folder)


def test_on_a_space_a_new_machine_goes_on_from_the_dataset(study_folder: Path, tmp_path: Path) -> None:
    hub = FolderHub(tmp_path / "hub")
    hub.folder.mkdir()

    def machine(name: str) -> tuple[Stage, CommitScheduler]:
        store, uploads = open_on_hub(f"sqlite:///{tmp_path / name}.db", tmp_path / name, "owner/votes", api=hub, every=1000)
        return Stage(read_study(study_folder), store, study_folder), uploads

    stage, uploads = machine("first")
    ticket, _ = stage.session(stage.attentive(), num=3)
    uploads.trigger().result()
    uploads.stop()
    again, uploads = machine("second")
    assert hub.private is True and again.store.count(VOTES) == 3
    assert again.service.next_ballot(ticket.rater_token).number == 4
    uploads.stop()


def test_in_a_mounted_folder_a_new_machine_goes_on_from_its_lines(
    study_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lasting = tmp_path / "bucket"
    monkeypatch.setenv("REWARDIV_VOTES_DIR", str(lasting))

    def machine(name: str) -> Stage:
        monkeypatch.setenv("REWARDIV_DATABASE_URL", f"sqlite:///{tmp_path / name}.db")
        return Stage(read_study(study_folder), open_store(study_folder), study_folder)

    with pytest.raises(UserError, match="there is no such folder"):
        machine("none")
    lasting.mkdir()
    stage = machine("first")
    ticket, _ = stage.session(stage.attentive(), num=3)
    gone, _ = stage.session(stage.attentive(), num=2)
    stage.service.withdraw(gone.withdrawal_code)
    again = machine("second")
    assert results(again.study, again.store) == results(stage.study, stage.store)
    assert again.service.next_ballot(ticket.rater_token).number == 4
    assert "withdrawn" in str(refusal(again, gone.rater_token)) and all(path.suffix == ".jsonl" for path in lasting.iterdir())
    monkeypatch.setenv("REWARDIV_VOTES_REPO", "owner/votes")
    with pytest.raises(UserError, match="both set"):
        machine("third")
    for one in (stage, again):
        one.store.close()


def refusal(stage: Stage, token: str) -> Refused:
    with pytest.raises(Refused) as caught:
        stage.service.next_ballot(token)
    return caught.value

"""Laws of load and faults: nothing acknowledged is lost, nothing wrong counts, and the measurement itself would say so."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sql
from starlette.testclient import TestClient

from rewardiv.bench.study import faults, junk
from rewardiv.bench.study.cluster import PLACES, kill_all, running
from rewardiv.bench.study.faults import SCENARIOS, SMALL, Ground, prepared
from rewardiv.bench.study.ledger import audit
from rewardiv.bench.study.load import LoadBench, table
from rewardiv.cli import main
from rewardiv.errors import UserError
from rewardiv.study.journal import Journal, open_on_hub, restore
from rewardiv.study.service import COUNT_S, Service, SteadyClock
from rewardiv.study.storage import BALLOTS, RATERS, TOKENS, VOTES, Store, Unavailable
from rewardiv.study_page import Studies, create_study_app
from study.stage import Stage
from study.test_storage import BALLOT, RATER, VOTE, FolderHub, fill

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    """The studies of the scenarios, in small."""
    with prepared(SMALL) as ground:
        yield ground


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_fault_leaves_what_was_acknowledged(name: str, ground: Ground) -> None:
    if name != "database-killed":
        assert SCENARIOS[name](ground).wrong == ()
        return
    if not any(Path(PLACES).glob("*/bin/initdb")):
        pytest.skip("PostgreSQL is not installed")
    with running(flush=False) as cluster:
        assert SCENARIOS[name](dataclasses.replace(ground, cluster=cluster)).wrong == ()


def test_a_process_that_ended_by_itself_keeps_none_of_the_others_alive() -> None:
    children = [subprocess.Popen(["sleep", "100"]) for _ in range(2)]
    processes = [psutil.Process(child.pid) for child in children]
    children[0].kill()
    children[0].wait()
    kill_all(processes)
    assert not any(process.is_running() for process in processes)


def test_raters_at_once_lose_and_double_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "study", "load", "--num-raters", "8", "--look-s", "0", "--num-ballots", "3", "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)
    total = 8 * (3 + 3)  # practice, a check and the repeat
    assert found["sound"] and found["finished"] == 8 and found["audit"]["acknowledged"] == found["audit"]["kept"] == total
    assert found["statuses"] == {"200": 8 + 8 + total + 2 * total}  # join, the first ballot, votes, pictures
    assert all(0 < low <= middle <= high for low, middle, high in found["ms"].values()) and found["server_share"] > 0
    bench = LoadBench(**{name: value for name, value in found.items() if name != "sound"})
    assert "8 raters without waiting" in table([bench])


def test_an_audit_finds_what_is_wrong(on_sqlite: Stage) -> None:
    _, seen = on_sqlite.session(lambda ballot: "left", num=4)
    votes = [(ballot.token, "left") for ballot in seen]

    def found(receipts: list[tuple[str, str]], sent: list[tuple[str, str]]) -> tuple[int, ...]:
        one = audit(on_sqlite.store, on_sqlite.study.id, receipts, sent)
        assert one.clean == (not any((one.lost, one.changed, one.doubled, one.foreign)))
        return one.acknowledged, one.kept, one.lost, one.changed, one.doubled, one.foreign

    assert found(votes, votes) == (4, 4, 0, 0, 0, 0)
    assert found(votes[1:], votes) == (3, 4, 0, 0, 0, 0)  # sent, kept, and the receipt didn't arrive
    assert found([*votes, ("lost", "left")], votes) == (5, 4, 1, 0, 0, 0)
    assert found([(votes[0][0], "right"), *votes[1:]], votes) == (4, 4, 0, 1, 0, 0)
    assert found(votes[1:], votes[1:]) == (3, 4, 0, 0, 0, 1)
    with on_sqlite.store.engine.begin() as connection:  # a second vote on a ballot, as if nothing forbade it
        for words in ("CREATE TABLE copied AS SELECT * FROM votes", "DROP TABLE votes", "ALTER TABLE copied RENAME TO votes",
                      "INSERT INTO votes SELECT * FROM votes LIMIT 1"):
            connection.execute(sql.text(words))
    assert found(votes, votes) == (4, 5, 0, 1, 1, 0)


def test_a_scenario_that_harms_nothing_does_not_pass(ground: Ground) -> None:
    found = faults._under_load(ground, "nothing", ground.url(), lambda server: None, {503})
    assert found.wrong == ("nobody noticed anything, so that nothing was tested",)
    with pytest.raises(UserError, match="unknown scenario 'app-kiled'; did you mean 'app-killed'"):
        next(faults.bench_faults(["app-kiled"]))
    failed = faults.Verdict("x", "facts", ("one thing", "another"))
    assert "FAILED: one thing; another" in faults.line(failed)
    assert "passed" in faults.line(dataclasses.replace(failed, wrong=()))


def test_a_failed_scenario_fails_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ends = [faults.Verdict("one", ""), faults.Verdict("two", "", ("bad",))]
    monkeypatch.setattr(faults, "bench_faults", lambda names: iter(ends))
    assert main(["bench", "study", "faults"]) == 2
    said = capsys.readouterr()
    assert "one: passed" in said.out and "1 of 2 scenarios failed: two" in said.err


def test_junk_is_of_many_kinds_and_an_answer_is_read_right() -> None:
    rng, target = random.Random(0), junk.Target("study", "rater", "ballot", "0" * 64)
    made = [junk.request(rng, target) for _ in range(3000)]
    assert len(set(made)) > 800
    assert any(b"chunked" in data for data in made) and any(b"secret" in data for data in made)
    assert junk.status(b"HTTP/1.1 404 Not Found\r\n") == junk.status(b"HTTP/1.1 100 \r\n\r\nHTTP/1.1 404 \r\n") == 404
    assert junk.status(b"") == junk.status(b"HTTP/1.1 x y") == 0


def test_rows_that_wait_are_written_together_and_each_hears_its_own_end(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'votes.db'}")
    fill(store)
    commits, late = [], threading.Event()
    sql.event.listen(store.engine, "commit", commits.append)
    rows = [(TOKENS, {"hash": str(k), "ballot_id": "b" if k % 4 else "none", "issued_at": 1.0}) for k in range(12)]
    with ThreadPoolExecutor(13) as threads:
        with store._turn:  # as if somebody were writing
            ends = [threads.submit(store.add, *row) for row in rows]
            threads.submit(lambda: late.wait(10))
            while len(store._waiting) < len(rows):
                time.sleep(0.001)
            late.set()
        assert [end.result() for end in ends] == [bool(k % 4) for k in range(12)]
    assert len(commits) == 1 and store.count(TOKENS) == 9
    with ThreadPoolExecutor(3) as threads:
        with store._turn:
            bad = threads.submit(store.add, TOKENS, {"hash": "x", "ballot_id": "b", "issued_at": 1.0, "more": 1})
            good = [threads.submit(store.add, TOKENS, {"hash": name, "ballot_id": "b", "issued_at": 1.0}) for name in "yz"]
            while len(store._waiting) < 3:
                time.sleep(0.001)
        assert [one.result() for one in good] == [True, True]
        with pytest.raises(sql.exc.CompileError):
            bad.result()
    assert store.count(TOKENS) == 11
    store.close()


def test_a_vote_is_not_acknowledged_before_it_is_committed(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'votes.db'}")
    fill(store)

    @sql.event.listens_for(store.engine, "commit")
    def fails(connection: sql.Connection) -> None:
        raise sql.exc.OperationalError("commit", {}, OSError("the disk is full"))

    with pytest.raises(Unavailable):
        store.add_vote(VOTE)
    sql.event.remove(store.engine, "commit", fails)
    assert store.count(VOTES) == 0 and store.add_vote(VOTE) == VOTE and store.count(VOTES) == 1
    store.close()


def test_the_pace_counts_a_minute_that_is_over(url: str) -> None:
    store = Store(url)
    fill(store)
    for k, (cast_at, address) in enumerate([(10.0, "a"), (70.0, "a"), (70.0, "other"), (100.0, "a"), (500.0, "a")]):
        store.add(BALLOTS, BALLOT | {"id": str(k), "position": k + 1, "item": str(k)})
        store.add_vote(VOTE | {"ballot_id": str(k), "cast_at": cast_at, "address_hash": address})
    assert store.pace("r", "a", 40.0, 100.0) == (3, 2)  # 500 lies ahead: the clock was put back
    assert store.pace("r", "none", 0.0, 1000.0) == (5, 0) and store.pace("none", "a", 69.9, 1000.0) == (0, 3)
    store.close()


def test_the_servers_clock_does_not_follow_when_the_machines_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, before = SteadyClock(), time.time()
    monkeypatch.setattr(time, "time", lambda: before + 1e6)
    assert abs(clock() - before) < 60
    later = clock()
    assert later <= clock()


def test_what_another_server_hands_out_counts_soon(on_sqlite: Stage) -> None:
    stage, question = on_sqlite, on_sqlite.study.config.questions[0]
    other = Service(stage.study, stage.store, stage.folder, b"secret", clock=stage.clock, rng=random.Random(1))
    before = dict(other._counted(question))
    for _ in range(3):
        stage.session(lambda ballot: "same")
    stage.clock.now += COUNT_S
    after = dict(other._counted(question))
    assert not before and after == stage.store.loads(stage.study.id, question, 0.0) and sum(n for n, _ in after.values()) == 9
    stage.clock.now -= 1000  # a clock that went back: counted anew, not kept until it has caught up
    other._loads[question].items.clear()
    assert other._counted(question) == after


def test_a_vote_needs_its_own_rater(on_sqlite: Stage) -> None:
    one, other = on_sqlite.join(), on_sqlite.join()
    ballot = on_sqlite.service.next_ballot(one.rater_token)
    on_sqlite.clock.now += 4
    vote = {"shown_s": 4.0, "window": (1, 1), "address": ""}
    for token in (other.rater_token, other.withdrawal_code, "", "x", one.rater_token + "x"):
        with pytest.raises(UserError, match="isn't known"):
            on_sqlite.service.cast(ballot.token, "left", rater_token=token, **vote)
    assert on_sqlite.store.count(VOTES) == 0
    on_sqlite.service.cast(ballot.token, "left", rater_token=one.withdrawal_code.lower(), **vote)
    on_sqlite.service.cast(ballot.token, "left", rater_token=one.rater_token, **vote)
    assert on_sqlite.store.count(VOTES) == 1


def test_what_a_killed_server_did_not_tell_is_told_by_the_next(study_folder: Path, tmp_path: Path) -> None:
    hub = FolderHub(tmp_path / "hub")
    hub.folder.mkdir()
    url = f"sqlite:///{tmp_path / 'votes.db'}"
    store = Store(url)
    fill(store)
    store.add_vote(VOTE)  # nothing of it is in a journal: the server was killed in between
    store.close()
    store, uploads = open_on_hub(url, tmp_path / "journal", "owner/votes", api=hub, every=1000)
    uploads.stop()
    store.close()
    files = [*(tmp_path / "journal").glob("*.jsonl")]
    new = Store(f"sqlite:///{tmp_path / 'new.db'}")
    assert restore(new, files) == 4 and new.count(VOTES) == 1
    new.close()
    again, uploads = open_on_hub(url, tmp_path / "journal", "owner/votes", api=hub, every=1000)
    uploads.stop()
    again.close()
    assert [*(tmp_path / "journal").glob("*.jsonl")] == files  # told once


def test_a_body_that_is_refused_is_not_waited_for(study_folder: Path, tmp_path: Path) -> None:
    studies = Studies([study_folder], open_store=lambda folder: Store(f"sqlite:///{tmp_path / 'votes.db'}"))
    with TestClient(create_study_app(studies)) as client:
        bodies = {b"x" * 5000: "close", b"x": None}
        for body, ends in bodies.items():
            reply = client.post(f"/study/{study_folder.name}/api/join", content=body, headers=JSON)
            assert reply.status_code == (413 if ends else 400) and reply.headers.get("Connection") == ends


def test_a_journal_that_lacks_rows_is_said(tmp_path: Path) -> None:
    journal, store = Journal(tmp_path), Store(f"sqlite:///{tmp_path / 'new.db'}")
    journal.append("raters", RATER)
    with pytest.raises(UserError, match="lacks rows that some of its raters need"):
        restore(store, [journal.path])
    assert store.count(RATERS) == 0
    store.close()

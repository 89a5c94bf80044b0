"""What is written is whole or not there, records survive a torn line, and nothing that is there is overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_disk import small_disk

from rewardiv.errors import UserError
from rewardiv.runs import (
    append_jsonl,
    check_new_dir,
    clear_leftovers,
    cut_jsonl,
    new_dir,
    read_jsonl,
    remove_dir,
    replaced_dir,
    write_bytes,
)


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert new_dir(folder).is_dir() and new_dir(folder) == folder  # empty, so it may be there
    (folder / "state.json").touch()
    with pytest.raises(UserError, match="exists already"):
        new_dir(folder)
    assert new_dir(folder, besides=("state.json",)) == folder
    (folder / ".partial-7-config.json").touch()  # what a kill leaves is nothing
    assert check_new_dir(folder, besides=("state.json",)) == folder
    with pytest.raises(UserError, match="exists already"):
        check_new_dir(folder / "state.json")


def test_checking_a_new_folder_makes_nothing(tmp_path: Path) -> None:
    check_new_dir(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make the folder .*file/run"):
        check_new_dir(tmp_path / "file" / "run")


def test_a_replaced_folder_is_the_new_one_or_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    for text in ("old", "new"):
        with replaced_dir(folder) as partial:
            (partial / text).write_text(text)
    assert [path.name for path in folder.iterdir()] == ["new"] and [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    with pytest.raises(KeyError), replaced_dir(folder) as partial:
        (partial / "third").touch()
        raise KeyError
    assert [path.name for path in folder.iterdir()] == ["new"] and [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_full_disk_is_said_and_leaves_what_was_there(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"old")
    with small_disk(1000), pytest.raises(UserError, match="cannot write .*file: File too large"):
        write_bytes(tmp_path / "file", bytes(2000))
    with (small_disk(1000), pytest.raises(UserError, match="cannot write .*folder: File too large"),
          replaced_dir(tmp_path / "folder") as partial):
        (partial / "file").write_bytes(bytes(2000))
    assert (tmp_path / "file").read_bytes() == b"old" and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_records_are_cut_to_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert cut_jsonl(path, lambda record: True) == [] and not path.exists()
    for step in range(4):
        append_jsonl(path, {"step": step})
    with path.open("a") as file:
        file.write('{"step": 4, "rew')
    assert cut_jsonl(path, lambda record: record["step"] != 1) == [{"step": 0}, {"step": 2}, {"step": 3}]
    append_jsonl(path, {"step": 5})
    assert [record["step"] for record in read_jsonl(path)] == [0, 2, 3, 5]


def test_leftovers_of_killed_writes_are_cleared(tmp_path: Path) -> None:
    for name in (".partial-1-step-2", ".old-1-step-0", ".kept", "step-4"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / ".partial-1-file").touch()
    clear_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".kept", "step-4"}
    clear_leftovers(tmp_path / "nowhere")


def test_a_removed_folder_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "step-2").mkdir()
    (tmp_path / "step-2" / "file").touch()
    remove_dir(tmp_path / "step-2")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="cannot remove .*step-2"):
        remove_dir(tmp_path / "step-2")

"""A study without a lasting disk, as on a Space: every row is also a line of JSON that goes to a dataset on the hub.

The database stays what it is and is rebuilt from the lines when the server starts. A file is only appended to, one a server
process. What the hub has not got yet is lost with the machine: at most `every` minutes of votes.
"""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from rewardiv.errors import UserError
from rewardiv.runs import append_jsonl, read_jsonl
from rewardiv.study.storage import TABLES, Row, Store, database_url

if TYPE_CHECKING:
    from huggingface_hub import CommitScheduler, HfApi

REPO_VARIABLE = "REWARDIV_VOTES_REPO"
PRIVATE = ("address_hash",)  # columns that stay on this machine


class Journal:
    """Rows as lines of a file of its own in a folder; give `append` to Store as `added`.

    Args:
        folder: Of the lines.
        lock: Held while a line is written; the scheduler's, so that no half line is uploaded.
    """

    def __init__(self, folder: str | Path, lock: AbstractContextManager[object] | None = None) -> None:
        self.path = Path(folder) / f"rows-{uuid.uuid4()}.jsonl"
        self._lock = lock or threading.Lock()

    def append(self, table: str, row: Row) -> None:
        """Write a row; the columns PRIVATE are left empty."""
        with self._lock:
            append_jsonl(self.path, {"table": table, "row": dict(row) | {name: "" for name in PRIVATE if name in row}})


def restore(store: Store, files: Iterable[str | Path]) -> int:
    """Add the rows of journals that the database hasn't got; gives how many.

    Raises:
        UserError: If a line before a file's last is damaged, or no row of this project's.
    """
    rows: dict[str, list[Row]] = {name: [] for name in TABLES}
    for path in files:
        for line in read_jsonl(path):
            if not isinstance(line, dict) or line.get("table") not in TABLES or not isinstance(line.get("row"), dict):
                raise UserError(f"{path} holds a line that is no row of a study: {json.dumps(line)[:80]}")
            rows[line["table"]].append(line["row"])
    return store.add_missing(rows)


def open_store(folder: str | Path) -> Store:
    """The store that a server of a study's folder uses: by the environment, an SQLite file without any.

    Raises:
        UserError: If the database or the dataset cannot be used.
    """
    url, repo = database_url(folder), os.environ.get(REPO_VARIABLE, "").strip()
    return open_on_hub(url, Path(folder) / "journal", repo)[0] if repo else Store(url)


def open_on_hub(
    url: str, folder: str | Path, repo: str, *, api: HfApi | None = None, every: float = 5
) -> tuple[Store, CommitScheduler]:
    """A store that is rebuilt from a dataset on the hub and goes on writing there; the dataset is made, private, if missing.

    Args:
        url: The database's, usually of a file that is lost when the machine goes.
        folder: Where the lines are collected.
        repo: owner/name of the dataset.
        api: Of the hub; by default with the token of the environment.
        every: Minutes between uploads; the last one comes when the process ends.

    Returns:
        The store, and what uploads.
    """
    from huggingface_hub import HfApi

    scheduler = _schedule(Path(folder), repo, api or HfApi(), every)
    store = Store(url)
    snapshot = scheduler.api.snapshot_download(repo, repo_type="dataset", allow_patterns="votes/*.jsonl")
    restore(store, sorted(Path(snapshot).glob("votes/*.jsonl")))
    store.added = Journal(folder, scheduler.lock).append
    return store, scheduler


def _schedule(folder: Path, repo: str, api: HfApi, every: float) -> CommitScheduler:
    from huggingface_hub import CommitScheduler
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return CommitScheduler(repo_id=repo, repo_type="dataset", private=True, folder_path=folder, path_in_repo="votes",
                               every=every, allow_patterns="*.jsonl", hf_api=api)
    except (HfHubHTTPError, ValueError) as error:
        raise UserError(f"cannot write to the dataset '{repo}' that {REPO_VARIABLE} names: {error}") from error

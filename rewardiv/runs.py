"""The only writer: atomic files, append-only JSONL and logs, locks, output folders that are never overwritten."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rewardiv.errors import UserError


@dataclass(frozen=True)
class Orders:
    """What a person asks of a training run between two steps; save and probe count once, pause for as long as it is true."""

    stop: bool = False
    pause: bool = False
    save: bool = False
    probe: bool = False


def write_atomic(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, then rename it into place: readers see all of it or none.

    The temporary name keeps the suffix of `path`, because image and safetensors writers look at it.

    Raises:
        UserError: If the disk refuses (full, read-only), naming the path and the system's reason.
    """
    path = Path(path)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write bytes atomically."""
    return write_atomic(path, lambda partial: partial.write_bytes(data))


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text atomically."""
    return write_bytes(path, text.encode())


def write_json(path: str | Path, value: object) -> Path:
    """Write JSON atomically, indented, with NaN refused (it isn't JSON)."""
    return write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def append_jsonl(path: str | Path, record: dict) -> None:
    """Append one record as one line in one write, so that a kill leaves at most one torn last line."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def read_jsonl(path: str | Path) -> Iterator[dict]:
    """Read the records of a JSONL file; a torn last line (from a kill) is left out, any other damage raises.

    Raises:
        UserError: If a line before the last isn't JSON.
    """
    lines = Path(path).read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number} is not JSON: {error}") from error


def check_new_dir(path: str | Path, *, besides: Collection[str] = ()) -> Path:
    """Refuse a folder to be made that holds anything yet, but for files of these names and what a killed write left.

    Raises:
        UserError: If it is a file or holds files (nothing is ever overwritten), or cannot be made where it is to be.
    """
    path = Path(path)
    leftovers = (".partial-", ".old-")
    if path.exists() and not path.is_dir() or path.is_dir() and any(
        file.name not in besides and not file.name.startswith(leftovers) for file in path.iterdir()
    ):
        raise UserError(f"{path} exists already; choose another output folder or remove it first")
    place = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"cannot make the folder {path}: nothing can be written in {place}; choose another output folder")
    return path


def new_dir(path: str | Path, *, besides: Collection[str] = ()) -> Path:
    """Make a folder that must not hold anything yet, but for files of these names.

    Raises:
        UserError: As `check_new_dir`, or if the disk refuses.
    """
    path = check_new_dir(path, besides=besides)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror or error}") from error
    return path


@contextmanager
def replaced_dir(path: str | Path) -> Iterator[Path]:
    """Fill a temporary folder beside `path` and swap it in at the end; on an error the old folder stays.

    What it holds has reached the disk before the swap, so that a power cut leaves no hollow files either.

    Raises:
        UserError: If the disk refuses (full, read-only), naming the path and the system's reason.
    """
    path = Path(path)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    old = path.with_name(f".old-{os.getpid()}-{path.name}")
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in partial.rglob("*"):
            _sync(file)
        if path.exists():
            path.rename(old)
        partial.rename(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def clear_leftovers(folder: str | Path) -> None:
    """Remove what killed writes have left in a folder."""
    for path in Path(folder).glob(".*"):
        if path.name.startswith((".partial-", ".old-")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def cut_jsonl(path: str | Path, keep: Callable[[dict], bool]) -> list[dict]:
    """Leave only the records to be kept in a JSONL file, whole lines all of them; gives them. No file: no records.

    Raises:
        UserError: If a line before the last isn't JSON, or the disk refuses.
    """
    if not Path(path).exists():
        return []
    kept = [record for record in read_jsonl(path) if keep(record)]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_dir(path: str | Path) -> None:
    """Remove a folder with all that it holds; it leaves its place at once, whole.

    Raises:
        UserError: If the disk refuses.
    """
    path = Path(path)
    old = path.with_name(f".old-{os.getpid()}-{path.name}")
    try:
        path.rename(old)
        shutil.rmtree(old)
    except OSError as error:
        raise UserError(f"cannot remove {path}: {error.strerror or error}") from error


def open_log(path: str | Path) -> BinaryIO:
    """A log file to append to, as a process's output.

    Raises:
        UserError: If the disk refuses.
    """
    try:
        return Path(path).open("ab")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def append_text(path: str | Path, text: str) -> None:
    """Append text to a log in one write.

    Raises:
        UserError: If the disk refuses.
    """
    with open_log(path) as file:
        file.write(text.encode())


def cap_log(path: str | Path, max_bytes: int) -> None:
    """Shorten a log that has grown beyond max_bytes to its last quarter, in place: who appends to it can go on.

    Raises:
        UserError: If the disk refuses.
    """
    path = Path(path)
    if not path.exists() or path.stat().st_size <= max_bytes:
        return
    try:
        with path.open("r+b") as file:
            file.seek(-max_bytes // 4, os.SEEK_END)
            tail = file.read().partition(b"\n")[2]
            file.seek(0)
            file.write(b"[earlier lines were removed]\n" + tail)
            file.truncate()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold the lock of an existing folder, waiting for it; no file is made for it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def try_lock(path: str | Path) -> BinaryIO | None:
    """The lock of a file (made if missing), or None while another process holds it; held until closed or the process ends."""
    file = open_log(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file

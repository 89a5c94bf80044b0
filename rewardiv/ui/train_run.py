"""What a run's folder holds, read as it grows: records, probe grids, checkpoints, the log's end. Nothing here writes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from rewardiv.errors import UserError
from rewardiv.jobs import LOG, Job
from rewardiv.records import CONFIG_NAME, EVENTS_NAME, GRID_NAME, METRICS_NAME, PROBES_NAME, StepRecord, list_steps
from rewardiv.registry import LORA_FILE
from rewardiv.runs import read_jsonl

KEYS = {  # that the page uses
    METRICS_NAME: {field.name for field in fields(StepRecord)},
    PROBES_NAME: {"step", "rewards", "held_out", "standard_errors", "gain", "scd", "scd_null", "trace_ratio", "effective_rank",
                  "effective_rank_base", "pairwise_distance"},
    EVENTS_NAME: {"step", "kind", "text"},
}
LOG_BYTES = 6000
Record = dict[str, Any]
Stamp = tuple[int, int]  # modification time in ns, size


@dataclass(frozen=True)
class RunData:
    """A run as the page shows it.

    Attributes:
        job: Its state, as `rewardiv.jobs` reads it.
        steps: Step records with rising steps: those of a stretch that was rolled back are left out.
        probes: Probe records, likewise.
        events: What happened out of the ordinary, in order.
        prompts: That it trains on.
        damage: What couldn't be read, as one sentence; "" where all could.
    """

    job: Job
    steps: tuple[Record, ...] = ()
    probes: tuple[Record, ...] = ()
    events: tuple[Record, ...] = ()
    prompts: tuple[str, ...] = ()
    damage: str = ""
    grids: dict[int, Path] = field(default_factory=dict)
    checkpoints: dict[int, Path] = field(default_factory=dict)

    def checkpoint_for(self, step: int) -> int | None:
        """The checkpoint that stands for a probe: its own step's, else the last one before it, else the first."""
        earlier = [one for one in self.checkpoints if one <= step]
        return max(earlier) if earlier else min(self.checkpoints, default=None)


def read_run(job: Job) -> RunData:
    """Everything in the run's folder; files that are missing or damaged leave gaps that `damage` names."""
    damage: list[str] = []
    records = {}
    for name in (METRICS_NAME, PROBES_NAME, EVENTS_NAME):
        path = job.folder / name
        try:
            records[name] = _records(path, stamp(path))
        except (UserError, OSError, UnicodeDecodeError) as error:
            records[name] = ()
            damage.append(f"{path.name} is damaged ({error})")
    prompts: tuple[str, ...] = ()
    config = job.folder / CONFIG_NAME
    try:
        prompts = _prompts(config, stamp(config))
    except (OSError, ValueError) as error:
        damage.append(f"{config.name} is damaged ({error})")
    return RunData(
        job, records[METRICS_NAME], records[PROBES_NAME], records[EVENTS_NAME], prompts, "; ".join(damage),
        grids=steps_with(job.folder / "probes", GRID_NAME), checkpoints=steps_with(job.folder / "checkpoints", LORA_FILE),
    )


def stamp(path: Path) -> Stamp:
    """Tells one state of a file from the next; (0, 0) where there is none."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def steps_with(folder: Path, file: str) -> dict[int, Path]:
    """Folders step-N in `folder` that hold `file`, by step."""
    return {step: path for step, path in list_steps(folder).items() if (path / file).is_file()}


def log_end(folder: Path) -> str:
    """The last lines of the run's log; progress bars that overwrote themselves show their last state."""
    path = folder / LOG
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LOG_BYTES))
        text = file.read().decode(errors="replace")
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.replace("\r\n", "\n").rstrip("\r").split("\n")]
    return "\n".join(line for line in lines if line)


def rising(records: Iterable[Record]) -> tuple[Record, ...]:
    """Records whose steps rise: one that goes back replaces everything from its step on."""
    kept: list[Record] = []
    for record in records:
        while kept and kept[-1]["step"] >= record["step"]:
            kept.pop()
        kept.append(record)
    return tuple(kept)


@lru_cache(maxsize=128)
def _records(path: Path, state: Stamp) -> tuple[Record, ...]:
    if state == (0, 0):
        return ()
    records = tuple(read_jsonl(path))
    for number, record in enumerate(records, 1):
        missing = KEYS[path.name] - record.keys() if isinstance(record, dict) else {"everything"}
        if missing or not isinstance(record["step"], int):
            raise UserError(f"record {number} lacks {min(missing, default='a whole step')}")
    return records if path.name == EVENTS_NAME else rising(records)


@lru_cache(maxsize=128)
def _prompts(path: Path, state: Stamp) -> tuple[str, ...]:
    if state == (0, 0):
        return ()
    saved = json.loads(path.read_text())
    if not isinstance(saved, dict):
        raise ValueError("it isn't a table")
    prompts = saved.get("prompts", [])
    return tuple(prompt for prompt in prompts if isinstance(prompt, str)) if isinstance(prompts, list) else ()

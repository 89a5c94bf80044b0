"""Checkpoints of a training run on disk: whole or not there, found by name, what lies beyond one forgotten."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path

import torch

from rewardiv.errors import UserError
from rewardiv.records import METRICS_NAME, PROBES_NAME, checkpoint_dir, list_checkpoints, list_steps
from rewardiv.runs import cut_jsonl, remove_dir, replaced_dir, write_bytes

STATE_NAME = "state.pt"
State = dict[str, object]  # numbers, texts, tensors, and lists and dicts of them


def save_checkpoint(output_dir: str | Path, state: State, save_weights: Callable[[Path], object], limit: int | None) -> Path:
    """Write checkpoints/step-N, whole or not at all, unless it is there; then remove the oldest ones over the limit.

    Args:
        output_dir: The run's folder.
        state: All that training goes on from; its "step" is N.
        save_weights: Writes the adapter for others into the folder that it is given.
        limit: How many checkpoints are kept; None is all.

    Raises:
        UserError: If the disk refuses; the earlier checkpoints are as they were.
    """
    folder = checkpoint_dir(output_dir, state["step"])
    if not folder.exists():
        with replaced_dir(folder) as partial:
            save_weights(partial)
            save_state(partial, state)
    if limit is not None:
        for old in list(list_checkpoints(output_dir).values())[:-limit]:
            remove_dir(old)
    return folder


def save_state(folder: Path, state: State) -> None:
    """Write a checkpoint's state, in place of the one that is there."""
    out = io.BytesIO()  # torch hides a full disk when it writes to a file itself
    torch.save(state, out)
    write_bytes(folder / STATE_NAME, out.getvalue())


def load_state(folder: Path) -> State:
    """Read a checkpoint's state; nothing in the file is executed.

    Raises:
        UserError: If it is missing or damaged.
    """
    path = folder / STATE_NAME
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is damaged ({error}); resume from another checkpoint") from error
    if not isinstance(state, dict) or "step" not in state:
        raise UserError(f"{path} is damaged (it holds no state of a run); resume from another checkpoint")
    return state


def find_checkpoint(output_dir: str | Path, name: str) -> Path | None:
    """The checkpoint that "latest" or "step-N" stands for; None for a run that has none yet and begins at step 0.

    Raises:
        UserError: If a checkpoint is asked for by its name and is not there.
    """
    checkpoints = list_checkpoints(output_dir)
    if name == "latest":
        return checkpoints[max(checkpoints)] if checkpoints else None
    for folder in checkpoints.values():
        if folder.name == name:
            return folder
    known = ", ".join(folder.name for folder in checkpoints.values()) or "none"
    raise UserError(f"{output_dir} has no checkpoint '{name}'; there are: {known}")


def forget_after(output_dir: str | Path, step: int) -> list[dict]:
    """Remove the checkpoints, probes and metrics of later steps, which are done again; gives the probes that are left.

    Checkpoints go first, newest first: whenever a kill comes, the latest checkpoint has all that went before it.

    Raises:
        UserError: If the disk refuses or a file is damaged.
    """
    root = Path(output_dir)
    for kind in ("checkpoints", "probes"):
        for later, folder in reversed(list_steps(root / kind).items()):
            if later > step:
                remove_dir(folder)
    cut_jsonl(root / METRICS_NAME, lambda record: record["step"] <= step)
    return cut_jsonl(root / PROBES_NAME, lambda record: record["step"] <= step)

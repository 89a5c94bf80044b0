"""A training run as others see it: the files of its folder, its records. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

CONFIG_NAME = "config.json"
METRICS_NAME = "metrics.jsonl"
PROBES_NAME = "probes.jsonl"
EVENTS_NAME = "events.jsonl"
GRID_NAME = "grid.png"
JOB_NAMES = ("state.json", "control.json", "log.txt")  # of rewardiv.jobs, which may be there before the run begins
STEP_DIR = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class StepRecord:
    """One finished step (counted from 1): rewards of its images, and what was done to the weights.

    Attributes:
        reward_mean: Of what is maximised: the mixture of several rewards, or the one reward itself.
        reward_std: Over the images of the step.
        rewards: The mean of each reward as it came, not standardised.
        loss: What is minimised: minus the mixture's mean, plus each regulariser times its weight.
        kl: Of the authors' KL, not weighted; 0 where it is off. So are path_kl and lora_norm.
        grad_norm: Before clipping.
        elapsed_s: Time spent on steps, probes and checkpoints so far, also in the run's earlier parts.
    """

    step: int
    reward_mean: float
    reward_std: float
    rewards: dict[str, float]
    loss: float
    kl: float
    path_kl: float
    lora_norm: float
    grad_norm: float
    learning_rate: float
    elapsed_s: float


@dataclass(frozen=True)
class Event:
    """Something out of the ordinary: kind is rollback, early-stop, stopped, saved, onset or resumed; text says it."""

    step: int
    kind: str
    text: str


def checkpoint_dir(output_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return Path(output_dir) / "checkpoints" / f"step-{step}"


def probe_dir(output_dir: str | Path, step: int) -> Path:
    """Where the pictures of a step's probe lie."""
    return Path(output_dir) / "probes" / f"step-{step}"


def list_checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """A run's checkpoints by step, oldest first; all of them are whole."""
    return list_steps(Path(output_dir) / "checkpoints")


def list_steps(folder: Path) -> dict[int, Path]:
    """The folders step-N in a folder, by N."""
    found = {int(match[1]): path for path in folder.glob("step-*") if (match := STEP_DIR.fullmatch(path.name))}
    return dict(sorted(found.items()))

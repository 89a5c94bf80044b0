"""Steps per second and peak memory of training, alone or against TRL 0.23.1's AlignPropTrainer in its own environment.

Every cell is a process of its own, one after another, ours and TRL's taking turns, so that neither has the machine for
itself and no memory is inherited. Both take the same number of steps with the same pipeline, batch, sampler (DDIM, eta 0),
guidance, K, reward (colorfulness, the same function on images in [0, 1]), LoRA (rank 4 on the attention layers, which
TRL fixes), optimiser and precision. Saving and logging aren't in the step times of either.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rewardiv.bench.process import run_module
from rewardiv.errors import UserError

OURS, TRL = "rewardiv", "trl"
MODULES = {OURS: "rewardiv.bench.cell", TRL: "rewardiv.bench.trl_cell"}
OUT_OF_MEMORY = "out of memory"  # in torch's own message
WARM_UP_STEPS = 1  # the first step also allocates
PROMPTS = ("a cat face", "a red rose", "a rocket", "a slice of pizza", "an owl", "a sunflower", "a house", "a bicycle")


@dataclass(frozen=True)
class Task:
    """What a cell does: `num_steps` optimiser steps of `train_batch_size` images, gradients through `grad_steps` steps.

    `grad_batch_size` is ours alone: images whose gradient is taken at once.
    """

    model: str
    num_steps: int = 6
    train_batch_size: int = 8
    grad_batch_size: int = 4
    num_inference_steps: int = 10
    grad_steps: int = 1
    guidance_scale: float = 3.0
    learning_rate: float = 1e-3
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    device: str = "cpu"
    num_threads: int = 0
    prompts: tuple[str, ...] = PROMPTS


@dataclass(frozen=True)
class Cell:
    """What one process took.

    Attributes:
        trainer: OURS or TRL.
        task: What it did.
        step_s: Seconds of each step, the first WARM_UP_STEPS left out.
        step_cpu_s: Processor seconds of the same steps, all threads together.
        loaded_mib: Memory held when everything was loaded, before the first step.
        peak_mib: The most memory held at once during the steps, what was loaded included.
        first_reward: Mean reward of the first step's images, drawn before any update.
        versions: Of the packages behind it.
    """

    trainer: str
    task: Task
    step_s: tuple[float, ...]
    step_cpu_s: tuple[float, ...]
    loaded_mib: float
    peak_mib: float
    first_reward: float
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Row:
    """One trainer at one number of denoising steps, over all its repeats: the median step, the highest peak."""

    trainer: str
    num_inference_steps: int
    step_s: float
    step_cpu_s: float
    loaded_mib: float
    peak_mib: float

    @property
    def growth_mib(self) -> float:
        """What training needs on top of what was loaded."""
        return self.peak_mib - self.loaded_mib


def bench_train(
    task: Task, *, num_inference_steps: Sequence[int], repeat: int = 1, trl_python: str = "",
) -> list[Cell]:
    """Run ours, and TRL's where its Python is given, `repeat` times at each number of denoising steps, taking turns.

    Raises:
        UserError: If a process fails; its last words are in the message.
    """
    if repeat < 1 or task.num_steps <= WARM_UP_STEPS or not num_inference_steps:
        raise UserError(f"repeat is {repeat} and num_steps {task.num_steps}: at least 1 and {WARM_UP_STEPS + 1} are needed")
    pythons = {OURS: sys.executable} | ({TRL: trl_python} if trl_python else {})
    return [
        run_cell(trainer, python, Task(**vars(task) | {"num_inference_steps": steps}))
        for _ in range(repeat) for steps in num_inference_steps for trainer, python in pythons.items()
    ]


def largest_batch(task: Task) -> list[Cell]:
    """Our side at 1, 2, 4, … images whose gradients are taken all at once, up to the most that the device has memory for.

    Raises:
        UserError: If not even one fits, or a process fails for another reason.
    """
    cells: list[Cell] = []
    while True:
        size = 2 ** len(cells)
        sized = Task(**vars(task) | {"train_batch_size": size, "grad_batch_size": size, "num_steps": WARM_UP_STEPS + 1})
        try:
            cells.append(run_cell(OURS, sys.executable, sized))
        except UserError as error:
            if not cells or OUT_OF_MEMORY not in str(error):
                raise
            return cells


def run_cell(trainer: str, python: str, task: Task) -> Cell:
    """One process from start to end.

    Raises:
        UserError: If it fails.
    """
    words = run_module(python, MODULES[trainer], json.dumps(asdict(task)))
    report = json.loads(words.splitlines()[-1])
    return Cell(
        trainer=trainer, task=task, step_s=tuple(report["step_s"][WARM_UP_STEPS:]),
        step_cpu_s=tuple(report["step_cpu_s"][WARM_UP_STEPS:]), loaded_mib=report["loaded_mib"], peak_mib=report["peak_mib"],
        first_reward=report["first_reward"], versions=report["versions"],
    )


def rows(cells: Sequence[Cell]) -> list[Row]:
    """The cells of each trainer and number of denoising steps as one row, in order."""
    groups: dict[tuple[int, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.task.num_inference_steps, cell.trainer), []).append(cell)
    return [
        Row(
            trainer, steps, statistics.median([seconds for cell in group for seconds in cell.step_s]),
            statistics.median([seconds for cell in group for seconds in cell.step_cpu_s]),
            statistics.median([cell.loaded_mib for cell in group]), max(cell.peak_mib for cell in group),
        )
        for (steps, trainer), group in sorted(groups.items())
    ]


def ratios(found: Sequence[Row]) -> dict[int, dict[str, float]]:
    """Ours to TRL's at each number of denoising steps: steps per second (and per processor second), peak, growth."""
    ours, theirs = ({row.num_inference_steps: row for row in found if row.trainer == name} for name in (OURS, TRL))
    return {
        steps: {
            "steps_per_s": theirs[steps].step_s / row.step_s, "steps_per_cpu_s": theirs[steps].step_cpu_s / row.step_cpu_s,
            "peak": row.peak_mib / theirs[steps].peak_mib, "growth": row.growth_mib / theirs[steps].growth_mib,
        }
        for steps, row in ours.items() if steps in theirs
    }


def table(cells: Sequence[Cell]) -> str:
    """The figures as text."""
    task, found = cells[0].task, rows(cells)
    titles = ("steps/s", "s/step", "CPU s/step", "peak MiB", "loaded MiB", "growth MiB")
    lines = [
        f"batch {task.train_batch_size} (gradients of {task.grad_batch_size} at once), K = {task.grad_steps}, guidance "
        f"{task.guidance_scale:g}, precision {task.mixed_precision}, {task.device}, {task.num_threads or 'all'} threads, "
        f"{Path(task.model).name}",
        f"{'trainer':10} {'denoising steps':>15} {' '.join(f'{title:>10}' for title in titles)}",
    ]
    for row in found:
        values = (f"{1 / row.step_s:.3f}", f"{row.step_s:.2f}", f"{row.step_cpu_s:.2f}",
                  *(f"{mib:.0f}" for mib in (row.peak_mib, row.loaded_mib, row.growth_mib)))
        lines.append(f"{row.trainer:10} {row.num_inference_steps:15} {' '.join(f'{value:>10}' for value in values)}")
    for steps, ratio in ratios(found).items():
        lines.append(
            f"{steps} denoising steps: {ratio['steps_per_s']:.2f} × TRL's steps per second ({ratio['steps_per_cpu_s']:.2f} × "
            f"per processor second), {ratio['peak']:.2f} × its peak memory, {ratio['growth']:.2f} × its growth since loading"
        )
    return "\n".join(lines)


def to_dict(cells: Sequence[Cell]) -> dict[str, object]:
    """Cells, rows and ratios as JSON can hold them."""
    found = rows(cells)
    return {
        "cells": [asdict(cell) for cell in cells],
        "rows": [asdict(row) | {"growth_mib": row.growth_mib} for row in found],
        "ratios": ratios(found),
    }

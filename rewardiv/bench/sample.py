"""Seconds and memory of one batched run of all methods, against the same images by plain diffusers calls."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from rewardiv.bench.process import run_module
from rewardiv.errors import UserError

OURS, PLAIN = "rewardiv", "plain"
CELL_MODULE = "rewardiv.bench.sample_cell"


@dataclass(frozen=True)
class SampleTask:
    """The default methods' images of one prompt: base, finetuned, the LoRA at 0.5, AIG with power 2.

    Attributes:
        model: A pipeline folder.
        lora: A built-in LoRA's name, a folder or a file.
        num_seeds: Images a method.
        repeat: How often each process makes the images; the fastest counts.
        dtype: Of the model, such as "float32".
    """

    model: str
    lora: str
    num_seeds: int = 8
    num_inference_steps: int = 20
    guidance_scale: float = 3.0
    scheduler: str = "model"
    repeat: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    num_threads: int = 0


@dataclass(frozen=True)
class SampleCell:
    """What one way took.

    Attributes:
        way: OURS or PLAIN.
        task: What it did.
        seconds: The fastest time, decoding included and scores not.
        rows: Network rows.
        loaded_mib: Memory held when everything was loaded.
        peak_mib: The most that was held while images were made, what was loaded included.
    """

    way: str
    task: SampleTask
    seconds: float
    rows: int
    loaded_mib: float
    peak_mib: float


@dataclass(frozen=True)
class SampleBench:
    """Both ways at one number of seeds.

    Attributes:
        ours: One batched run.
        plain: A StableDiffusionPipeline (or XL) call for base, one for the LoRA at scale 1, one at 0.5, each with all seeds
            in its batch; for AIG a loop over two UNets in memory, as the authors' code.
        max_difference: Of any colour value of any image, in 1/255.
    """

    ours: SampleCell
    plain: SampleCell
    max_difference: int

    @property
    def speed(self) -> float:
        """How many times faster ours is."""
        return self.plain.seconds / self.ours.seconds

    @property
    def memory(self) -> float:
        """Our peak as a share of the plain way's."""
        return self.ours.peak_mib / self.plain.peak_mib

    def to_dict(self) -> dict[str, object]:
        """The fields and the ratios, as JSON can hold them."""
        return asdict(self) | {"speed": self.speed, "memory": self.memory}


def bench_sample(task: SampleTask, *, num_seeds: Sequence[int] = (8,)) -> list[SampleBench]:
    """Make the images both ways at each number of seeds, every time in two processes, one after the other.

    Raises:
        UserError: If a number is out of range or a process fails.
    """
    if not num_seeds or min(num_seeds) < 1 or task.repeat < 1 or task.num_inference_steps < 1:
        raise UserError(f"num_seeds is {list(num_seeds)}, num_inference_steps {task.num_inference_steps} and repeat "
                        f"{task.repeat}; all must be at least 1")
    return [_compared(replace(task, num_seeds=number)) for number in num_seeds]


def table(found: Sequence[SampleBench]) -> str:
    """The figures as text."""
    task = found[0].ours.task
    lines = [
        f"4 methods × seeds × {task.num_inference_steps} steps, {Path(task.model).name} with {Path(task.lora).name}, "
        f"{task.device}, {task.dtype}",
        f"{'':24} {'seeds':>6} {'seconds':>9} {'rows':>7} {'loaded MiB':>11} {'peak MiB':>9}",
    ]
    for bench in found:
        for name, cell in (("one batched run", bench.ours), ("plain diffusers calls", bench.plain)):
            lines.append(f"{name:24} {cell.task.num_seeds:6} {cell.seconds:9.2f} {cell.rows:7} {cell.loaded_mib:11.0f} "
                         f"{cell.peak_mib:9.0f}")
        lines.append(f"{bench.ours.task.num_seeds} seeds: {bench.speed:.2f} times as fast, {bench.memory:.2f} × the peak "
                     f"memory; images differ by at most {bench.max_difference}/255")
    return "\n".join(lines)


def _compared(task: SampleTask) -> SampleBench:
    with tempfile.TemporaryDirectory() as folder:
        files = {way: Path(folder) / f"{way}.npy" for way in (OURS, PLAIN)}
        cells = {way: _cell(way, task, file) for way, file in files.items()}
        ours, plain = (np.load(file).astype(int) for file in files.values())
    return SampleBench(cells[OURS], cells[PLAIN], int(np.abs(ours - plain).max()))


def _cell(way: str, task: SampleTask, file: Path) -> SampleCell:
    report = json.loads(run_module(sys.executable, CELL_MODULE, way, json.dumps(asdict(task)), str(file)).splitlines()[-1])
    return SampleCell(way, task, **{name: report[name] for name in ("seconds", "rows", "loaded_mib", "peak_mib")})

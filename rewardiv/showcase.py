"""A finished run as a small folder to show elsewhere: records, pictures and two LoRAs, nothing of the machine it ran on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save

from rewardiv.config import TrainConfig
from rewardiv.errors import UserError
from rewardiv.jobs import read_job, write_state
from rewardiv.publish import Source, read_source, without_places
from rewardiv.records import (
    CONFIG_NAME,
    EVENTS_NAME,
    GRID_NAME,
    METRICS_NAME,
    PROBES_NAME,
    checkpoint_dir,
    list_checkpoints,
    list_steps,
    probe_dir,
)
from rewardiv.registry import LORA_FILE, PROMPTS
from rewardiv.runs import new_dir, write_atomic, write_bytes, write_json, write_text
from rewardiv.verdicts import best_tradeoff

NUM_COLOURS = 256  # of a probe grid's palette


def export_run(run_dir: str | Path, output_dir: str | Path, *, checkpoints: Collection[int] = ()) -> Path:
    """Copy what the Training tab shows of a finished run; `REWARDIV_DEMO=1` shows such folders in assets/runs.

    Of the checkpoints only the last, the one of the best trade-off and the named ones come along, as LoRAs in fp16 that can
    be sampled but not trained on; probe grids get a palette of NUM_COLOURS colours. Process, machine and log stay behind, and
    of the path of a prompts file, a local model or reward only the last part is kept; prompts that ship go by their name.

    Args:
        run_dir: The run's folder.
        output_dir: A folder that holds nothing yet.
        checkpoints: Steps whose checkpoints come along too.

    Raises:
        UserError: If the run isn't done, a file of it or a named checkpoint is missing or damaged, or something would be
            overwritten.
    """
    source, target = Path(run_dir), Path(output_dir)
    job = read_job(source)
    if job.state != "done":
        raise UserError(f"the run in {source} is {job.state}; only a finished one can be exported as a run")
    run = read_source(source)
    if missing := set(checkpoints) - set(list_checkpoints(source)):
        raise UserError(f"{source} has no checkpoint of step {min(missing)}; it has {sorted(list_checkpoints(source))}")
    settings = _portable(run.config, target.name)
    new_dir(target)
    write_json(target / CONFIG_NAME, {"settings": settings, "prompts": run.prompts})
    for name in (METRICS_NAME, PROBES_NAME, EVENTS_NAME):
        if (source / name).exists():
            write_text(target / name, without_places((source / name).read_text(), run.config))
    for step, folder in list_steps(source / "probes").items():
        with Image.open(folder / GRID_NAME) as grid:
            small = grid.convert("RGB").quantize(NUM_COLOURS)
        write_atomic(probe_dir(target, step) / GRID_NAME, lambda path, small=small: small.save(path, "PNG", optimize=True))
    for step in sorted({*_shown_steps(run), *checkpoints}):
        _copy_lora(checkpoint_dir(source, step), checkpoint_dir(target, step))
    _copy_lora(source, target)
    write_state(replace(job, folder=target, settings=settings, pid=None, process_started=None, host="", heartbeat=0.0))
    return target


def _portable(config: TrainConfig, name: str) -> dict[str, Any]:
    """Settings without places of this machine."""
    model = Path(config.model).name if Path(config.model).is_absolute() else config.model
    rewards, held_out = (tuple(without_places(reward, config) for reward in names)
                         for names in (config.rewards, config.probe_rewards))
    shipped = {entry.path: name for name, entry in PROMPTS.items()}
    prompts = shipped.get(config.prompts_file) or Path(config.prompts_file).name
    return replace(config, output_dir=name, prompts_file=prompts, model=model, rewards=rewards, probe_rewards=held_out,
                   resume_from_checkpoint="").to_dict()


def _shown_steps(run: Source) -> set[int]:
    """The last checkpoint, and the one of the best trade-off where there is one."""
    checkpoints = list_checkpoints(run.run_dir)
    best = best_tradeoff(run.probes, list(checkpoints))
    return {max(checkpoints), *([best.step] if best else [])}


def _copy_lora(source: Path, target: Path) -> None:
    """The LoRA of a folder, in fp16.

    Raises:
        UserError: If a weight is too large for fp16.
    """
    with safe_open(source / LORA_FILE, framework="pt") as opened:
        metadata, state = opened.metadata(), {key: opened.get_tensor(key).half() for key in opened.keys()}
    if any(not bool(torch.isfinite(tensor).all()) for tensor in state.values()):
        raise UserError(f"{source / LORA_FILE} holds weights that are too large for fp16; export it for diffusers instead")
    write_bytes(target / LORA_FILE, save(state, metadata))

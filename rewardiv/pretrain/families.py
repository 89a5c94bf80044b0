"""Stage 5: reward LoRAs in families: for each taste one LoRA free to over-optimise, and the same held back by KL weights.

Each is an ordinary run of `rewardiv train`, exported with a few early checkpoints for the Training tab. The free one's weights
are a checkpoint of their own.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

from rewardiv.config import TrainConfig
from rewardiv.jobs import is_run, read_job
from rewardiv.pretrain.data import ASSETS
from rewardiv.pretrain.scenes import COLOURS
from rewardiv.pretrain.wording import caption, countable
from rewardiv.records import METRICS_NAME, StepRecord, list_checkpoints
from rewardiv.registry import LORA_FILE
from rewardiv.runs import Orders, read_jsonl, replaced_dir
from rewardiv.showcase import export_run
from rewardiv.supervisor import supervise
from rewardiv.train_presets import Setting
from rewardiv.trainer import train

EARLY = (0.1, 0.2, 0.5)  # shares of a free LoRA's steps whose checkpoints are shown too


@dataclass(frozen=True)
class Family:
    """One taste: the rewards it is trained on, the file of prompts in assets/emoji, and DRaFT's settings (fields of
    TrainConfig)."""

    rewards: tuple[str, ...]
    prompts: str = "prompts.txt"
    settings: dict[str, Setting] = field(default_factory=dict)

    @property
    def taste(self) -> str:
        """What it is trained on, in words."""
        return f"the {' and the '.join(self.rewards)} reward" + ("s, mixed" if len(self.rewards) > 1 else "")


def member(name: str, kl_weight: float) -> str:
    """The name of a family's LoRA: "vivid" without a KL weight, "vivid-kl0.1" with one."""
    return f"{name}-kl{kl_weight:g}" if kl_weight else name


def composed_prompts(concepts: list[str]) -> list[str]:
    """Prompts that ask for more than a thing: of each concept in turn several, it with another one, or its background.

    "two ghosts", "a skull and a fried egg", "a snowman on a white background", …: every colour and number
    equally often.
    """
    prompts, colours = [], list(COLOURS)
    for i, concept in enumerate(concepts):
        if i % 3 == 0 and countable(concept):
            prompts.append(caption(concept, number=2 + i // 3 % 3))
        elif i % 3 == 1:
            prompts.append(caption(concept, concepts[(i + len(concepts) // 2) % len(concepts)]))
        else:
            prompts.append(caption(concept, colour=colours[i // 3 % len(colours)]))
    return prompts


def run(name: str, family: Family, kl_weight: float, *, output_dir: Path, work_dir: Path, runs_dir: Path, seed: int,
        device: str, resume: bool) -> dict[str, object]:
    """Train one LoRA of a family, export its run and, without a KL weight, its weights.

    As in every run, the CLIP in checkpoints/ is held out and measures diversity.

    Args:
        name: Of the family.
        family: What it is trained on.
        kl_weight: Of the authors' KL.
        output_dir: Where the base model and the rewards lie, and the free LoRA's weights go, as `emoji-<name>`.
        work_dir: Where the run itself lies; if `resume`, one of fewer steps than are asked for goes on, another is kept.
        runs_dir: Where the small export goes, in place of an earlier one.
        seed: Of the run.
        device: Of the run.
        resume: Go on with what `work_dir` holds instead of refusing it.

    Returns:
        First and last mean reward of a step, the time, and the settings.
    """
    own = member(name, kl_weight)
    folder, output_dir = work_dir / "loras" / own, output_dir.absolute()  # an export names rewards by their places
    config = TrainConfig(
        output_dir=str(folder), model=str(output_dir / "emoji"), seed=seed, device=device, kl_weight=kl_weight,
        rewards=tuple(str(output_dir / "emoji-rewards" / reward) for reward in family.rewards),
        prompts_file=str(ASSETS / family.prompts),
        resume_from_checkpoint="latest" if resume else "", **family.settings)
    if not (resume and is_done(folder, config.max_train_steps)):
        with (tqdm(total=config.max_train_steps, desc=own, unit="step") as bar,
              closing(supervise(config, partial(_records, config))) as records):
            for record in records:
                if isinstance(record, StepRecord):
                    bar.update(record.step - bar.n)
                    bar.set_postfix(reward=round(record.reward_mean, 3), refresh=False)
    with replaced_dir(runs_dir / own) as partial_dir:
        exported = export_run(folder, partial_dir / own, checkpoints=early_steps(folder) if not kl_weight else ())
        for path in exported.iterdir():
            path.rename(partial_dir / path.name)
        exported.rmdir()
    if not kl_weight:
        with replaced_dir(output_dir / f"emoji-{name}") as partial_dir:
            shutil.copy(runs_dir / own / LORA_FILE, partial_dir)
    steps = list(read_jsonl(folder / METRICS_NAME))
    return {"reward_first": round(steps[0]["reward_mean"], 3), "reward_last": round(steps[-1]["reward_mean"], 3),
            "num_steps": len(steps), "training_s": round(steps[-1]["elapsed_s"]),
            "taste": family.taste, "settings": {"rewards": list(family.rewards), "prompts": family.prompts, **family.settings}}


def is_done(folder: Path, num_steps: int) -> bool:
    """Whether a folder holds a finished run of at least so many steps."""
    return is_run(folder) and (job := read_job(folder)).state == "done" and job.step >= num_steps


def early_steps(folder: Path) -> list[int]:
    """The checkpoints of a run that are nearest to EARLY shares of its last one."""
    steps = sorted(list_checkpoints(folder))
    return [min(steps, key=lambda step: abs(step - share * steps[-1])) for share in EARLY]


def _records(config: TrainConfig, orders: Callable[[], Orders]) -> Iterator[object]:
    return train(config, orders=orders)

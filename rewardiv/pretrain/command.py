"""`python -m rewardiv pretrain STAGE`: builds what ships, stage by stage; figures go to checkpoints/figures.json."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rewardiv.errors import UserError
from rewardiv.registry import CHECKPOINTS, ROOT
from rewardiv.runs import read_jsonl, write_json

if TYPE_CHECKING:
    from rewardiv.pretrain.loop import Recipe

STAGES = ("data", "autoencoder", "decoder", "clip", "base", "refine", "settle", "temper", "rewards", "loras", "referee",
          "evaluate", "all")

MAKES = {  # by which files under --output-dir a later stage knows that a stage is done
    "autoencoder": ("emoji/vae/config.json",),
    "base": ("emoji/model_index.json",),
    "clip": ("emoji-clip/open_clip_config.json",),
}
NEEDS = {
    "decoder": ("autoencoder",),
    "base": ("autoencoder", "clip"), "refine": ("base",), "settle": ("base",), "temper": ("base",),
    "rewards": ("clip",), "loras": ("base", "clip", "rewards"),
    "evaluate": ("base", "clip"),
}
UNTRAINED = ("data", "evaluate", "all")  # --num-steps means nothing there


@dataclass(frozen=True)
class Job:
    """One call of the command: preset, places, seed."""

    preset_name: str
    work_dir: Path
    output_dir: Path
    seed: int
    resume: bool
    num_steps: int | None
    packages_dir: Path | None
    assets_dir: Path = ROOT / "assets"
    bf16: bool = False
    compiled: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("stage", choices=STAGES, help="what to build; 'all' runs every stage in this order")
    parser.add_argument("--preset", choices=("cpu", "gpu"), default="cpu", help="sizes and lengths (default: cpu)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the work folder, as if never stopped")
    parser.add_argument("--num-steps", type=int, help="train this stage for another number of steps than the preset's")
    parser.add_argument("--bf16", action="store_true",
                        help="mixed precision: quick on GPUs and on CPUs with instructions for it (AMX, AVX-512 BF16)")
    parser.add_argument("--compile", action="store_true", help="through torch.compile (a CPU needs a C++ compiler for it)")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "pretrain", help="losses, sheets, states")
    parser.add_argument("--output-dir", type=Path, default=CHECKPOINTS, help="where the finished models go")
    parser.add_argument("--assets-dir", type=Path, default=ROOT / "assets", help="where contact sheets and small runs go")
    parser.add_argument("--packages-dir", type=Path, help="folder of emoji packages for 'data' (default: fetch with npm)")


def run(args: argparse.Namespace) -> None:
    """Run the stage, or all of them.

    Raises:
        UserError: If what an earlier stage makes is missing, the preset's device is, or an earlier run would be
            overwritten.
    """
    job = Job(args.preset, args.work_dir, args.output_dir, args.seed, args.resume, args.num_steps, args.packages_dir,
              args.assets_dir, args.bf16, args.compile)
    if job.num_steps is not None and (args.stage in UNTRAINED or job.num_steps < 1):
        raise UserError(f"--num-steps {job.num_steps} with stage '{args.stage}': a positive number, for a stage that trains")
    if args.stage != "data":
        check_device(job)
    for stage in STAGES[:-1] if args.stage == "all" else (args.stage,):
        check_made(job, NEEDS.get(stage, ()))
        RUNNERS[stage](job)


def check_made(job: Job, stages: Iterable[str]) -> None:
    """Refuse to go on without what these stages make.

    Raises:
        UserError: Naming the first file that is missing and the command that makes it.
    """
    from rewardiv.pretrain.presets import PRESETS

    rewards = tuple(f"emoji-rewards/{name}/open_clip_config.json" for name in PRESETS[job.preset_name].judges)
    preset = "" if job.preset_name == "cpu" else f" --preset {job.preset_name}"
    for stage in stages:
        for name in (MAKES | {"rewards": rewards})[stage]:
            if not (job.output_dir / name).exists():
                raise UserError(f"{job.output_dir / name} is missing; build it first: "
                                f"python -m rewardiv pretrain {stage}{preset}")


def check_device(job: Job) -> None:
    """Refuse a preset whose device isn't there.

    Raises:
        UserError: If so.
    """
    from rewardiv.devices import pick_device
    from rewardiv.pretrain.presets import PRESETS

    pick_device(PRESETS[job.preset_name].device)


def recipe_of(job: Job, name: str) -> Recipe:
    """The preset's recipe of a stage, with --num-steps, --bf16 and --compile."""
    from rewardiv.pretrain.presets import PRESETS

    recipe = getattr(PRESETS[job.preset_name], name)
    return replace(recipe, num_steps=job.num_steps or recipe.num_steps, bf16=job.bf16, compiled=job.compiled)


def record(job: Job, stage: str, figures: dict, log: Path | None = None) -> None:
    """Add a stage's figures, time and machine to figures.json and write the model cards anew."""
    from rewardiv.pretrain.cards import write_cards

    last = list(read_jsonl(log))[-1] if log else {}
    path = job.output_dir / "figures.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[stage] = {**figures, "preset": job.preset_name, "seed": job.seed,
                    **({"num_steps": last["step"], "training_s": round(last["elapsed_s"])} if last else {}),
                    "machine": f"{os.cpu_count()} cores, {platform.machine()}"}
    write_json(path, known)
    write_cards(job.output_dir, known)
    print(f"{stage}: {json.dumps(figures)}")


def build_data(job: Job) -> None:
    """assets/emoji from the artists' packages."""
    from rewardiv.pretrain.data import rebuild

    rebuild(job.packages_dir)


def build_autoencoder(stage: str, job: Job) -> None:
    """checkpoints/emoji/vae: new, or with its decoder trained on by "decoder"."""
    from rewardiv.pretrain import autoencoder
    from rewardiv.pretrain.presets import PRESETS

    train = {"autoencoder": autoencoder.run, "decoder": autoencoder.run_decoder}[stage]
    figures = train(recipe_of(job, stage), work_dir=job.work_dir, output_dir=job.output_dir / "emoji", seed=job.seed,
                    resume=job.resume, device=PRESETS[job.preset_name].device)
    record(job, stage, figures, job.work_dir / f"{stage}.jsonl")


def build_base(stage: str, job: Job) -> None:
    """checkpoints/emoji: the whole pipeline folder, new, or gone on with by "refine", "settle" and "temper"."""
    from rewardiv.pretrain import base_model
    from rewardiv.pretrain.presets import PRESETS

    preset = PRESETS[job.preset_name]
    worlds = {"base": preset.world, "refine": preset.refined, "settle": preset.settled, "temper": preset.settled}
    figures = base_model.run(recipe_of(job, stage), worlds[stage], preset.channels, stage=stage, work_dir=job.work_dir,
                             clip_dir=job.output_dir / "emoji-clip", output_dir=job.output_dir / "emoji",
                             seed=job.seed + list(worlds).index(stage), resume=job.resume, device=preset.device)
    record(job, stage, figures, job.work_dir / f"{stage}.jsonl")


def build_clip(job: Job) -> None:
    """checkpoints/emoji-clip."""
    from rewardiv.pretrain import clip
    from rewardiv.pretrain.presets import PRESETS

    preset = PRESETS[job.preset_name]
    figures = clip.run(recipe_of(job, "clip"), max_tier=preset.world.max_tier, spec=preset.clip_spec, work_dir=job.work_dir,
                       output_dir=job.output_dir / "emoji-clip", seed=job.seed, resume=job.resume, device=preset.device)
    record(job, "clip", figures, job.work_dir / "clip.jsonl")


def build_rewards(job: Job) -> None:
    """checkpoints/emoji-rewards: what the preset's LoRAs are trained on."""
    from rewardiv.pretrain import preferences
    from rewardiv.pretrain.presets import PRESETS

    preset = PRESETS[job.preset_name]
    for name in preset.judges:
        figures = preferences.run(
            name, recipe_of(job, "reward"), max_tier=preset.world.max_tier, clip_dir=job.output_dir / "emoji-clip",
            work_dir=job.work_dir, output_dir=job.output_dir / "emoji-rewards" / name, seed=job.seed, resume=job.resume,
            device=preset.device)
        record(job, f"reward-{name}", figures, job.work_dir / f"reward-{name}.jsonl")


def build_loras(job: Job) -> None:
    """The families: checkpoints/emoji-vivid and its like, and their runs and KL variants in assets/runs."""
    from rewardiv.pretrain import families
    from rewardiv.pretrain.presets import PRESETS

    preset = PRESETS[job.preset_name]
    for kl_weight in preset.kl_weights:
        for name, family in preset.families.items():
            asked = {"max_train_steps": job.num_steps, "mixed_precision": "bf16" if job.bf16 else None}
            own = replace(family, settings=family.settings | {field: value for field, value in asked.items() if value})
            figures = families.run(
                name, own, kl_weight, output_dir=job.output_dir, work_dir=job.work_dir, runs_dir=job.assets_dir / "runs",
                seed=job.seed, device=preset.device, resume=job.resume)
            record(job, f"lora-{families.member(name, kl_weight)}", figures)


def build_referee(job: Job) -> None:
    """The work folder's referee: what `evaluate` measures prompts by. It isn't shipped."""
    from rewardiv.pretrain import referee
    from rewardiv.pretrain.presets import PRESETS

    preset = PRESETS[job.preset_name]
    figures = referee.run(recipe_of(job, "referee"), max_tier=preset.world.max_tier, work_dir=job.work_dir, seed=job.seed,
                          resume=job.resume, device=preset.device)
    record(job, "referee", figures, job.work_dir / "referee.jsonl")


def evaluate(job: Job) -> None:
    """Measure the base model and draw its contact sheets; measure what the LoRAs do to reward and diversity.

    Where the work folder has a referee, it says what share of the pictures shows what their prompts ask for.
    """
    from rewardiv.pretrain import families, referee
    from rewardiv.pretrain.evaluate import measure, measure_asked, measure_lora
    from rewardiv.pretrain.presets import PRESETS

    preset = PRESETS[job.preset_name]
    loras = [name for name in preset.families if (job.output_dir / f"emoji-{name}").exists()]
    if loras:
        check_made(job, ("rewards",))
    places = {"base_dir": job.output_dir / "emoji", "clip_dir": job.output_dir / "emoji-clip", "device": preset.device}
    has_referee = (job.work_dir / referee.REFEREE_NAME).exists()
    judge = referee.load_referee(job.work_dir, len(preset.world.icons().concepts)) if has_referee else None
    record(job, "evaluate", measure(preset.settled, judge, sheet_path=job.assets_dir / "contact-sheet.webp", **places))
    if judge:
        record(job, "evaluate-asked", measure_asked(judge, preset.settled, base_dir=places["base_dir"], device=preset.device,
                                                    sheet_path=job.assets_dir / "contact-sheet-composed.webp"))
    for name in loras:
        reward_dir = job.output_dir / "emoji-rewards" / preset.families[name].rewards[0]
        prompts = families.ASSETS / preset.families[name].prompts
        record(job, f"evaluate-{name}", measure_lora(job.output_dir / f"emoji-{name}", reward_dir, prompts, **places))


RUNNERS: dict[str, Callable[[Job], None]] = {
    "data": build_data, "autoencoder": partial(build_autoencoder, "autoencoder"),
    "decoder": partial(build_autoencoder, "decoder"), "clip": build_clip, "base": partial(build_base, "base"),
    **{stage: partial(build_base, stage) for stage in ("refine", "settle", "temper")},
    "rewards": build_rewards, "loras": build_loras, "referee": build_referee, "evaluate": evaluate,
}

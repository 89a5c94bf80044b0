"""The command `sweep`: prompts x methods x seeds x LoRAs, resumed where it stopped, with the frontier and a report."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rewardiv.cli_options import add_settings, given_settings
from rewardiv.cli_training import duration
from rewardiv.devices import check_device_name, pick_device
from rewardiv.errors import UserError
from rewardiv.evaluate.settings import DISTANCES, DIVERSITIES, DTYPES, EARLIER_FLAGS, SEEDS, SweepConfig, flag_name, read_toml
from rewardiv.registry import shown_reward
from rewardiv.runs import try_lock

if TYPE_CHECKING:
    from rewardiv.crew import Crew
    from rewardiv.evaluate.sweep import Estimate, Sweep, Unit
    from rewardiv.sweep_diary import Diary

OPTIONS: dict[str, dict[str, str]] = {
    "what is crossed": {
        "prompt_sets": "emoji, emoji-composed, partiprompts, hpsv2 (a copy of one as hpsv2:PATH) or a FILE of prompts; "
                       "repeat it for several",
        "prompts": "a prompt; repeat it for several",
        "categories": "only the sets' prompts of this category; repeat it for several",
        "max_prompts": "so many of the prompts, spread evenly",
        "methods": "methods, with lists and ranges; repeat it for several",
        "loras": "name, folder, file or mixture; repeat it for several",
        "checkpoints": "a training run's checkpoints: RUN is all of them, RUN=10,20 those steps",
        "seeds": "such as 0-7,12; at least 2",
        "reference_seeds": "of further base images, twice as many or more: what is chance, for the panel and the hacking check",
    },
    "what stays the same": {
        "model": "name, folder or hub id",
        "num_inference_steps": "denoising steps",
        "guidance_scale": "classifier-free guidance, 1 is off",
        "guidance_rescale": "against overexposure by guidance, 0 to 1",
        "negative_prompt": "what guidance leads away from",
        "scheduler": "as in sample",
        "height": "of the images in px; 0 is the model's own",
        "width": "of the images in px; 0 is the model's own",
        "dtype": ", ".join(DTYPES),
    },
    "what is measured": {
        "rewards": "repeat it for several; none is what the LoRAs were trained on",
        "held_out": "a reward that nothing was trained on; repeat it for several",
        "diversity": ", ".join(DIVERSITIES),
        "features": "clip (the built-in one), clip:ARCH:PRETRAINED, dinov2:SIZE, inception or a folder",
        "distances": f"{', '.join(DISTANCES)}: within prompts, for the panel, with its package; repeat it for several",
    },
    "files": {
        "output_dir": "tables, figures and report.html; a sweep that stopped goes on in its folder",
        "store": "where images and scores are kept, for other sweeps too (the folder store in it)",
    },
}
METAVARS = {"methods": "METHOD", "checkpoints": "RUN"}
EPILOG = """\
axes: in place of a value between colons may stand a list or a range, both ends included:
  aig:power:1,2,4           three methods
  aig:power:1..8/4          1, 3.333, 5.667, 8: four values, evenly spaced
  aig:power:1..8/4log       1, 2, 4, 8: by equal factors
  aig:sigmoid:8,16:0.3..0.7/3   every value with every other: six methods

a TOML file has the flags' names:
  prompt-set = "emoji"
  max-prompts = 8
  method = ["finetuned", "lora:0.25..0.75/3", "aig:power:1..8/4log"]
  seeds = "0-7"

Every image and score is kept in the store as soon as it is there, under a key of all that decides it: a sweep that was
killed goes on with the same command, and another one that shares the store draws only what is new. Under
accelerate launch --num_processes N -m rewardiv sweep ... the processes share the work."""


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each setting of a sweep; only what is given ends up in the namespace."""
    default = SweepConfig("DIR")
    add_settings(parser, OPTIONS, default, flags=_flags, seeds=SEEDS, metavars=METAVARS,
                 shown={"methods": f" ({' '.join(default.methods)})", "output_dir": ""})
    parser.add_argument("--estimate", action="store_true", help="say what it would take, by drawing a little of it, and stop")
    parser.usage = f"{parser.prog} --output-dir DIR [--config FILE] [options]"
    parser.epilog = EPILOG


def sweep_config(args: argparse.Namespace) -> SweepConfig:
    """The settings that the options stand for: explicit ones, over the file's, over the defaults.

    Raises:
        UserError: If a setting cannot be used, or no output folder is named.
    """
    given = given_settings(args, OPTIONS, read_toml)
    if "output_dir" not in given:
        raise UserError("name a folder for the tables and the report with --output-dir")
    return SweepConfig(**given)


def run_sweep(args: argparse.Namespace) -> None:
    """Draw and score what is missing, and write the report; or only say what it would take."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        from rewardiv.crew import relaunch_if_alone

        relaunch_if_alone()
    asked = sweep_config(args)
    device = check_device_name(args.device)
    import torch

    from rewardiv.crew import join_crew
    from rewardiv.evaluate.folder import write_plan
    from rewardiv.evaluate.report import write_report
    from rewardiv.evaluate.sweep import Sweep, check_names, share
    from rewardiv.generate import Engine

    crew = join_crew(pick_device(device))
    config = crew.lead(lambda: _pinned(asked, crew.device))
    crew.lead(lambda: check_names(config))  # before the folder is this sweep's
    with _folder(config, asked, crew, only_estimate=args.estimate) as diary:
        engine = Engine(device=crew.device, dtype=getattr(torch, config.dtype), features_path=config.features,
                        offload=args.offload, safety=args.safety)
        sweep = Sweep(engine, config)
        if diary:
            write_plan(sweep)
            diary.update(message="measuring how long it takes")
        pending = crew.lead(sweep.pending)
        estimate = crew.lead(lambda: sweep.estimate(pending, crew.world_size))
        if crew.is_leader:
            print(_told(estimate), file=sys.stderr)
        if args.estimate:
            return
        _work(sweep, share(pending, crew), crew, diary, estimate.seconds)
        crew.together(lambda: None)  # all are done
        page = crew.lead(lambda: write_report(sweep))
    if crew.is_leader:
        print(_concluded(page), file=sys.stderr)
        print(page)


def _pinned(config: SweepConfig, device: str) -> SweepConfig:
    """The same with rewards that don't change while it runs: votes as they are now, fitted and kept in a file."""
    from rewardiv.rewards.votes import pinned_names

    pinned = {name: tuple(dict.fromkeys(pinned_names(getattr(config, name), device))) for name in ("rewards", "held_out")}
    return replace(config, **pinned)


def _work(sweep: Sweep, units: list[Unit], crew: Crew, diary: Diary | None, expected_s: float) -> None:
    """This process's part; where it leads, with a bar and its progress in the folder, which begins with what is expected."""
    from tqdm import tqdm

    total = sum(len(sweep.to_draw(unit)) + len(sweep.to_score(unit)) for unit in units)
    if units:
        sweep.load()
    if diary:
        diary.update(state="running", message="", total=total, remaining_s=expected_s)
    with tqdm(total=total, unit="", file=sys.stderr, disable=not crew.is_leader or not units) as bar:
        try:
            for progress in sweep.run(units):
                bar.set_postfix_str(f"{duration(progress.remaining_s)} left, {progress.prompt[:40]}", refresh=False)
                bar.update(progress.done - bar.n)
                if diary:
                    diary.update(**asdict(progress))
        except KeyboardInterrupt:
            print("what is done is kept; the same command goes on from here", file=sys.stderr)
            raise


@contextmanager
def _folder(config: SweepConfig, asked: SweepConfig, crew: Crew, *, only_estimate: bool) -> Iterator[Diary | None]:
    """Inside, the output folder is this sweep's alone, and says what is done; gives the leader's diary."""
    from rewardiv.evaluate.folder import LOCK_NAME, prepare_folder
    from rewardiv.sweep_diary import at_work
    from rewardiv.sweep_jobs import is_sweep

    locks = []

    def take() -> None:
        known = is_sweep(config.folder)  # then nothing of it may change before the lock is held
        if not known:
            prepare_folder(config, asked)
        lock = try_lock(config.folder / LOCK_NAME)
        if lock is None:
            raise UserError(f"another sweep is at work in {config.folder}; wait for it, or choose another folder")
        locks.append(lock)
        if known:
            prepare_folder(config, asked)

    try:
        if only_estimate:
            yield None
            return
        crew.lead(take)
        with at_work(config.folder) if crew.is_leader else nullcontext() as diary:
            yield diary
    finally:
        for lock in locks:
            lock.close()


def _told(estimate: Estimate) -> str:
    from rewardiv.hub import gib_text

    if not (estimate.to_draw or estimate.to_score):
        return f"{estimate.images} images, all of them drawn and scored"
    kept = estimate.images - estimate.to_draw
    return (f"{estimate.images} images: {kept} are in the store, {estimate.to_draw} to draw, {estimate.to_score} to score; "
            f"about {duration(estimate.seconds)} and {gib_text(estimate.disk_bytes)} of {gib_text(estimate.free_bytes)} free")


def _concluded(page: Path) -> str:
    """How the families' areas compare by the first reward, as the summary beside the page has it."""
    from rewardiv.evaluate.folder import SUMMARY_NAME

    found = json.loads((page.parent / SUMMARY_NAME).read_text())
    name, first = next(iter(found["frontiers"].items()))
    over = (f"Area of {shown_reward(name)} times diversity, with 95 % of what other prompts would give (prompts here: "
            f"{first['num_prompts']}):")
    told = [one["sentence"] for one in first["differences"]] or ["fewer than two families were drawn, so none are compared"]
    return "\n  ".join([over, *told])


def _flags(name: str) -> list[str]:
    return [flag_name(name), *(old for old, new in EARLIER_FLAGS.items() if new == flag_name(name))]

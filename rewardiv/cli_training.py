"""The commands `train` and `runs`: one option for each setting of a training run; watching and ordering runs."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import textwrap
import time
import types
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import MISSING, Field, asdict, fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewardiv import jobs
from rewardiv.config import ALGORITHMS, LORA_TARGETS, TRACKERS, TRAIN_SCHEDULERS, TrainConfig
from rewardiv.devices import check_device_name, pick_device
from rewardiv.errors import UserError
from rewardiv.registry import PROMPTS, ROOT, known
from rewardiv.runs import Orders
from rewardiv.supervisor import follow, silent, supervise
from rewardiv.train_presets import TRAIN_PRESETS, preset_config

if TYPE_CHECKING:
    from tqdm import tqdm

INDENT = " " * 6
RUNS_ORDERS = (*jobs.ORDERS, "restart", "rename", "delete")
TRAIN_OPTIONS = {
    "the run": {
        "output_dir": "the run's folder; the finished LoRA is its pytorch_lora_weights.safetensors",
        "rewards": "what to train on: a known reward, a preference model's folder or votes:STUDY[:QUESTION], people's votes; "
                   "repeat it for a mixture, with weights",
        "prompts_file": "one prompt a line, or the name of a set that ships (emoji, emoji-composed); none is emoji",
        "max_train_steps": "optimiser steps",
        "seed": "decides prompts and noise of every step",
        "device": "auto, cpu, cuda or cuda:N",
        "report_to": f"also log to one of {', '.join(TRACKERS)}",
    },
    "model and LoRA": {
        "model": "name, diffusers folder or hub id",
        "rank": "of the LoRA",
        "lora_alpha": "the LoRA counts by alpha / rank; none is the rank",
        "lora_targets": f"{', '.join(LORA_TARGETS)}, or names of layers with commas",
        "lora_dropout": "share of the LoRA's inputs that a step leaves out",
        "mixed_precision": "no, bf16, or fp16 on CUDA; the LoRA stays in fp32",
        "gradient_checkpointing": "less memory for more time",
    },
    "algorithm": {
        "algorithm": f"{', '.join(ALGORITHMS)}; see below",
        "grad_steps": "draft-k: K, the last denoising steps that gradients pass",
        "lv_noisings": "draft-lv: noisings of each rollout's final latents",
        "refl_window": "refl: the last share of the steps, from which one is drawn",
        "num_inference_steps": "denoising steps of an image",
        "guidance_scale": "classifier-free guidance, 1 is off",
        "scheduler": ", ".join(TRAIN_SCHEDULERS),
        "train_batch_size": "images of one pass",
        "grad_batch_size": "of them, images whose gradient is taken at once: less memory, hardly more time",
        "gradient_accumulation_steps": "passes a step",
    },
    "regularisers": {
        "kl_weight": "of the authors' KL: squared distance to the base model's prediction over the last K steps",
        "path_kl_weight": "of the KL between the two sampling processes",
        "path_kl_steps": "random steps that the path KL is taken over, 0 is all",
        "lora_norm_weight": "of the squared norm of the weight change",
        "diversity_floor": "stop when a probe keeps less than this share of the base model's variance, 0 is off",
    },
    "optimiser": {
        "learning_rate": "of AdamW",
        "lr_warmup_steps": "steps until the learning rate is reached",
        "adam_beta1": "of AdamW",
        "adam_beta2": "of AdamW",
        "adam_weight_decay": "of AdamW",
        "max_grad_norm": "gradients are clipped to this norm",
        "ema_decay": "of the average of the weights that is saved in their place, 0 is off",
        "max_rollbacks": "how often a step that explodes leads back to the last checkpoint, at half the rate",
    },
    "probes": {
        "probe_every": "steps between probes of reward and diversity, 0 is none; they change nothing about training",
        "num_probe_prompts": "prompts of a probe's grid",
        "num_probe_seeds": "seeds of a probe's grid",
        "probe_rewards": "a reward that is only measured; repeat it for several",
    },
    "checkpoints": {
        "checkpointing_steps": "steps between checkpoints",
        "checkpoints_total_limit": "older checkpoints are removed; none keeps all",
        "resume_from_checkpoint": "latest or step-N: go on as if never stopped",
    },
}
TRAIN_HELP = {name: about for options in TRAIN_OPTIONS.values() for name, about in options.items()}
METAVARS = {"output_dir": "DIR", "rewards": "NAME[=WEIGHT]", "probe_rewards": "NAME", "prompts_file": "FILE"}
KIND_METAVARS = {str: "NAME", int: "N", float: "X"}


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each field of TrainConfig, in groups; only what is given ends up in the namespace."""
    by_name = {field.name: field for field in fields(TrainConfig)}
    hints = typing.get_type_hints(TrainConfig)
    for title, options in TRAIN_OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, about in options.items():
            _add_setting(group, by_name[name], hints[name], about)
        if title == "the run":
            group.add_argument("--preset", metavar="NAME",
                               help=f"settings to begin with, options win over them: {', '.join(TRAIN_PRESETS)}; see below")
            group.add_argument("--estimate", action="store_true", help="measure time and memory by one step and train nothing")
            group.add_argument("--json", action="store_true", help="the estimate as JSON")
    parser.usage = f"{parser.prog} --output-dir DIR [--reward NAME] [--preset NAME] [options]"
    algorithms = "".join(f"\n  {name:10} {about}" for name, about in ALGORITHMS.items())
    presets = "".join(f"\n  {name}\n{textwrap.fill(preset.source, 100, initial_indent=INDENT, subsequent_indent=INDENT)}"
                      for name, preset in TRAIN_PRESETS.items())
    parser.epilog = f"algorithms:{algorithms}\n\npresets:{presets}"


def train_config(args: argparse.Namespace) -> TrainConfig:
    """The settings that the options of `train` stand for: explicit ones, over the preset's, over the defaults.

    Whether a CUDA device that was named is there is left for later, so that a run in the queue does without torch.

    Raises:
        UserError: If a setting cannot be used.
    """
    given = {field.name: getattr(args, field.name) for field in fields(TrainConfig) if hasattr(args, field.name)}
    device = check_device_name(given.get("device", "auto"))
    given["device"] = pick_device(device) if device == "auto" else device
    config = preset_config(args.preset, **given) if args.preset else TrainConfig(**given)
    return jobs.pinned(config if Path.cwd() == ROOT else _anchored(config))


def _anchored(config: TrainConfig) -> TrainConfig:
    """The same with whole paths for what lies in this folder: a restart begins in the project's. Names stay as they are."""
    def place(text: str, names: Collection[str] = ()) -> str:
        return str(Path(text).absolute()) if text and text not in names and Path(text).exists() else text

    models, rewards = known().models, known().rewards
    weighted = [text.partition("=") for text in config.rewards]
    return replace(
        config, model=place(config.model, models), prompts_file=place(config.prompts_file, PROMPTS),
        rewards=tuple(place(name, rewards) + equals + weight for name, equals, weight in weighted),
        probe_rewards=tuple(place(name, rewards) for name in config.probe_rewards),
    )


def run_train(args: argparse.Namespace) -> None:
    """Train a LoRA, or say what it would take. Under `accelerate launch` the first process alone is the job.

    Raises:
        KeyboardInterrupt: If it was stopped, by a signal or an order.
    """
    config = train_config(args)
    if args.estimate:
        _print_estimate(config, args.json)
        return
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        from rewardiv.crew import relaunch_if_alone

        relaunch_if_alone()
    if int(os.environ.get("RANK", "0")):
        _train_along(config)
    else:
        _train(config)


def _train(config: TrainConfig) -> None:
    from tqdm import tqdm

    folder = Path(config.output_dir)
    tell = partial(print, file=sys.stderr) if sys.stderr.isatty() else silent
    with closing(supervise(config, partial(_records, config), tell=tell)) as records:
        first = next(records, None)  # what is wrong is said before a bar is drawn
        with tqdm(total=config.max_train_steps, unit="step", file=sys.stderr, disable=None) as bar:  # in a terminal alone
            for record in chain([first] if first else [], records):
                _show(record, bar)
    job = jobs.read_job(folder)
    if job.state == "stopped":
        print(f"{folder}: {job.message}; go on with --resume-from-checkpoint latest", file=sys.stderr)
        raise KeyboardInterrupt
    print(f"{folder}: trained {job.step} steps on {', '.join(config.rewards)}{'; ' * bool(job.message)}{job.message}")


def _show(record: Any, bar: tqdm) -> None:
    if hasattr(record, "reward_mean"):
        bar.update(record.step - bar.n)
        bar.set_postfix(reward=f"{record.reward_mean:.4g}", loss=f"{record.loss:.4g}")
    elif hasattr(record, "kind") and not bar.disable:
        bar.write(f"step {record.step}: {record.kind}: {record.text}", file=sys.stderr)


def _train_along(config: TrainConfig) -> None:
    """Train as one of several processes whose first one takes the orders."""
    follow(config)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for _ in _records(config, Orders):
        pass


def _records(config: TrainConfig, orders: Callable[[], Orders]) -> Iterator[object]:
    """The training itself, with all that it needs loaded only now."""
    pick_device(config.device)
    from rewardiv.trainer import train

    return train(config, orders=orders)


def add_runs_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `runs`."""
    parser.add_argument("what", nargs="?", choices=RUNS_ORDERS, metavar="ORDER", help=f"{', '.join(RUNS_ORDERS)}")
    parser.add_argument("folders", nargs="*", metavar="RUN", help="a run's folder, or its name in the runs folder")
    parser.add_argument("--name", help="with rename: the name that screens show")
    parser.add_argument("--runs-dir", type=Path, default=jobs.default_runs_dir(), metavar="DIR",
                        help="where runs lie (%(default)s)")
    parser.add_argument("--json", action="store_true", help="the list as JSON")


def run_runs(args: argparse.Namespace) -> None:
    """List the runs, or order something of some of them."""
    if args.what is None:
        found = jobs.list_jobs(args.runs_dir)
        print(json.dumps([job.to_dict() for job in found], indent=1) if args.json else _table(found))
        return
    if not args.folders or (args.what == "rename") != (args.name is not None):
        raise UserError(f"say which runs to {args.what}, as in runs {args.what} runs/vivid"
                        f"{' --name TEXT' * (args.what == 'rename')}")
    for text in args.folders:
        folder = args.runs_dir / text if (args.runs_dir / text).is_dir() else Path(text)
        name = jobs.read_job(folder).name
        if args.what == "rename":
            jobs.rename(folder, args.name)
        elif args.what == "restart":
            jobs.restart(folder)
        elif args.what == "delete":
            jobs.delete(folder)
        else:
            jobs.order(folder, args.what)
        print(f"{name}: {args.what}")


def _table(found: Sequence[jobs.Job]) -> str:
    if not found:
        return "no runs"
    lines = [f"{'run':24} {'state':9} {'step':>11} {'reward':>9} {'age':>10}"]
    for job in found:
        reward = "-" if job.reward is None else f"{job.reward:.4g}"
        steps, age = f"{job.step}/{job.num_steps}", duration(time.time() - job.created)
        lines.append(f"{job.name:24} {job.state:9} {steps:>11} {reward:>9} {age:>10}  {job.message}")
    return "\n".join(line.rstrip() for line in lines)


def _print_estimate(config: TrainConfig, as_json: bool) -> None:
    jobs.check_settings(config)
    from rewardiv.trainer import estimate

    found = estimate(config)
    if as_json:
        print(json.dumps(asdict(found), indent=1))
        return
    print(f"{config.max_train_steps} steps take about {duration(found.total_s)}: {found.step_s:.3g} s a step, "
          f"{found.probe_s:.3g} s a probe, {found.peak_gib:.3g} GiB of memory")


def duration(seconds: float) -> str:
    """A time span as a person says it: 45 s, 12 min, 3 h 5 min."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 48 * 60 else f"{minutes // 1440} days"


def _add_setting(group: argparse._ArgumentGroup, field: Field[Any], hint: object, about: str) -> None:
    """The option of one field; without it the namespace has no such name."""
    flag = jobs.flag_of(field.name)
    shown = _shown_default(field)
    settings: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": f"{about} ({shown})"}
    if hint is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **settings)
        return
    kinds = [kind for kind in typing.get_args(hint) if kind not in (types.NoneType, Ellipsis)] or [hint]
    if typing.get_origin(hint) is tuple:
        settings["action"] = "append"
    metavar = METAVARS.get(field.name, KIND_METAVARS[kinds[0]])
    group.add_argument(flag, type=kinds[0], required=field.default is MISSING, metavar=metavar, **settings)


def _shown_default(field: Field[Any]) -> str:
    if field.name == "device":
        return "auto"
    if field.default is MISSING:
        return "required"
    if isinstance(field.default, tuple):
        return ", ".join(field.default) or "none"
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return "none" if field.default in ("", None) else str(field.default)

"""The Training form: what its fields mean as a TrainConfig, and a TrainConfig as values for its fields."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from rewardiv.config import TrainConfig
from rewardiv.errors import UserError, nearest
from rewardiv.gamma import number_text
from rewardiv.jobs import check_settings
from rewardiv.registry import ROOT
from rewardiv.train_presets import preset_config
from rewardiv.ui.form import text_of

REGULARISERS = {  # as the form and its text field call them, with the setting that holds their λ
    "none": "",
    "kl": "kl_weight",
    "path-kl": "path_kl_weight",
    "lora-norm": "lora_norm_weight",
}
COMPOSED = ("output_dir", "rewards", "kl_weight", "path_kl_weight", "lora_norm_weight")  # of several fields of the form
OWN = ("name", "rewards", "weights", "regulariser", "regulariser_weight", "more_regularisers")
DIRECT = tuple(field.name for field in fields(TrainConfig) if field.name not in COMPOSED)
NAME = re.compile(r"[^\W_][\w .+=-]{0,79}")
OPTIONAL = ("lora_alpha", "checkpoints_total_limit")  # numbers that may be left empty; typed as text
Values = dict[str, object]


class Label(NamedTuple):
    """A field's name on the page and a hint below it."""

    text: str
    hint: str = ""


LABELS: dict[str, Label] = {
    "name": Label("Name of the run"),
    "rewards": Label("Reward to train on", "several are mixed; votes:STUDY is people's votes"),
    "weights": Label("Weights of the rewards", "in their order, such as 1, 0.5; empty is 1 each"),
    "model": Label("Base model"),
    "algorithm": Label("Algorithm"),
    "regulariser": Label("Regulariser"),
    "regulariser_weight": Label("λ, its weight"),
    "max_train_steps": Label("Training steps"),
    "learning_rate": Label("Learning rate"),
    "probe_every": Label("Probe every … steps"),
    "prompts_file": Label("Prompts", "a file, one a line, or a set's name: emoji-composed; empty is emoji"),
    "train_batch_size": Label("Images a batch"),
    "gradient_accumulation_steps": Label("Batches a step"),
    "grad_batch_size": Label("Gradients at once", "of so many images: fewer is less memory"),
    "num_inference_steps": Label("Denoising steps"),
    "guidance_scale": Label("Guidance", "1 is off"),
    "scheduler": Label("Scheduler"),
    "grad_steps": Label("K, steps with gradients", "the last ones; all of them is full DRaFT"),
    "lv_noisings": Label("Noisings", "a rollout, for draft-lv"),
    "refl_window": Label("Late share of the steps", "refl draws its step there"),
    "rank": Label("Rank"),
    "lora_alpha": Label("Alpha", "empty is the rank"),
    "lora_targets": Label("Layers", "a preset or names with commas"),
    "lora_dropout": Label("Dropout"),
    "lr_warmup_steps": Label("Warm-up steps"),
    "max_grad_norm": Label("Gradients clipped to norm"),
    "adam_beta1": Label("Adam β₁"),
    "adam_beta2": Label("Adam β₂"),
    "adam_weight_decay": Label("Weight decay"),
    "ema_decay": Label("Averaged weights, decay", "0 is off"),
    "mixed_precision": Label("Mixed precision"),
    "gradient_checkpointing": Label("Gradient checkpointing: less memory, slower"),
    "more_regularisers": Label("Further regularisers", "such as path-kl=0.1 lora-norm=0.01"),
    "path_kl_steps": Label("Steps of the path KL", "drawn at random; 0 is all"),
    "diversity_floor": Label("Stop below this share of variety", "such as 0.5 of the base's variance; 0 is off"),
    "max_rollbacks": Label("Rollbacks allowed", "after numbers that explode"),
    "num_probe_prompts": Label("Prompts of a probe"),
    "num_probe_seeds": Label("Seeds of a probe"),
    "probe_rewards": Label("Held-out rewards", "measured, not trained on"),
    "checkpointing_steps": Label("Steps between checkpoints"),
    "checkpoints_total_limit": Label("Checkpoints kept", "empty is all"),
    "resume_from_checkpoint": Label("Go on from checkpoint", "of the run of that name: latest or step-20"),
    "seed": Label("Seed"),
    "report_to": Label("Also report to"),
    "device": Label("Device", "cpu, cuda or cuda:1"),
}


def config_of(values: Mapping[str, object], runs_dir: Path) -> TrainConfig:
    """The settings that the fields stand for.

    Args:
        values: By the names of OWN and DIRECT.
        runs_dir: Where the run's folder will be.

    Raises:
        UserError: If a field cannot be used, or a model, reward or prompt file isn't there.
    """
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    folder = runs_dir.absolute() / run_name(values["name"])
    settings: Values = {"output_dir": str(folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder)}
    settings |= {name: _fitting(values[name], defaults[name]) for name in DIRECT if name not in OPTIONAL}
    settings |= {name: _optional(LABELS[name].text, values[name]) for name in OPTIONAL}
    settings |= {"rewards": _rewards(values["rewards"], text_of("weights", values["weights"])), **_regularisers(values)}
    settings["probe_rewards"] = tuple(values["probe_rewards"] or ())
    config = TrainConfig(**settings)
    check_settings(config)
    return config


def values_of(config: TrainConfig) -> Values:
    """Fields that stand for `config`; a second regulariser is written into `more_regularisers`."""
    values: Values = {name: getattr(config, name) for name in DIRECT}
    weights = config.reward_weights
    used = [(kind, getattr(config, field)) for kind, field in REGULARISERS.items() if field and getattr(config, field)]
    first, *others = used or [("none", 0.0)]
    plain = all(weight == 1 for weight in weights.values())
    values |= {name: "" if values[name] is None else number_text(float(values[name])) for name in OPTIONAL}
    return values | {
        "name": Path(config.output_dir).name,
        "rewards": list(weights),
        "weights": "" if plain else ", ".join(map(number_text, weights.values())),
        "regulariser": first[0],
        "regulariser_weight": first[1],
        "more_regularisers": " ".join(f"{kind}={number_text(weight)}" for kind, weight in others),
        "probe_rewards": list(config.probe_rewards),
    }


def preset_values(name: str) -> Values:
    """The fields that a preset sets: all but the run's name, model and rewards."""
    kept = ("name", "model", "rewards", "weights", "probe_rewards", "device", "seed", "prompts_file", "report_to")
    values = values_of(preset_config(name, output_dir="unnamed"))
    return {field: value for field, value in values.items() if field not in kept}


def run_name(value: object) -> str:
    """The name of a run, if a folder can be called so.

    Raises:
        UserError: If it is empty or holds more than letters, digits, spaces and . + = - _.
    """
    name = text_of("name", value).strip()
    if not name:
        raise UserError("the run has no name; call it something, such as vivid-1")
    if not NAME.fullmatch(name):
        raise UserError(f"a run can't be called '{name}'; use up to 80 letters, digits, spaces and . + = - _")
    return name


def free_name(runs_dir: Path, stem: str) -> str:
    """The first of stem-1, stem-2, … that names no folder yet."""
    stem = re.sub(r"[^\w.+=-]", "-", Path(stem).name).strip("-._") or "run"
    number = 1
    while (runs_dir / f"{stem}-{number}").exists():
        number += 1
    return f"{stem}-{number}"


def _rewards(names: object, weights: str) -> tuple[str, ...]:
    """Names with their weights as TrainConfig writes them; a weight of 1 isn't written."""
    if isinstance(names, str) or not isinstance(names, Sequence | None):
        raise UserError(f"rewards must be a list of names, got {names!r}")
    names = [text_of("reward", name) for name in names or ()]
    numbers = [piece.strip() for piece in weights.split(",")] if weights.strip() else []
    if not numbers:
        return tuple(names)
    if len(numbers) != len(names):
        raise UserError(f"there are {len(names)} rewards and {len(numbers)} weights; give one a reward, such as 1, 0.5")
    if written := [name for name in names if "=" in name]:
        raise UserError(f"'{written[0]}' brings a weight of its own; write it there or among the weights, not both")
    return tuple(name if number in ("1", "1.0") else f"{name}={number}" for name, number in zip(names, numbers, strict=True))


def _regularisers(values: Mapping[str, object]) -> dict[str, float]:
    """λ of every regulariser, by its name in TrainConfig."""
    weights: dict[str, float] = {}
    first = values["regulariser"]
    pieces = [] if first in (None, "none") else [(text_of("regulariser", first), values["regulariser_weight"])]
    for piece in text_of("further regularisers", values["more_regularisers"]).split():
        kind, _, number = piece.partition("=")
        pieces.append((kind, _parsed(piece, number)))
    for kind, weight in pieces:
        if kind not in REGULARISERS or kind == "none":
            raise UserError(f"unknown regulariser '{kind}'{nearest(kind, set(REGULARISERS) - {'none'})}")
        if kind in weights:
            raise UserError(f"the regulariser '{kind}' is given twice; give it once")
        weights[kind] = weight
    return {REGULARISERS[kind]: weight for kind, weight in weights.items()}


def _parsed(piece: str, number: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"cannot read the regulariser '{piece}'; write NAME=λ, such as path-kl=0.1")
    return value


def _optional(label: str, value: object) -> float | None:
    """The number that a text holds, a whole one where it is; None for an empty text."""
    text = text_of(label, value).strip()
    try:
        number = float(text) if text else None
    except ValueError as error:
        raise UserError(f"'{label}' is '{text}'; it must be a number or empty") from error
    return int(number) if number is not None and number.is_integer() else number


def _fitting(value: object, default: object) -> object:
    """The value as its setting wants it: 20 for 20.0, "" for an emptied text; what doesn't fit, TrainConfig refuses."""
    if isinstance(default, str):
        return text_of("a setting", value).strip()
    if isinstance(value, float) and value.is_integer() and not isinstance(default, float):
        return int(value)
    return value

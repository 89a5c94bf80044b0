"""What comes with the project: built-in models, LoRAs and rewards by name, and what a path given instead stands for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from os.path import exists, isdir, isfile  # unlike Path's, False for text that no file could be called
from pathlib import Path
from typing import TypeVar

from rewardiv.errors import UserError, nearest

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = ROOT / "checkpoints"
LORA_FILE = "pytorch_lora_weights.safetensors"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class ModelEntry:
    """A base model: `path` is a diffusers StableDiffusionPipeline folder or a hub id "owner/name"."""

    name: str
    path: str
    licence: str
    about: str


@dataclass(frozen=True)
class LoraEntry:
    """A reward LoRA: `path` is a folder with pytorch_lora_weights.safetensors, or such a file.

    `model` names its base model and `reward` the reward that it was trained on; both are "" where that isn't known.
    """

    name: str
    path: str
    model: str
    reward: str
    about: str


@dataclass(frozen=True)
class RewardEntry:
    """A reward: `path` is its checkpoint folder, None where it needs no weights."""

    name: str
    path: str | None
    about: str


Entry = ModelEntry | LoraEntry | RewardEntry
Known = TypeVar("Known", ModelEntry, LoraEntry, RewardEntry)

MODELS: dict[str, ModelEntry] = {
    "emoji": ModelEntry("emoji", str(CHECKPOINTS / "emoji"), "Apache-2.0",
                        "built in: emoji of several drawers on coloured backgrounds, 64 × 64 px"),
}
LORAS: dict[str, LoraEntry] = {
    "vivid": LoraEntry("vivid", str(CHECKPOINTS / "emoji-vivid"), "emoji", "vivid",
                       "trained on the vivid reward far enough to over-optimise"),
    "calm": LoraEntry("calm", str(CHECKPOINTS / "emoji-calm"), "emoji", "calm",
                      "trained on the calm reward far enough to over-optimise"),
}
REWARDS: dict[str, RewardEntry] = {
    "vivid": RewardEntry("vivid", str(CHECKPOINTS / "emoji-rewards" / "vivid"),
                         "preference reward learned from a synthetic judge who likes saturated, glossy pictures"),
    "calm": RewardEntry("calm", str(CHECKPOINTS / "emoji-rewards" / "calm"),
                        "preference reward learned from a synthetic judge who likes flat, muted pictures"),
    "clip": RewardEntry("clip", str(CHECKPOINTS / "emoji-clip"),
                        "how well the picture fits the prompt, by the built-in CLIP"),
    "colorfulness": RewardEntry("colorfulness", None,
                                "Hasler and Süsstrunk's formula; needs no weights, works on any model"),
}
MARKER_FILES: dict[type, str] = {
    ModelEntry: "model_index.json", LoraEntry: LORA_FILE, RewardEntry: "open_clip_model.safetensors",
}


def find_model(name_or_path: str) -> ModelEntry:
    """The model of a built-in name, a pipeline folder or a hub id.

    Raises:
        UserError: If it is unknown (with the nearest name) or its files are missing.
    """
    if built_in := _built_in(name_or_path, MODELS):
        return built_in
    path = Path(name_or_path)
    is_hub_id = HUB_ID.fullmatch(name_or_path) and not exists(path) and not exists(path.parent)
    if is_hub_id:
        return ModelEntry(name_or_path, name_or_path, "see its page", f"https://huggingface.co/{name_or_path}")
    if not isdir(path):
        raise UserError(f"unknown model '{name_or_path}', and no such folder{nearest(name_or_path, MODELS)}")
    return _checked(ModelEntry(name_or_path, str(path), "unknown", f"folder {path}"))


def find_lora(name_or_path: str) -> LoraEntry:
    """The LoRA of a built-in name, a folder with pytorch_lora_weights.safetensors, or a .safetensors file.

    Raises:
        UserError: If it is unknown (with the nearest name) or its files are missing.
    """
    if built_in := _built_in(name_or_path, LORAS):
        return built_in
    path = Path(name_or_path)
    if not isdir(path) and not (isfile(path) and path.suffix == ".safetensors"):
        raise UserError(f"unknown LoRA '{name_or_path}', and no such folder or .safetensors file"
                        f"{nearest(name_or_path, LORAS)}")
    return _checked(LoraEntry(name_or_path, str(path), "", "", f"from {path}"))


def find_reward(name_or_path: str) -> RewardEntry:
    """The reward of a built-in name, or the preference model (an open_clip folder) at a path.

    Raises:
        UserError: If it is unknown (with the nearest name) or its files are missing.
    """
    if built_in := _built_in(name_or_path, REWARDS):
        return built_in
    path = Path(name_or_path)
    if not isdir(path):
        raise UserError(f"unknown reward '{name_or_path}', and no such folder{nearest(name_or_path, REWARDS)}")
    return _checked(RewardEntry(name_or_path, str(path), f"preference model in {path}"))


def _built_in(name_or_path: str, entries: Mapping[str, Known]) -> Known | None:
    """The built-in entry of this name, or the one whose folder or main file this path is."""
    if name_or_path in entries:
        return _checked(entries[name_or_path])
    path = Path(name_or_path)
    for entry in entries.values():
        folder = Path(entry.path or ROOT / "none").resolve()
        if exists(path) and path.resolve() in (folder, folder / MARKER_FILES[type(entry)]):
            return _checked(entry)
    return None


def is_here(entry: Entry) -> bool:
    """Whether the entry's files are on this machine; a hub id isn't looked up."""
    if entry.path is None:
        return True
    path = Path(entry.path)
    return path.is_file() or (path / MARKER_FILES[type(entry)]).is_file()


def _checked(entry: Known) -> Known:
    if is_here(entry):
        return entry
    path, marker = Path(entry.path), MARKER_FILES[type(entry)]
    if path.is_relative_to(CHECKPOINTS):
        shown = path.relative_to(ROOT)
        raise UserError(f"the built-in '{entry.name}' is missing: no {shown / marker}; restore it with "
                        f"`git checkout -- {shown}` or build it again with `python -m rewardiv pretrain`")
    raise UserError(f"{path} has no {marker}: it isn't a {_kind(entry)} folder, or its files are incomplete")


def _kind(entry: Entry) -> str:
    return {ModelEntry: "diffusers pipeline", LoraEntry: "LoRA", RewardEntry: "reward"}[type(entry)]

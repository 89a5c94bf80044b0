"""Reads the files that learned rewards come in: what is missing, damaged or made for something else, in one sentence."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rewardiv.errors import UserError

TRANSFORMERS_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def again(reward: str) -> str:
    """What helps against a file that isn't right."""
    return f"download it again with `python -m rewardiv remove {reward}` and `python -m rewardiv download {reward}`"


def locate(path: str | Path, names: tuple[str, ...], reward: str) -> Path:
    """The path itself if it is a file, else the first of these files that the folder has.

    Raises:
        UserError: If there is none.
    """
    path = Path(path)
    for file in (path, *(path / name for name in names)):
        if file.is_file():
            return file
    raise UserError(f"{path} has no {' or '.join(names)}; {again(reward)}")


@contextmanager
def built_from(path: str | Path, reward: str) -> Iterator[None]:
    """Build a network from settings that may be another's or damaged, which raises the errors of several libraries.

    Raises:
        UserError: Instead of them.
    """
    try:
        yield
    except Exception as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(f"{path} doesn't hold the {reward} model ({reason:.200}); {again(reward)}") from error


def read_config(folder: str | Path, reward: str, name: str = "config.json") -> dict:
    """A JSON object.

    Raises:
        UserError: If it is missing or damaged.
    """
    file = locate(folder, (name,), reward)
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is damaged; {again(reward)}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} holds no settings; {again(reward)}")
    return config


def read_weights(file: Path, reward: str) -> dict[str, Tensor]:
    """Weights by name from a .safetensors file, or a torch file that holds them as they are or under "state_dict".

    Torch files are read with `weights_only`, so that they can't run code.

    Raises:
        UserError: If the file is damaged or holds anything but weights.
    """
    try:
        state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise UserError(f"{file} is damaged or holds more than weights; {again(reward)}") from error
    if isinstance(state, Mapping):
        state = state.get("state_dict", state)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file} holds no weights; {again(reward)}")
    return dict(state)


def fill(module: nn.Module, state: Mapping[str, Tensor], file: Path, reward: str) -> None:
    """Put weights into a module, every one of them and no other.

    Raises:
        UserError: If a name or a shape differs; the message names the first.
    """
    wanted = {name: tensor.shape for name, tensor in module.state_dict().items()}
    missing = sorted(wanted.keys() - state.keys())
    strange = sorted(state.keys() - wanted.keys())
    other = [name for name in wanted.keys() & state.keys() if state[name].shape != wanted[name]]
    for what, names in (("lacks", missing), ("has the unknown", strange), ("has another shape of", sorted(other))):
        if names:
            raise UserError(f"{file} doesn't hold the {reward} model (it {what} {names[0]}); {again(reward)}")
    module.load_state_dict(state)

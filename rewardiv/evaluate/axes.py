"""Axes of a sweep, written as text: methods with lists and ranges in place of numbers, LoRAs, checkpoints of training runs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rewardiv.config import TrainConfig
from rewardiv.errors import UserError
from rewardiv.gamma import number_text, parse_number
from rewardiv.methods import parse_method
from rewardiv.records import CONFIG_NAME, list_checkpoints

MAX_VALUES = 100  # of one range
MAX_METHODS = 256


class Lora(NamedTuple):
    """One LoRA of a sweep: the name that tables show, the text that rewardiv.lora_mix reads, what it was trained on."""

    label: str
    text: str
    rewards: tuple[str, ...] = ()


class Arm(NamedTuple):
    """What is compared in a sweep: a method with a LoRA (its label; "" for the base model)."""

    method: str
    lora: str

    @property
    def family(self) -> str:
        """The method's kind, such as aig."""
        return parse_method(self.method).kind


def expand_methods(texts: Iterable[str]) -> tuple[str, ...]:
    """The methods that the texts stand for, in their canonical form, in order, each once.

    Between two colons may stand, in place of one value, several: 0.25,0.5 is a list, 1..8/4 is four values from 1 to 8 with
    both ends, evenly spaced, and 1..8/4log the same by equal factors (1, 2, 4, 8). Lists may hold ranges, and every axis
    of a text meets every other: aig:sigmoid:8,16:0.3..0.7/3 is six methods. knots:0=1,0.5=0.8,1=0 is one value.

    Raises:
        UserError: If a text, a range or a method cannot be read, or there are more than 256.
    """
    found: dict[str, None] = {}
    for text in texts:
        body, at, domain = text.partition("@")
        for pieces in itertools.product(*(_values(piece, text) for piece in body.split(":"))):
            found[str(parse_method(":".join(pieces) + at + domain))] = None
            if len(found) > MAX_METHODS:
                raise UserError(f"'{text}' makes more than {MAX_METHODS} methods; take fewer values")
    return tuple(found)


def expand_loras(loras: Sequence[str], checkpoints: Sequence[str]) -> tuple[Lora, ...]:
    """LoRAs by name, path or mixture, then those of training runs' checkpoints: RUN is all of them, RUN=10,20 those steps.

    Raises:
        UserError: If a run has no such checkpoint, or a LoRA is given twice.
    """
    found = [*(Lora(text, text) for text in loras), *itertools.chain.from_iterable(map(_of_run, checkpoints))]
    texts = [lora.text for lora in found]
    if twice := [text for k, text in enumerate(texts) if text in texts[:k]]:
        raise UserError(f"the LoRA '{twice[0]}' is given twice; name each once")
    short = [Path(lora.label).name if lora.label == lora.text and "=" not in lora.text else lora.label for lora in found]
    return tuple(lora._replace(label=name) if short.count(name) == 1 else lora
                 for name, lora in zip(short, found, strict=True))


def arms(methods: Sequence[str], loras: Sequence[Lora]) -> tuple[Arm, ...]:
    """Every method with every LoRA; base, which takes none, comes first and once, even if it isn't among the methods."""
    return (Arm("base", ""), *(Arm(method, lora.label) for lora in loras for method in methods if method != "base"))


def _values(piece: str, text: str) -> list[str]:
    """What one place between two colons stands for."""
    if "=" in piece or not ("," in piece or ".." in piece):
        return [piece]
    return [value for item in piece.split(",") for value in (_range(item, text) if ".." in item else [item.strip()])]


def _range(item: str, text: str) -> Iterator[str]:
    ends, _, count = item.partition("/")
    low, _, high = ends.partition("..")
    by_factor = count.strip().endswith("log")
    number = count.strip().removesuffix("log")
    if not number.isdigit() or not 2 <= int(number) <= MAX_VALUES:
        raise UserError(f"cannot read the range '{item}' in '{text}'; write LOW..HIGH/COUNT with a count of 2 to {MAX_VALUES}, "
                        "as in 1..8/4, or 1..8/4log for equal factors")
    first, last = parse_number(low, text), parse_number(high, text)
    if by_factor and min(first, last) <= 0:
        raise UserError(f"the range '{item}' in '{text}' goes by equal factors, so both ends must be above 0")
    for k in range(int(number)):
        share = k / (int(number) - 1)
        value = first * (last / first) ** share if by_factor else first + (last - first) * share
        yield number_text(float(f"{value:.6g}"))


def _of_run(text: str) -> Iterator[Lora]:
    """The checkpoints that one text stands for."""
    name, _, steps = text.partition("=") if not Path(text).is_dir() else (text, "", "")
    folder, known = Path(name), list_checkpoints(name)
    if not known:
        raise UserError(f"{folder} has no checkpoints; name a training run's folder, such as runs/vivid")
    pieces = [piece.strip() for piece in steps.split(",")] if steps else list(map(str, known))
    rewards = _rewards_of(folder)
    for piece in pieces:
        if not piece.isdigit() or int(piece) not in known:
            raise UserError(f"{folder} has no checkpoint of step {piece}; there are {', '.join(map(str, known))}")
        yield Lora(f"{folder.name} step {piece}", str(known[int(piece)]), rewards)


def _rewards_of(folder: Path) -> tuple[str, ...]:
    """What a training run was trained on; nothing where its settings are gone."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        return ()
    try:
        return tuple(TrainConfig.from_dict(json.loads(path.read_text())["settings"]).reward_weights)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"the settings of the run {path} are damaged: {error}") from error

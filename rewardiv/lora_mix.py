"""Which LoRAs a run takes and how much of each, from text: NAME[=WEIGHT], several joined by +."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os.path import exists  # unlike Path's, False for text that no file could be called
from typing import NamedTuple

from rewardiv.errors import UserError
from rewardiv.registry import LoraEntry, find_lora

MAX_WEIGHT = 10.0  # either side of 0


class LoraShare(NamedTuple):
    """A LoRA and what a method's scale is multiplied by for it: 1 is as trained, 0 leaves it out, below 0 turns it round."""

    entry: LoraEntry
    weight: float


def find_loras(text: str) -> tuple[LoraShare, ...]:
    """The LoRAs of "vivid", "vivid+calm=0.5" or "my/lora.safetensors=0.8+owner/name"; none for "".

    A name may itself hold + or =, as files do: text that is a file or folder as a whole is one LoRA, and a piece that names
    nothing is tried together with the next.

    Raises:
        UserError: If a LoRA is unknown or given twice, its files are missing, or a weight is no number in -10 to 10.
    """
    shares: list[LoraShare] = []
    pieces = [text] if exists(text) else text.split("+") if text.strip() else []
    while pieces:
        share, pieces = _first(pieces)
        if share.entry.path in [known.entry.path for known in shares]:
            raise UserError(f"the LoRA '{share.entry.name}' is given twice; give it once, with a weight")
        shares.append(share)
    return tuple(shares)


def adapter_weights(mix: Sequence[LoraShare], use_lora: Callable[[LoraEntry], str]) -> dict[str, float]:
    """What lora.lora_scale takes: each adapter's weight by its name, which `use_lora` gives and loads.

    A LoRA of weight 0 isn't loaded; one that is given under two names counts as often.
    """
    weights: dict[str, float] = {}
    for share in mix:
        if share.weight:
            name = use_lora(share.entry)
            weights[name] = weights.get(name, 0.0) + share.weight
    return weights


def _first(pieces: list[str]) -> tuple[LoraShare, list[str]]:
    """The LoRA of the fewest first pieces that name one, and the pieces behind it."""
    errors = []
    for count in range(1, len(pieces) + 1):
        try:
            return _share("+".join(pieces[:count]).strip()), pieces[count:]
        except UserError as error:
            errors.append(error)
    raise errors[0]


def _share(text: str) -> LoraShare:
    name, equals, number = text.rpartition("=")
    if not (name if equals else text).strip():
        raise UserError("a LoRA has no name; write NAME or NAME=WEIGHT, several as NAME+NAME=WEIGHT")
    if not equals or exists(text) or number.endswith(".safetensors"):
        return LoraShare(find_lora(text), 1.0)
    entry = find_lora(name.strip())
    try:
        weight = float(number)
    except ValueError:
        weight = float("nan")
    if not abs(weight) <= MAX_WEIGHT:
        raise UserError(f"the weight of the LoRA '{name}' is '{number}'; write a number from -{MAX_WEIGHT:g} to "
                        f"{MAX_WEIGHT:g}, as in {name}=0.5")
    return LoraShare(entry, weight)

"""The safety checker that some Stable Diffusion models bring: which images it flags, black images in their place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rewardiv.pipelines import CheckerParts

OFF, ON, ABSENT = "off", "on", "absent"


@dataclass(frozen=True)
class SafetyReport:
    """What became of a run's images.

    Attributes:
        state: "off"; "on"; "absent" where checking was asked for and the model from the hub brings no checker.
        flagged: Seeds of the images that are black now, by method; methods without any are left out.
    """

    state: str = OFF
    flagged: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """For people; "" where nothing was checked because nobody asked."""
        if self.state == ABSENT:
            return "not checked for safety: this model brings no safety checker"
        if self.state == OFF:
            return ""
        num = sum(map(len, self.flagged.values()))
        return f"safety checker on: {num} {'image is' if num == 1 else 'images are'} blacked out"


class SafetyChecker:
    """Stable Diffusion's own checker, with its own preprocessing, in fp32.

    Args:
        parts: See pipelines.read_checker.
        device: Where it computes.
    """

    def __init__(self, parts: CheckerParts, device: str | torch.device) -> None:
        self.network, self.processor, self.device = parts.network.to(device), parts.processor, device

    @torch.no_grad()
    def flags(self, images: Tensor) -> list[bool]:
        """Which of the images, uint8 [S, 3, H, W], it calls unsafe."""
        arrays = list(images.permute(0, 2, 3, 1).cpu().numpy())
        pixels = self.processor(arrays, return_tensors="pt").pixel_values
        _, flags = self.network(clip_input=pixels.to(self.device), images=arrays)
        return flags

    def blacked_out(self, images: Sequence[Tensor]) -> tuple[list[Tensor], list[list[bool]]]:
        """Each method's images with black ones where they are unsafe, and which; what is shared is looked at once."""
        seen: dict[int, tuple[Tensor, list[bool]]] = {}
        for one in images:
            if id(one) not in seen:
                flags = self.flags(one)
                keep = torch.tensor([not flag for flag in flags], device=one.device).view(-1, 1, 1, 1)
                seen[id(one)] = one * keep, flags
        pairs = [seen[id(one)] for one in images]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def public_host() -> bool:
    """Whether strangers use this machine: a Hugging Face Space says so by itself."""
    return bool(os.environ.get("SPACE_ID"))

"""Rewards: images and their prompts to one number each, higher is better; one file a reward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rewardiv.clip_models import check_images, load_clip
from rewardiv.registry import find_reward
from rewardiv.rewards.clip import clip_score
from rewardiv.rewards.colorfulness import colorfulness
from rewardiv.rewards.preference import preference_score


@dataclass(frozen=True)
class Reward:
    """A reward by name: called with images [B, 3, H, W] in [0, 1] and B prompts it gives rewards [B].

    Differentiable in the images; an image's reward does not depend on the others of its batch.

    Raises:
        ValueError: If the images have another shape, type or range, or the prompts another number.
    """

    name: str
    score: Callable[[Tensor, list[str]], Tensor]

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        check_images(images)
        if isinstance(prompts, str) or len(prompts) != len(images):
            raise ValueError(f"{len(images)} images need a list of as many prompts, not {prompts!r:.60}")
        return self.score(images, list(prompts))


def load_reward(name: str, *, device: str | torch.device = "cpu") -> Reward:
    """Load a reward by its name in the registry, or a preference model by its folder.

    Official scales: `colorfulness` as in its paper, `clip` the cosine, preference models exp(logit_scale) times it.

    Raises:
        UserError: If the name is unknown or a file is missing or damaged.
    """
    entry = find_reward(name)
    if entry.path is None:
        return Reward(entry.name, colorfulness)
    model = load_clip(entry.path, device)
    return Reward(entry.name, clip_score(model) if entry.name == "clip" else preference_score(model))

"""Colourfulness of an image: needs no weights, works on any model, ignores the prompt.

Source: Hasler and Süsstrunk, "Measuring colourfulness in natural images", 2003, the metric with opponent colours.
"""

from __future__ import annotations

import torch
from torch import Tensor


def colorfulness(images: Tensor, prompts: list[str]) -> Tensor:
    """Rewards [B] on the paper's scale (channels 0..255): 0 is grey, above about 80 is extremely colourful.

    sqrt(var(rg) + var(yb)) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2), with rg = R - G and yb = (R + G)/2 - B of the pixels.
    Written as norms, whose gradient is 0 where they vanish, so that a grey image has a finite gradient.
    """
    red, green, blue = (255 * images).flatten(2).unbind(1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue], dim=1)  # [B, 2, pixels]
    means = opponents.mean(2, keepdim=True)
    spread = torch.linalg.vector_norm(opponents - means, dim=(1, 2)) / opponents.shape[2] ** 0.5
    return spread + 0.3 * torch.linalg.vector_norm(means, dim=(1, 2))

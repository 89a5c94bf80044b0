"""CLIP score: how well an image fits its prompt.

Source: Radford et al., arXiv:2103.00020; the score of Hessel et al., arXiv:2104.08718.
Differs: the plain cosine, neither clipped at 0 nor scaled by 2.5.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rewardiv.clip_models import ClipModel


def clip_score(model: ClipModel) -> Callable[[Tensor, list[str]], Tensor]:
    """The reward of a two-tower model: cosine of image and prompt embedding, in [-1, 1]."""
    return model.cosines

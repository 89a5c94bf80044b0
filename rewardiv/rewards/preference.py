"""Learned preference rewards: a two-tower model finetuned on pairs of images, of which a judge preferred one.

Source: PickScore (Kirstain et al., arXiv:2305.01569): exp(logit_scale) times the cosine, so that the difference of two
images' rewards is the log-odds that the first is preferred (Bradley-Terry).
"""

from __future__ import annotations

from torch import Tensor, nn

from rewardiv.clip_models import TwoTowers


class PreferenceScore(nn.Module):
    """Framed images [B, 3, S, S] and B prompts to rewards [B] in units of log-odds."""

    def __init__(self, towers: TwoTowers) -> None:
        super().__init__()
        self.towers, self.frame = towers, towers.frame

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        return self.towers.logit_scale.exp() * self.towers.pixel_cosines(pixels, prompts)

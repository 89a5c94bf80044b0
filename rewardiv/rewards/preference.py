"""Learned preference rewards: a two-tower model finetuned on pairs of images, of which a judge preferred one.

Source: PickScore (Kirstain et al., arXiv:2305.01569): exp(logit_scale) times the cosine, so that the difference of two
images' rewards is the log-odds that the first is preferred (Bradley-Terry).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rewardiv.clip_models import ClipModel


def preference_score(model: ClipModel) -> Callable[[Tensor, list[str]], Tensor]:
    """The reward of a preference model, in units of log-odds."""
    return lambda images, prompts: model.logit_scale.exp() * model.cosines(images, prompts)

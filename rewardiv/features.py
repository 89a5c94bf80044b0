"""Images to features, on which every diversity number is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rewardiv.clip_models import check_images, load_clip
from rewardiv.registry import CHECKPOINTS


def load_features(path: str | Path = CHECKPOINTS / "emoji-clip",
                  device: str | torch.device = "cpu") -> Callable[[Tensor], Tensor]:
    """From images [n, 3, H, W] in [0, 1] to a CLIP's image embeddings, float32 [n, d].

    Not normalised: the spectral distance is defined on the covariance of the embeddings as they are. A row does not
    depend on the other images.

    Raises:
        UserError: If a file of the model is missing or damaged. The function raises ValueError on other images.
    """
    model = load_clip(path, device)

    def features(images: Tensor) -> Tensor:
        check_images(images)
        return model.encode_images(images).float()

    return features

"""The LAION aesthetic score: how much people like a picture as such, 1 to 10; it doesn't see the prompt.

Source: christophschuhmann/improved-aesthetic-predictor, sac+logos+ava1-l14-linearMSE: an affine map of the normalised image
embedding of OpenAI's CLIP ViT-L/14; weights shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE, which holds the
vision tower and that map in one transformers folder. Differs: float32 instead of half precision on a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from rewardiv.framing import Frame
from rewardiv.rewards.checkpoint_files import (
    TRANSFORMERS_WEIGHTS,
    built_from,
    fill,
    locate,
    read_config,
    read_weights,
)
from rewardiv.rewards.linear_head import linear_head

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection

NAME = "aesthetic"


class AestheticScore(nn.Module):
    """Framed images [B, 3, S, S] to scores [B]."""

    def __init__(self, vision: CLIPVisionModelWithProjection) -> None:
        super().__init__()
        self.vision, self.layers = vision, linear_head(vision.config.projection_dim)
        self.frame = Frame(vision.config.image_size)

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        return self.layers(F.normalize(self.vision(pixel_values=pixels).image_embeds)).squeeze(1)


def load_aesthetic(folder: str | Path) -> AestheticScore:
    """The score, about 4 to 7 for most pictures, from config.json and model.safetensors (or pytorch_model.bin).

    Raises:
        UserError: If a file is missing, damaged or of another model.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    file = locate(folder, TRANSFORMERS_WEIGHTS, NAME)
    settings = {key: value for key, value in read_config(folder, NAME).items() if key != "model_type"}
    with built_from(folder, NAME):
        vision = CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(settings)).float()  # its settings may say fp16
        model = AestheticScore(vision)
    state = {key if key.startswith("layers.") else f"vision.{key}": value
             for key, value in read_weights(file, NAME).items() if not key.endswith(".position_ids")}
    fill(model, state, file, NAME)
    return model

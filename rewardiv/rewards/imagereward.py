"""ImageReward: how experts rate an image for a prompt; 0 is the average, 1 a standard deviation above it.

Source: Xu et al., arXiv:2304.05977; weights ImageReward.pt and med_config.json of zai-org/ImageReward: BLIP's ViT and its
text encoder with cross-attention to the image, then a linear head on the text's first token. Here the networks are
transformers' BLIP, filled with those weights, because the reference package no longer runs on current transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from rewardiv.framing import Frame
from rewardiv.rewards.checkpoint_files import built_from, fill, locate, read_config, read_weights
from rewardiv.rewards.linear_head import linear_head

if TYPE_CHECKING:
    from transformers import BertTokenizer, BlipTextModel, BlipVisionModel

NAME = "imagereward"
WEIGHTS_NAME = "ImageReward.pt"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output on the reference's validation set
MAX_TOKENS = 35
HEAD_WIDTH = 64  # of the vision tower's attention, in every size of ViT
VISION = {  # the reference's names of the vision tower, and transformers'
    r"cls_token": "embeddings.class_embedding",
    r"pos_embed": "embeddings.position_embedding",
    r"patch_embed\.proj": "embeddings.patch_embedding",
    r"blocks\.(\d+)\.norm(\d)": r"encoder.layers.\1.layer_norm\2",
    r"blocks\.(\d+)\.attn\.qkv": r"encoder.layers.\1.self_attn.qkv",
    r"blocks\.(\d+)\.attn\.proj": r"encoder.layers.\1.self_attn.projection",
    r"blocks\.(\d+)\.mlp": r"encoder.layers.\1.mlp",
    r"norm": "post_layernorm",
}


class ImageReward(nn.Module):
    """Framed images [B, 3, S, S] and B prompts to rewards [B]; of a prompt, the first 35 tokens count."""

    def __init__(self, vision: BlipVisionModel, text: BlipTextModel, tokenizer: BertTokenizer) -> None:
        super().__init__()
        self.vision, self.text, self.tokenizer = vision, text, tokenizer
        self.head = linear_head(text.config.hidden_size)
        self.frame = Frame(vision.config.image_size)

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        states = self.text(
            tokens.input_ids.to(pixels.device),
            attention_mask=tokens.attention_mask.to(pixels.device),
            encoder_hidden_states=self.vision(pixels).last_hidden_state,
            is_decoder=False,
        ).last_hidden_state
        return (self.head(states[:, 0]).squeeze(1) - MEAN) / STD


def load_imagereward(folder: str | Path, tokenizer_folder: str | Path) -> ImageReward:
    """The reward, about -2 to 2, from ImageReward.pt and med_config.json.

    Args:
        folder: Holds the two files.
        tokenizer_folder: Holds the vocab.txt of google-bert/bert-base-uncased.

    Raises:
        UserError: If a file is missing, damaged or of another model.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    file = locate(folder, (WEIGHTS_NAME,), NAME)
    state, settings = read_weights(file, NAME), read_config(file.parent, NAME, "med_config.json")
    tokenizer = _tokenizer(tokenizer_folder)
    with built_from(file, NAME):
        vision = BlipVisionConfig(**_vision_settings(state))
        text = BlipTextConfig(**settings | {"model_type": "blip_text_model", "encoder_hidden_size": vision.hidden_size,
                                            "is_decoder": True, "use_cache": False})
        model = ImageReward(BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False), tokenizer)
    fill(model, _renamed(state), file, NAME)
    return model


def _vision_settings(state: Mapping[str, Tensor]) -> dict[str, int | float]:
    """The vision tower's sizes, read off its weights."""
    weights = {key.removeprefix("blip.visual_encoder."): value for key, value in state.items()}
    _, num_positions, width = weights["pos_embed"].shape
    patch = weights["patch_embed.proj.weight"].shape[-1]
    return {
        "hidden_size": width, "intermediate_size": len(weights["blocks.0.mlp.fc1.bias"]), "patch_size": patch,
        "num_hidden_layers": 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks.")),
        "num_attention_heads": width // HEAD_WIDTH, "image_size": patch * round((num_positions - 1) ** 0.5),
        "layer_norm_eps": 1e-6,
    }


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reference's weights under the names of this model; the projections of BLIP's pretraining are left out."""
    renamed = {}
    for key, value in state.items():
        if key.startswith("blip.visual_encoder."):
            renamed["vision." + _vision_name(key.removeprefix("blip.visual_encoder."))] = value
        elif key.startswith("blip.text_encoder.") and not key.endswith(".position_ids"):
            renamed["text." + key.removeprefix("blip.text_encoder.")] = value
        elif key.startswith("mlp.layers."):
            renamed["head." + key.removeprefix("mlp.layers.")] = value
    return renamed


def _vision_name(name: str) -> str:
    for pattern, replacement in VISION.items():
        if match := re.match(rf"{pattern}(?=\.|$)", name):
            return match.expand(replacement) + name[match.end():]
    return name


def _tokenizer(folder: str | Path) -> BertTokenizer:
    """BERT's uncased tokenizer with BLIP's two special tokens."""
    from transformers import BertTokenizer

    tokenizer = BertTokenizer(str(locate(folder, ("vocab.txt",), NAME)))
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    return tokenizer

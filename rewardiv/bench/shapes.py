"""Pipelines with random weights in the shape of a real model: `python -m rewardiv.bench.shapes SHAPE IMAGE_SIZE FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rewardiv.registry import CHECKPOINTS

# Stable Diffusion 1.x's own configs; what isn't said is the libraries' default, which is the same.
SD15 = {
    "unet": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "vae": {
        "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    },
    "text_encoder": {
        "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "projection_dim": 768,
    },
}
SHAPES = {"sd15": SD15}
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
             "clip_sample": False, "set_alpha_to_one": False}


def write_shape(shape: dict[str, dict[str, object]], image_size: int, folder: str | Path) -> Path:
    """Save a StableDiffusionPipeline of this shape for images of this size; weights from seed 0, stored in fp16.

    The tokenizer is the built-in model's, padded to 77 tokens: which tokens a prompt has doesn't matter for speed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(**shape["vae"], sample_size=image_size)
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        unet = UNet2DConditionModel(**shape["unet"], sample_size=image_size // scale)
        text_encoder = CLIPTextModel(CLIPTextConfig(**shape["text_encoder"]))
    length = text_encoder.config.max_position_embeddings
    tokenizer = CLIPTokenizer.from_pretrained(CHECKPOINTS / "emoji" / "tokenizer", model_max_length=length)
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(folder)
    return Path(folder)


if __name__ == "__main__":
    write_shape(SHAPES[sys.argv[1]], int(sys.argv[2]), sys.argv[3])

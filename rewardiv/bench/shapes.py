"""Pipelines with random weights in the shape of a real model: `python -m rewardiv.bench.shapes SHAPE IMAGE_SIZE FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from rewardiv.config import LORA_TARGETS
from rewardiv.lora import adapter_parameters, attach_adapter, save_adapter
from rewardiv.registry import CHECKPOINTS

Shape = dict[str, dict[str, object]]

# The published configs; what isn't said is the libraries' default, which is the same.
VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}
CLIP_L = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768,
}
SD15: Shape = {"unet": {"cross_attention_dim": 768, "attention_head_dim": 8}, "vae": VAE, "text_encoder": CLIP_L}
SDXL: Shape = {
    "unet": {
        "block_out_channels": (320, 640, 1280), "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
        "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"), "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048, "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
    "vae": VAE | {"scaling_factor": 0.13025},
    "text_encoder": CLIP_L,
    "text_encoder_2": {
        "vocab_size": 49408, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
        "num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu",
    },
}
ADAPTER = "random"
SHAPES = {"sd15": SD15, "sdxl": SDXL}
NOISE_LEVELS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def write_shape(shape: Shape, image_size: int, folder: str | Path) -> Path:
    """Save a pipeline of this shape for images of this size; weights from seed 0, stored in fp16.

    The tokenizers are the built-in model's, padded to 77 tokens: which tokens a prompt has doesn't matter for speed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(**shape["vae"], sample_size=image_size)
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        unet = UNet2DConditionModel(**shape["unet"], sample_size=image_size // scale)
        parts = {"vae": vae, "unet": unet, "text_encoder": CLIPTextModel(CLIPTextConfig(**shape["text_encoder"]))}
        if "text_encoder_2" in shape:
            parts["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**shape["text_encoder_2"]))
    length = parts["text_encoder"].config.max_position_embeddings
    tokenizer = CLIPTokenizer.from_pretrained(CHECKPOINTS / "emoji" / "tokenizer", model_max_length=length)
    if "text_encoder_2" in parts:
        scheduler = EulerDiscreteScheduler(**NOISE_LEVELS, timestep_spacing="leading")
        pipe = StableDiffusionXLPipeline(**parts, tokenizer=tokenizer, tokenizer_2=tokenizer, scheduler=scheduler,
                                         add_watermarker=False)
    else:
        scheduler = DDIMScheduler(**NOISE_LEVELS, clip_sample=False, set_alpha_to_one=False)
        pipe = StableDiffusionPipeline(**parts, tokenizer=tokenizer, scheduler=scheduler, safety_checker=None,
                                       feature_extractor=None, requires_safety_checker=False)
    pipe.to(torch.float16).save_pretrained(folder)
    save_random_lora(unet, folder)
    return Path(folder)


def save_random_lora(unet: UNet2DConditionModel, folder: str | Path) -> None:
    """A LoRA of rank 16 on all attention and feed-forward layers, beside the pipeline; the UNet keeps it."""
    attach_adapter(unet, ADAPTER, rank=16, alpha=16.0, targets=LORA_TARGETS["all"])
    generator = torch.Generator().manual_seed(0)
    for weight in adapter_parameters(unet, ADAPTER):
        weight.data.copy_(0.02 * torch.randn(weight.shape, generator=generator))
    save_adapter(unet, ADAPTER, folder)


if __name__ == "__main__":
    write_shape(SHAPES[sys.argv[1]], int(sys.argv[2]), sys.argv[3])

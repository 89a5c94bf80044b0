"""Builders of the reward tests: pictures to score, and random weights in the layouts of real checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

Built = TypeVar("Built", bound=torch.nn.Module)
PROMPTS = ["a red barn at dusk", "two dogs, one hat", "“quoted” & Co"]
SIZES = [(512, 512), (768, 512), (1024, 1024), (683, 1024)]  # width, height
TINY_ARCH = "tiny-ViT-32"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"a red barn at dusk two dogs , one hat quoted & co “ ”".split()]
CLIP_SIZES = {
    "text_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407},
    "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                      "image_size": 224, "patch_size": 32},
    "projection_dim": 24,
}


@cache
def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth sky, shapes with hard edges, fine stripes and grain: what resizing treats differently."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    phase = rng.uniform(0, 6, 3)
    pixels = 127 + 90 * np.sin(np.stack([3 * x + phase[0], 5 * y + phase[1], 4 * (x - y) + phase[2]], axis=2))
    pixels += rng.normal(0, 8, pixels.shape)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for i in range(12):
        left, top = rng.integers(0, width), rng.integers(0, height)
        box = (left, top, left + width // 5, top + height // 6)
        (draw.ellipse if i % 2 else draw.rectangle)(box, fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
    for row in range(0, height // 8, 4):
        draw.line((0, row, width // 2, row), fill=(0, 0, 0))
    return image


def as_tensor(image: Image.Image) -> Tensor:
    """[1, 3, H, W] in [0, 1]."""
    return torch.tensor(np.array(image)).permute(2, 0, 1)[None].float() / 255


def seeded(build: Callable[[], Built], seed: int, gain: float = 1.0) -> Built:
    """A module with random weights so large that the outputs for different images differ clearly."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = build()
        for parameter in module.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=gain * parameter[0].numel() ** -0.5)
            elif parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn(parameter.shape)
    return module.eval()


def new_clip_model(activation: str, seed: int) -> CLIPModel:
    config = CLIPConfig(**CLIP_SIZES)
    config.text_config.hidden_act = config.vision_config.hidden_act = activation
    return seeded(lambda: CLIPModel(config), seed)


def imagereward_state(
    width: int, patch: int, depth: int, *, hidden_size: int, intermediate_size: int, num_hidden_layers: int,
    vocab_size: int, num_attention_heads: int,
) -> dict[str, Tensor]:
    """Random weights with the names and shapes of the reference's state dict; `width` is the vision tower's."""
    generator, state, hidden = torch.Generator().manual_seed(4), {}, hidden_size

    def add(name: str, *shape: int, scale: float = 0.15, shift: float = 0.0) -> None:
        state[name] = shift + scale * torch.randn(*shape, generator=generator)

    def linear(name: str, outputs: int, inputs: int) -> None:
        add(f"{name}.weight", outputs, inputs, scale=inputs**-0.5)
        add(f"{name}.bias", outputs)

    def norm(name: str, size: int) -> None:
        add(f"{name}.weight", size, shift=1.0)
        add(f"{name}.bias", size)

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    add(f"{vision}.cls_token", 1, 1, width)
    add(f"{vision}.pos_embed", 1, (224 // patch) ** 2 + 1, width)
    add(f"{vision}.patch_embed.proj.weight", width, 3, patch, patch, scale=0.03)
    add(f"{vision}.patch_embed.proj.bias", width)
    for i in range(depth):
        block = f"{vision}.blocks.{i}"
        norm(f"{block}.norm1", width)
        linear(f"{block}.attn.qkv", 3 * width, width)
        linear(f"{block}.attn.proj", width, width)
        norm(f"{block}.norm2", width)
        linear(f"{block}.mlp.fc1", 4 * width, width)
        linear(f"{block}.mlp.fc2", width, 4 * width)
    norm(f"{vision}.norm", width)
    state[f"{text}.embeddings.position_ids"] = torch.arange(512)[None]
    add(f"{text}.embeddings.word_embeddings.weight", vocab_size, hidden)
    add(f"{text}.embeddings.position_embeddings.weight", 512, hidden)
    norm(f"{text}.embeddings.LayerNorm", hidden)
    for i in range(num_hidden_layers):
        layer = f"{text}.encoder.layer.{i}"
        for attention, inputs in (("attention", hidden), ("crossattention", width)):
            linear(f"{layer}.{attention}.self.query", hidden, hidden)
            linear(f"{layer}.{attention}.self.key", hidden, inputs)
            linear(f"{layer}.{attention}.self.value", hidden, inputs)
            linear(f"{layer}.{attention}.output.dense", hidden, hidden)
            norm(f"{layer}.{attention}.output.LayerNorm", hidden)
        linear(f"{layer}.intermediate.dense", intermediate_size, hidden)
        linear(f"{layer}.output.dense", hidden, intermediate_size)
        norm(f"{layer}.output.LayerNorm", hidden)
    linear("blip.vision_proj", 256, width)
    linear("blip.text_proj", 256, hidden)
    for i, (inputs, outputs) in {0: (hidden, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}.items():
        linear(f"mlp.layers.{i}", outputs, inputs)
    return state

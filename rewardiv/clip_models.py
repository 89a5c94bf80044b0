"""Loads, runs and saves open_clip two-tower models in local folders: behind rewards, features and pretraining.

A folder holds `open_clip_config.json` (open_clip's {"model_cfg", "preprocess_cfg"}), `open_clip_model.safetensors`
(fp16; computed in fp32) and `tokenizer/` (a transformers CLIPTokenizer whose end-of-text token has the highest id).
Nothing is ever fetched.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rewardiv.errors import UserError
from rewardiv.runs import replaced_dir

if TYPE_CHECKING:
    from open_clip import CLIP
    from transformers import CLIPTokenizer

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
TOKENIZER_NAME = "tokenizer"
RESIZING = {"interpolation": "bicubic", "resize_mode": "shortest"}  # open_clip's defaults, and what is done here
RANGE_TOLERANCE = 1e-4


class ClipModel(nn.Module):
    """An open_clip network with its tokenizer and its preprocessing; differentiable in the images.

    Args:
        net: The network.
        config: {"model_cfg": ..., "preprocess_cfg": {"mean": 3 numbers, "std": 3 numbers}} as open_clip writes it.
        tokenizer: Turns texts into ids; its end-of-text token must have the highest id, because the text tower reads
            its output there (argmax of the ids).

    Raises:
        UserError: If the tokenizer and the text tower don't fit or the preprocessing is not the one done here.
    """

    def __init__(self, net: CLIP, config: dict, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        preprocess = RESIZING | config["preprocess_cfg"]
        if any(preprocess[key] != value for key, value in RESIZING.items()):
            raise UserError(f"only bicubic resizing of the shortest side is known, not preprocess_cfg {preprocess}")
        size, end = len(tokenizer), tokenizer.eos_token_id
        if end != size - 1 or size > net.vocab_size:
            raise UserError(f"the tokenizer ({size} tokens, end of text {end}) doesn't fit the text tower (vocab_size "
                            f"{net.vocab_size}): end of text must have the highest id")
        self.net, self.config, self.tokenizer = net, config, tokenizer
        self.image_size: int = config["model_cfg"]["vision_cfg"]["image_size"]
        self.register_buffer("mean", torch.tensor(preprocess["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess["std"]).view(3, 1, 1), persistent=False)

    @property
    def logit_scale(self) -> Tensor:
        """Logarithm of the factor on the cosine, a scalar parameter, as open_clip keeps it."""
        return self.net.logit_scale

    def preprocess(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] to normalised [B, 3, image_size, image_size]: resize, clamp to [0, 1], centre crop."""
        images = fit_square(images.to(self.mean), self.image_size)
        return (images - self.mean) / self.std

    def tokenize(self, texts: list[str]) -> Tensor:
        """Token ids [B, context_length]; what is longer is cut."""
        return self.tokenizer(texts, padding="max_length", truncation=True, max_length=self.net.context_length,
                              return_tensors="pt").input_ids

    def encode_images(self, images: Tensor) -> Tensor:
        """Image embeddings [B, d], not normalised, of images [B, 3, H, W] in [0, 1]."""
        return self.net.encode_image(self.preprocess(images))

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Text embeddings [B, d], not normalised."""
        return self.net.encode_text(self.tokenize(texts).to(self.mean.device))

    def cosines(self, images: Tensor, texts: list[str]) -> Tensor:
        """Cosine [B] of image i's and text i's embeddings; equal texts are encoded once."""
        distinct = sorted(set(texts))
        rows = [distinct.index(text) for text in texts]
        return F.cosine_similarity(self.encode_images(images), self.encode_texts(distinct)[rows])


def fit_square(images: Tensor, size: int) -> Tensor:
    """Resize the shortest side to `size` (bicubic, antialiased, clamped back to [0, 1]) and crop the middle.

    Source: open_clip's `image_transform` with resize_mode "shortest". Differs: works on tensors, so that gradients
    pass, and doesn't round to 8 bits.
    """
    height, width = images.shape[-2:]
    if min(height, width) != size:
        height, width = (size * side // min(height, width) for side in (height, width))
        images = F.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return images[..., top:top + size, left:left + size]


def check_images(images: Tensor) -> None:
    """Refuse anything but float images [B, 3, H, W] in [0, 1].

    Raises:
        ValueError: On another shape or type, NaN, or a value outside [0, 1] by more than RANGE_TOLERANCE. The range is
            never guessed from the data.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images must be float [B, 3, H, W], not {images.dtype} {list(images.shape)}")
    low, high = (float(v) for v in images.detach().aminmax()) if images.numel() else (0.0, 0.0)
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
        raise ValueError(f"images must lie in [0, 1], not [{low:g}, {high:g}]")


def new_clip(config: dict, tokenizer: CLIPTokenizer) -> ClipModel:
    """An untrained model (weights drawn from torch's global generator), in training mode."""
    from open_clip import CLIP

    return ClipModel(CLIP(**config["model_cfg"]), config, tokenizer)


def load_clip(folder: str | Path, device: str | torch.device = "cpu") -> ClipModel:
    """Load a model in fp32, in evaluation mode, with frozen weights.

    Raises:
        UserError: If a file is missing, damaged, or doesn't fit the others; the message names it.
    """
    from transformers import CLIPTokenizer

    folder = Path(folder)
    for name in (CONFIG_NAME, WEIGHTS_NAME, TOKENIZER_NAME):
        if not (folder / name).exists():
            raise UserError(f"{folder / name} is missing; restore the folder or build it again with "
                            "`python -m rewardiv pretrain`")
    try:
        config = json.loads((folder / CONFIG_NAME).read_text())
        tokenizer = CLIPTokenizer.from_pretrained(folder / TOKENIZER_NAME, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exceptions of its own
        raise UserError(f"{folder / CONFIG_NAME} or {folder / TOKENIZER_NAME} is damaged: {error}") from error
    try:
        model = new_clip(config, tokenizer)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{folder / CONFIG_NAME} is damaged or doesn't fit the tokenizer: {error}") from error
    try:
        model.net.load_state_dict(load_file(folder / WEIGHTS_NAME))
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder / WEIGHTS_NAME} is damaged or made for another {CONFIG_NAME}: {reason}") from error
    return model.to(device).eval().requires_grad_(False)


def save_clip(net: CLIP, config: dict, tokenizer: CLIPTokenizer, folder: str | Path) -> None:
    """Write a folder that `load_clip` and open_clip's "local-dir:" read, weights in fp16; it replaces an earlier one.

    Raises:
        ValueError: If a weight is not finite in fp16.
    """
    state = {name: (tensor.half() if tensor.is_floating_point() else tensor).cpu().contiguous()
             for name, tensor in net.state_dict().items()}
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"the weight {name} is not finite in fp16")
    with replaced_dir(folder) as partial:
        (partial / CONFIG_NAME).write_text(json.dumps(config, indent=1) + "\n")
        save_file(state, partial / WEIGHTS_NAME, metadata={"format": "pt"})
        tokenizer.save_pretrained(partial / TOKENIZER_NAME)

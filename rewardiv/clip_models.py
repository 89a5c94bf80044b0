"""Two-tower models (CLIP and its kin): what every one does, and open_clip models in local folders.

A folder holds `open_clip_config.json` (open_clip's {"model_cfg", "preprocess_cfg"}), `open_clip_model.safetensors`
(fp16; computed in fp32) and `tokenizer/` (a transformers CLIPTokenizer whose end-of-text token has the highest id).
Nothing is ever fetched.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rewardiv.errors import UserError
from rewardiv.framing import Frame
from rewardiv.runs import replaced_dir

if TYPE_CHECKING:
    from open_clip import CLIP
    from transformers import CLIPTokenizer

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
TOKENIZER_NAME = "tokenizer"
RESIZING = {"interpolation": "bicubic", "resize_mode": "shortest"}  # open_clip's defaults, and what is done here


class TwoTowers(nn.Module):
    """Images and texts as embeddings in one space; differentiable in the images.

    Args:
        net: The network: `encode_image(pixels [B, 3, S, S])`, `encode_text(ids [B, T])` and `logit_scale`, as open_clip's.
        tokenize: Texts to token ids [B, T].
        frame: Images to the network's pixels.
    """

    def __init__(self, net: nn.Module, tokenize: Callable[[list[str]], Tensor], frame: Frame) -> None:
        super().__init__()
        self.net, self.tokenize, self.frame = net, tokenize, frame

    @property
    def logit_scale(self) -> Tensor:
        """Logarithm of the factor on the cosine, a scalar parameter, as open_clip keeps it."""
        return self.net.logit_scale

    @property
    def mean(self) -> Tensor:
        """Of the images' normalisation, [3, 1, 1]; on the device, and of the dtype, that this computes in."""
        return self.frame.mean

    @property
    def std(self) -> Tensor:
        """Of the images' normalisation, [3, 1, 1]."""
        return self.frame.std

    def encode_images(self, images: Tensor) -> Tensor:
        """Image embeddings [B, d], not normalised, of images [B, 3, H, W] in [0, 1]."""
        return self.net.encode_image(self.frame(images))

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Text embeddings [B, d], not normalised."""
        return self.net.encode_text(self.tokenize(texts).to(self.mean.device))

    def cosines(self, images: Tensor, texts: list[str]) -> Tensor:
        """Cosine [B] of image i's and text i's embeddings."""
        return self.pixel_cosines(self.frame(images), texts)

    def pixel_cosines(self, pixels: Tensor, texts: list[str]) -> Tensor:
        """The same for framed images [B, 3, S, S]; equal texts are encoded once."""
        distinct = sorted(set(texts))
        rows = [distinct.index(text) for text in texts]
        return F.cosine_similarity(self.net.encode_image(pixels), self.encode_texts(distinct)[rows])


class ClipModel(TwoTowers):
    """An open_clip network with a tokenizer of its own, as a local folder holds it.

    Args:
        net: The network.
        config: {"model_cfg": ..., "preprocess_cfg": {"mean": 3 numbers, "std": 3 numbers}} as open_clip writes it.
        tokenizer: Turns texts into ids; its end-of-text token must have the highest id, because the text tower reads
            its output there (argmax of the ids).

    Raises:
        UserError: If the tokenizer and the text tower don't fit or the preprocessing is not the one done here.
    """

    def __init__(self, net: CLIP, config: dict, tokenizer: CLIPTokenizer) -> None:
        preprocess = RESIZING | config["preprocess_cfg"]
        if any(preprocess[key] != value for key, value in RESIZING.items()):
            raise UserError(f"only bicubic resizing of the shortest side is known, not preprocess_cfg {preprocess}")
        size, end = len(tokenizer), tokenizer.eos_token_id
        if end != size - 1 or size > net.vocab_size:
            raise UserError(f"the tokenizer ({size} tokens, end of text {end}) doesn't fit the text tower (vocab_size "
                            f"{net.vocab_size}): end of text must have the highest id")
        frame = Frame(config["model_cfg"]["vision_cfg"]["image_size"], preprocess["mean"], preprocess["std"])
        super().__init__(net, partial(token_ids, tokenizer, net.context_length), frame)
        self.config, self.tokenizer = config, tokenizer

    @property
    def image_size(self) -> int:
        """Side of the network's images in pixels."""
        return self.frame.size


def token_ids(tokenizer: CLIPTokenizer, length: int, texts: list[str]) -> Tensor:
    """Token ids [B, length]; what is longer is cut."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids


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

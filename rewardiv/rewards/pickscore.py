"""PickScore: which of two images people who had written the prompt preferred.

Source: Kirstain et al., arXiv:2305.01569; weights yuvalkirstain/PickScore_v1 (a transformers CLIPModel, ViT-H/14),
preprocessing of laion/CLIP-ViT-H-14-laion2B-s32B-b79K. Differs: transformers' tokenizer takes CLIP's vocabulary from
open_clip, which carries it, so that no second repository is needed.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from rewardiv.clip_models import TwoTowers, token_ids
from rewardiv.framing import Frame
from rewardiv.rewards.checkpoint_files import (
    TRANSFORMERS_WEIGHTS,
    built_from,
    fill,
    locate,
    read_config,
    read_weights,
)
from rewardiv.rewards.preference import PreferenceScore

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

NAME = "pickscore"


class TransformersTowers(nn.Module):
    """A transformers CLIPModel with open_clip's methods."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model = model

    @property
    def logit_scale(self) -> Tensor:
        """Logarithm of the factor on the cosine."""
        return self.model.logit_scale

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Embeddings [B, d] of normalised images; since transformers 5 they are the output's `pooler_output`."""
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def encode_text(self, ids: Tensor) -> Tensor:
        """Embeddings [B, d] of token ids."""
        return self.model.get_text_features(input_ids=ids).pooler_output


def load_pickscore(folder: str | Path) -> PreferenceScore:
    """Exp(logit_scale) times the cosine, about 15 to 25, from config.json and model.safetensors (or pytorch_model.bin).

    Raises:
        UserError: If a file is missing, damaged or of another model.
    """
    from transformers import CLIPConfig, CLIPModel

    file, settings = locate(folder, TRANSFORMERS_WEIGHTS, NAME), read_config(folder, NAME)
    with built_from(folder, NAME):
        config = CLIPConfig.from_dict(settings)
        model = CLIPModel(config).float()  # the settings may say fp16
    state = {key: value for key, value in read_weights(file, NAME).items() if not key.endswith(".position_ids")}
    fill(model, state, file, NAME)
    tokenize = partial(token_ids, clip_tokenizer(), config.text_config.max_position_embeddings)
    frame = Frame(config.vision_config.image_size, floor_crop=True)
    return PreferenceScore(TwoTowers(TransformersTowers(model), tokenize, frame))


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer as transformers has it, which leaves quotation marks and HTML as they are; open_clip's mends them."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    known = SimpleTokenizer()
    names = dict(zip(known.all_special_ids, ("<|startoftext|>", "<|endoftext|>"), strict=True))
    return CLIPTokenizer(vocab={names.get(i, token): i for token, i in known.encoder.items()}, merges=list(known.bpe_ranks))

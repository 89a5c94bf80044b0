"""Prompts to what the UNet is conditioned on: tokens, one or two text encoders, what is cut off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rewardiv.errors import UserError

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


@dataclass(frozen=True)
class PromptCheck:
    """What the text encoders read of a prompt, and what they don't ("" where everything fits)."""

    kept: str
    cut: str


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What the UNet knows of each prompt.

    Attributes:
        embeds: [B, T, D], a row a prompt.
        pooled: [B, P], the whole prompt as one vector (Stable Diffusion XL); None where the model takes none.
        prompts: [B], the texts, for encoding them again under a LoRA; () of rows that were picked for the network.
    """

    embeds: Tensor
    pooled: Tensor | None = None
    prompts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, index: slice | list[int] | Tensor) -> Conditioning:
        """The rows of these indices, in their order."""
        pooled = None if self.pooled is None else self.pooled[index]
        if isinstance(index, slice) or not self.prompts:
            return Conditioning(self.embeds[index], pooled, self.prompts[index] if self.prompts else ())
        return Conditioning(self.embeds[index], pooled, tuple(self.prompts[k] for k in index))

    def split(self, size: int) -> list[Conditioning]:
        """Parts of `size` rows, the last one with what is left."""
        return [self[start:start + size] for start in range(0, len(self), size)]

    def rows(self, index: Tensor) -> Conditioning:
        """A row for each index [R]; a single row serves all of them."""
        if len(self) == 1:
            index = torch.zeros_like(index)
        return replace(self, prompts=())[index.to(self.embeds.device)]

    def to(self, device: torch.device, dtype: torch.dtype) -> Conditioning:
        """The same on a device, as a type."""
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return Conditioning(self.embeds.to(device, dtype), pooled, self.prompts)


def concatenated(parts: Sequence[Conditioning]) -> Conditioning:
    """One after the other."""
    pooled = None if parts[0].pooled is None else torch.cat([part.pooled for part in parts])
    return Conditioning(torch.cat([part.embeds for part in parts]), pooled)


class TextTower(NamedTuple):
    """A text encoder with its tokenizer."""

    tokenizer: CLIPTokenizer
    encoder: CLIPTextModel | CLIPTextModelWithProjection

    @property
    def max_length(self) -> int:
        """Tokens that the encoder reads, with start and end."""
        return min(self.tokenizer.model_max_length, self.encoder.config.max_position_embeddings)


def check_prompt(prompt: str, towers: Sequence[TextTower]) -> PromptCheck:
    """Which part of the prompt every encoder reads, and which one or all of them would cut off.

    Raises:
        UserError: If the prompt is empty.
    """
    if not prompt.strip():
        raise UserError("the prompt is empty; write what to draw, such as \"a cat face\"")
    end = min(_read_end(prompt, tower) for tower in towers)
    return PromptCheck(prompt, "") if end == len(prompt) else PromptCheck(prompt[:end].rstrip(), prompt[end:].lstrip())


@torch.no_grad()
def encode(prompts: Sequence[str], towers: Sequence[TextTower], *, zero_empty: bool) -> Conditioning:
    """The conditioning of prompts, as diffusers' pipelines compute it.

    One tower (Stable Diffusion 1 and 2): its last hidden states. Two (XL): the hidden states before the last layer, side by
    side, and the second one's projected text embedding as `pooled`.

    Args:
        prompts: "" is the usual negative prompt.
        towers: In the pipeline's order, each where it is to compute.
        zero_empty: The row of "" is all zeros (XL's `force_zeros_for_empty_prompt`) instead of the encoders' own.
    """
    outputs = [_encoded(prompts, tower, hidden=len(towers) > 1) for tower in towers]
    if len(towers) == 1:
        return Conditioning(outputs[0].last_hidden_state, prompts=tuple(prompts))
    device = outputs[-1].text_embeds.device
    kept = torch.tensor([not zero_empty or prompt != "" for prompt in prompts], device=device)
    embeds = torch.cat([output.hidden_states[-2].to(device) for output in outputs], dim=-1)
    pooled = outputs[-1].text_embeds
    embeds, pooled = torch.where(kept[:, None, None], embeds, 0), torch.where(kept[:, None], pooled, 0)
    return Conditioning(embeds, pooled, tuple(prompts))


def _read_end(prompt: str, tower: TextTower) -> int:
    """Where in the prompt the tower stops reading; its length where everything fits."""
    tokens = tower.tokenizer(prompt, return_offsets_mapping=True, verbose=False)
    if len(tokens.input_ids) <= tower.max_length:
        return len(prompt)
    return tokens.offset_mapping[tower.max_length - 2][1]  # the last token that fits before the end token


def _encoded(prompts: Sequence[str], tower: TextTower, *, hidden: bool) -> object:
    ids = tower.tokenizer(list(prompts), padding="max_length", max_length=tower.max_length, truncation=True,
                          return_tensors="pt").input_ids
    device = next(tower.encoder.parameters()).device
    return tower.encoder(ids.to(device), output_hidden_states=hidden)

"""Base models: load a Stable Diffusion pipeline's parts, encode prompts, run the guided UNet, decode latents."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from rewardiv.errors import UserError
from rewardiv.lora import load_adapter, lora_scale
from rewardiv.registry import LORA_FILE, LoraEntry, find_model

DECODE_ROWS = 16  # latents decoded at once
PIPELINE = "StableDiffusionPipeline"
Part = TypeVar("Part")


@dataclass(frozen=True)
class PromptCheck:
    """What the text encoder reads of a prompt, and what it doesn't ("" where everything fits)."""

    kept: str
    cut: str


@dataclass(eq=False)
class Model:
    """A Stable Diffusion model with frozen weights, shared by threads.

    Attributes:
        name: The built-in name or the path that it was asked for by.
        scheduler_config: The pipeline's scheduler config, for sampling.make_scheduler.
        latent_shape: (C, h, w).
        image_size: Pixels of an image's side.
        lock: Held while the UNet's adapters are changed or scaled.
    """

    name: str
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler_config: dict[str, object]
    latent_shape: tuple[int, int, int]
    image_size: int
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    @property
    def device(self) -> torch.device:
        """Of the UNet's first weight: diffusers' own property walks every module, at each use."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the UNet's first weight."""
        return next(self.unet.parameters()).dtype

    @property
    def max_length(self) -> int:
        """Tokens that the text encoder reads, with start and end."""
        return min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)

    def check_prompt(self, prompt: str) -> PromptCheck:
        """Which part of the prompt is read and which is cut off.

        Raises:
            UserError: If the prompt is empty.
        """
        if not prompt.strip():
            raise UserError("the prompt is empty; write what to draw, such as \"a cat face\"")
        tokens = self.tokenizer(prompt, return_offsets_mapping=True, verbose=False)
        if len(tokens.input_ids) <= self.max_length:
            return PromptCheck(prompt, "")
        end = tokens.offset_mapping[self.max_length - 2][1]  # the last token that fits before the end token
        return PromptCheck(prompt[:end].rstrip(), prompt[end:].lstrip())

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Prompt embeddings [B, T, D], as diffusers' pipeline computes them; "" is the usual negative prompt."""
        ids = self.tokenizer(prompts, padding="max_length", max_length=self.max_length, truncation=True,
                             return_tensors="pt").input_ids
        return self.text_encoder(ids.to(self.device)).last_hidden_state

    def predictor(
        self, prompt_embeds: Tensor, negative_prompt_embeds: Tensor, *, guidance_scale: float, adapter: str | None,
        max_rows: int = 128,
    ) -> Predictor:
        """The guided UNet for sampling.sample.

        Args:
            prompt_embeds: [S, T, D], one row for each image, or [1, T, D] for all.
            negative_prompt_embeds: [S, T, D] or [1, T, D].
            guidance_scale: Classifier-free guidance; 1 is off and halves the work.
            adapter: A name from use_lora; None for the base model under every scale.
            max_rows: Most rows that the network takes at once (memory); it doesn't change results.
        """
        return Predictor(self, prompt_embeds, negative_prompt_embeds, guidance_scale, adapter, max_rows)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], fp32, of latents [B, C, h, w]; differentiable where not clamped."""
        scaled = latents.to(self.device, self.vae.dtype) / self.vae.config.scaling_factor
        decoded = torch.cat([self.vae.decode(part).sample for part in scaled.split(DECODE_ROWS)])
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    def use_lora(self, entry: LoraEntry) -> str:
        """Load a LoRA beside those already here, once, and return its adapter's name.

        A file that has changed since is loaded again, under another name; a run that uses the old one goes on with it.

        Raises:
            UserError: If the LoRA is made for another model (both are named), missing or damaged.
        """
        if entry.model and entry.model != self.name:
            raise UserError(f"the LoRA '{entry.name}' was made for the model '{entry.model}', not for '{self.name}'")
        path = Path(entry.path)
        file = (path / LORA_FILE if path.is_dir() else path).resolve()
        if not file.is_file():
            raise UserError(f"no LoRA file {file}")
        stamp = f"{file} {file.stat().st_mtime_ns} {file.stat().st_size}"
        label = file.parent.name if file.name == LORA_FILE else file.stem
        name = re.sub(r"\W", "_", f"{label[:40]}_{hashlib.sha256(stamp.encode()).hexdigest()[:12]}")
        with self.lock:
            if name not in getattr(self.unet, "peft_config", {}):
                load_adapter(self.unet, name, file, model_name=f"the model '{self.name}'")
        return name


@dataclass(frozen=True, eq=False)
class Predictor:
    """The UNet's output after classifier-free guidance, with one LoRA scale a row; see Model.predictor."""

    model: Model
    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor
    guidance_scale: float
    adapter: str | None
    max_rows: int

    @property
    def passes(self) -> int:
        """Network rows behind each row: 2 with guidance, 1 without."""
        return 1 if self.guidance_scale == 1 else 2

    def __call__(self, latents_in: Tensor, t: Tensor, lora_scales: Tensor, seed_index: Tensor) -> Tensor:
        """Guided outputs [R, C, h, w]; gradients pass where they are enabled."""
        chunk = max(1, self.max_rows // self.passes)
        parts = zip(latents_in.split(chunk), lora_scales.split(chunk), seed_index.split(chunk), strict=True)
        return torch.cat([self._guided(latents, t, scales, index) for latents, scales, index in parts])

    def _guided(self, latents: Tensor, t: Tensor, scales: Tensor, index: Tensor) -> Tensor:
        embeds = _rows(self.prompt_embeds, index)
        inputs = latents
        if self.passes == 2:
            embeds = torch.cat([_rows(self.negative_prompt_embeds, index), embeds])
            inputs, scales = torch.cat([latents, latents]), torch.cat([scales, scales])
        unet, device, dtype = self.model.unet, self.model.device, self.model.dtype
        with self.model.lock, lora_scale(unet, self.adapter, scales):
            output = unet(inputs.to(dtype), t, embeds.to(device, dtype)).sample.to(latents.dtype)
        if self.passes == 1:
            return output
        negative, positive = output.chunk(2)
        return negative + self.guidance_scale * (positive - negative)


def load_model(name_or_path: str, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """Load a built-in model, a StableDiffusionPipeline folder or a hub id; only safetensors weights are read.

    Raises:
        UserError: If it is unknown, another kind of pipeline, or a file is missing or damaged (it is named).
    """
    entry = find_model(name_or_path)
    path, local = entry.path, Path(entry.path).is_dir()
    if local:
        _check_folder(Path(path))

    def part(kind: type[Part], subfolder: str, **settings: object) -> Part:
        place = f"{path}/{subfolder}"
        return _read(place, lambda: kind.from_pretrained(path, subfolder=subfolder, local_files_only=local, **settings))

    def network(kind: type[Part], subfolder: str, dtype_key: str) -> Part:
        weights = {dtype_key: dtype, "use_safetensors": True, "output_loading_info": True}
        loaded, info = part(kind, subfolder, **weights)
        lost = [*info["missing_keys"], *info["mismatched_keys"]]
        if lost:
            raise UserError(f"{path}/{subfolder} is damaged: the weights of {lost[0]} are missing or of another shape")
        return loaded.to(device).eval().requires_grad_(False)

    tokenizer = part(CLIPTokenizer, "tokenizer")
    text_encoder = network(CLIPTextModel, "text_encoder", "dtype")
    unet, vae = network(UNet2DConditionModel, "unet", "torch_dtype"), network(AutoencoderKL, "vae", "torch_dtype")
    config = _read(f"{path}/scheduler",
                   lambda: DDIMScheduler.load_config(path, subfolder="scheduler", local_files_only=local))
    config = dict(config) | {"steps_offset": 1, "clip_sample": False}  # what StableDiffusionPipeline itself corrects
    for convolutions in (unet, vae):
        convolutions.to(memory_format=torch.channels_last)  # about a third faster on a CPU
    side = unet.config.sample_size
    return Model(
        name=entry.name, unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler_config=config,
        latent_shape=(unet.config.in_channels, side, side),
        image_size=side * 2 ** (len(vae.config.block_out_channels) - 1),
    )


def _rows(embeds: Tensor, index: Tensor) -> Tensor:
    return embeds.expand(len(index), -1, -1) if len(embeds) == 1 else embeds[index.to(embeds.device)]


def _check_folder(folder: Path) -> None:
    """Refuse another kind of pipeline and name a damaged file, before anything is loaded."""
    index = folder / "model_index.json"
    kind = _read(index, lambda: json.loads(index.read_text())["_class_name"])
    if kind != PIPELINE:
        raise UserError(f"{folder} is a {kind}; only {PIPELINE} models can be used")
    tokenizer = folder / "tokenizer"
    if not (tokenizer / "tokenizer.json").is_file() and not (tokenizer / "vocab.json").is_file():
        raise UserError(f"{tokenizer} has no tokenizer.json and no vocab.json; restore it")
    for file in sorted(folder.glob("*/*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged ({error}); restore it") from error


def _read(place: str | Path, read: Callable[[], Part]) -> Part:
    """`read()`, where any failure means that what lies at `place` cannot be used."""
    try:
        return read()
    except Exception as error:  # tokenizers and the hub client raise bare Exception types of their own
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{place} is missing or damaged: {type(error).__name__}: {reason}") from error

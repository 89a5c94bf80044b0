"""Stages 1 and 2: the autoencoder of the built-in model, 64 × 64 pixels to 16 × 16 × 8 latents; then its decoder alone.

Trained on scenes of every concept but each HELD_OUT-th beyond the first tier, which measure it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torchvision.utils import make_grid

from rewardiv.pretrain.layouts import SceneSpec
from rewardiv.pretrain.loop import Recipe, train
from rewardiv.pretrain.scenes import SIZE, Icons, balanced_icons, compose, load_icons
from rewardiv.runs import replaced_dir, write_json

HELD_OUT = 8
KL_WEIGHT = 3e-5
L1_WEIGHT = 0.1
SPEC = SceneSpec(min_size=0.6, max_size=1.0, shift=1.0, mirror=0.5, small=0.05, large=0.05, counted=0.25, paired=0.25)
NUM_SCENES, NUM_TEST = 24_576, 1024
MAX_NOISE = 0.15  # on scaled latents while the decoder trains alone
NARROW = -15.0  # log variance of a posterior that is as good as a point


def build() -> AutoencoderKL:
    """The untrained network (0.66 M weights)."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64), layers_per_block=1, latent_channels=8, norm_num_groups=8, sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False, force_upcast=False,
    ).to(memory_format=torch.channels_last)


def split_icons() -> tuple[Icons, Icons]:
    """Icons to train on, and the held-out ones: every HELD_OUT-th concept beyond the first tier."""
    icons = load_icons()
    second = [c for c in icons.concepts if all(r["tier"] > 1 for r in icons.records if r["caption"] == c)]
    held = set(second[::HELD_OUT])
    is_held = [record["caption"] in held for record in icons.records]
    positions = range(len(is_held))
    return icons.where([i for i in positions if not is_held[i]]), icons.where([i for i in positions if is_held[i]])


def to_model(images: Tensor) -> Tensor:
    """uint8 scenes as the autoencoder takes them: float in [-1, 1], channels last."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def losses(model: AutoencoderKL, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Reconstruction (squared and absolute error on [-1, 1]) and the KL of the posterior to a standard normal."""
    posterior = model.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(images)
    terms = errors(model.decode(posterior.mean + posterior.std * noise).sample, images)
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return {**terms, "loss": terms["loss"] + KL_WEIGHT * kl, "kl": kl}


def errors(decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
    """Squared and absolute error, both on [-1, 1], and their weighted sum."""
    mse, l1 = (decoded - images).square().mean(), (decoded - images).abs().mean()
    return {"loss": mse + L1_WEIGHT * l1, "mse": mse, "l1": l1}


@torch.no_grad()
def psnr(model: AutoencoderKL, images: Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB, on [0, 1], decoded from the posterior mean."""
    values = []
    for part in images.split(64):
        x = to_model(part)
        decoded = model.decode(model.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        mse = ((decoded - x) / 2).square().mean((1, 2, 3))
        values.append(-10 * torch.log10(mse))
    return float(torch.cat(values).mean())


def run(recipe: Recipe, *, work_dir: Path, output_dir: Path, seed: int, resume: bool, device: str) -> dict[str, float]:
    """Train, measure on held-out scenes and write `output_dir`/vae.

    Returns:
        Measured figures for the model card.
    """
    torch.manual_seed(seed)  # initial weights
    data = build_data(seed)
    scenes = data.scenes

    def loss_fn(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(len(scenes), (recipe.batch_size,), generator=generator)
        return losses(model, to_model(scenes[chosen]).to(device), generator)

    model = build().to(device)
    if recipe.compiled:
        model.encoder.compile()
        model.decoder.compile()
    average = train("autoencoder", model, loss_fn, recipe, folder=work_dir, seed=seed, resume=resume,
                    sheet=partial(reconstructions, data.test[:16])).cpu()
    even_out(average, scenes[:2048])
    average.register_to_config(scaling_factor=round(1 / latent_std(average, scenes[:1024]), 4))
    return save(average, data, output_dir)


def run_decoder(recipe: Recipe, *, work_dir: Path, output_dir: Path, seed: int, resume: bool, device: str) -> dict[str, float]:
    """Train the decoder of `output_dir`/vae alone; the encoder, and so every latent, stays as it is.

    It learns to decode latents with a little noise on them: those that a diffusion model makes are never exact, and a decoder
    that has seen exact ones alone makes grain of their errors.

    Returns:
        Measured figures for the model card.
    """
    data = build_data(seed)
    model = AutoencoderKL.from_pretrained(output_dir / "vae", torch_dtype=torch.float32).to(memory_format=torch.channels_last)
    factor = model.config.scaling_factor
    with torch.no_grad():
        latents = torch.cat([model.encode(to_model(part)).latent_dist.mean.half() for part in data.scenes.split(128)])
    model.to(device)
    if recipe.compiled:
        model.decoder.compile()

    def loss_fn(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(len(latents), (recipe.batch_size,), generator=generator)
        clean, images = latents[chosen].float(), to_model(data.scenes[chosen]).to(device)
        amount = torch.rand(len(clean), 1, 1, 1, generator=generator) * MAX_NOISE / factor
        noisy = (clean + amount * torch.randn(clean.shape, generator=generator)).contiguous(memory_format=torch.channels_last)
        return errors(model.decode(noisy.to(device)).sample, images)

    average = train("decoder", model, loss_fn, recipe, folder=work_dir, seed=seed, resume=resume,
                    sheet=partial(reconstructions, data.test[:16]))
    return save(average.cpu(), data, output_dir)


@dataclass(frozen=True)
class Data:
    """Scenes to train on and, of concepts held out, to measure with, uint8 [n, 3, 64, 64]; which of those show one drawing."""

    scenes: Tensor
    test: Tensor
    alone: Tensor


def build_data(seed: int) -> Data:
    """Compose both, from a seed."""
    generator = torch.Generator().manual_seed(seed)
    kept, held = split_icons()
    scenes = compose(kept, balanced_icons(kept, NUM_SCENES, generator), SPEC, generator).images
    test = compose(held, balanced_icons(held, NUM_TEST, generator), SPEC, generator)
    return Data(scenes, test.images, test.number == 1)


@torch.no_grad()
def reconstructions(images: Tensor, model: nn.Module) -> Tensor:
    """A sheet: uint8 scenes above what the autoencoder makes of them."""
    inputs = to_model(images).to(next(model.parameters()).device)
    decoded = model.decode(model.encode(inputs).latent_dist.mean).sample.cpu()
    return make_grid(torch.cat([images.float() / 255, (decoded / 2 + 0.5).clamp(0, 1)]), nrow=len(images))


def save(model: AutoencoderKL, data: Data, output_dir: Path) -> dict[str, float]:
    """Measure on held-out scenes and write `output_dir`/vae in half precision."""
    figures = {"psnr_held_out_db": round(psnr(model, data.test[data.alone]), 2),
               "psnr_held_out_several_db": round(psnr(model, data.test[~data.alone]), 2)}
    with replaced_dir(output_dir / "vae") as folder:
        model.half().save_pretrained(folder)
        drop_origin(folder / "config.json")
    return figures


def drop_origin(config: Path) -> None:
    """Take the folder that a part was loaded from out of its config: it names a place on one machine."""
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)
    write_json(config, values)


@torch.no_grad()
def even_out(model: AutoencoderKL, images: Tensor) -> None:
    """Turn the latents to their principal axes, centred, each axis' spread replaced by its square root.

    Trained as it is, the autoencoder keeps edges in channels seventy times weaker than those that keep colours: a
    diffusion model meets them only in its last steps, and the decoder magnifies its errors there. The two 1 × 1
    convolutions around the latents take the change and its inverse, so that decoding stays as it was. The posterior's
    own spread, which nothing reads from here on, becomes negligible.
    """
    latents = torch.cat([model.encode(to_model(part)).latent_dist.mean for part in images.split(64)])
    points = latents.permute(0, 2, 3, 1).flatten(0, 2).double()
    centre, channels = points.mean(0), points.shape[1]
    variance, axes = torch.linalg.eigh(torch.cov(points.T))
    forward = (variance.clamp_min(1e-8) ** -0.25)[:, None] * axes.T
    inward, outward = model.quant_conv, model.post_quant_conv
    weight, bias = inward.weight[:, :, 0, 0].double(), inward.bias.double()
    inward.weight.copy_(torch.cat([forward @ weight[:channels], 0 * weight[channels:]])[:, :, None, None])
    inward.bias.copy_(torch.cat([forward @ (bias[:channels] - centre), torch.full((channels,), NARROW).double()]))
    weight = outward.weight[:, :, 0, 0].double()
    outward.bias.add_((weight @ centre).float())
    outward.weight.copy_((weight @ torch.linalg.inv(forward))[:, :, None, None])


@torch.no_grad()
def latent_std(model: AutoencoderKL, images: Tensor) -> float:
    """Standard deviation of the latents over everything: its inverse is the pipeline's scaling factor."""
    latents = torch.cat([model.encode(to_model(part)).latent_dist.mean for part in images.split(64)])
    std = float(latents.std())
    if not math.isfinite(std) or std < 1e-3:
        raise ValueError(f"the latents have collapsed (standard deviation {std:g})")
    return std

"""Stage 2: text encoder and UNet of the built-in model, trained on cached latents of scenes.

Most captions leave the drawing style out: a prompt that names none must give several drawings, because the variety
within a prompt is what reward finetuning destroys and what this project measures. Guidance destroys some of it too, so the
last stage weakens it where the drawing is chosen, and makes up for that later.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torchvision.utils import make_grid
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rewardiv.clip_models import load_clip
from rewardiv.errors import UserError
from rewardiv.pretrain.autoencoder import drop_origin, to_model
from rewardiv.pretrain.layouts import SceneSpec
from rewardiv.pretrain.loop import Recipe, train
from rewardiv.pretrain.scenes import Icons, balanced_icons, captions, compose, load_icons
from rewardiv.pretrain.tokenizer import MAX_LENGTH, build_tokenizer
from rewardiv.pretrain.wording import caption
from rewardiv.runs import replaced_dir, write_atomic, write_text

if TYPE_CHECKING:
    from open_clip import CLIP

MAX_SNR = 5.0  # beyond it a timestep's loss counts less
WIDTH = 128  # of the text encoder and so of cross-attention
EMPTY_ODDS, COLOUR_ODDS, STYLE_ODDS = 0.1, 0.4, 0.4
MAX_SHARD_SIZE = "15MB"
TEMPERED_FROM, SHARE_FROM, SHARE_BELOW = 600, 0.48, 4 / 3  # a timestep; shares of guidance after stage "temper"


@dataclass(frozen=True)
class World:
    """What the base model learns to draw: concepts up to a tier, in these styles, in scenes that vary so much."""

    max_tier: int
    styles: tuple[str, ...]
    spec: SceneSpec
    num_scenes: int

    def icons(self) -> Icons:
        """The icons of this world."""
        return load_icons(max_tier=self.max_tier, styles=self.styles)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The text tower of `clip` as transformers has it: two layers over the small vocabulary."""
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2, hidden_act="gelu",
        num_attention_heads=4, max_position_embeddings=MAX_LENGTH, projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))


@torch.no_grad()
def take_over(tower: CLIP, encoder: CLIPTextModel) -> None:
    """Give a text encoder the weights of an open_clip network's text tower: concepts that look alike begin alike."""
    encoder.embeddings.token_embedding.weight.copy_(tower.token_embedding.weight)
    encoder.embeddings.position_embedding.weight.copy_(tower.positional_embedding)
    encoder.final_layer_norm.load_state_dict(tower.ln_final.state_dict())
    for block, layer in zip(tower.transformer.resblocks, encoder.encoder.layers, strict=True):
        weights, biases = block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3)
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            getattr(layer.self_attn, f"{name}_proj").load_state_dict({"weight": weight, "bias": bias})
        for own, other in ((layer.self_attn.out_proj, block.attn.out_proj), (layer.layer_norm1, block.ln_1),
                           (layer.layer_norm2, block.ln_2), (layer.mlp.fc1, block.mlp.c_fc), (layer.mlp.fc2, block.mlp.c_proj)):
            own.load_state_dict(other.state_dict())


def build_unet(channels: tuple[int, int, int]) -> UNet2DConditionModel:
    """16 × 16 × 8 latents; attention to the text at 8 × 8 and 4 × 4, and all of the text in one vector, added to the time
    embedding, that scales and shifts every ResNet block: with the attention alone a model takes many times as long to draw what
    is asked for."""
    return UNet2DConditionModel(
        sample_size=16, in_channels=8, out_channels=8, block_out_channels=channels, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=4, norm_num_groups=16, resnet_time_scale_shift="scale_shift",
        addition_embed_type="text", addition_embed_type_num_heads=4,
    ).to(memory_format=torch.channels_last)


def build_scheduler() -> DDIMScheduler:
    """Of training: Stable Diffusion's betas, rescaled to zero terminal SNR (backgrounds may be any brightness), v-prediction.

    Source: Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", arXiv 2305.08891.
    """
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
        clip_sample=False, set_alpha_to_one=True, steps_offset=1)


def build_sampler() -> DPMSolverMultistepScheduler:
    """What the pipeline draws with: DPM-Solver++(2M) on the same betas. 25 of its steps find as many of the concepts as 60 of
    DDIM's.

    Source: Lu et al., arXiv 2211.01095.
    """
    return DPMSolverMultistepScheduler.from_config(build_scheduler().config, algorithm_type="dpmsolver++")


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """uint8 scenes to scaled latents [n, 8, 16, 16], half precision (a cache)."""
    parts = [vae.encode(to_model(part)).latent_dist.mean for part in images.split(128)]
    return (torch.cat(parts) * vae.config.scaling_factor).half()


def v_loss(model: nn.ModuleDict, scheduler: DDIMScheduler, latents: Tensor, tokens: Tensor,
           generator: torch.Generator) -> dict[str, Tensor]:
    """Mean squared error of the velocity v = α·eps − σ·x at random timesteps (Salimans and Ho, arXiv 2202.00512), one in each
    of as many equal parts of the schedule as there are latents, so that a batch has all noise levels.

    Nearly clean latents, of a signal-to-noise ratio above MAX_SNR, count (MAX_SNR + 1) / (SNR + 1): what is left to predict
    there is noise. Source: Hang et al., "Min-SNR Weighting", arXiv 2303.09556. Differs: the weight is 1, not SNR / (SNR + 1),
    below MAX_SNR, so that the first step, of SNR 0, is learned too.
    """
    noisy, noise, timesteps = noised(scheduler, latents, generator)
    velocity = scheduler.get_velocity(latents, noise, timesteps)
    errors = (predict(model, noisy, timesteps, tokens) - velocity).square().mean((1, 2, 3))
    clean = scheduler.alphas_cumprod.to(latents.device)[timesteps]  # SNR / (SNR + 1)
    return {"loss": (errors * ((MAX_SNR + 1) * (1 - clean)).clamp_max(1)).mean()}


def noised(scheduler: DDIMScheduler, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [n, C, h, w] with noise, the noise, and their timesteps [n], one in each of n equal parts of the schedule."""
    num = len(latents)
    places = (torch.arange(num) + torch.rand(num, generator=generator, dtype=torch.float64)) / num
    timesteps = (places * scheduler.config.num_train_timesteps).long().to(latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    return scheduler.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last), noise, timesteps


def predict(model: nn.ModuleDict, noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
    """The velocity [n, C, h, w] for captions' tokens [n, l]."""
    unique, back = torch.unique(tokens, dim=0, return_inverse=True)
    embeds = model["text_encoder"](unique)[0][back]
    return model["unet"](noisy, timesteps, encoder_hidden_states=embeds).sample


def temper_loss(model: nn.ModuleDict, teacher: nn.ModuleDict, scheduler: DDIMScheduler, latents: Tensor, tokens: Tensor,
                empty: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Mean squared error against the teacher's u + share · (c - u), where c and u are its predictions with and without the
    caption: guidance of the new model then is the teacher's times `share`, which is less than 1 at the timesteps where the
    drawing is chosen and more than 1 after them. Without a caption nothing changes.

    Limits guidance to some noise levels as Kynkäänniemi et al., arXiv 2404.07724, but in the weights (Meng et al., arXiv
    2210.03142, distil guidance), so that any sampler has it. Differs from both: what is distilled still takes guidance.

    Args:
        model: What is trained.
        teacher: The same before this stage.
        scheduler: Of training.
        latents: [n, C, h, w].
        tokens: Captions [n, l].
        empty: The empty caption's tokens [l].
        generator: The step's.
    """
    noisy, _, timesteps = noised(scheduler, latents, generator)
    with torch.no_grad():
        with_text, without = predict(teacher, noisy.repeat(2, 1, 1, 1), timesteps.repeat(2),
                                     torch.cat([tokens, empty.expand_as(tokens)])).chunk(2)
        target = without + guidance_share(timesteps)[:, None, None, None] * (with_text - without)
    return {"loss": (predict(model, noisy, timesteps, tokens) - target).square().mean()}


def guidance_share(timesteps: Tensor) -> Tensor:
    """The share of guidance that stage "temper" leaves, [n]: 3 becomes 1.44 from timestep 600 on, and 4 below."""
    return torch.where(timesteps >= TEMPERED_FROM, SHARE_FROM, SHARE_BELOW)


def run(recipe: Recipe, world: World, channels: tuple[int, int, int], *, stage: str, clip_dir: Path, work_dir: Path,
        output_dir: Path, seed: int, resume: bool, device: str) -> dict[str, float]:
    """Train and write `output_dir` as a StableDiffusionPipeline folder (the autoencoder must be there already).

    Stage "base" begins with a new UNet and, as its text encoder, the text tower of the CLIP in `clip_dir`; the others go on
    with both from `output_dir`. They are trained together, in stage "temper" on what `output_dir` predicted when that stage
    began: begun anew from a model that is tempered already, it tempers twice.

    Returns:
        The number of the UNet's weights in millions, and what it was shown; quality is measured by `evaluate`.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # initial weights
    vae = AutoencoderKL.from_pretrained(output_dir / "vae", torch_dtype=torch.float32).eval()
    vae.to(memory_format=torch.channels_last)
    icons = world.icons()
    num_scenes = min(world.num_scenes, recipe.num_steps * recipe.batch_size)  # no more than it can be shown
    scenes = compose(icons, balanced_icons(icons, num_scenes, generator), world.spec, generator)
    with torch.autocast(device, torch.bfloat16, enabled=recipe.bf16):
        latents = encode_scenes(vae, scenes.images)
    tokenizer, scheduler = build_tokenizer(), build_scheduler()
    model = nn.ModuleDict({"unet": build_unet(channels), "text_encoder": build_text_encoder(tokenizer)})
    if stage == "base":
        take_over(load_clip(clip_dir).net, model["text_encoder"])
    else:
        go_on_from(output_dir, model)
    model.to(device)
    if device == "cpu":
        model["unet"].set_attn_processor(AttnProcessor())  # torch's fused attention is slow there, its backward pass above all
    if recipe.compiled:
        model["unet"].compile()

    def tokenized(texts: list[str]) -> Tensor:
        return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)

    teacher = kept_teacher(model, work_dir, device) if stage == "temper" else None
    empty_tokens = tokenized([""])[0]

    def loss_fn(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(len(latents), (recipe.batch_size,), generator=generator)
        texts = captions(icons, scenes, chosen, generator, colour_odds=COLOUR_ODDS, style_odds=STYLE_ODDS, in_order=True)
        empty = torch.rand(len(texts), generator=generator) < EMPTY_ODDS
        texts = ["" if none else text for text, none in zip(texts, empty.tolist(), strict=True)]
        shown, tokens = latents[chosen].float().to(device), tokenized(texts)
        if teacher is not None:
            return temper_loss(model, teacher, scheduler, shown, tokens, empty_tokens, generator)
        return v_loss(model, scheduler, shown, tokens, generator)

    def pipeline(average: nn.Module) -> StableDiffusionPipeline:
        return new_pipeline(vae.to(device), average, tokenizer)

    def sheet(average: nn.Module) -> Tensor:
        return draw_sheet(pipeline(average), icons.concepts)

    average = train(stage, model, loss_fn, recipe, folder=work_dir, seed=seed, resume=resume, sheet=sheet)
    save_pipeline(pipeline(average), output_dir)
    return {"unet_weights_m": round(sum(p.numel() for p in average["unet"].parameters()) / 1e6, 2),
            "max_tier": world.max_tier, "several": world.spec.counted + world.spec.paired > 0}


def go_on_from(folder: Path, model: nn.ModuleDict) -> None:
    """Give the networks the weights that a pipeline's folder has, in fp32."""
    for name, part in model.items():
        part.load_state_dict(type(part).from_pretrained(folder / name, torch_dtype=torch.float32).state_dict())


def kept_teacher(model: nn.ModuleDict, folder: Path, device: str) -> nn.ModuleDict:
    """A frozen copy of the model as it was when stage "temper" began, kept in the work folder: a run that is resumed after it
    was finished finds a tempered model in the output folder, and would temper that.

    Raises:
        UserError: If the stage has begun and the copy is gone.
    """
    path, state = folder / "temper-teacher.pt", folder / "temper.pt"
    if not state.exists():
        write_atomic(path, lambda partial: torch.save(model.state_dict(), partial))
    elif not path.exists():
        raise UserError(f"{path}, the model as it was when {state} began, is missing; remove {state} and build 'settle' and "
                        "'temper' again")
    teacher = copy.deepcopy(model)
    teacher.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    return teacher.eval().requires_grad_(False)


def new_pipeline(vae: AutoencoderKL, model: nn.ModuleDict, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """The networks in diffusers' pipeline, without a progress bar."""
    pipe = StableDiffusionPipeline(vae, model["text_encoder"], tokenizer, model["unet"], build_sampler(), safety_checker=None,
                                   feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_sheet(pipeline: StableDiffusionPipeline, concepts: list[str]) -> Tensor:
    """The pipeline's pictures of `sheet_prompts`, eight in a row, as one image [3, H, W] in [0, 1]."""
    images = pipeline(sheet_prompts(concepts), num_inference_steps=10, guidance_scale=3.0, output_type="pt",
                      generator=torch.Generator().manual_seed(0)).images
    return make_grid(images.cpu(), nrow=8)


def sheet_prompts(concepts: list[str]) -> list[str]:
    """Of a stage's sheets: eight concepts, three each of four of them, and pairs, four times each."""
    shown = concepts[::max(len(concepts) // 8, 1)][:8]
    several = [caption(one, number=3) for one in shown[:4]] + [caption(*two) for two in pairwise(shown[3:])]
    return [prompt for prompt in shown + several for _ in range(4)]


def save_pipeline(pipe: StableDiffusionPipeline, output_dir: Path) -> None:
    """Write the pipeline in half precision, in files under 16 MiB, keeping the folder's README."""
    readme = (output_dir / "README.md").read_text() if (output_dir / "README.md").exists() else None
    with replaced_dir(output_dir) as folder:
        pipe.to(dtype=torch.float16, device="cpu").save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
        drop_origin(folder / "vae" / "config.json")
        if readme:
            write_text(folder / "README.md", readme)

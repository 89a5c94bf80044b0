"""DRaFT and its relatives: the gradient of differentiable rewards through late denoising steps, for one part of a batch.

Sources: Clark et al., arXiv:2309.17400 (DRaFT-K, DRaFT-LV), as used by Jena et al., arXiv:2409.06493; Xu et al.,
arXiv:2304.05977 (ReFL). The denoising loop is sampling's own; rewards are read on decoded images clamped to [0, 1], as the
authors do. Everything here is a function of the weights, (config.seed, step, part, rank) and the images' own seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from rewardiv import lora
from rewardiv.config import TrainConfig
from rewardiv.methods import parse_method
from rewardiv.mixing import RewardMix
from rewardiv.models import Model
from rewardiv.regularisers import KlWitness, lora_norm, path_kl
from rewardiv.sampling import Predict, Scheduler, initial_noise, make_scheduler, rows_of, sample

ADAPTER = "draft"
HALF_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
CHOICES, DROPOUT = 1, 2  # what random numbers are for
FINETUNED = (parse_method("finetuned"),)
Backward = Callable[[Tensor], float]


@dataclass
class Trainee:
    """What a run changes: the adapter's weights inside the model, the optimiser and the count of finished steps.

    `scaler` does nothing but in fp16: hand it to `accumulate`, and let it unscale and step the optimiser.
    """

    model: Model
    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    step: int = 0
    elapsed_s: float = 0.0


@dataclass(frozen=True)
class Part:
    """What one part of a batch showed.

    Attributes:
        raw: Every reward [B], as its model gives it. In DRaFT-LV an image's is the mean over its noisings.
        mixed: The reward [B] that is maximised.
        loss: The number that is minimised: -mean(mixed) and the weighted regularisers; nan where any of it isn't finite.
        kl: The authors' KL, path_kl the paths', lora_norm the squared norm of the weight change; 0 where their weight is 0.
    """

    raw: dict[str, Tensor]
    mixed: Tensor
    loss: float
    kl: float
    path_kl: float
    lora_norm: float


@dataclass(frozen=True, eq=False)
class Tail:
    """The end of a rollout, through which gradients pass.

    Attributes:
        latents: The scheduler's, before step `start`; no gradient passes further back.
        start: The first of the steps.
        scheduler: As it stands before step `start`.
        at_once: Whether the images are those that step `start` predicts, instead of those after the last step.
    """

    latents: Tensor
    start: int
    scheduler: Scheduler
    at_once: bool = False


@dataclass(frozen=True, eq=False)
class Batch:
    """One part of a batch on its way through the model.

    Attributes:
        predict: The guided model output, in the run's precision.
        witness: The same, measured by the authors' KL; None where that is off.
        generator: Of the choices that concern the whole step, in all its parts and processes.
        path: The scheduler's latents before each step that the path's KL looks at; filled by `rollout`.
    """

    model: Model
    seeds: list[int]
    config: TrainConfig
    predict: Predict
    witness: KlWitness | None
    scheduler: Scheduler
    generator: torch.Generator
    path: dict[int, Tensor] = field(default_factory=dict)

    def noise(self, seeds: list[int]) -> Tensor:
        """Standard normal noise like the latents; they stay in fp32 where the network doesn't."""
        dtype = torch.float32 if self.config.mixed_precision in HALF_TYPES else self.model.dtype
        return initial_noise(seeds, self.model.latent_shape, device=self.model.device, dtype=dtype)

    def rows(self, rows: slice) -> Batch:
        """These images of the batch alone; the path's latents aren't among what it holds."""
        def predict(latents_in: Tensor, t: Tensor, lora_scales: Tensor, seed_index: Tensor) -> Tensor:
            return self.predict(latents_in, t, lora_scales, seed_index + rows.start)

        witness = self.witness and KlWitness(predict, self.scheduler)
        return replace(self, seeds=self.seeds[rows], predict=predict, witness=witness, path={})

    def finish(self, tail: Tail) -> Tensor:
        """The images [B, 3, H, W] in [0, 1] of a tail, with its gradient."""
        num_steps = self.config.num_inference_steps - tail.start
        steps = sample(self.witness or self.predict, tail.latents, FINETUNED, tail.scheduler, start=tail.start,
                       grad_steps=num_steps)
        *_, state = islice(steps, 1 if tail.at_once else num_steps)
        return decoded(self.model, state.denoised[0] if tail.at_once else state.latents[0], self.config)


def new_trainee(model: Model, config: TrainConfig) -> Trainee:
    """Freeze the model, attach a fresh adapter (it changes nothing yet) and make its optimiser.

    In mixed precision the frozen UNet is kept in the half type and the adapter in fp32.

    Raises:
        UserError: If a target of the adapter matches no layer.
    """
    for network in (model.unet, model.vae, *(tower.encoder for tower in model.towers)):
        network.requires_grad_(False).eval()
    half = config.mixed_precision in HALF_TYPES
    if half:
        model.unet.to(HALF_TYPES[config.mixed_precision])
    alpha = config.rank if config.lora_alpha is None else config.lora_alpha
    lora.attach_adapter(model.unet, ADAPTER, rank=config.rank, alpha=alpha, targets=config.targets,
                        dropout=config.lora_dropout, seed=config.seed)
    parameters = lora.adapter_parameters(model.unet, ADAPTER)
    for parameter in parameters:
        parameter.data = parameter.data.float() if half else parameter.data
    if config.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
        model.vae.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2),
                                  weight_decay=config.adam_weight_decay)
    scaler = torch.amp.GradScaler(model.device.type, enabled=config.mixed_precision == "fp16")
    return Trainee(model, parameters, optimizer, scaler)


def draw_batches(
    prompts: list[str], config: TrainConfig, step: int, *, attempt: int = 0, rank: int = 0, world_size: int = 1,
) -> Iterator[tuple[list[str], list[int]]]:
    """The prompts and noise seeds of one process's step, in gradient_accumulation_steps parts.

    A function of (config.seed, step, attempt), attempt being how many rollbacks went before, lest the step that led back be
    drawn again: all processes together draw what one process with world_size times the batch draws.
    """
    generator = torch.Generator().manual_seed(_number(config.seed, step, 0, attempt))
    size = config.train_batch_size
    total = size * config.gradient_accumulation_steps * world_size
    rows = torch.randint(len(prompts), (total,), generator=generator).tolist()
    seeds = torch.randint(2**31, (total,), generator=generator).tolist()
    for start in range(rank * size, total, world_size * size):
        yield [prompts[row] for row in rows[start:start + size]], seeds[start:start + size]


@torch.enable_grad()
def accumulate(
    model: Model, mix: RewardMix, prompts: list[str], seeds: list[int], config: TrainConfig, *, step: int, part: int,
    rank: int = 0, scaler: torch.amp.GradScaler | None = None,
) -> Part:
    """Add the gradient of one part's loss, divided by gradient_accumulation_steps, to the adapter's parameters.

    The gradient is taken term by term, each one's graph freed before the next is built. A term that isn't finite leaves no
    gradient, but others may: discard the step's gradients where the loss is nan.
    Torch's global generators are left as they were.

    Args:
        model: With the adapter of `new_trainee`.
        mix: The rewards.
        prompts: One for each image.
        seeds: The images' noise seeds.
        config: The run's settings.
        step: Steps finished before this one.
        part: 0 to gradient_accumulation_steps - 1.
        rank: Of this process.
        scaler: Scales the losses for fp16; None is without.
    """
    def backward(term: Tensor) -> float:
        if not term.isfinite():
            return math.nan
        scaled = term / config.gradient_accumulation_steps
        (scaled if scaler is None else scaler.scale(scaled)).backward()
        return float(term.detach())

    choices = torch.Generator().manual_seed(_number(config.seed, step, CHOICES))
    dropout = _number(config.seed, step, part, rank, DROPOUT)
    with (model.lock, _seeded(model.device, dropout), lora.lora_scale(model.unet, ADAPTER, 1.0),
          lora.dropping(model.unet, ADAPTER)):  # backward inside too: checkpointing computes forward again
        batch = _batch(model, prompts, seeds, config, choices)
        raw, mixed, loss, kl = _ascend(batch, mix, prompts, backward)
        path, norm = 0.0, 0.0
        for rows, share in _lots(batch) if config.path_kl_weight else ():
            latents = {i: latents[rows] for i, latents in batch.path.items()}
            for term in path_kl(batch.rows(rows).predict, batch.scheduler, latents, config.num_inference_steps):
                path += share * float(term.detach())
                loss += backward(share * config.path_kl_weight * term)
        if config.lora_norm_weight:
            term = lora_norm(model.unet, ADAPTER)
            norm = float(term.detach())
            loss += backward(config.lora_norm_weight * term)
    return Part(raw, mixed, loss, kl, path, norm)


def _ascend(
    batch: Batch, mix: RewardMix, prompts: list[str], backward: Backward,
) -> tuple[dict[str, Tensor], Tensor, float, float]:
    """Take the gradient of the rewards (and of the authors' KL) of an algorithm's images, one lot after the other.

    Gives the raw and the mixed rewards [B], as means over the tails, the KL and the loss.
    """
    config = batch.config
    num_tails = config.lv_noisings if config.algorithm == "draft-lv" else 1
    raw, mixed, loss, kl = {name: [] for name in mix.rewards}, [], 0.0, 0.0
    for tail in TAILS[config.algorithm](batch):
        for rows, share in _lots(batch):
            lot = batch.rows(rows)
            rewards = mix(lot.finish(replace(tail, latents=tail.latents[rows], scheduler=rows_of(tail.scheduler, rows))),
                          prompts[rows])
            term = -rewards.mixed.mean()
            if lot.witness is not None:
                gap = lot.witness.take()
                kl += share / num_tails * float(gap.detach())
                term = term + config.kl_weight * gap
            loss += backward(share / num_tails * term)
            mixed.append(rewards.mixed.detach())
            for name, values in rewards.raw.items():
                raw[name].append(values)

    def mean(lots: list[Tensor]) -> Tensor:
        return torch.cat(lots).view(num_tails, -1).mean(0)

    return {name: mean(values) for name, values in raw.items()}, mean(mixed), loss, kl


def _lots(batch: Batch) -> Iterator[tuple[slice, float]]:
    """The images whose gradient is taken at once, and their share of the batch."""
    total, size = len(batch.seeds), batch.config.grad_batch_size
    for start in range(0, total, size):
        rows = slice(start, min(start + size, total))
        yield rows, (rows.stop - start) / total


def last_steps(batch: Batch) -> Iterator[Tail]:
    """DRaFT-K: the final images, whose gradient passes the last grad_steps steps only; all of them: full DRaFT."""
    start = batch.config.num_inference_steps - batch.config.grad_steps
    yield rollout(batch, start)


def noised_again(batch: Batch) -> Iterator[Tail]:
    """DRaFT-LV: lv_noisings times, the last step's images from the rollout's final latents noised afresh.

    The gradients of the noisings are averaged, so that their number changes the gradient's variance and not its size; the
    rollout's own gradient isn't among them, so that it needs no graph.
    """
    num_steps = batch.config.num_inference_steps
    final = rollout(batch, num_steps).latents
    for k in range(batch.config.lv_noisings):
        latents = forward_noised(batch.scheduler, final, batch.noise(noising_seeds(batch.seeds, k)))
        yield Tail(latents, num_steps - 1, batch.scheduler)


def one_late_step(batch: Batch) -> Iterator[Tail]:
    """ReFL: the images that one random step of the last refl_window share predicts at once, with that step's gradient.

    Differs: no loss on real images, no cap on the reward; guidance as the settings say (the authors train without).
    """
    yield replace(rollout(batch, late_step(batch.config, batch.generator)), at_once=True)


TAILS: dict[str, Callable[[Batch], Iterator[Tail]]] = {
    "draft-k": last_steps, "draft-lv": noised_again, "refl": one_late_step,
}


def rollout(batch: Batch, start: int) -> Tail:
    """Denoise from noise, all images at once and without gradients, to before step `start` (num_inference_steps: after all).

    Goes on where the path needs it, to fill `batch.path`.
    """
    noise = batch.noise(batch.seeds)
    latents = noise * batch.scheduler.init_noise_sigma
    tail = Tail(latents, 0, batch.scheduler)
    if 0 in batch.path:
        batch.path[0] = latents
    for state in islice(sample(batch.predict, noise, FINETUNED, batch.scheduler), max(start, *batch.path, 0)):
        i = state.i + 1
        if i == start:
            tail = Tail(state.latents[0], i, state.schedulers[0])
        if i in batch.path:
            batch.path[i] = state.latents[0]
    return tail


def late_step(config: TrainConfig, generator: torch.Generator) -> int:
    """The step that ReFL looks at: uniform over the last refl_window share of the steps (at least one)."""
    num_steps = config.num_inference_steps
    num_late = max(1, round(config.refl_window * num_steps))
    return num_steps - 1 - int(torch.randint(num_late, (), generator=generator))


def path_steps(config: TrainConfig, generator: torch.Generator) -> list[int]:
    """The steps that the path's KL looks at: path_kl_steps random ones, or all."""
    if not config.path_kl_steps:
        return list(range(config.num_inference_steps))
    return sorted(torch.randperm(config.num_inference_steps, generator=generator)[:config.path_kl_steps].tolist())


def noising_seeds(seeds: list[int], k: int) -> list[int]:
    """The noise seeds of the k-th noising of images that began from these seeds."""
    return [_number(seed, k, CHOICES) for seed in seeds]


def forward_noised(scheduler: Scheduler, final: Tensor, noise: Tensor) -> Tensor:
    """Final latents taken to the last step's noise level by the forward process, as the scheduler scales it; no gradient."""
    return scheduler.add_noise(final.detach(), noise, scheduler.timesteps[-1:])


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """The run's mixed precision, for one call of a network: the sampler's and the rewards' arithmetic stays in fp32."""
    half = HALF_TYPES.get(config.mixed_precision)
    return torch.autocast(device.type, dtype=half or torch.bfloat16, enabled=half is not None)


def decoded(model: Model, latents: Tensor, config: TrainConfig) -> Tensor:
    """Images [B, 3, H, W] in [0, 1], in the run's precision; XL's autoencoder overflows in fp16 and computes in fp32 there."""
    in_full = model.family == "sdxl" and config.mixed_precision == "fp16"
    with nullcontext() if in_full else autocast(config, model.device):
        return model.decode_latents(latents)


def _batch(model: Model, prompts: list[str], seeds: list[int], config: TrainConfig, generator: torch.Generator) -> Batch:
    embeds = model.encode_prompts(prompts)
    guided = model.predictor(embeds, model.encode_prompts([""]), guidance_scale=config.guidance_scale, adapter=ADAPTER)

    def predict(latents_in: Tensor, t: Tensor, lora_scales: Tensor, seed_index: Tensor) -> Tensor:
        with autocast(config, model.device):
            return guided(latents_in, t, lora_scales, seed_index)

    scheduler = make_scheduler(model.scheduler_config, config.scheduler, config.num_inference_steps, model.device)
    witness = KlWitness(predict, scheduler) if config.kl_weight else None
    batch = Batch(model, seeds, config, predict, witness, scheduler, generator)
    if config.path_kl_weight:
        batch.path.update(dict.fromkeys(path_steps(config, generator)))
    return batch


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Inside, torch's global generators of the CPU and of the device begin at `seed`; afterwards they are as before."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for used in cuda:
            with torch.cuda.device(used):
                torch.cuda.manual_seed(seed)
        yield


def _number(*key: int) -> int:
    """A generator's seed for this key: equal keys, equal numbers."""
    state = np.random.SeedSequence(key).generate_state(2, np.uint32)
    return int(state[0]) << 31 ^ int(state[1])

"""Probes of a training run: a fixed grid of prompts and seeds, its rewards and diversity; `verdicts` says what they mean."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rewardiv.config import TrainConfig
from rewardiv.draft import ADAPTER, HALF_TYPES, autocast, decoded
from rewardiv.errors import UserError
from rewardiv.features import load_features
from rewardiv.methods import Method
from rewardiv.metrics import within_report
from rewardiv.models import Model
from rewardiv.prompts import Conditioning
from rewardiv.registry import REWARDS, find_reward, is_here
from rewardiv.rewards import Reward, load_reward
from rewardiv.sampling import initial_noise, make_scheduler, sample
from rewardiv.verdicts import ProbeRecord

BASE, FINETUNED = Method("base"), Method("finetuned")
ALWAYS_HELD_OUT = "clip"  # measured even if nobody asks: whether pictures still show what the prompt says
MAX_CHUNK = 32  # images drawn and scored at once; fewer where the training batch is smaller
RESAMPLING_SEED = 0

Grid = NDArray[np.uint8]  # [P, S, H, W, 3]


@dataclass(frozen=True)
class _Look:
    """What is kept of a set of images: features [P, S, d] and each reward's values [P, S]."""

    features: NDArray[np.float32]
    rewards: dict[str, NDArray[np.float64]]


class Probe:
    """Draws and scores the grid, as often as asked; training goes on as if nothing had happened.

    Args:
        model: With the adapter draft.ADAPTER, whose weights are used as they are at each measure.
        rewards: Trained on, by their names in config.reward_weights.
        held_out: Only measured.
        features: Images [n, 3, H, W] in [0, 1] to features [n, d].
        prompts: P of them.
        seeds: S of them, 2 at least; every prompt is drawn with the same.
        config: The run's; images are made as in training.
    """

    def __init__(
        self, model: Model, rewards: Mapping[str, Reward], held_out: Mapping[str, Reward],
        features: Callable[[Tensor], Tensor], prompts: Sequence[str], seeds: Sequence[int], config: TrainConfig,
    ) -> None:
        self.model, self.config, self.features = model, config, features
        self.rewards, self.held_out = dict(rewards), dict(held_out)
        self.prompts, self.seeds = tuple(prompts), tuple(seeds)
        self._base: _Look | None = None

    def measure(self, step: int) -> tuple[ProbeRecord, Grid]:
        """Draw and score the grid with the adapter as it is; also its images, uint8 [P, S, H, W, 3].

        Modes, gradients and global random numbers are left as they were. The first call draws the base model's images,
        too, by the same adapter at scale 0.

        Raises:
            UserError: If the images aren't finite numbers.
        """
        with _at_rest(self.model):
            if self._base is None:
                self._base = self._look(BASE, step)[0]
            started = time.perf_counter()
            seen, grid = self._look(FINETUNED, step)
            return self._record(step, seen, self._base, started), grid

    def _record(self, step: int, seen: _Look, base: _Look, started: float) -> ProbeRecord:
        spread = within_report(seen.features, base.features, seed=RESAMPLING_SEED)
        means = {name: float(values.mean()) for name, values in seen.rewards.items()}
        weights = {name: self.config.reward_weights[name] for name in self.rewards}
        gains = {name: (means[name] - base.rewards[name].mean()) / (_deviation(base.rewards[name]) or 1.0) for name in weights}
        return ProbeRecord(
            step=step,
            rewards={name: means[name] for name in self.rewards},
            held_out={name: means[name] for name in self.held_out},
            standard_errors={name: _deviation(values) / values.size**0.5 for name, values in seen.rewards.items()},
            gain=float(sum(weights[name] * gains[name] for name in weights) / sum(weights.values())),
            scd=spread.scd,
            scd_null=spread.null,
            trace_ratio=spread.trace_ratio,
            effective_rank=spread.effective_rank,
            effective_rank_base=spread.effective_rank_reference,
            pairwise_distance=spread.pairwise_distance,
            num_images=spread.num_images,
            elapsed_s=time.perf_counter() - started,
            trace_null=spread.trace_null,
        )

    def _look(self, method: Method, step: int) -> tuple[_Look, Grid]:
        """Draw the grid by `method`, a chunk at a time, and score it as 8-bit images, which is what a viewer sees."""
        cells = list(itertools.product(range(len(self.prompts)), self.seeds))
        embeds = self.model.encode_prompts([*self.prompts, ""])
        size = min(self.config.train_batch_size, MAX_CHUNK)
        features, grid = [], []
        rewards: dict[str, list[Tensor]] = {name: [] for name in (*self.rewards, *self.held_out)}
        for start in range(0, len(cells), size):
            rows, seeds = zip(*cells[start:start + size], strict=True)
            drawn = self._draw(embeds[list(rows)], embeds[-1:], seeds, method)
            if not drawn.isfinite().all():
                raise UserError(f"the probe at step {step} drew pictures that aren't finite numbers; go back to an earlier "
                                "checkpoint with a lower learning rate")
            pixels = (drawn * 255).round().to(torch.uint8)
            images, texts = pixels.float() / 255, [self.prompts[row] for row in rows]
            grid.append(pixels.permute(0, 2, 3, 1).cpu())
            features.append(self.features(images).float().cpu())
            for name, reward in (self.rewards | self.held_out).items():
                rewards[name].append(reward(images, texts).double().cpu())
        shape = (len(self.prompts), len(self.seeds))
        values = {name: torch.cat(parts).view(shape).numpy() for name, parts in rewards.items()}
        return _Look(torch.cat(features).unflatten(0, shape).numpy(), values), torch.cat(grid).unflatten(0, shape).numpy()

    def _draw(self, embeds: Conditioning, negative_embeds: Conditioning, seeds: Sequence[int], method: Method) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] of one prompt embedding a seed, made as the training's are."""
        model, config = self.model, self.config
        scheduler = make_scheduler(model.scheduler_config, config.scheduler, config.num_inference_steps, model.device)
        predict = model.predictor(embeds, negative_embeds, guidance_scale=config.guidance_scale, adapter=ADAPTER)
        dtype = torch.float32 if config.mixed_precision in HALF_TYPES else model.dtype
        noise = initial_noise(seeds, model.latent_shape, device=model.device, dtype=dtype)
        with autocast(config, model.device):
            *_, last = sample(predict, noise, [method], scheduler)
        return decoded(model, last.latents[0], config)


def new_probe(
    model: Model, config: TrainConfig, prompts: Sequence[str], *, rewards: Mapping[str, Reward] | None = None
) -> Probe:
    """The probe of a run: prompts taken evenly from the run's list, seeds 0 to num_probe_seeds - 1.

    Held out are config.probe_rewards, and "clip" wherever its files are here and it isn't trained on.

    Args:
        model: The run's.
        config: The run's.
        prompts: The run's; where there are fewer different ones than num_probe_prompts, all of them are taken.
        rewards: Those trained on where they are loaded already, by their names in config.reward_weights.

    Raises:
        UserError: If a reward or the features' files are unknown, missing or damaged.
    """
    if rewards is None:
        rewards = {name: load_reward(name, device=model.device) for name in config.reward_weights}
    names = [*config.probe_rewards]
    if is_here(REWARDS[ALWAYS_HELD_OUT]) and ALWAYS_HELD_OUT not in {find_reward(name).name for name in (*names, *rewards)}:
        names.append(ALWAYS_HELD_OUT)
    held_out = {name: load_reward(name, device=model.device) for name in names}
    features = load_features(device=model.device)
    seeds = tuple(range(config.num_probe_seeds))
    return Probe(model, rewards, held_out, features, probe_prompts(prompts, config.num_probe_prompts), seeds, config)


def probe_prompts(prompts: Sequence[str], number: int) -> list[str]:
    """`number` different prompts at even distances in the list, beginning with its first; all if there aren't more."""
    distinct = list(dict.fromkeys(prompts))
    number = min(number, len(distinct))
    return [distinct[i * len(distinct) // number] for i in range(number)]


def _deviation(values: NDArray[np.float64]) -> float:
    """Standard deviation within prompts of values [P, S], pooled."""
    return float(values.var(axis=1, ddof=1).mean() ** 0.5)


@contextmanager
def _at_rest(model: Model) -> Iterator[None]:
    """Evaluation mode without gradients; modes and the global random numbers are as before afterwards."""
    parts = (model.unet, model.vae, *(tower.encoder for tower in model.towers))
    modules = [module for part in parts for module in part.modules()]
    modes = [module.training for module in modules]
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        for module in modules:
            module.training = False
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode

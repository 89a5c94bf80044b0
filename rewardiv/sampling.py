"""The one denoising loop: noise per image, schedulers, every method's mixture of LoRA scales, gradients if wanted.

Source: Jena et al., arXiv:2409.06493 (Annealed Importance Guidance); Clark et al., arXiv:2309.17400 (DRaFT-K's
truncated gradient).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from rewardiv.errors import UserError, nearest
from rewardiv.gamma import Clock
from rewardiv.methods import Method, Term

DataSolver = DPMSolverMultistepScheduler | DPMSolverSinglestepScheduler | UniPCMultistepScheduler  # keep data predictions
Scheduler = (DDIMScheduler | PNDMScheduler | EulerDiscreteScheduler | HeunDiscreteScheduler | KDPM2DiscreteScheduler
             | DEISMultistepScheduler | DataSolver)
SCHEDULERS: dict[str, type[Scheduler]] = {
    "ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpm++2m": DPMSolverMultistepScheduler,
    "dpm++2s": DPMSolverSinglestepScheduler, "unipc": UniPCMultistepScheduler, "deis": DEISMultistepScheduler,
    "pndm": PNDMScheduler, "heun": HeunDiscreteScheduler, "dpm2": KDPM2DiscreteScheduler,
}
OWN = "model"  # stands for the model's own scheduler
OWN_NAMES = {kind.__name__: name for name, kind in SCHEDULERS.items()} | {  # those that add noise: as without it
    "DDPMScheduler": "ddim", "EulerAncestralDiscreteScheduler": "euler", "KDPM2AncestralDiscreteScheduler": "dpm2",
    "DPMSolverSDEScheduler": "dpm++2m",
}
FIXED_SETTINGS: dict[str, dict[str, object]] = {  # whatever a model's config says
    "pndm": {"skip_prk_steps": True}, "dpm++2m": {"algorithm_type": "dpmsolver++"},
    "dpm++2s": {"algorithm_type": "dpmsolver++"}, "unipc": {"predict_x0": True},
}
SMALLEST_SIGNAL = 2.0**-24  # share of signal counted where a zero-terminal-SNR schedule has none; diffusers' own choice


class Predict(Protocol):
    """The guided model output: latents_in [R, C, h, w] as the network takes them, t, lora_scales [R], seed_index [R].

    `passes` is the number of network rows behind each row (2 with guidance); a function without it counts 1.
    """

    def __call__(self, latents_in: Tensor, t: Tensor, lora_scales: Tensor, seed_index: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Step:
    """What one step has made, for each method in the order given.

    Attributes:
        i: The step, 0 to num_steps - 1.
        num_steps: All steps of the run.
        t: The timestep that was denoised; the first one where a step calls the network twice.
        latents: [S, C, h, w] for each method, after the step. Methods that haven't parted yet share one tensor.
        denoised: The estimate of the final latents for each method, same shape.
        schedulers: Each method's after the step, with what a multistep solver remembers.
        rows: Network rows so far, all methods together.
        done: True at the last step.
    """

    i: int
    num_steps: int
    t: float
    latents: tuple[Tensor, ...]
    denoised: tuple[Tensor, ...]
    schedulers: tuple[Scheduler, ...]
    rows: int
    done: bool


@dataclass
class Branch:
    """A trajectory that several methods share for as long as their terms are the same."""

    methods: list[int]
    latents: Tensor
    scheduler: Scheduler
    denoised: Tensor | None = None


def scheduler_name(config: Mapping[str, object], name: str) -> str:
    """The key of SCHEDULERS that `name` stands for: itself, or for "model" the one that a model's config asks for.

    Schedulers that add fresh noise on the way (ancestral and SDE ones, DDPM) are replaced by their deterministic relative,
    which at one step is the same.

    Raises:
        UserError: If the name is unknown, or the model's own scheduler can't be used here.
    """
    if name != OWN:
        if name not in SCHEDULERS:
            raise UserError(f"unknown scheduler '{name}'{nearest(name, (OWN, *SCHEDULERS))}")
        return name
    own = str(config.get("_class_name", "DDIMScheduler"))
    if own not in OWN_NAMES:
        raise UserError(f"the model's own scheduler {own} can't be used here; choose one of {', '.join(SCHEDULERS)}")
    return OWN_NAMES[own]


def make_scheduler(
    config: Mapping[str, object], name: str, num_inference_steps: int, device: str | torch.device = "cpu",
) -> Scheduler:
    """A fresh scheduler with its timesteps set, from a model's scheduler config.

    Differs: with trailing spacing diffusers' own set_timesteps makes one step too many, at t = -1, for some numbers of
    steps (61 of 1000, for one); that step is left out here.

    Raises:
        UserError: If the name is unknown or the scheduler cannot take that number of steps with this model.
    """
    name = scheduler_name(config, name)
    kind = SCHEDULERS[name]
    if config.get("rescale_betas_zero_snr") and not _takes_zero_snr(kind):
        able = ", ".join(known for known, other in SCHEDULERS.items() if _takes_zero_snr(other))
        raise UserError(f"this model's first step is pure noise, which the scheduler '{name}' can't take; choose one of {able}")
    scheduler = kind.from_config(config, **FIXED_SETTINGS.get(name, {}))
    limit = scheduler.config.num_train_timesteps
    if not 1 <= num_inference_steps <= limit:
        raise UserError(f"the number of steps is {num_inference_steps}; this model takes 1 to {limit}")
    scheduler.set_timesteps(num_inference_steps, device=device)
    num_calls = sum(_calls(scheduler, num_inference_steps))
    scheduler.timesteps = scheduler.timesteps[:num_calls]
    if hasattr(scheduler, "sigmas") and len(scheduler.sigmas) > num_calls + 1:
        scheduler.sigmas = torch.cat([scheduler.sigmas[:num_calls], scheduler.sigmas[-1:]])
    first = torch.stack([times[0] for times in calls_of(scheduler)])
    if len(first.unique()) < num_inference_steps and not scheduler.config.get("use_karras_sigmas"):
        raise UserError(f"the scheduler '{name}' cannot take {num_inference_steps} steps with this model; take fewer")
    return scheduler


def calls_of(scheduler: Scheduler) -> list[Tensor]:
    """The timesteps at which the network is called, step by step: one a step, or two with samplers of second order.

    Heun's and DPM-2's steps take two but for the last one, PNDM's (without its Runge-Kutta start) only the first.
    """
    num_calls = len(scheduler.timesteps)
    if scheduler.order == 2:
        num_steps = (num_calls + 1) // 2
    else:
        num_steps = num_calls - 1 if isinstance(scheduler, PNDMScheduler) and num_calls > 1 else num_calls
    return list(scheduler.timesteps.split(_calls(scheduler, num_steps)))


def clock_of(scheduler: Scheduler) -> Clock:
    """tau of the scheduler's steps in every domain: t/T, and the log signal-to-noise ratio at t."""
    calls = calls_of(scheduler)
    times = torch.stack([times[0] for times in calls]).cpu().double().numpy()
    signal = scheduler.alphas_cumprod.double().cpu().numpy().clip(SMALLEST_SIGNAL, 1 - SMALLEST_SIGNAL)
    logsnr = np.interp(times, np.arange(len(signal)), np.log(signal / (1 - signal)))
    clock = Clock.of_steps(len(times), t=(times / scheduler.config.num_train_timesteps).tolist(), logsnr=logsnr.tolist())
    return replace(clock, calls=tuple(map(len, calls)))


def initial_noise(
    seeds: Sequence[int], shape: Sequence[int], *, device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise [S, *shape]; image i's depends on seeds[i] alone, on any machine."""
    noise = [torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(noise).to(device, dtype)


def sample(
    predict: Predict, noise: Tensor, methods: Sequence[Method], scheduler: Scheduler, *, grad_steps: int = 0,
    start: int | None = None,
) -> Iterator[Step]:
    """Denoise the same noise under every method, one record a step.

    All trajectories, distinct LoRA scales and images go through one `predict` call a step (two where the sampler calls the
    network twice, with the same mixture). Methods share a trajectory until their terms differ. The mixture
    Σ weight · output is taken after guidance, and the scheduler sees only it.

    Args:
        predict: The guided model output, see Predict.
        noise: [S, C, h, w], standard normal.
        methods: What to sample with; at least one.
        scheduler: From make_scheduler, unused so far unless `start` is given; it isn't changed.
        grad_steps: Gradients reach the last `grad_steps` steps only (DRaFT's K); 0 is plain sampling, and the number of
            steps lets them reach `noise` too. Don't wrap the iteration in torch.inference_mode.
        start: The step to begin at, where `noise` is the scheduler's latents before that step instead of pure noise.
            A multistep solver goes on with what the scheduler remembers (`Step.schedulers`); a fresh one begins there
            as at its first step, which PNDM cannot.

    Raises:
        ValueError: If there is no method, `grad_steps` isn't in 0 to the number of steps, or there is no step `start` to
            begin at.
    """
    clock = clock_of(scheduler)
    if not methods or not 0 <= grad_steps <= len(clock):
        raise ValueError(f"{len(methods)} methods and grad_steps = {grad_steps} for {len(clock)} steps")
    if start is not None and not 0 <= start < len(clock):
        raise ValueError(f"no step {start}; there are {len(clock)}, counted from 0")
    if start and isinstance(scheduler, PNDMScheduler) and not scheduler.counter:
        raise ValueError("PNDM cannot begin late: its first step is of another kind")
    passes = getattr(predict, "passes", 1)
    latents = noise * scheduler.init_noise_sigma if start is None else noise
    branches = [Branch(list(range(len(methods))), latents, _fork(scheduler))]
    rows = 0
    for i, times in list(enumerate(calls_of(scheduler)))[start:]:
        terms = [method.terms(clock, i) for method in methods]
        for t in times:
            with torch.set_grad_enabled(i >= len(clock) - grad_steps):
                branches, call_rows = _advance(predict, branches, terms, t)
            rows += call_rows * passes
        branch_of = {method: branch for branch in branches for method in branch.methods}
        owners = [branch_of[k] for k in range(len(methods))]
        yield Step(i, len(clock), float(times[0]), tuple(branch.latents for branch in owners),
                   tuple(branch.denoised for branch in owners), tuple(branch.scheduler for branch in owners), rows,
                   i == len(clock) - 1)


def _advance(
    predict: Predict, branches: list[Branch], terms: list[tuple[Term, ...]], t: Tensor,
) -> tuple[list[Branch], int]:
    """Take every branch one network call on, splitting those whose methods part here; also the number of rows predicted."""
    size = len(branches[0].latents)
    scales = [sorted({term.lora_scale for k in branch.methods for term in terms[k]}) for branch in branches]
    inputs = [branch.scheduler.scale_model_input(branch.latents, t) for branch in branches]
    latents_in = torch.cat([part for part, own in zip(inputs, scales, strict=True) for _ in own])
    lora_scales = torch.tensor([scale for own in scales for scale in own]).repeat_interleave(size)
    seed_index = torch.arange(size).repeat(len(latents_in) // size)
    outputs = iter(predict(latents_in, t, lora_scales, seed_index).split(size))
    parted = []
    for branch, own in zip(branches, scales, strict=True):
        output_at = {scale: next(outputs) for scale in own}
        groups: dict[tuple[Term, ...], list[int]] = {}
        for k in branch.methods:
            groups.setdefault(terms[k], []).append(k)
        for mixture, members in groups.items():
            child = Branch(members, branch.latents, _fork(branch.scheduler))
            parted.append(_stepped(child, _mix(mixture, output_at), t))
    return parted, len(latents_in)


def _mix(terms: tuple[Term, ...], output_at: Mapping[float, Tensor]) -> Tensor:
    """Σ weight · output; a single term is its output itself, bit for bit."""
    if len(terms) == 1:
        return output_at[terms[0].lora_scale]
    return sum(term.weight * output_at[term.lora_scale] for term in terms)


def _stepped(branch: Branch, output: Tensor, t: Tensor) -> Branch:
    result = branch.scheduler.step(output, t, branch.latents)
    if isinstance(branch.scheduler, DataSolver):
        denoised = branch.scheduler.model_outputs[-1]
    elif "pred_original_sample" in result:
        denoised = result.pred_original_sample
    else:
        denoised = _clean(branch.scheduler, output, t, branch.latents)
    return Branch(branch.methods, result.prev_sample, branch.scheduler, denoised)


def _clean(scheduler: PNDMScheduler | DEISMultistepScheduler, output: Tensor, t: Tensor, latents: Tensor) -> Tensor:
    """The estimate of the final latents, where x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps."""
    abar = scheduler.alphas_cumprod[int(t)].to(latents)
    match scheduler.config.prediction_type:
        case "epsilon":
            return (latents - (1 - abar).sqrt() * output) / abar.sqrt()
        case "v_prediction":
            return abar.sqrt() * latents - (1 - abar).sqrt() * output
        case _:
            return output


def _calls(scheduler: Scheduler, num_steps: int) -> list[int]:
    """Network calls of each step."""
    if scheduler.order == 2:
        return [2] * (num_steps - 1) + [1]
    return [1 + (isinstance(scheduler, PNDMScheduler) and num_steps > 1)] + [1] * (num_steps - 1)


def _takes_zero_snr(kind: type[Scheduler]) -> bool:
    return "rescale_betas_zero_snr" in inspect.signature(kind.__init__).parameters


def rows_of(scheduler: Scheduler, rows: slice) -> Scheduler:
    """A copy that remembers these images of the batch only."""
    def cut(kept: object) -> object:
        return kept[rows] if isinstance(kept, Tensor) and kept.ndim == 4 else kept

    twin = _fork(scheduler)
    vars(twin).update({name: [cut(one) for one in kept] if isinstance(kept, list) else cut(kept)
                       for name, kept in vars(twin).items()})
    return twin


def _fork(scheduler: Scheduler) -> Scheduler:
    """A copy that steps on its own; tensors are shared, because schedulers replace them and never write into them."""
    twin = copy.copy(scheduler)
    vars(twin).update({name: list(value) for name, value in vars(twin).items() if isinstance(value, list)})
    return twin

"""What keeps a finetuned model near its base: the authors' KL, the KL of the two sampling paths, the LoRA's norm.

The base model's predictions are the same network's at adapter scale 0, so no second model is in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rewardiv.lora import adapter_factors
from rewardiv.sampling import Predict, Scheduler

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class KlWitness:
    """A Predict that measures the authors' KL at the calls through which gradients pass.

    Source: NeMo-Aligner's DRaFT+: the mean squared difference of guided eps, finetuned against base, over the last
    `truncation_steps` steps, at the same latents, the base's side without gradient; no factor 1 / (2 sigma²).
    Differs: models that predict v or the sample are measured in eps too.

    Args:
        predict: The guided model output; its base is that at scale 0.
        scheduler: Of the run, for the noise levels.
    """

    def __init__(self, predict: Predict, scheduler: Scheduler) -> None:
        self.predict, self.scheduler = predict, scheduler
        self.terms: list[Tensor] = []

    def __call__(self, latents_in: Tensor, t: Tensor, lora_scales: Tensor, seed_index: Tensor) -> Tensor:
        """The model output, as it is."""
        output = self.predict(latents_in, t, lora_scales, seed_index)
        if torch.is_grad_enabled():
            gap = output - base_output(self.predict, latents_in, t, seed_index)
            self.terms.append(eps_factor(self.scheduler, t) * gap.square().mean())
        return output

    def take(self) -> Tensor | float:
        """The mean over the calls since the last `take`; 0 where there was none."""
        terms, self.terms = self.terms, []
        return torch.stack(terms).mean() if terms else 0.0


def path_kl(
    predict: Predict, scheduler: Scheduler, latents: Mapping[int, Tensor], num_steps: int,
) -> Iterator[Tensor]:
    """The KL divergence of the finetuned from the base sampling process, one scalar for each step, to be added up.

    For the two Gaussian transitions of the DDPM sampler (Ho et al., arXiv:2006.11239, equation 12, with sigma² = beta,
    which is finite at the last step too), from latents x_t at abar_t to the next step's noise level abar_s:
    (abar_s - abar_t) / (2 abar_t (1 - abar_t)) times the squared difference of guided eps. In nats per latent dimension,
    mean over the batch. The latents are detached: each term's gradient is that of its own step's prediction, and its graph
    depends on no other, so call backward on each before asking for the next. Where `latents` hold only some steps, each
    counts num_steps / len(latents) times, so that the sum over a random choice has the full sum as its mean.

    Args:
        predict: The guided model output.
        scheduler: Of the run, unused so far; it isn't changed.
        latents: The scheduler's latents [B, C, h, w] before each chosen step.
        num_steps: All steps of the run.
    """
    for i, x in latents.items():
        t = scheduler.timesteps[i]
        x = copy.copy(scheduler).scale_model_input(x.detach(), t)
        scales, index = torch.ones(len(x)), torch.arange(len(x))
        gap = predict(x, t, scales, index) - base_output(predict, x, t, index)
        yield path_weight(scheduler, i) * num_steps / len(latents) * gap.square().mean()


@torch.no_grad()
def base_output(predict: Predict, latents_in: Tensor, t: Tensor, seed_index: Tensor) -> Tensor:
    """The base model's output at the same latents."""
    return predict(latents_in, t, torch.zeros(len(latents_in)), seed_index)


def signal_shares(scheduler: Scheduler) -> list[float]:
    """abar, the share of signal in a latent's variance, before each step and after the last, as the scheduler counts it."""
    if hasattr(scheduler, "sigmas"):  # Euler and DPM-Solver++: sigma² = (1 - abar) / abar
        return [1 / (1 + float(sigma) ** 2) for sigma in scheduler.sigmas]
    return [float(scheduler.alphas_cumprod[int(t)]) for t in scheduler.timesteps] + [float(scheduler.final_alpha_cumprod)]


def eps_factor(scheduler: Scheduler, t: Tensor) -> float:
    """What turns a squared difference of model outputs at the step of timestep t into one of eps.

    With x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps and v = sqrt(abar) eps - sqrt(1 - abar) x_0, at the same x_t.
    """
    abar = signal_shares(scheduler)[_step_of(scheduler, t)]
    return _by_prediction(scheduler, epsilon=lambda: 1.0, v_prediction=lambda: abar, sample=lambda: abar / (1 - abar))


def path_weight(scheduler: Scheduler, i: int) -> float:
    """The weight of step i's squared difference of model outputs in the path's KL.

    `path_kl`'s weight for eps times `eps_factor`, with what cancels cancelled: finite for v at abar_t = 0 too.
    """
    now, after = signal_shares(scheduler)[i:i + 2]
    gain = (after - now) / 2
    return _by_prediction(scheduler, epsilon=lambda: gain / (now * (1 - now)), v_prediction=lambda: gain / (1 - now),
                          sample=lambda: gain / (1 - now) ** 2)


def lora_norm(unet: UNet2DConditionModel, name: str) -> Tensor:
    """The squared Frobenius norm of the weight change, Σ over layers of ||scaling · B A||².

    Differentiable; B A is never formed: ||B A||² = Σ (Bᵀ B) ∘ (A Aᵀ), two rank x rank matrices.
    """
    return sum(scaling**2 * ((up.T @ up) * (down @ down.T)).sum() for down, up, scaling in adapter_factors(unet, name))


def _step_of(scheduler: Scheduler, t: Tensor) -> int:
    return int((scheduler.timesteps == t).nonzero()[0])


def _by_prediction(scheduler: Scheduler, **choices: Callable[[], float]) -> float:
    return choices[scheduler.config.prediction_type]()

"""Regularisers: the path's KL is that of the samplers' Gaussians, every form of output is measured in eps, norms are right."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from rewardiv.config import TRAIN_SCHEDULERS
from rewardiv.lora import adapter_parameters, attach_adapter
from rewardiv.regularisers import KlWitness, eps_factor, lora_norm, path_kl, path_weight, signal_shares
from rewardiv.sampling import Scheduler, make_scheduler

CONFIG = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
          "timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SHAPE = (2, 4, 8, 8)


def noise(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def toy(weight: Tensor) -> Callable[..., Tensor]:
    """A network of one weight: base at scale 0, and at scale 1 bent by the weight."""
    def predict(latents_in: Tensor, t: Tensor, lora_scales: Tensor, seed_index: Tensor) -> Tensor:
        scales = lora_scales.to(latents_in).view(-1, 1, 1, 1)
        return torch.tanh(latents_in * (1 + scales * weight)) + scales * weight**2 * float(t) / 1000

    return predict


def ddim(prediction: str, num_steps: int, **changes: object) -> Scheduler:
    return make_scheduler(CONFIG | {"prediction_type": prediction} | changes, "ddim", num_steps)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_step_s_weight_is_that_of_the_two_gaussians(prediction: str, zero_snr: bool) -> None:
    """KL of diffusers' own DDPM transitions of variance beta, in nats per latent dimension, from the two outputs."""
    if zero_snr and prediction == "epsilon":
        prediction = "v_prediction"  # without any signal eps says nothing, and nobody trains it so
    config = CONFIG | {"prediction_type": prediction, "rescale_betas_zero_snr": zero_snr}
    scheduler = make_scheduler(config, "ddim", 4)
    ddpm = DDPMScheduler.from_config(config, variance_type="fixed_large")
    ddpm.set_timesteps(4)
    shares = signal_shares(scheduler)
    first, second, x = noise(1), noise(2), noise(3)
    for i, t in enumerate(scheduler.timesteps):
        means = [ddpm.step(output, t, x, generator=torch.Generator().manual_seed(0)).prev_sample for output in (first, second)]
        deviation = (1 - shares[i] / shares[i + 1]) ** 0.5
        expected = kl_divergence(Normal(means[0], deviation), Normal(means[1], deviation)).mean()
        ours = path_weight(scheduler, i) * (first - second).square().mean()
        assert float(ours) == pytest.approx(float(expected), rel=2e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_form_of_output_is_measured_in_eps(prediction: str) -> None:
    scheduler = ddim(prediction, 5)
    first, second, x = noise(1), noise(2), noise(3)
    for i, t in enumerate(scheduler.timesteps):
        abar = signal_shares(scheduler)[i]
        root, rest = abar**0.5, (1 - abar) ** 0.5

        def eps(output: Tensor, root: float = root, rest: float = rest) -> Tensor:
            if prediction == "epsilon":
                return output
            clean = output if prediction == "sample" else root * x - rest * output
            return (x - root * clean) / rest

        expected = (eps(first) - eps(second)).square().mean()
        torch.testing.assert_close(eps_factor(scheduler, t) * (first - second).square().mean(), expected)
        assert path_weight(scheduler, i) == pytest.approx(
            eps_factor(scheduler, t) * path_weight(ddim("epsilon", 5), i), rel=1e-6)


@pytest.mark.parametrize("name", TRAIN_SCHEDULERS)
def test_every_scheduler_s_noise_levels_are_the_model_s(name: str) -> None:
    scheduler = make_scheduler(CONFIG | {"prediction_type": "epsilon"}, name, 5)
    *shares, last = signal_shares(scheduler)
    expected = [float(scheduler.alphas_cumprod[int(t)]) for t in scheduler.timesteps]
    assert shares == pytest.approx(expected, rel=1e-5) and last == 1
    assert all(0 < path_weight(scheduler, i) < 1e4 for i in range(5))
    assert all(eps_factor(scheduler, t) == 1 for t in scheduler.timesteps)


def test_stable_diffusion_s_last_step_ends_at_its_own_level() -> None:
    scheduler = ddim("epsilon", 5, set_alpha_to_one=False, timestep_spacing="leading", steps_offset=1)
    assert signal_shares(scheduler)[-1] == pytest.approx(float(scheduler.alphas_cumprod[0]))
    assert 0 < path_weight(scheduler, 4) < 1


@pytest.mark.parametrize("name", TRAIN_SCHEDULERS)
def test_the_mean_over_all_choices_of_steps_is_the_full_path(name: str) -> None:
    scheduler = make_scheduler(CONFIG | {"prediction_type": "v_prediction"}, name, 4)
    predict = toy(torch.tensor(0.3))
    latents = {i: noise(i) * scheduler.init_noise_sigma for i in range(4)}
    full = sum(path_kl(predict, scheduler, latents, 4))
    for size in (1, 2, 3):
        choices = [sum(path_kl(predict, scheduler, {i: latents[i] for i in chosen}, 4))
                   for chosen in combinations(range(4), size)]
        torch.testing.assert_close(torch.stack(choices).mean(), full)
    assert full > 1e-4


@pytest.mark.parametrize("name", TRAIN_SCHEDULERS)
def test_the_path_by_its_definition(name: str) -> None:
    """Each step's network input is the scheduler's own, the other steps don't matter, latents get no gradient."""
    scheduler = make_scheduler(CONFIG | {"prediction_type": "epsilon"}, name, 3)
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    latents = {i: (noise(i) * scheduler.init_noise_sigma).requires_grad_() for i in range(3)}
    for i, term in enumerate(path_kl(toy(weight), scheduler, latents, 3)):
        fresh = make_scheduler(CONFIG | {"prediction_type": "epsilon"}, name, 3)
        t = fresh.timesteps[i]
        x = fresh.scale_model_input(latents[i].detach(), t)
        gap = toy(weight.detach())(x, t, torch.ones(2), None) - toy(weight.detach())(x, t, torch.zeros(2), None)
        torch.testing.assert_close(term.detach(), path_weight(fresh, i) * gap.square().mean())
        term.backward()  # each by itself: nothing else keeps its graph
    assert weight.grad > 0 and all(x.grad is None for x in latents.values())


def test_the_witness_measures_the_steps_with_gradients_only() -> None:
    scheduler = ddim("epsilon", 4)
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    witness = KlWitness(toy(weight), scheduler)
    ones, index, expected = torch.ones(2), torch.arange(2), []
    for i, t in enumerate(scheduler.timesteps):
        x = noise(i).requires_grad_(i == 3)
        with torch.set_grad_enabled(i >= 2):
            output = witness(x, t, ones, index)
        assert torch.equal(output, toy(weight)(x, t, ones, index))
        if i >= 2:
            expected.append((output - toy(weight)(x, t, 0 * ones, index)).square().mean().detach())
    kl = witness.take()
    torch.testing.assert_close(kl.detach(), torch.stack(expected).mean())
    kl.backward()
    assert weight.grad.isfinite() and x.grad.any()  # through the latents of the finetuned side too
    assert witness.take() == 0.0


@pytest.fixture()
def unet(tiny_model_dir: object) -> UNet2DConditionModel:
    """With an adapter on linear layers and convolutions, alpha 6 at rank 4, away from its start."""
    unet = UNet2DConditionModel.from_pretrained(tiny_model_dir, subfolder="unet").double().requires_grad_(False)
    attach_adapter(unet, "a", rank=4, alpha=6.0, targets=("to_q", "ff.net.2", "conv1"))
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter_parameters(unet, "a"):
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return unet


def test_the_norm_is_that_of_the_formed_weight_changes(unet: UNet2DConditionModel) -> None:
    changes = [layer.get_delta_weight("a") for layer in unet.modules() if isinstance(layer, LoraLayer)]
    assert {change.ndim for change in changes} == {2, 4}
    expected = sum(change.square().sum() for change in changes)
    torch.testing.assert_close(lora_norm(unet, "a").detach(), expected.detach(), rtol=1e-9, atol=0)


def test_the_norm_s_gradient_is_the_finite_difference(unet: UNet2DConditionModel) -> None:
    lora_norm(unet, "a").backward()
    parameters = adapter_parameters(unet, "a")
    for parameter in (parameters[0], parameters[1], parameters[-1]):
        place = int(parameter.grad.abs().argmax())
        weight = parameter.data.view(-1)
        before = float(weight[place])
        values = []
        for shift in (1e-5, -1e-5):
            weight[place] = before + shift
            values.append(float(lora_norm(unet, "a").detach()))
        weight[place] = before
        gradient = float(parameter.grad.view(-1)[place])
        assert abs(gradient) > 1e-3 and gradient == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)

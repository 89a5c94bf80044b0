"""Several rewards as one: one stays raw; a reward's unit and zero don't matter; the state comes back bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rewardiv.config import TrainConfig
from rewardiv.errors import UserError
from rewardiv.mixing import DECAY, RewardMix, load_mix

PROMPTS = ["a", "b", "c", "d"]
RewardFn = Callable[[Tensor, list[str]], Tensor]


def red(images: Tensor, prompts: list[str]) -> Tensor:
    return images[:, 0].mean((1, 2))


def contrast(images: Tensor, prompts: list[str]) -> Tensor:
    return images.var((1, 2, 3)) + images[:, 1, 0, 0] ** 2


def affine(reward: RewardFn, scale: float, shift: float) -> RewardFn:
    return lambda images, prompts: scale * reward(images, prompts) + shift


def images_of(seed: int, count: int = 4) -> Tensor:
    return torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def after(mix: RewardMix, num_steps: int) -> RewardMix:
    for step in range(num_steps):
        mix.update(mix(images_of(step), PROMPTS).raw)
    return mix


def gradient(mix: RewardMix) -> Tensor:
    images = images_of(99).requires_grad_()
    mix(images, PROMPTS).mixed.mean().backward()
    return images.grad


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_one_reward_stays_raw(weight: float) -> None:
    mix = after(RewardMix({"red": red}, {"red": weight}), 3)
    mixed = mix(images_of(5), PROMPTS)
    assert torch.equal(mixed.mixed, weight * red(images_of(5), PROMPTS))
    assert torch.equal(mixed.raw["red"], red(images_of(5), PROMPTS))


@pytest.mark.parametrize("num_steps", [0, 1, 20])
@pytest.mark.parametrize(("scale", "shift"), [(100.0, 0.0), (1.0, -300.0), (1e-3, 20.0)])
def test_a_reward_s_unit_and_zero_do_not_matter(num_steps: int, scale: float, shift: float) -> None:
    """From the first step on: the mixture and its gradient are the same; the raw values are logged as they are."""
    weights = {"red": 1.0, "contrast": 2.0}
    plain = after(RewardMix({"red": red, "contrast": contrast}, weights), num_steps)
    other = after(RewardMix({"red": affine(red, scale, shift), "contrast": contrast}, weights), num_steps)
    torch.testing.assert_close(gradient(plain), gradient(other), rtol=1e-5, atol=1e-9)
    ours, theirs = plain(images_of(7), PROMPTS), other(images_of(7), PROMPTS)
    torch.testing.assert_close(ours.mixed, theirs.mixed, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(theirs.raw["red"], scale * ours.raw["red"] + shift)


def test_weights_weigh() -> None:
    """Over a single step's own images the standardised rewards have mean 0 and deviation 1 times the weight."""
    rewards = {"red": red, "contrast": contrast}
    mixed = [RewardMix(rewards, {"red": a, "contrast": b})(images_of(1), PROMPTS).mixed for a, b in ((1, 1), (3, 1), (1, 3))]
    first = (mixed[1] - mixed[0]) / 2
    second = (mixed[2] - mixed[0]) / 2
    for part in (first, second):
        assert float(part.mean()) == pytest.approx(0, abs=1e-9) and float(part.std(correction=0)) == pytest.approx(1)
    torch.testing.assert_close(first + second, mixed[0])


def test_the_statistics_are_the_weighted_average_by_definition() -> None:
    """Every image of step k of n counts DECAY^(n - k); mean and variance of all of them, computed at once."""
    steps = [torch.randn(8, generator=torch.Generator().manual_seed(k), dtype=torch.float64) * (k + 1) + k for k in range(6)]
    mix = RewardMix({"a": red, "b": red}, {"a": 1.0, "b": 1.0})
    for values in steps:
        mix.update({"a": values, "b": 2 * values})
    weights = torch.cat([torch.full((8,), DECAY ** (6 - k), dtype=torch.float64) for k in range(1, 7)])
    weights, values = weights / weights.sum(), torch.cat(steps)
    mean = float((weights * values).sum())
    assert mix.means["a"] == pytest.approx(mean)
    assert mix.variances["a"] == pytest.approx(float((weights * (values - mean) ** 2).sum()))
    assert mix.variances["b"] == pytest.approx(4 * mix.variances["a"])


def test_the_state_comes_back_bit_for_bit_through_json() -> None:
    rewards, weights = {"red": red, "contrast": contrast}, {"red": 1.0, "contrast": 0.5}
    mix = after(RewardMix(rewards, weights), 7)
    twin = RewardMix(rewards, weights)
    twin.load_state_dict(json.loads(json.dumps(mix.state_dict())))
    assert twin.state_dict() == mix.state_dict()
    assert torch.equal(gradient(after(twin, 2)), gradient(after(mix, 2)))


def test_statistics_of_other_rewards_are_refused() -> None:
    state = RewardMix({"red": red}, {"red": 1.0}).state_dict()
    with pytest.raises(KeyError, match="contrast"):
        RewardMix({"contrast": contrast}, {"contrast": 1.0}).load_state_dict(state)
    with pytest.raises(ValueError, match="contrast"):
        RewardMix({"red": red}, {"contrast": 1.0})
    with pytest.raises(ValueError, match="values of"):
        RewardMix({"red": red}, {"red": 1.0}).update({})


def test_a_single_image_has_a_finite_gradient() -> None:
    mix = RewardMix({"red": red, "contrast": contrast}, {"red": 1.0, "contrast": 1.0})
    images = images_of(1, 1).requires_grad_()
    mix(images, PROMPTS[:1]).mixed.mean().backward()
    assert images.grad.isfinite().all() and images.grad.any()


def test_a_step_that_is_not_finite_leaves_the_statistics() -> None:
    mix = after(RewardMix({"red": red, "contrast": contrast}, {"red": 1.0, "contrast": 1.0}), 2)
    before = mix.state_dict()
    mix.update({"red": torch.tensor([1.0, float("nan")]), "contrast": torch.ones(2)})
    assert mix.state_dict() == before


def test_rewards_are_loaded_by_their_settings() -> None:
    mix = load_mix(TrainConfig(output_dir="run", rewards=("colorfulness=0.5",)), "cpu")
    images = images_of(3)
    assert mix.weights == {"colorfulness": 0.5}
    assert torch.equal(mix(images, PROMPTS).mixed, 0.5 * mix.rewards["colorfulness"](images, PROMPTS))
    with pytest.raises(UserError, match="did you mean 'colorfulness'"):
        load_mix(TrainConfig(output_dir="run", rewards=("colorfullness",)), "cpu")

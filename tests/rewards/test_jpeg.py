"""JPEG compressibility: the encoder's own size, and a gradient that makes the real file smaller."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rewardiv.rewards import load_reward
from rewardiv.rewards.jpeg import jpeg_kilobytes, rate_bits
from rewards.tiny_rewards import as_tensor, picture


def gradient(images: Tensor) -> Tensor:
    leaf = images.clone().requires_grad_()
    return torch.autograd.grad(load_reward("jpeg")(leaf, [""] * len(leaf)).sum(), leaf)[0]


def test_the_value_is_minus_the_file_s_size() -> None:
    reward, pictures = load_reward("jpeg"), [picture(96, 80), picture(50, 37, 1), picture(16, 16, 2)]
    sizes = []
    for image in pictures:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        sizes.append(-len(buffer.getvalue()) / 1000)
    torch.testing.assert_close(reward.official(pictures, [""] * 3), torch.tensor(sizes))
    leaf = as_tensor(pictures[0]).requires_grad_()
    assert reward(leaf, [""]).item() == pytest.approx(sizes[0]), "with a gradient the value is the same"


@pytest.mark.parametrize("size", [(48, 64), (41, 35)])
def test_the_gradient_is_the_proxy_s_relative_change_times_the_size(size: tuple[int, int]) -> None:
    images = torch.cat([as_tensor(picture(*size, seed)) for seed in range(2)]).double()
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = [rate_bits(images + sign * 1e-7 * direction).log() for sign in (1, -1)]
    expected = -jpeg_kilobytes(images) * (ends[0] - ends[1]) / 2e-7
    torch.testing.assert_close((gradient(images) * direction).sum((1, 2, 3)), expected, rtol=1e-4, atol=1e-6)


def test_the_proxy_orders_images_as_the_encoder_does() -> None:
    """Blurred and noisy versions of pictures: the sizes' logarithms correlate above 0.99."""
    generator, images = torch.Generator().manual_seed(1), []
    for seed in range(4):
        for radius in (0, 1, 4):
            image = F.avg_pool2d(as_tensor(picture(128, 96, seed)), 2 * radius + 1, 1, radius, count_include_pad=False)
            images += [(image + noise * torch.randn(image.shape, generator=generator)).clamp(0, 1) for noise in (0, 0.05)]
    stacked = torch.cat(images)
    pair = torch.stack([jpeg_kilobytes(stacked).log(), rate_bits(stacked).double().log()])
    assert float(torch.corrcoef(pair)[0, 1]) > 0.99


def test_a_step_along_the_gradient_shrinks_the_file() -> None:
    images = torch.cat([as_tensor(picture(96, 64, seed)) for seed in range(3)])
    stepped = (images + 0.01 * gradient(images).sign()).clamp(0, 1)
    assert bool((jpeg_kilobytes(stepped) < 0.97 * jpeg_kilobytes(images)).all())


def test_a_flat_image_is_the_best_and_has_a_finite_gradient() -> None:
    flat = torch.full((1, 3, 48, 48), 0.5)
    assert gradient(flat).isfinite().all()
    colours = torch.rand(5, 3, 1, 1, generator=torch.Generator().manual_seed(2)).expand(5, 3, 48, 48)
    assert bool((jpeg_kilobytes(colours) < jpeg_kilobytes(as_tensor(picture(48, 48)))).all())

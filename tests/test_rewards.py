"""Rewards: known values, gradients, independence of the batch, refusal of anything but images in [0, 1]."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from rewardiv.clip_models import load_clip, new_clip, save_clip
from rewardiv.errors import UserError
from rewardiv.registry import REWARDS, RewardEntry
from rewardiv.rewards import Reward, load_reward, network_reward
from rewardiv.rewards.clip import ClipScore
from rewardiv.rewards.colorfulness import colorfulness
from rewardiv.rewards.preference import PreferenceScore

PROMPTS = ["a cat", "a dog on red", "a cat"]


def random_images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform images away from the ends of [0, 1], so that a small step stays inside."""
    return 0.1 + 0.8 * torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.fixture(scope="session")
def resnet_clip_dir(tiny_clip_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of the built-in one's kind: a ResNet at 64 px, whose batch norms have statistics of their own."""
    template = load_clip(tiny_clip_dir)
    model_cfg = template.config["model_cfg"] | {
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64},
    }
    config = template.config | {"model_cfg": model_cfg}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = new_clip(config, template.tokenizer).train()
        for block in (model.net.visual.layer1, model.net.visual.layer4):
            torch.nn.init.ones_(block[0].bn3.weight)
        model.encode_images(torch.rand(16, 3, 64, 64))  # moves the running statistics
    folder = tmp_path_factory.mktemp("clip") / "resnet"
    save_clip(model.net, config, template.tokenizer, folder)
    return folder


@pytest.fixture(params=["clip", "clip, a ResNet", "preference", "colorfulness"])
def reward(request: pytest.FixtureRequest, tiny_clip_dir: Path, resnet_clip_dir: Path) -> Reward:
    """Each reward, in float64, the learned ones on a tiny random model."""
    networks = {
        "clip": lambda: ClipScore(load_clip(tiny_clip_dir)),
        "clip, a ResNet": lambda: ClipScore(load_clip(resnet_clip_dir)),
        "preference": lambda: PreferenceScore(load_clip(tiny_clip_dir)),
    }
    if request.param == "colorfulness":
        return Reward(request.param, colorfulness)
    return network_reward(request.param, networks[request.param]().double())


def directional(score: Callable[[Tensor], Tensor], images: Tensor, h: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The derivative along a random direction, by backpropagation and by central differences."""
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=images.dtype)
    leaf = images.clone().requires_grad_()
    gradient, = torch.autograd.grad(score(leaf).sum(), leaf)
    with torch.no_grad():
        difference = (score(images + h * direction).sum() - score(images - h * direction).sum()) / (2 * h)
    return (gradient * direction).sum(), difference


@pytest.mark.parametrize("size", [(64, 64), (96, 80), (40, 50)])
def test_gradient_equals_finite_differences(reward: Reward, size: tuple[int, int]) -> None:
    images = random_images(3, 3, *size, dtype=torch.float64)
    gradient, difference = directional(lambda x: reward(x, PROMPTS), images)
    assert float(gradient) != 0
    torch.testing.assert_close(gradient, difference, rtol=1e-5, atol=1e-9)


def test_an_images_reward_is_the_same_in_any_batch(reward: Reward) -> None:
    images = random_images(3, 3, 64, 64, dtype=torch.float64)
    together = reward(images, PROMPTS)
    assert together.shape == (3,)
    for i in range(3):
        torch.testing.assert_close(reward(images[i:i + 1], PROMPTS[i:i + 1])[0], together[i], rtol=1e-9, atol=1e-12)
    flipped = reward(images.flip(0), PROMPTS[::-1])
    torch.testing.assert_close(flipped.flip(0), together, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spoil", [
    lambda x: x * 2 - 1, lambda x: x * 255, lambda x: x / 0 - x / 0, lambda x: x[0], lambda x: x[:, :1],
    lambda x: (x * 255).to(torch.uint8),
])
def test_anything_but_images_in_0_1_is_refused(reward: Reward, spoil: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="images must"):
        reward(spoil(random_images(3, 3, 64, 64)), PROMPTS)


@pytest.mark.parametrize("prompts", [["a cat"], PROMPTS + ["one more"], "abc"])
def test_another_number_of_prompts_is_refused(reward: Reward, prompts: list[str]) -> None:
    with pytest.raises(ValueError, match="3 images need"):
        reward(random_images(3, 3, 64, 64), prompts)


def two_colours(first: tuple[float, float, float], second: tuple[float, float, float]) -> Tensor:
    """An image whose left half has one colour and whose right half another, 0..255."""
    left, right = (torch.tensor(c).view(1, 3, 1, 1).expand(1, 3, 4, 3) for c in (first, second))
    return torch.cat([left, right], dim=3) / 255


def test_colorfulness_of_two_colours_has_a_closed_form() -> None:
    """Half red, half green: rg = ±255 (spread 255, mean 0), yb = 127.5 everywhere."""
    image = two_colours((255.0, 0.0, 0.0), (0.0, 255.0, 0.0))
    assert float(colorfulness(image, [""])) == pytest.approx(255 + 0.3 * 127.5, rel=1e-6)
    uneven = two_colours((200.0, 100.0, 50.0), (40.0, 80.0, 10.0))  # rg 100, -40; yb 100, 50
    expected = math.hypot(70, 25) + 0.3 * math.hypot(30, 75)
    assert float(colorfulness(uneven, [""])) == pytest.approx(expected, rel=1e-5)


def test_colorfulness_of_grey_is_zero_with_a_finite_gradient() -> None:
    for image in (torch.full((1, 3, 5, 5), 0.5), torch.rand(1, 1, 5, 5).expand(1, 3, 5, 5)):
        leaf = image.clone().requires_grad_()
        score = colorfulness(leaf, [""])
        gradient, = torch.autograd.grad(score.sum(), leaf)
        assert float(score.detach()) == pytest.approx(0, abs=1e-4) and gradient.isfinite().all()


def test_colorfulness_ignores_the_size_of_the_image() -> None:
    image = random_images(1, 3, 8, 8)
    larger = image.repeat_interleave(3, 2).repeat_interleave(3, 3)
    torch.testing.assert_close(colorfulness(larger, [""]), colorfulness(image, [""]))


def test_preference_is_exp_logit_scale_times_the_cosine(
    tiny_clip_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REWARDS, "tiny", RewardEntry("tiny", str(tiny_clip_dir), ""))
    monkeypatch.setitem(REWARDS, "clip", RewardEntry("clip", str(shutil.copytree(tiny_clip_dir, tmp_path / "clip")), ""))
    model = load_clip(tiny_clip_dir)
    images = random_images(3, 3, 64, 64)
    embeds, texts = model.encode_images(images), model.encode_texts(PROMPTS)
    cosines = (embeds * texts).sum(1) / embeds.norm(dim=1) / texts.norm(dim=1)
    torch.testing.assert_close(load_reward("clip")(images, PROMPTS), cosines)
    for name in ("tiny", str(tiny_clip_dir)):
        torch.testing.assert_close(load_reward(name)(images, PROMPTS), model.logit_scale.exp() * cosines)
    assert cosines[0] != cosines[2], "one prompt, two images"


@pytest.mark.parametrize("folder", ["tiny_clip_dir", "resnet_clip_dir"])
def test_open_clip_itself_reads_the_folder_and_agrees(folder: str, request: pytest.FixtureRequest) -> None:
    import open_clip

    path = request.getfixturevalue(folder)
    reference = open_clip.create_model(f"local-dir:{path}").eval()
    model = load_clip(path)
    images = random_images(2, 3, model.image_size, model.image_size)
    normalised = (images - model.mean) / model.std
    torch.testing.assert_close(model.encode_images(images), reference.encode_image(normalised))
    torch.testing.assert_close(model.encode_texts(PROMPTS), reference.encode_text(model.tokenize(PROMPTS)))


@torch.no_grad()
def test_the_official_path_takes_pictures_of_any_sizes(reward: Reward) -> None:
    """And agrees with the other within Pillow's rounding, where there is one."""
    images = [(255 * random_images(1, 3, *size)).round().to(torch.uint8) for size in ((64, 64), (96, 80), (40, 50))]
    pictures = [Image.fromarray(image[0].permute(1, 2, 0).numpy()) for image in images]
    official = reward.official(pictures, PROMPTS)
    tensors = torch.cat([reward(image / 255, [prompt]) for image, prompt in zip(images, PROMPTS, strict=True)])
    torch.testing.assert_close(official, tensors, rtol=2e-2, atol=5e-3)
    torch.testing.assert_close(reward.official(images[0], PROMPTS[:1]), official[:1])
    with pytest.raises(ValueError, match="3 images need"):
        reward.official(pictures, PROMPTS[:2])


def test_a_function_that_somebody_added_is_a_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = RewardEntry("redness", None, "", function=lambda: lambda images, prompts: images[:, 0].mean((1, 2)))
    monkeypatch.setitem(REWARDS, "redness", entry)
    images = random_images(3, 3, 8, 8)
    torch.testing.assert_close(load_reward("redness")(images, PROMPTS), images[:, 0].mean((1, 2)))


def test_colorfulness_needs_no_files() -> None:
    assert load_reward("colorfulness").name == "colorfulness"


def test_unknown_reward_names_the_nearest() -> None:
    with pytest.raises(UserError, match="colorfulness"):
        load_reward("colorfullness")


@pytest.mark.parametrize("name", ["open_clip_config.json", "open_clip_model.safetensors"])
def test_damaged_and_missing_files_are_named(tiny_clip_dir: Path, tmp_path: Path, name: str) -> None:
    for path in tiny_clip_dir.rglob("*"):
        if path.is_file():
            target = tmp_path / path.relative_to(tiny_clip_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    damaged = tmp_path / name
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(UserError, match=name):
        load_clip(tmp_path)
    damaged.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        load_clip(tmp_path)

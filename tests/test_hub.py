"""The real weights: rewards order what everybody would order so, base models draw as diffusers. Run with `pytest -m hub`."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from rewardiv import hub
from rewardiv.config import SampleConfig
from rewardiv.generate import Engine, generate
from rewardiv.pretrain.scenes import load_icons
from rewardiv.registry import find_model, find_reward
from rewardiv.rewards import Reward, load_reward
from rewardiv.rewards.clip import clip_source
from rewardiv.sampling import initial_noise

pytestmark = pytest.mark.hub

CAPTIONS = ("a cat face", "a slice of pizza")
CLIP_NAME = "clip:ViT-B-32:laion2b_s34b_b79k"
SCALES = {  # what a picture's reward can be at all, generously: another scale means another formula
    "pickscore": (10.0, 30.0), "hpsv2": (0.05, 0.5), "hpsv2.1": (0.05, 0.5), "imagereward": (-3.0, 3.0), CLIP_NAME: (0.0, 0.6),
}


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tests run with the hub switched off."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """A cat face and a slice of pizza on white, uint8 [2, 3, 512, 512]."""
    icons = load_icons(max_tier=1, styles=("fluent-3d",))
    rows = [next(i for i, record in enumerate(icons.records) if record["caption"] == caption) for caption in CAPTIONS]
    rgba = icons.rgba[rows]
    drawn = rgba[:, :3] + 1 - rgba[:, 3:]
    large = torch.nn.functional.interpolate(drawn, (512, 512), mode="bicubic").clamp(0, 1)
    return (large * 255).round().to(torch.uint8)


def fetched(name: str) -> Reward:
    hub.fetch(clip_source(name) if name.startswith("clip:") else find_reward(name))
    return load_reward(name)


@torch.no_grad()
@pytest.mark.parametrize("name", SCALES)
def test_a_picture_scores_higher_for_its_own_caption(name: str, pictures: Tensor) -> None:
    """On the reward's own scale, by both paths, which agree."""
    reward = fetched(name)
    own, other = (reward.official(pictures, list(texts)) for texts in (CAPTIONS, CAPTIONS[::-1]))
    assert bool((own > other).all()), (own, other)
    low, high = SCALES[name]
    assert low < float(torch.cat([own, other]).min()) and float(torch.cat([own, other]).max()) < high
    torch.testing.assert_close(reward(pictures / 255, list(CAPTIONS)), own, rtol=2e-3, atol=0.02 if high > 1 else 2e-3)


@torch.no_grad()
def test_the_aesthetic_score_prefers_a_picture_to_noise(pictures: Tensor) -> None:
    reward = fetched("aesthetic")
    noise = torch.randint(256, pictures.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    drawn, random = (reward.official(images, list(CAPTIONS)) for images in (pictures, noise))
    assert bool((drawn > random).all()) and 1 < float(drawn.min()) and float(drawn.max()) < 10
    assert torch.equal(drawn, reward.official(pictures, ["", ""])), "it is blind to the prompt"


@torch.no_grad()
def test_version_2_and_2_1_of_hps_are_different_models(pictures: Tensor) -> None:
    scores = [fetched(name).official(pictures, list(CAPTIONS)) for name in ("hpsv2", "hpsv2.1")]
    assert float((scores[0] - scores[1]).abs().min()) > 1e-4


@pytest.mark.parametrize("name", ["sd15", "sd-turbo", "sdxl-turbo"])
def test_a_base_model_draws_as_diffusers_own_pipeline(name: str) -> None:
    """Two steps, one image, the model's own scheduler, size and 32-bit arithmetic."""
    hub.fetch(find_model(name))
    check_drawn_alike(name, steps=2)


def check_drawn_alike(name: str, *, steps: int) -> None:
    """A model's base picture is that of the plain pipeline from the same noise."""
    guidance = 1.0 if "turbo" in name else 5.0
    config = SampleConfig(model=name, lora="", prompt="a cat face", methods=("base",), seeds=(3,), num_inference_steps=steps,
                          guidance_scale=guidance, rewards=("colorfulness",))
    *_, result = generate(Engine(safety=False), config)
    place = hub.local_path(find_model(name))
    pipe = DiffusionPipeline.from_pretrained(place, torch_dtype=torch.float32, use_safetensors=True)
    if hasattr(pipe, "safety_checker"):
        pipe.safety_checker = None
    unet = pipe.unet.config
    noise = initial_noise((3,), (unet.in_channels, unet.sample_size, unet.sample_size))
    theirs = pipe("a cat face", latents=noise, num_inference_steps=steps, guidance_scale=guidance, output_type="np").images
    difference = abs(result.images["base"].astype(float) - 255 * theirs)
    assert difference.mean() < 1 and difference.max() < 8

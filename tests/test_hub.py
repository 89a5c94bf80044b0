"""The real weights: each reward downloads, loads and orders what everybody would order so. Run with `pytest -m hub`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rewardiv import hub
from rewardiv.pretrain.scenes import load_icons
from rewardiv.registry import find_reward
from rewardiv.rewards import Reward, load_reward
from rewardiv.rewards.clip import clip_source

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

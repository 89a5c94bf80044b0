"""The model's own safety checker: the same verdicts as the pipeline's, black images in every output, its state said."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor

from rewardiv.config import SampleConfig
from rewardiv.errors import UserError
from rewardiv.export import report
from rewardiv.generate import Engine, Progress, Result, generate, partial_result
from rewardiv.models import load_model
from rewardiv.pipelines import read_checker
from rewardiv.safety import SafetyChecker, SafetyReport

SEEDS = tuple(range(6))


@pytest.fixture(scope="module")
def plain(tiny_model_dir: Path, tiny_lora_dir: Path, tiny_clip_dir: Path) -> Result:
    """A run that nobody checks."""
    config = SampleConfig(model=str(tiny_model_dir), lora=str(tiny_lora_dir), methods=("base", "aig:power:2"), seeds=SEEDS,
                          num_inference_steps=2, rewards=("colorfulness",))
    return list(generate(Engine(features_path=str(tiny_clip_dir), safety=False), config))[-1]


@pytest.fixture(scope="module")
def images(plain: Result) -> torch.Tensor:
    """Its pictures, uint8 [12, 3, 16, 16]."""
    return torch.from_numpy(np.concatenate(list(plain.images.values()))).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def guarded_dir(tiny_model_dir: Path, images: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a random checker that has one concept, whose threshold lies amid what it sees in the pictures."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
              "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(4)
        checker = StableDiffusionSafetyChecker(CLIPConfig(projection_dim=16, vision_config=vision)).eval()
        for weight in checker.parameters():
            weight.data = torch.randn(weight.shape) * 0.3
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixels = processor(list(images.permute(0, 2, 3, 1).numpy()), return_tensors="pt").pixel_values
    with torch.no_grad():
        seen = checker.visual_projection(checker.vision_model(pixels)[1])
    cosines = torch.nn.functional.normalize(seen) @ torch.nn.functional.normalize(checker.concept_embeds).T
    for thresholds in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        thresholds.data[:] = 2.0
    checker.concept_embeds_weights.data[0] = cosines[:, 0].sort().values[5:7].mean()
    folder = tmp_path_factory.mktemp("models") / "guarded"
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model_dir, safety_checker=checker, feature_extractor=processor)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(guarded_dir: Path, plain: Result) -> SampleConfig:
    return replace(plain.config, model=str(guarded_dir))


def test_it_flags_what_the_pipeline_flags(guarded_dir: Path, images: torch.Tensor) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(guarded_dir)
    _, expected = pipe.run_safety_checker(images.float() / 127.5 - 1, "cpu", torch.float32)
    checker = SafetyChecker(read_checker(guarded_dir), "cpu")
    assert checker.flags(images) == expected and set(expected) == {True, False}
    (first, second), flags = checker.blacked_out([images, images])
    assert first is second and flags == [expected, expected]
    for before, after, flag in zip(images, first, expected, strict=True):
        assert torch.equal(after, torch.zeros_like(before) if flag else before)


def test_weights_named_as_they_were_published_are_read(guarded_dir: Path, images: torch.Tensor, tmp_path: Path) -> None:
    folder = tmp_path / "published"
    shutil.copytree(guarded_dir, folder)
    for name, old in (("safety_checker", "vision_model."), ("text_encoder", "")):
        file = folder / name / "model.safetensors"
        state = load_file(file)
        prefix = "vision_model." if old else "text_model."
        save_file({prefix * key.startswith(old) + key: tensor for key, tensor in state.items()}, file, {"format": "pt"})
    flags = [SafetyChecker(read_checker(place), "cpu").flags(images) for place in (guarded_dir, folder)]
    assert flags[0] == flags[1]
    ours, published = (load_model(str(place)).encode_prompts(["a cat"]).embeds for place in (guarded_dir, folder))
    assert torch.equal(ours, published)


@pytest.fixture(scope="module")
def records(config: SampleConfig, tiny_clip_dir: Path) -> list[Progress | Result]:
    """The same run with the checker."""
    return list(generate(Engine(features_path=str(tiny_clip_dir), safety=True), config, preview_every=1))


def test_flagged_images_are_black_everywhere_and_the_others_untouched(
    records: list[Progress | Result], plain: Result, guarded_dir: Path,
) -> None:
    checker, num_black = SafetyChecker(read_checker(guarded_dir), "cpu"), 0
    for method, images in plain.images.items():
        flags = checker.flags(torch.from_numpy(images).permute(0, 3, 1, 2))
        flagged = tuple(seed for seed, flag in zip(SEEDS, flags, strict=True) if flag)
        assert records[-1].safety.flagged.get(method, ()) == flagged
        for ours, image, flag in zip(records[-1].images[method], images, flags, strict=True):
            np.testing.assert_array_equal(ours, image * (not flag))
        num_black += sum(flags)
    assert 0 < num_black < 2 * len(SEEDS), "some must be flagged and some not"
    for record in records[:-1]:
        black = {method: tuple(seed for seed, image in zip(SEEDS, images, strict=True) if not image.any())
                 for method, images in record.previews.items()}
        assert record.safety.flagged == {method: seeds for method, seeds in black.items() if seeds}


def test_its_state_is_in_the_report_and_said(records: list[Progress | Result], plain: Result, config: SampleConfig) -> None:
    found = records[-1].safety
    assert found.state == "on" and f"{sum(map(len, found.flagged.values()))} image" in found.sentence
    assert report(records[-1])["safety"] == {"state": "on", "flagged": {name: list(own) for name, own in found.flagged.items()}}
    assert report(plain)["safety"] == {"state": "off", "flagged": {}} and plain.safety.sentence == ""
    assert partial_result(config, records[0]).safety == records[0].safety


def test_it_is_on_where_the_host_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPACE_ID", raising=False)
    assert not Engine().safety and Engine(safety=True).safety
    monkeypatch.setenv("SPACE_ID", "owner/space")
    assert Engine().safety and not Engine(safety=False).safety


@pytest.fixture()
def in_the_cache(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub id whose files lie in the hub's cache, under a revision."""
    repo = tmp_path / "models--somebody--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "v2").write_text("0" * 40)
    shutil.copytree(tiny_model_dir, repo / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return "somebody/tiny@v2"


def test_a_hub_model_without_one_says_so(in_the_cache: str, config: SampleConfig, tiny_clip_dir: Path) -> None:
    engine = Engine(features_path=str(tiny_clip_dir), safety=True)
    *_, result = generate(engine, replace(config, model=in_the_cache, seeds=(0,)))
    assert result.safety == SafetyReport("absent") and "brings no safety checker" in result.safety.sentence
    *_, built_in = generate(engine, replace(config, model=str(find_local(in_the_cache)), seeds=(0,)))
    assert built_in.safety.state == "off"


def find_local(hub_id: str) -> Path:
    from rewardiv.hub import local_path
    from rewardiv.registry import find_model

    return local_path(find_model(hub_id))


def test_a_damaged_checker_is_named(guarded_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(guarded_dir, folder)
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="safety_checker/model.safetensors is damaged"):
        read_checker(folder)

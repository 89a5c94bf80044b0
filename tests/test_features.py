"""Features and learned distances: a row an image, the same in any batch, the reference networks' own, files by name."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import inception_v3
from torchvision.transforms.v2 import functional as vision
from transformers import Dinov2Config, Dinov2Model

from rewardiv.clip_models import load_clip, save_clip
from rewardiv.errors import UserError
from rewardiv.features import load_dinov2, load_features, load_inception
from rewardiv.perceptual import distances_within, load_distance


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_features_are_the_image_embeddings_in_float32(tiny_clip_dir: Path, images: torch.Tensor) -> None:
    features = load_features(tiny_clip_dir)(images)
    assert features.dtype == torch.float32 and features.ndim == 2 and len(features) == 5
    torch.testing.assert_close(features, load_clip(tiny_clip_dir).encode_images(images))
    assert torch.linalg.vector_norm(features, dim=1).std() > 0, "lengths are kept"


def test_a_row_is_the_same_in_any_batch(tiny_clip_dir: Path, images: torch.Tensor) -> None:
    features = load_features(tiny_clip_dir)
    together = features(images)
    for i in range(5):
        torch.testing.assert_close(features(images[i:i + 1])[0], together[i], rtol=1e-4, atol=1e-5)


def test_other_ranges_are_refused(tiny_clip_dir: Path, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        load_features(tiny_clip_dir)(images * 2 - 1)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing"):
        load_features(tmp_path / "nowhere")


@pytest.mark.parametrize(("name", "content"), [
    ("open_clip_config.json", '{"model_cfg": {'),
    ("open_clip_config.json", "null"),
    ("open_clip_config.json", '{"model_cfg": {"embed_dim": 32, "vision_cfg": {}, "text_cfg": null}, "preprocess_cfg": {}}'),
    ("tokenizer/tokenizer.json", "{"),
    ("tokenizer/tokenizer.json", '{"added_tokens": []}'),
    ("open_clip_model.safetensors", ""),
])
def test_a_damaged_file_is_named(tiny_clip_dir: Path, tmp_path: Path, name: str, content: str) -> None:
    folder = shutil.copytree(tiny_clip_dir, tmp_path / "clip")
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=f"{name.partition('/')[0]}.* is damaged"):
        load_features(folder)


def test_saving_and_loading_changes_nothing_more(tiny_clip_dir: Path, tmp_path: Path, images: torch.Tensor) -> None:
    """The weights are fp16 on disk: once rounded they stay as they are."""
    model = load_clip(tiny_clip_dir)
    save_clip(model.net, model.config, model.tokenizer, tmp_path / "copy")
    copy = load_clip(tmp_path / "copy")
    assert torch.equal(copy.encode_images(images), model.encode_images(images))
    assert torch.equal(copy.encode_texts(["a cat"]), model.encode_texts(["a cat"]))


def test_weights_that_fp16_cannot_hold_are_not_saved(tiny_clip_dir: Path, tmp_path: Path) -> None:
    model = load_clip(tiny_clip_dir)
    model.net.visual.conv1.weight.data[0, 0, 0, 0] = 1e6
    with pytest.raises(ValueError, match="visual.conv1.weight"):
        save_clip(model.net, model.config, model.tokenizer, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.fixture
def pictures() -> torch.Tensor:
    """Not square, so that cropping and squashing differ."""
    return torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def dinov2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """facebook/dinov2-base's layout: config.json and model.safetensors of a transformers Dinov2Model."""
    folder = tmp_path_factory.mktemp("dinov2")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=518)
        Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inception() -> Iterator[nn.Module]:
    """Torchvision's whole classifier with its own normalisation of ImageNet's inputs; random weights that keep the scale."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        network = inception_v3(weights=None, init_weights=False, transform_input=True).eval()
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    yield network


def normalised(images: torch.Tensor) -> torch.Tensor:
    return vision.normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def test_dinov2_features_are_the_class_token_of_its_evaluation(dinov2_dir: Path, pictures: torch.Tensor) -> None:
    resized = vision.resize(pictures, [256], vision.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    model = Dinov2Model.from_pretrained(dinov2_dir).eval()
    with torch.no_grad():
        expected = model(normalised(vision.center_crop(resized, [224, 224]))).last_hidden_state[:, 0]
        torch.testing.assert_close(load_dinov2(dinov2_dir).eval()(pictures), expected, rtol=1e-4, atol=1e-4)


def test_inception_features_are_torchvisions_last_pooling(
    inception: nn.Module, pictures: torch.Tensor, tmp_path: Path
) -> None:
    save_file(inception.state_dict(), tmp_path / "model.safetensors")
    pooled = []
    inception.avgpool.register_forward_hook(lambda module, inputs, output: pooled.append(output.flatten(1)))
    with torch.no_grad():
        inception(normalised(F.interpolate(pictures, (299, 299), mode="bilinear", antialias=True)))
        found = load_inception(tmp_path / "model.safetensors").eval()(pictures)
    assert found.shape == (2, 2048)
    torch.testing.assert_close(found, pooled[0], rtol=1e-3, atol=1e-4)
    assert (found[0] - found[1]).abs().mean() > 1e-3, "features that tell pictures apart"


def test_networks_come_by_name_from_the_cache(
    dinov2_dir: Path, pictures: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What isn't here is refused with the command that fetches it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="hf download facebook/dinov2-base config.json model.safetensors"):
        load_features("dinov2:base")
    with pytest.raises(UserError, match="hf download timm/inception_v3.tv_in1k model.safetensors"):
        load_features("inception")
    shutil.copytree(dinov2_dir, tmp_path / "models--facebook--dinov2-base" / "snapshots" / "main")
    features = load_features("dinov2:base")(pictures)
    assert features.shape == (2, 32) and features.dtype == torch.float32 and not features.requires_grad
    torch.testing.assert_close(features, load_dinov2(dinov2_dir).eval()(pictures).detach())


def test_the_built_in_clip_has_a_name(images: torch.Tensor) -> None:
    assert torch.equal(load_features("clip")(images), load_features()(images))


@pytest.mark.parametrize(("name", "said"), [
    ("dinov2:bas", "did you mean 'dinov2:base'"), ("clip:ViT-B-32", "clip:ARCH:PRETRAINED"),
    ("clip:ViT-B-99:openai", "did you mean"), ("resnet", "is missing"),
])
def test_unknown_networks_are_refused(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_features(name)


def test_damaged_networks_are_refused(dinov2_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dinov2_dir, tmp_path / "dinov2")
    state = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in state.items() if name != "layernorm.weight"}, folder / "model.safetensors",
              metadata={"format": "pt"})
    with pytest.raises(UserError, match="it lacks layernorm.weight"):
        load_dinov2(folder)
    (folder / "model.safetensors").write_bytes(b"x")
    for load, path in ((load_dinov2, folder), (load_dinov2, tmp_path), (load_inception, folder / "model.safetensors"),
                       (load_inception, tmp_path / "none")):
        with pytest.raises(UserError, match="delete it and download it again"):
            load(path)


def test_distances_within_prompts_are_those_of_every_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(2, 5, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr("rewardiv.perceptual.CHUNK", 3)
    found = distances_within(images, lambda a, b: (a - b).square().mean((1, 2, 3)))
    expected = (images[:, :, None] - images[:, None]).double().square().mean((3, 4, 5)).numpy()
    assert found == pytest.approx(expected, abs=1e-6) and found.shape == (2, 5, 5)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        distances_within(images + 1, lambda a, b: a)


@pytest.mark.parametrize("name", ["lpips", "dreamsim"])
def test_a_distance_whose_package_is_missing_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"needs the package {name}; install it with `pip install {name}`"):
        load_distance(name)
    with pytest.raises(UserError, match="did you mean 'lpips'"):
        load_distance("lpip")

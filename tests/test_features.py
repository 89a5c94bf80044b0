"""Features: a row an image, the same in any batch, from images in [0, 1] only."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from rewardiv.clip_models import load_clip, save_clip
from rewardiv.errors import UserError
from rewardiv.features import load_features


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

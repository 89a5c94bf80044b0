"""Framing: the official path is the reference packages' arithmetic, the differentiable one agrees with it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as TF
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rewardiv.errors import UserError
from rewardiv.framing import CLIP_MEAN, CLIP_STD, Frame, letterbox, to_pictures
from rewards.tiny_rewards import SIZES, as_tensor, picture

FRAMES = {
    "transformers": lambda: Frame(224, floor_crop=True),
    "open_clip": lambda: Frame(224),
    "siglip": lambda: Frame(224, (0.5,) * 3, (0.5,) * 3, fit="squash"),
    "mobileclip": lambda: Frame(224, (0.0,) * 3, (1.0,) * 3, interpolation="bilinear"),
    "hpsv2": lambda: Frame(224, fit="letterbox"),
}


def by_transformers(image: Image.Image) -> Tensor:
    return CLIPImageProcessorPil()(image, return_tensors="pt").pixel_values


def by_open_clip(**settings: object) -> Callable[[Image.Image], Tensor]:
    return lambda image: image_transform_v2(PreprocessCfg(size=224, **settings), is_train=False)(image)[None]


def by_hpsv2(image: Image.Image) -> Tensor:
    """ToTensor, the longest side to 224 by torchvision, half the padding to each side, normalise."""
    pixels = TF.to_tensor(image)
    scale = 224 / max(pixels.shape[1:])
    height, width = (round(side * scale) for side in pixels.shape[1:])
    pixels = TF.resize(pixels, [height, width], TF.InterpolationMode.BICUBIC, antialias=True)
    down, across = 224 - height, 224 - width
    pixels = TF.pad(pixels, [across // 2, down // 2, across - across // 2, down - down // 2], fill=0)
    return TF.normalize(pixels, CLIP_MEAN, CLIP_STD)[None]


REFERENCES = {
    "transformers": by_transformers,
    "open_clip": by_open_clip(),
    "siglip": by_open_clip(mean=(0.5,) * 3, std=(0.5,) * 3, resize_mode="squash"),
    "mobileclip": by_open_clip(mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="bilinear"),
    "hpsv2": by_hpsv2,
}


@pytest.mark.parametrize("size", [*SIZES, (335, 224), (200, 133)], ids=str)
@pytest.mark.parametrize("name", FRAMES)
def test_the_official_path_is_the_reference_s(name: str, size: tuple[int, int]) -> None:
    image = picture(*size)
    torch.testing.assert_close(FRAMES[name]().official([image]), REFERENCES[name](image), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", FRAMES)
def test_both_paths_agree(name: str, size: tuple[int, int]) -> None:
    """Within Pillow's rounding, in 8-bit levels; where nothing is rounded, exactly."""
    frame, image = FRAMES[name](), picture(*size)
    difference = 255 * ((frame(as_tensor(image)) - frame.official([image])) * frame.std).abs()
    if name == "hpsv2":
        assert float(difference.max()) == 0
    else:
        assert float(difference.mean()) < 0.3 and float(difference.max()) < 6


def test_letterbox_pads_with_black_even_an_image_of_the_right_size() -> None:
    flat = torch.ones(1, 3, 100, 224)
    boxed = letterbox(flat, 224)
    assert boxed.shape == (1, 3, 224, 224) and float(boxed[:, :, 62:162].min()) == 1
    assert float(boxed[:, :, :62].max()) == float(boxed[:, :, 162:].max()) == 0


def test_the_right_size_is_kept_and_the_middle_cropped() -> None:
    frame = Frame(64, (0.0,) * 3, (1.0,) * 3)
    image = as_tensor(picture(64, 64))
    assert torch.equal(frame(image), image)
    wide = torch.cat([torch.zeros(1, 3, 64, 10), image, torch.zeros(1, 3, 64, 10)], dim=3)
    assert torch.equal(frame(wide), image)
    torch.testing.assert_close(frame(torch.full((1, 3, 100, 130), 0.7)), torch.full((1, 3, 64, 64), 0.7))


@pytest.mark.parametrize("settings", [{"fit": "longest"}, {"interpolation": "nearest"}])
def test_unknown_resizing_is_refused(settings: dict[str, str]) -> None:
    with pytest.raises(UserError, match="only crop, squash, letterbox"):
        Frame(224, **settings)


def test_pictures_come_from_pillow_or_from_bytes() -> None:
    image = picture(40, 30)
    clear = Image.merge("RGBA", (*image.split(), Image.new("L", image.size, 7)))
    for given in (clear, image.convert("P"), image.convert("L")):
        assert to_pictures([given])[0].mode == "RGB"
    again = to_pictures((as_tensor(image) * 255).to(torch.uint8))
    assert np.array_equal(np.array(again[0]), np.array(image))
    for wrong in (as_tensor(image), as_tensor(image).to(torch.uint8)[0], ["picture.png"]):
        with pytest.raises(ValueError, match="8-bit images must be"):
            to_pictures(wrong)

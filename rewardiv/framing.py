"""Frames images for a network: as its reference package does with 8-bit pictures, and once more so that gradients pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from rewardiv.errors import UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
RANGE_TOLERANCE = 1e-4
FITS = ("crop", "squash", "letterbox")
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class Frame(nn.Module):
    """What a network sees of an image: a normalised square of `size` pixels, by one of two paths.

    `forward` takes tensors and passes gradients. `official` takes 8-bit pictures and does what the reference packages
    do: "crop" and "squash" resize with Pillow, which rounds to 8 bits after each of its two passes; "letterbox" resizes
    tensors. Both filters are antialiased on both paths. What is left is that rounding: a quarter of an 8-bit level on
    average, up to five where hard edges cross; none with "letterbox".

    Args:
        size: Side of the square in pixels.
        mean, std: Of the normalisation, a number a channel.
        fit: "crop" resizes the shortest side to `size` and keeps the middle (torchvision's Resize and CenterCrop),
            "squash" resizes both sides, "letterbox" resizes the longest side and pads with black (HPSv2's ResizeMaxSize).
        interpolation: "bicubic" or "bilinear".
        floor_crop: Where the crop starts if what it leaves out is odd: half of it rounded down (transformers), else to
            the even neighbour (torchvision).

    Raises:
        UserError: If the fit or the interpolation is none of these.
    """

    def __init__(
        self,
        size: int,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        *,
        fit: str = "crop",
        interpolation: str = "bicubic",
        floor_crop: bool = False,
    ) -> None:
        super().__init__()
        if fit not in FITS or interpolation not in FILTERS:
            raise UserError(f"only {', '.join(FITS)} with {' or '.join(FILTERS)} are known, not {fit} with {interpolation}")
        self.size, self.fit, self.interpolation, self.floor_crop = size, fit, interpolation, floor_crop
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] to normalised [B, 3, size, size], differentiable; on this module's device."""
        images = images.to(self.mean)
        fitted = letterbox(images, self.size) if self.fit == "letterbox" else self._fit(images)
        return (fitted - self.mean) / self.std

    def official(self, pictures: Sequence[Image.Image]) -> Tensor:
        """RGB pictures of any sizes to normalised [B, 3, size, size] by the reference packages' arithmetic."""
        squares = [self._official(picture) for picture in pictures]
        return (torch.cat(squares).to(self.mean) - self.mean) / self.std

    def _fit(self, images: Tensor) -> Tensor:
        """Resize tensors, clamp what the filter overshoots, crop."""
        height, width = self._resized(*images.shape[-2:])
        if (height, width) != images.shape[-2:]:
            images = F.interpolate(images, (height, width), mode=self.interpolation, antialias=True).clamp(0, 1)
        top, left = (self._margin(side) for side in (height, width))
        return images[..., top:top + self.size, left:left + self.size]

    def _official(self, picture: Image.Image) -> Tensor:
        if self.fit == "letterbox":
            return letterbox(to_tensor(picture), self.size)
        height, width = self._resized(picture.height, picture.width)
        picture = picture.resize((width, height), FILTERS[self.interpolation])
        top, left = (self._margin(side) for side in (height, width))
        return to_tensor(picture.crop((left, top, left + self.size, top + self.size)))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.fit == "squash":
            return self.size, self.size
        return tuple(self.size * side // min(height, width) for side in (height, width))

    def _margin(self, side: int) -> int:
        """Pixels left out before the crop."""
        return (side - self.size) // 2 if self.floor_crop else round((side - self.size) / 2)


def letterbox(images: Tensor, size: int) -> Tensor:
    """Resize the longest side to `size` (bicubic, antialiased, not clamped), pad with black: [B, 3, size, size].

    Source: HPSv2's ResizeMaxSize on tensors, with torchvision's default antialias since 0.17. Differs: pads an image
    whose longest side is `size` already, too.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    if scale != 1:
        height, width = round(height * scale), round(width * scale)
        images = F.interpolate(images, (height, width), mode="bicubic", antialias=True)
    top, left = (size - height) // 2, (size - width) // 2
    return F.pad(images, (left, size - width - left, top, size - height - top))


def to_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture as [1, 3, H, W] in [0, 1], float32."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255


def to_pictures(images: Sequence[Image.Image] | Tensor) -> list[Image.Image]:
    """RGB pictures of Pillow images of any size and mode (alpha is dropped), or of a uint8 tensor [B, 3, H, W].

    Raises:
        ValueError: If they are anything else.
    """
    if isinstance(images, Tensor):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"8-bit images must be uint8 [B, 3, H, W], not {images.dtype} {list(images.shape)}")
        return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
    if strangers := [type(image).__name__ for image in images if not isinstance(image, Image.Image)]:
        raise ValueError(f"8-bit images must be Pillow images or a uint8 tensor, not {strangers[0]}")
    return [image.convert("RGB") for image in images]


def check_images(images: Tensor) -> None:
    """Refuse anything but float images [B, 3, H, W] in [0, 1].

    Raises:
        ValueError: On another shape or type, NaN, or a value outside [0, 1] by more than RANGE_TOLERANCE. The range is
            never guessed from the data.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images must be float [B, 3, H, W], not {images.dtype} {list(images.shape)}")
    low, high = (float(v) for v in images.detach().aminmax()) if images.numel() else (0.0, 0.0)
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
        raise ValueError(f"images must lie in [0, 1], not [{low:g}, {high:g}]")

"""JPEG compressibility: how few bytes an image takes; a reward without weights, whose optimum (flat colour) is known.

Source: the compressibility reward of DDPO (Black et al., arXiv:2305.13301): minus the size of a JPEG of quality 95, in kB
of 1000 bytes. DDPO needs no gradient and an encoder has none: here it is straight-through, from a proxy of the rate.
"""

from __future__ import annotations

import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

QUALITY = 95
BLOCK_BITS = 6.0  # an empty block's DC difference and end-of-block mark, about
MCU = 16  # pixels of a unit of four luma blocks and one block a chroma channel
YCBCR = (  # ITU-T T.871, offsets left out: they only reach DC, whose differences are coded
    (0.299, 0.587, 0.114),
    (-0.168735892, -0.331264108, 0.5),
    (0.5, -0.418687589, -0.081312411),
)


def compressibility(images: Tensor, prompts: list[str]) -> Tensor:
    """Rewards [B] in kB, all below 0; the prompts don't matter.

    The value is exact: that of Pillow's encoder on the image rounded to 8 bits, with chroma at half resolution. The
    gradient is straight-through: that of size · log(rate_bits), so a relative change of the proxy counts as the same
    relative change of the file. It points the right way but isn't the derivative of the value, which is flat between
    steps.
    """
    sizes = jpeg_kilobytes(images).to(images)
    if not images.requires_grad:
        return -sizes
    log_rate = rate_bits(images).log()
    return -sizes * (1 + log_rate - log_rate.detach())


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Size [B] of each image's JPEG file, float64, in units of 1000 bytes."""
    pixels = (images.detach() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return torch.tensor([len(_encoded(image)) / 1000 for image in pixels], dtype=torch.float64)


def rate_bits(images: Tensor) -> Tensor:
    """A differentiable estimate [B] of the entropy-coded bits of images [B, 3, H, W] in [0, 1].

    Each coefficient c of the 8 × 8 cosine transform, in the encoder's own quantisation steps, costs log2(1 + |c|) bits, DC
    as the difference from the block to its left; every block costs BLOCK_BITS more. |c| is sqrt(c² + 1/4) - 1/2, which is
    smooth where the encoder rounds to 0.
    """
    pixels = 255 * F.pad(images, (0, -images.shape[3] % MCU, 0, -images.shape[2] % MCU), mode="replicate")
    planes = torch.einsum("kc,bchw->bkhw", pixels.new_tensor(YCBCR), pixels)
    luma, chroma = (pixels.new_tensor(table) for table in _quantisation())
    halved = F.avg_pool2d(planes[:, 1:], 2)
    return _plane_bits(planes[:, 0], luma) + _plane_bits(halved[:, 0], chroma) + _plane_bits(halved[:, 1], chroma)


def _plane_bits(plane: Tensor, steps: Tensor) -> Tensor:
    """Bits [B] of a channel [B, H, W] with quantisation steps [8, 8]."""
    blocks = plane.unfold(1, 8, 8).unfold(2, 8, 8)  # [B, rows, columns, 8, 8]
    transform = _cosines().to(plane)
    levels = transform @ blocks @ transform.T / steps
    dc = levels[..., 0, 0]
    levels = torch.cat([torch.diff(dc, dim=2, prepend=torch.zeros_like(dc[:, :, :1]))[..., None],
                        levels.flatten(3)[..., 1:]], dim=3)
    return torch.log2(0.5 + (levels**2 + 0.25).sqrt()).sum((1, 2, 3)) + BLOCK_BITS * dc[0].numel()


def _cosines() -> Tensor:
    """The orthonormal cosine transform of 8 samples, [frequency, sample], float64."""
    samples = torch.arange(8, dtype=torch.float64)
    matrix = torch.cos(math.pi / 8 * samples[:, None] * (samples + 0.5)) / 2
    matrix[0] /= math.sqrt(2)
    return matrix


def _quantisation() -> tuple[np.ndarray, np.ndarray]:
    """The encoder's steps for luma and chroma, [8, 8] each, read off a file that it wrote."""
    file = Image.open(io.BytesIO(_encoded(np.zeros((MCU, MCU, 3), np.uint8))))
    luma, chroma = (np.array(file.quantization[table], float).reshape(8, 8) for table in (0, 1))
    return luma, chroma


def _encoded(pixels: np.ndarray) -> bytes:
    """An image [H, W, 3] of 8 bits as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.getvalue()

"""Learned distances between two images, LPIPS and DreamSim, where their packages are installed; nothing here needs them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rewardiv.errors import UserError, nearest
from rewardiv.framing import check_images
from rewardiv.metrics import Array

DREAMSIM_SIDE = 224
CHUNK = 32  # pairs at once

Distance = Callable[[Tensor, Tensor], Tensor]


def load_distance(name: str, device: str | torch.device = "cpu") -> Distance:
    """The distance of image i of both [B, 3, H, W] in [0, 1]: [B], 0 or more. "lpips" (AlexNet) or "dreamsim" (ensemble).

    The packages bring their weights themselves, or fetch them on first use.

    Source: Zhang et al., arXiv:1801.03924; Fu et al., arXiv:2306.09344. Differs: DreamSim's images are resized to 224 as
    tensors (bicubic, antialiased) instead of by Pillow.

    Raises:
        UserError: If the name is unknown, the package isn't installed, or it can't get its weights.
    """
    loaders = {"lpips": _lpips, "dreamsim": _dreamsim}
    if name not in loaders:
        raise UserError(f"unknown distance '{name}'{nearest(name, loaders)}")
    try:
        return loaders[name](torch.device(device))
    except ImportError as error:
        raise UserError(f"{name} needs the package {name}; install it with `pip install {name}`") from error
    except OSError as error:
        raise UserError(f"{name} couldn't fetch its weights ({error}); it needs a network once") from error


@torch.no_grad()
def distances_within(images: Tensor, distance: Distance) -> Array:
    """Distances between all images of a prompt, [P, K, K], symmetric with zeros on the diagonal.

    Args:
        images: [P, K, 3, H, W] in [0, 1].
        distance: Such as load_distance's; called with CHUNK pairs at a time, each pair once.

    Raises:
        ValueError: If the images have another shape, type or range.
    """
    if images.ndim != 5:
        raise ValueError(f"images must be [P, K, 3, H, W], not {list(images.shape)}")
    check_images(images.flatten(0, 1))
    number = images.shape[1]
    first, second = torch.triu_indices(number, number, 1)
    matrices = np.zeros((len(images), number, number))
    for matrix, pictures in zip(matrices, images, strict=True):
        for rows, columns in zip(first.split(CHUNK), second.split(CHUNK), strict=True):
            matrix[rows, columns] = distance(pictures[rows], pictures[columns]).double().cpu()
        matrix += matrix.T
    return matrices


def _lpips(device: torch.device) -> Distance:
    from lpips import LPIPS

    network = LPIPS(net="alex", verbose=False).to(device).eval()
    return lambda a, b: network(a.to(device), b.to(device), normalize=True).flatten()


def _dreamsim(device: torch.device) -> Distance:
    from dreamsim import dreamsim

    network, _ = dreamsim(pretrained=True, device=str(device))

    def fitted(images: Tensor) -> Tensor:
        side = (DREAMSIM_SIDE, DREAMSIM_SIDE)
        return F.interpolate(images.to(device), side, mode="bicubic", antialias=True).clamp(0, 1)

    return lambda a, b: network(fitted(a), fitted(b)).flatten()

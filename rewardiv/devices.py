"""Which torch device and which dtype a name stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewardiv.errors import UserError, nearest

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


def check_device_name(name: str) -> str:
    """The name, if it is one; whether the device is there isn't looked up.

    Raises:
        UserError: If it isn't auto, cpu, mps, cuda or cuda:N.
    """
    kind, colon, number = name.partition(":")
    if name not in ("auto", "cpu", "mps") and (kind != "cuda" or (colon and not number.isdigit())):
        raise UserError(f"unknown device '{name}'{nearest(name, ('auto', 'cpu', 'cuda', 'mps'))}")
    return name


def pick_device(name: str) -> str:
    """The torch device of this name; "auto" is CUDA, else Apple's MPS, where there is one.

    Raises:
        UserError: If it isn't there.
    """
    if check_device_name(name) == "cpu":
        return name
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("device 'mps' isn't there: it needs a Mac with Apple silicon; use cpu")
        return name
    if int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise UserError(f"device '{name}' isn't there: {torch.cuda.device_count()} CUDA devices; use cpu")
    return name


def pick_dtype(name: str) -> torch.dtype:
    """The torch dtype of this name.

    Raises:
        UserError: If it is none of DTYPES.
    """
    if name not in DTYPES:
        raise UserError(f"unknown dtype '{name}'{nearest(name, DTYPES)}; one of {', '.join(DTYPES)}")
    import torch

    return getattr(torch, name)

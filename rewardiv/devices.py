"""Which torch device a name stands for."""

from __future__ import annotations

from rewardiv.errors import UserError, nearest


def check_device_name(name: str) -> str:
    """The name, if it is one; whether the device is there isn't looked up.

    Raises:
        UserError: If it isn't auto, cpu, cuda or cuda:N.
    """
    kind, colon, number = name.partition(":")
    if name not in ("auto", "cpu") and (kind != "cuda" or (colon and not number.isdigit())):
        raise UserError(f"unknown device '{name}'{nearest(name, ('auto', 'cpu', 'cuda'))}")
    return name


def pick_device(name: str) -> str:
    """The torch device of this name; "auto" is CUDA where there is one.

    Raises:
        UserError: If it isn't there.
    """
    if check_device_name(name) == "cpu":
        return name
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise UserError(f"device '{name}' isn't there: {torch.cuda.device_count()} CUDA devices; use cpu")
    return name

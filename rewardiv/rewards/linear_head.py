"""The head that ImageReward and the LAION aesthetic score share: five linear layers with dropout and no activation."""

from __future__ import annotations

from torch import nn


def linear_head(width: int) -> nn.Sequential:
    """From features [B, width] to scores [B, 1]: width-1024-128-64-16-1; an affine map in evaluation mode."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.Dropout(0.2),
        nn.Linear(1024, 128), nn.Dropout(0.2),
        nn.Linear(128, 64), nn.Dropout(0.1),
        nn.Linear(64, 16), nn.Linear(16, 1),
    )

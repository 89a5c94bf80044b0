"""Experiment trackers (TensorBoard, trackio, Weights & Biases), through accelerate's classes for them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rewardiv.config import TrainConfig
from rewardiv.errors import UserError
from rewardiv.records import StepRecord

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}  # any one of them
PROJECT = "rewardiv"


def check_tracker(name: str) -> None:
    """Make sure that the tracker's package is installed; "" is no tracker.

    Raises:
        UserError: Saying what to install.
    """
    if name and not any(importlib.util.find_spec(package) for package in PACKAGES[name]):
        raise UserError(f"--report-to {name} needs a package that isn't installed: pip install {name}")


def open_tracker(config: TrainConfig) -> GeneralTracker | None:
    """Start the tracker that config.report_to names, under the name of the run's folder; TensorBoard writes inside it.

    Raises:
        UserError: If it cannot be started.
    """
    if not config.report_to:
        return None
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState(cpu=not config.device.startswith("cuda"))  # its loggers want it; alone, it sets up no communication
    folder = Path(config.output_dir)
    own = {"logging_dir": str(folder)} if config.report_to == "tensorboard" else {"name": folder.resolve().name}
    title = config.report_to if config.report_to == "tensorboard" else PROJECT
    settings = {name: value if isinstance(value, int | float | str) else str(value) for name, value in config.to_dict().items()}
    try:
        tracker = LOGGER_TYPE_TO_CLASS[config.report_to](title, **own)
        tracker.start()
        tracker.store_init_configuration(settings)
    except Exception as error:  # the packages raise types of their own: no account, no network, an old version
        raise UserError(f"the tracker {config.report_to} cannot be started: {error}") from error
    return tracker


def step_numbers(record: StepRecord) -> dict[str, float]:
    """A step's numbers as trackers show them."""
    return _numbers("train", asdict(record))


def probe_numbers(record: Mapping[str, object]) -> dict[str, float]:
    """A probe's numbers as trackers show them, from ProbeRecord.to_dict()."""
    return _numbers("probe", record)


def _numbers(prefix: str, values: Mapping[str, object]) -> dict[str, float]:
    """Numbers by the path that leads to them, train/rewards/vivid; the step itself is left out."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _numbers(f"{prefix}/{name}", value)
        elif isinstance(value, int | float) and name != "step":
            found[f"{prefix}/{name}"] = value
    return found

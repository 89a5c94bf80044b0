"""Published settings as data: each makes a valid run and says where it is from."""

from __future__ import annotations

import json
import re

import pytest

from rewardiv.config import TrainConfig
from rewardiv.errors import UserError
from rewardiv.train_presets import TRAIN_PRESETS, preset_config
from rewardiv.ui import PREPARED_RUNS


@pytest.mark.parametrize("name", TRAIN_PRESETS)
def test_every_preset_is_a_valid_run_with_a_source(name: str) -> None:
    preset = TRAIN_PRESETS[name]
    config = preset_config(name, output_dir="run", rewards=("clip",))
    assert {field: getattr(config, field) for field in preset.settings} == preset.settings
    assert re.search(r"arXiv:\d{4}\.\d{5}|\.yaml|Ours", preset.source)
    assert not {"model", "rewards", "output_dir", "device"} & preset.settings.keys()


@pytest.mark.parametrize("name", ["vivid", "calm"])
def test_the_built_in_model_s_preset_makes_what_ships(name: str) -> None:
    """But for its precision, which is a matter of the machine."""
    shipped = json.loads((PREPARED_RUNS / name / "config.json").read_text())["settings"]
    ours = preset_config("emoji", output_dir=name, rewards=(name,), mixed_precision=shipped["mixed_precision"])
    assert ours == TrainConfig.from_dict(shipped | {"prompts_file": ""})


def test_what_is_set_goes_before_the_preset() -> None:
    assert preset_config("draft-sd1", output_dir="run", rank=4).rank == 4


def test_the_authors_batches_are_whole() -> None:
    for name, size in (("draft-sd1", 64), ("draft-sdxl", 32), ("nemo-sd1", 4)):
        config = preset_config(name, output_dir="run")
        assert config.train_batch_size * config.gradient_accumulation_steps == size


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(UserError, match="did you mean 'draft-sdxl'"):
        preset_config("draft-sdx", output_dir="run")

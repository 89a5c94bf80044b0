"""Laws of the settings: what cannot work is refused in one sentence, and what is kept reads back the same."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from rewardiv.config import MAX_SEED, MAX_SEEDS, SCHEDULERS, SampleConfig, format_seeds, parse_seeds
from rewardiv.errors import UserError, nearest


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("0-7", tuple(range(8))), ("0-2,12", (0, 1, 2, 12)), (" 3 , 1 ", (3, 1)), ("5-5", (5,)),
        (str(MAX_SEED), (MAX_SEED,)),
    ],
)
def test_seeds_are_read_in_order(text: str, seeds: tuple[int, ...]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2), (3, 1, 2), (5, 4, 3), (0, 1, 7, 8, 9, 4), (MAX_SEED - 1, MAX_SEED)])
def test_seeds_read_back_from_their_text(seeds: tuple[int, ...]) -> None:
    assert parse_seeds(format_seeds(seeds)) == seeds


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "''"), ("a", "'a'"), ("1,,2", "''"), ("-1", "'-1'"), ("1.5", "1.5"), ("1-", "'1-'"), ("7-0", "0-7"),
        ("1,1", "seed 1 is given twice"), ("0-4,2", "twice"), (f"0-{MAX_SEEDS}", str(MAX_SEEDS)),
        ("0-4294967295", str(MAX_SEEDS)), (str(MAX_SEED + 1), str(MAX_SEED)), ("9" * 40, "whole numbers"), ("²", "²"),
    ],
)
def test_seeds_that_cannot_be_read_are_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_seeds(text)


def test_the_default_settings_can_be_used() -> None:
    config = SampleConfig()
    assert config.seeds == tuple(range(8)) and config.scheduler in SCHEDULERS


def test_schedulers_are_those_of_the_sampler() -> None:
    from rewardiv import sampling

    assert (sampling.OWN, *sampling.SCHEDULERS) == SCHEDULERS


def test_settings_survive_json() -> None:
    config = SampleConfig(
        prompt="naïve 猫", methods=("base", "aig:knots:0=1,0.3=0.9,1=0@nemo"), seeds=(4, 2), rewards=("clip", "vivid"),
        guidance_scale=1, num_inference_steps=1, scheduler="euler", negative_prompt="grey",
    )
    assert SampleConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_methods_are_kept_in_their_canonical_text() -> None:
    config = SampleConfig(methods=("AIG:power_2.0", " lora:.5"))
    assert config.methods == ("aig:power:2", "lora:0.5")


def test_settings_that_are_left_out_take_their_defaults() -> None:
    assert SampleConfig.from_dict({"prompt": "a dog"}) == replace(SampleConfig(), prompt="a dog")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": 3}, "must be text"),
        ({"model": ""}, "no model"),
        ({"lora": ""}, "'finetuned' needs a LoRA"),
        ({"methods": ()}, "no method"),
        ({"methods": ("finetned",)}, "'finetuned'"),
        ({"methods": ("base", "base")}, "twice"),
        ({"methods": "base"}, "list"),
        ({"methods": ("aig:knots:0=1,0.3=0.2,0.6=0.5,1=0",)}, "rises"),
        ({"methods": ("aig:knots:0=1,0.3=1.2,1=0",)}, "leaves"),
        ({"seeds": ()}, "1 to"),
        ({"seeds": (-1,)}, "-1"),
        ({"seeds": (1, 1)}, "twice"),
        ({"seeds": (1.0,)}, "whole"),
        ({"seeds": (True,)}, "whole"),
        ({"seeds": 3}, "list"),
        ({"num_inference_steps": 0}, "1 to 1000"),
        ({"num_inference_steps": 1001}, "1 to 1000"),
        ({"num_inference_steps": 2.5}, "whole"),
        ({"guidance_scale": 0.9}, "1 "),
        ({"guidance_scale": 30.1}, "30"),
        ({"guidance_scale": float("nan")}, "nan"),
        ({"guidance_scale": "3"}, "number"),
        ({"guidance_rescale": 1.1}, "from 0 .off. to 1"),
        ({"guidance_rescale": "1"}, "number"),
        ({"height": 100}, "height is 100 px; it must be a multiple of 8, such as 96"),
        ({"width": 3}, "such as 8"),
        ({"width": -8}, "whole number of px"),
        ({"width": 64.0}, "whole number of px"),
        ({"height": 8192}, "up to 4096"),
        ({"scheduler": "dimm"}, "'ddim'"),
        ({"rewards": ("clip", "clip")}, "twice"),
        ({"rewards": (None,)}, "None"),
        ({"sceduler": "ddim"}, "'scheduler'"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        SampleConfig.from_dict(SampleConfig().to_dict() | change)


def test_settings_must_be_a_table() -> None:
    with pytest.raises(UserError, match="list"):
        SampleConfig.from_dict([])


def test_the_base_model_alone_needs_no_lora() -> None:
    assert SampleConfig(lora="", methods=("base",)).lora == ""


def test_the_nearest_name_is_offered_and_else_all_of_them() -> None:
    assert "'vivid'" in nearest("vivd", ["calm", "vivid"])
    assert nearest("xyz", ["calm", "vivid"]) == "; known: calm, vivid"

"""Probes: they change nothing, see what is drawn, and their verdicts are right on runs whose story is known."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rewardiv import lora
from rewardiv.clip_models import load_clip
from rewardiv.config import TrainConfig
from rewardiv.draft import ADAPTER
from rewardiv.errors import UserError
from rewardiv.methods import parse_method
from rewardiv.metrics import within_report
from rewardiv.models import Model, load_model
from rewardiv.probes import Probe, new_probe, probe_prompts
from rewardiv.rewards import Reward, load_reward
from rewardiv.sampling import initial_noise, make_scheduler, sample
from rewardiv.verdicts import ProbeRecord, best_tradeoff, collapse_onset

PROMPTS = ["a cat face", "a red cat", "face"]
SEEDS = (0, 1, 2, 3)
REDNESS = Reward("redness", lambda images, prompts: images[:, 0].mean((1, 2)))
LENGTH = Reward("length", lambda images, prompts: torch.tensor([float(len(prompt)) for prompt in prompts]))


def pixels(images: Tensor) -> Tensor:
    """Features that need no network: the pixels of a small picture."""
    return torch.nn.functional.avg_pool2d(images, 4).flatten(1)


@pytest.fixture
def config(tiny_model_dir: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        output_dir=str(tmp_path / "run"), model=str(tiny_model_dir), rewards=("redness=2",), num_inference_steps=3,
        train_batch_size=5, rank=2, lora_dropout=0.5, num_probe_seeds=4,
    )


def adapted(config: TrainConfig, strength: float = 0.0) -> Model:
    """The tiny model with an adapter that changes the pictures by `strength`, in training mode."""
    model = load_model(config.model)
    lora.attach_adapter(model.unet, ADAPTER, rank=2, alpha=2.0, targets=config.targets, dropout=0.5, seed=0)
    move(model, strength)
    model.unet.train()
    return model


def move(model: Model, strength: float) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lora.adapter_parameters(model.unet, ADAPTER):
            parameter += strength * torch.randn(parameter.shape, generator=generator)


def probe_of(model: Model, config: TrainConfig) -> Probe:
    return Probe(model, {"redness": REDNESS}, {"length": LENGTH}, pixels, PROMPTS, SEEDS, config)


@torch.no_grad()
def drawn(model: Model, config: TrainConfig, prompt: str, seed: int) -> Tensor:
    """One picture made by itself with the loop of sampling: what a cell of the grid has to be."""
    model.unet.eval()
    scheduler = make_scheduler(model.scheduler_config, config.scheduler, config.num_inference_steps)
    predict = model.predictor(model.encode_prompts([prompt]), model.encode_prompts([""]),
                              guidance_scale=config.guidance_scale, adapter=ADAPTER)
    *_, last = sample(predict, initial_noise([seed], model.latent_shape), [parse_method("finetuned")], scheduler)
    return (model.decode_latents(last.latents[0])[0] * 255).round().byte().permute(1, 2, 0)


def test_a_fresh_adapter_is_the_base(config: TrainConfig) -> None:
    record, grid = probe_of(adapted(config), config).measure(0)
    assert grid.shape == (3, 4, 16, 16, 3) and grid.dtype == np.uint8
    assert record.gain == record.scd == 0 and record.trace_ratio == 1
    assert record.effective_rank == record.effective_rank_base > 1
    assert record.num_images == 12 and record.step == 0 and record.elapsed_s > 0


def test_the_grid_is_what_sampling_draws_and_the_numbers_are_of_its_pictures(config: TrainConfig) -> None:
    """Chunks of 5 of 12 pictures cut through a prompt's row."""
    model = adapted(config, 0.3)
    record, grid = probe_of(model, config).measure(7)
    for p, s in ((0, 0), (1, 0), (1, 3), (2, 3)):
        difference = grid[p, s].astype(int) - drawn(model, config, PROMPTS[p], SEEDS[s]).numpy()
        assert np.abs(difference).max() <= 1
    red = grid[..., 0].mean((2, 3)) / 255
    assert record.rewards == {"redness": pytest.approx(red.mean(), abs=1e-6)}
    assert record.standard_errors["redness"] == pytest.approx(red.var(axis=1, ddof=1).mean() ** 0.5 / 12**0.5, rel=1e-4)
    assert record.held_out == {"length": pytest.approx(np.mean([len(prompt) for prompt in PROMPTS]))}
    assert record.standard_errors["length"] == 0, "prompts that differ are no uncertainty"

    _, base = probe_of(adapted(config), config).measure(0)
    features = [pixels(torch.tensor(one).flatten(0, 1).permute(0, 3, 1, 2) / 255).view(3, 4, -1) for one in (grid, base)]
    expected = within_report(*features, seed=0)
    assert (record.scd, record.scd_null) == (pytest.approx(expected.scd), pytest.approx(expected.null))
    assert record.trace_null == pytest.approx(expected.trace_null)
    assert record.trace_ratio == pytest.approx(expected.trace_ratio) and record.scd > 0
    assert record.pairwise_distance == pytest.approx(expected.pairwise_distance)
    base_red = base[..., 0].mean((2, 3)) / 255
    gain = (red.mean() - base_red.mean()) / base_red.var(axis=1, ddof=1).mean() ** 0.5
    assert record.gain == pytest.approx(gain, rel=1e-3) and gain != 0


def test_a_probe_changes_nothing(config: TrainConfig) -> None:
    """Weights, gradients, modes of every module and the global random numbers; and it is the same probe again."""
    model = adapted(config, 0.3)
    model.unet.mid_block.eval()
    restless = Reward("restless", lambda images, prompts: torch.rand(len(images)))
    probe = Probe(model, {"redness": REDNESS}, {"restless": restless}, pixels, PROMPTS, SEEDS, config)
    modes = [module.training for module in model.unet.modules()]
    before = {name: value.clone() for name, value in model.unet.state_dict().items()}
    state = torch.get_rng_state()
    first, grid = probe.measure(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.unet.modules()] == modes and any(modes) and not all(modes)
    assert all(torch.equal(value, before[name]) for name, value in model.unet.state_dict().items())
    assert all(parameter.grad is None for parameter in model.unet.parameters())
    assert all(parameter.requires_grad for parameter in lora.adapter_parameters(model.unet, ADAPTER))
    second, again = probe.measure(1)
    assert np.array_equal(grid, again)
    assert replace(first, elapsed_s=0, held_out={}, standard_errors={}) == replace(
        second, elapsed_s=0, held_out={}, standard_errors={})


def test_the_base_stays_the_reference_while_the_adapter_moves(config: TrainConfig) -> None:
    """A probe made late (a resumed run) says the same as one that was there from the start."""
    model = adapted(config)
    early = probe_of(model, config)
    early.measure(0)
    move(model, 0.3)
    seen, _ = early.measure(9)
    late, _ = probe_of(model, config).measure(9)
    assert replace(seen, elapsed_s=0) == replace(late, elapsed_s=0) and seen.scd > 0


def test_modes_are_restored_after_a_failure_and_broken_pictures_are_said(config: TrainConfig) -> None:
    model = adapted(config, math.inf)
    with pytest.raises(UserError, match="step 4 drew pictures that aren't finite"):
        probe_of(model, config).measure(4)
    assert model.unet.training and torch.is_grad_enabled()


def test_bf16_draws_nearly_the_same_pictures(config: TrainConfig) -> None:
    model = adapted(config, 0.2)
    full = probe_of(model, config).measure(1)[1].astype(int)
    half = probe_of(model, replace(config, mixed_precision="bf16")).measure(1)[1].astype(int)
    assert 0 < np.abs(full - half).mean() < 6


@pytest.mark.parametrize(("model_dir", "expected"), [("tiny_model_dir", torch.float16), ("tiny_xl_dir", torch.float32)])
def test_xl_s_autoencoder_draws_in_fp32_where_the_run_is_in_fp16(
    config: TrainConfig, model_dir: str, expected: torch.dtype, request: pytest.FixtureRequest
) -> None:
    config = replace(config, model=str(request.getfixturevalue(model_dir)), device="cuda", mixed_precision="fp16")
    model, seen = adapted(config), set()
    model.vae.decoder.conv_out.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    probe_of(model, config).measure(0)
    assert seen == {expected}


def test_prompts_are_taken_evenly_and_each_once() -> None:
    assert probe_prompts(list("abcdefgh"), 4) == ["a", "c", "e", "g"]
    assert probe_prompts(["a", "b", "a"], 4) == ["a", "b"]
    assert probe_prompts(list("abcde"), 3) == ["a", "b", "d"]


def test_a_new_probe_holds_out_what_is_asked_for_and_clip(
    config: TrainConfig, tiny_clip_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(config)
    monkeypatch.setattr("rewardiv.probes.load_features", lambda device: pixels)
    monkeypatch.setattr("rewardiv.rewards.load_clip", lambda path, device: load_clip(tiny_clip_dir, device))
    config = replace(config, rewards=("colorfulness",), probe_rewards=("vivid",), num_probe_prompts=2, num_probe_seeds=3)
    probe = new_probe(model, config, PROMPTS)
    assert list(probe.rewards) == ["colorfulness"] and list(probe.held_out) == ["vivid", "clip"]
    assert probe.prompts == ("a cat face", "a red cat") and probe.seeds == (0, 1, 2)
    record, grid = probe.measure(0)
    assert grid.shape[:2] == (2, 3) and set(record.standard_errors) == {"colorfulness", "vivid", "clip"}
    loaded = {"clip": load_reward("clip")}
    on_clip = new_probe(model, replace(config, rewards=("clip",), probe_rewards=()), PROMPTS, rewards=loaded)
    assert on_clip.rewards == loaded and not on_clip.held_out


def test_records_survive_json() -> None:
    for record in (probe(10, trace=0.9), probe(10, trace=math.nan), replace(probe(10), trace_null=None)):
        back = ProbeRecord.from_dict(json.loads(json.dumps(record.to_dict(), allow_nan=False)))
        assert repr(back) == repr(record)


def probe(step: int, reward: float = 0.0, clip: float = 0.5, trace: float = 1.0, scd: float = 0.0) -> ProbeRecord:
    """A record whose rewards have a standard error of 0.01 and whose band of chance ends at 1."""
    return ProbeRecord(
        step=step, rewards={"vivid": reward}, held_out={"clip": clip}, standard_errors={"vivid": 0.01, "clip": 0.01},
        gain=10 * reward, scd=scd, scd_null=(0.1, 1.0), trace_ratio=trace, effective_rank=5.0, effective_rank_base=6.0,
        pairwise_distance=2.0, num_images=16, elapsed_s=1.0, trace_null=(0.45, 2.0),
    )


def run(**columns: Sequence[float]) -> list[ProbeRecord]:
    """Probes every 10 steps from 0."""
    rows = zip(*columns.values(), strict=True)
    return [probe(10 * i, **dict(zip(columns, row, strict=True))) for i, row in enumerate(rows)]


def test_diversity_has_left_the_band_at_the_first_of_two_probes() -> None:
    onset = collapse_onset(run(scd=[0, 0.5, 3.21, 4, 5], trace=[1, 0.9, 0.62, 0.6, 0.5]))
    assert onset.step == 20
    for words in ("3.21", "reaches 1", "62 %", "leaves 45 %", "step 30"):
        assert words in onset.reason
    records = run(scd=[0, 0, 0, 0, 0], trace=[1, 0.9, 0.62, 0.4, 0.3])
    assert collapse_onset(records).step == 30, "the variance alone tells"
    assert collapse_onset([replace(record, trace_null=None) for record in records]) is None


@pytest.mark.parametrize("columns", [
    pytest.param({"scd": [0, 3, 0.5, 3, 0.5], "trace": [1, 0.6, 0.9, 0.6, 0.9]}, id="single probes outside"),
    pytest.param({"scd": [0, 3, 4, 5], "trace": [1, 1.5, 1.7, 2]}, id="diversity grows"),
    pytest.param({"scd": [0, 0.5, 0.9, 1.0], "trace": [1, 0.9, 0.8, 0.8]}, id="inside the band"),
    pytest.param({"scd": [0, 0, 3], "trace": [1, 1, 0.5]}, id="only the last probe"),
    pytest.param({"reward": [0, 0, 0, 0], "clip": [0.5, 0.3, 0.2, 0.1]}, id="held-out falls, nothing rises"),
    pytest.param({"reward": [0, 1, 2, 3], "clip": [0.5, 0.48, 0.49, 0.48]}, id="held-out falls within its error"),
    pytest.param({"reward": [0, 1, 2, 3, 4], "clip": [0.5, 0.5, 0.4, 0.5, 0.4]}, id="held-out falls once at a time"),
    pytest.param({"reward": [0, 1, 2, 3, 4], "clip": [0.5, 0.51, 0.7, 0.5, 0.49]}, id="one lucky probe is no level"),
    pytest.param({"reward": [3, 2, 1, 0], "clip": [0.5, 0.4, 0.3, 0.2]}, id="everything falls"),
    pytest.param({"reward": [0, 1, 2, 3], "clip": [0.5, 0.6, 0.7, 0.8]}, id="everything rises"),
    pytest.param({"reward": [0.0]}, id="one probe"),
    pytest.param({"reward": []}, id="none"),
])
def test_no_alarm(columns: dict[str, list[float]]) -> None:
    assert collapse_onset(run(**columns)) is None


def test_a_held_out_reward_turns_while_the_trained_one_rises() -> None:
    onset = collapse_onset(run(reward=[0, 1, 2, 3, 4, 5], clip=[0.5, 0.6, 0.62, 0.57, 0.5, 0.4]))
    assert onset.step == 40, "at 30 it is within 2.5 standard errors of the level held at 10 and 20"
    for word in ("clip", "from 0.60 to 0.50", "since step 10", "vivid rose from 1.00 to 4.00", "step 50"):
        assert word in onset.reason.replace("rose from 1.0 to 4.0", "rose from 1.00 to 4.00")


def test_the_earlier_sign_is_the_onset_and_signs_do_not_confirm_each_other() -> None:
    assert collapse_onset(run(reward=[0, 1, 2, 3], clip=[0.5, 0.3, 0.3, 0.3], scd=[0, 0, 3, 3],
                              trace=[1, 1, 0.5, 0.5])).step == 10
    assert collapse_onset(run(reward=[0, 1, 2, 3], clip=[0.5, 0.3, 0.5, 0.5], scd=[0, 0, 3, 0],
                              trace=[1, 1, 0.5, 0.5])) is None


def test_false_alarms_are_rare_in_healthy_runs_of_independent_noise() -> None:
    """50 probes whose held-out mean stays: real probes share their seeds, which lowers the noise; 2 % alarm."""
    alarms = 0
    for trial in range(60):
        noise = np.random.default_rng(trial).standard_normal(50) * 0.01
        alarms += collapse_onset(run(reward=np.linspace(0, 5, 50), clip=0.5 + noise)) is not None
    assert alarms <= 5


def test_a_step_that_is_measured_again_counts_once() -> None:
    collapsed = run(scd=[0, 3, 4], trace=[1, 0.5, 0.4])
    assert collapse_onset(collapsed).step == 10
    assert collapse_onset([*collapsed, probe(10), probe(20)]) is None
    assert collapse_onset(collapsed[::-1]).step == 10, "in any order"


def test_the_best_tradeoff_is_the_knee() -> None:
    records = run(reward=[0, 2, 4, 4.6, 4.9, 5], trace=[1, 0.99, 0.91, 0.6, 0.3, 0.1])
    choice = best_tradeoff(records)
    assert choice.step == 20 and choice.gain_share == pytest.approx(0.8) and choice.variance_kept == 0.91
    for words in ("91 % of the base's variance", "80 % of this run's reward gain", "vivid from 0.0 to 4.0"):
        assert words in choice.reason
    assert best_tradeoff(records, steps=[0, 10, 30]).step == 30
    assert best_tradeoff(records, steps=[0]) is None and best_tradeoff(records, steps=[]) is None


def test_a_run_that_hardly_loses_diversity_is_told_to_go_on() -> None:
    """Scaled to the run's own range, the knee would be at half of the gain."""
    assert best_tradeoff(run(reward=[0, 2, 3, 4], trace=[1, 0.999, 0.995, 0.99])).step == 30


def test_more_variance_than_the_base_counts_as_all_of_it() -> None:
    choice = best_tradeoff(run(reward=[0, 2, 4], trace=[1, 3, 1.1]))
    assert (choice.step, choice.variance_kept) == (20, 1.0)


def test_an_exchange_at_a_loss_says_so() -> None:
    choice = best_tradeoff(run(reward=[0, 1, 2, 4], trace=[1, 0.2, 0.1, 0.05]))
    assert choice.step == 30 and "yet" not in choice.reason
    choice = best_tradeoff(run(reward=[0, 1, 2, 4], trace=[1, 0.2, 0.1, 0.0]), steps=[10, 20])
    assert choice.step == 20 and "loses more than it gains" in choice.reason


def test_where_a_held_out_reward_turned_before_any_gain_the_earliest_counts() -> None:
    """Never a probe far beyond the turn, however large its sum."""
    records = run(reward=[0, 2, 3, 4, 5], trace=[1, 0.9, 0.9, 0.9, 0.9], clip=[0.7, 0.5, 0.4, 0.3, 0.3])
    assert collapse_onset(records).step == 10
    choice = best_tradeoff(records)
    assert choice.step == 10 and "turns at step 10, and" in choice.reason
    assert best_tradeoff(records, steps=[20, 40]).step == 20


def test_what_is_gained_after_a_held_out_reward_turned_does_not_count() -> None:
    columns = {"reward": [0, 2, 3, 4, 5], "trace": [1, 0.99, 0.98, 0.97, 0.96]}
    assert best_tradeoff(run(**columns)).step == 40
    choice = best_tradeoff(run(**columns, clip=[0.5, 0.5, 0.5, 0.3, 0.2]))
    assert choice.step == 20 and "before step 30" in choice.reason
    only_late = best_tradeoff(run(**columns, clip=[0.5, 0.5, 0.5, 0.3, 0.2]), steps=[0, 40])
    assert only_late.step == 40 and "before" not in only_late.reason
    left_the_band = best_tradeoff(run(**columns, scd=[0, 3, 3, 3, 3]))
    assert left_the_band.step == 40, "a loss of diversity is on the scale already"


@pytest.mark.parametrize("columns", [
    {"reward": [0, 4]},
    {"reward": [0, -1, -2]},
    {"reward": [0, 0.01, 0.02]},
    {"reward": [0, 1, 2], "trace": [math.nan] * 3},
])
def test_no_choice_without_three_probes_and_a_gain(columns: dict[str, list[float]]) -> None:
    assert best_tradeoff(run(**columns)) is None

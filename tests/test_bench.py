"""Laws of the benchmarks: both ways of sampling agree, training is measured from its own start, tables say what was found."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rewardiv.bench import cell, command, shapes
from rewardiv.bench.meter import Meter
from rewardiv.bench.sample import SampleBench, bench_sample, table
from rewardiv.bench.train import OURS, TRL, Cell, Task, bench_train, ratios, rows, run_cell, to_dict
from rewardiv.bench.train import table as train_table
from rewardiv.cli import main
from rewardiv.errors import UserError
from rewardiv.models import load_model

TINY_SHAPE = {
    "unet": {"block_out_channels": (32, 32), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
             "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1, "cross_attention_dim": 32,
             "norm_num_groups": 8, "attention_head_dim": 8},
    "vae": {"block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 4, "latent_channels": 4},
    "text_encoder": {"vocab_size": 49408, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
                     "num_attention_heads": 2, "projection_dim": 32},
}


def task_of(model_dir: Path, **settings: object) -> Task:
    return replace(Task(str(model_dir), num_steps=2, train_batch_size=2, num_inference_steps=2, num_threads=1), **settings)


def cell_of(trainer: str, steps: int, step_s: tuple[float, ...], peak_mib: float) -> Cell:
    return Cell(trainer, Task("m", num_inference_steps=steps), step_s, step_s, 100.0, peak_mib, 1.0, {})


def test_both_ways_make_the_same_images(tiny_model_dir: Path, tiny_lora_dir: Path) -> None:
    found = bench_sample(str(tiny_model_dir), str(tiny_lora_dir), num_seeds=2, num_inference_steps=4)
    assert found.max_difference <= 2
    assert found.plain_rows == 2 * 5 * 2 * 4
    # AIG is base at the first step, shares its row at the second, and takes one row at the last.
    assert found.batched_rows == 2 * 2 * (3 + 4 + 5 + 4)
    assert found.batched_s > 0 and found.ratio == found.plain_s / found.batched_s


def test_the_command_prints_the_ratio(tiny_model_dir: Path, tiny_lora_dir: Path,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "sample", "--model", str(tiny_model_dir), "--lora", str(tiny_lora_dir), "--num-seeds", "1",
             "--num-inference-steps", "2", "--device", "cpu"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    ratio = found.pop("ratio")
    assert ratio == pytest.approx(found["plain_s"] / found["batched_s"])
    assert f"{ratio:.2f} times faster" in table(SampleBench(**found))


@pytest.mark.parametrize("wrong", [{"num_seeds": 0}, {"repeat": 0}, {"num_inference_steps": 0}])
def test_numbers_out_of_range_are_refused(tiny_model_dir: Path, tiny_lora_dir: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(UserError):
        bench_sample(str(tiny_model_dir), str(tiny_lora_dir), **wrong)


def test_training_is_measured_in_a_process_of_its_own(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command: our side, one number of denoising steps; the peak is not that of this process."""
    words = ["bench", "train", "--model", str(tiny_model_dir), "--num-steps", "3", "--train-batch-size", "2",
             "--num-inference-steps", "2", "--num-threads", "1", "--device", "cpu", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    (one,), (row,) = found["cells"], found["rows"]
    assert one["trainer"] == OURS and len(one["step_s"]) == len(one["step_cpu_s"]) == 2 and found["ratios"] == {}
    assert row["peak_mib"] >= row["loaded_mib"] > 50 and row["growth_mib"] == row["peak_mib"] - row["loaded_mib"]
    assert one["versions"]["torch"] == torch.__version__.split("+")[0]


def test_a_step_of_the_benchmark_is_a_step_of_a_run(tiny_model_dir: Path) -> None:
    """Two steps in this process: rewards of the images drawn, and time for each."""
    threads = torch.get_num_threads()
    try:
        report = json.loads(cell.main(vars(task_of(tiny_model_dir, gradient_checkpointing=True))))
    finally:
        torch.set_num_threads(threads)
    assert len(report["step_s"]) == 2 and all(seconds > 0 for seconds in report["step_cpu_s"])
    assert report["first_reward"] > 0 and report["last_reward"] != report["first_reward"]


def test_the_meter_counts_from_its_own_start() -> None:
    before = torch.ones(64, 2**20)  # 256 MiB, gone before the meter begins
    del before
    meter = Meter()
    kept = torch.ones(24, 2**20)  # 96 MiB
    meter.step_done()
    del kept
    report = json.loads(meter.report(note="x"))
    assert 90 < report["peak_mib"] - report["loaded_mib"] < 130
    assert len(report["step_s"]) == 1 and report["note"] == "x"


def test_rows_and_ratios_of_alternating_repeats() -> None:
    cells = [cell_of(OURS, 10, (1.0, 3.0), 150), cell_of(TRL, 10, (4.0, 4.0), 300), cell_of(OURS, 10, (1.0, 1.0), 160),
             cell_of(TRL, 10, (5.0, 4.0), 290), cell_of(OURS, 20, (2.0, 2.0), 150)]
    found = {(row.trainer, row.num_inference_steps): row for row in rows(cells)}
    assert found[OURS, 10].step_s == 1.0 and found[OURS, 10].peak_mib == 160 and found[TRL, 10].growth_mib == 200
    assert ratios(rows(cells)) == {10: {"steps_per_s": 4.0, "steps_per_cpu_s": 4.0, "peak": 160 / 300, "growth": 0.3}}
    assert "10 denoising steps: 4.00 × TRL's steps per second" in train_table(cells) and "0.53 × its peak" in train_table(cells)
    assert len(json.loads(json.dumps(to_dict(cells)))["rows"]) == 3


def test_a_failing_process_is_named_with_its_last_words(tiny_model_dir: Path, tmp_path: Path) -> None:
    task = task_of(tiny_model_dir)
    with pytest.raises(UserError, match="cannot run .*/python"):
        run_cell(TRL, str(tmp_path / "python"), task)
    with pytest.raises(UserError, match="rewardiv.bench.trl_cell failed .*No module named 'trl'"):
        run_cell(TRL, sys.executable, task)
    for wrong in ({"repeat": 0}, {"num_inference_steps": []}):
        with pytest.raises(UserError, match="needed"):
            bench_train(task, **{"num_inference_steps": [2], **wrong})


def test_random_weights_in_a_real_shape_are_a_pipeline_that_trains(tmp_path: Path) -> None:
    """The path of `--shape`, on a small one: the folder loads, has the image size asked for, and its UNet learns."""
    folder = shapes.write_shape(TINY_SHAPE, 32, tmp_path)
    assert load_model(str(folder)).image_size == 32
    assert len(json.loads(cell.main(vars(task_of(folder, num_threads=torch.get_num_threads()))))["step_s"]) == 2


def test_stable_diffusion_1_has_its_published_size() -> None:
    """859.5 million weights in the UNet, counted without making them; every shape of the command is known."""
    with torch.device("meta"):
        unet = shapes.UNet2DConditionModel(**shapes.SD15["unet"], sample_size=64)
        vae = shapes.AutoencoderKL(**shapes.SD15["vae"])
    assert sum(weight.numel() for weight in unet.parameters()) == 859_520_964
    assert sum(weight.numel() for weight in vae.parameters()) == 83_653_863
    assert set(command.SHAPES) == set(shapes.SHAPES)

"""Laws of the benchmarks: both ways of sampling agree, training is measured from its own start, tables say what was found."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rewardiv.bench import cell, command, sample_cell, shapes, train
from rewardiv.bench.meter import Meter
from rewardiv.bench.sample import OURS, PLAIN, SampleBench, SampleCell, SampleTask, bench_sample, table
from rewardiv.bench.train import TRL, Cell, Task, bench_train, ratios, rows, run_cell, to_dict
from rewardiv.bench.train import table as train_table
from rewardiv.cli import main
from rewardiv.config import SampleConfig
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


TINY_XL_SHAPE = {
    "unet": TINY_SHAPE["unet"] | {"cross_attention_dim": 64, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
                                  "projection_class_embeddings_input_dim": 32 + 6 * 8},
    "vae": TINY_SHAPE["vae"], "text_encoder": TINY_SHAPE["text_encoder"], "text_encoder_2": TINY_SHAPE["text_encoder"],
}


def task_of(model_dir: Path, **settings: object) -> Task:
    return replace(Task(str(model_dir), num_steps=2, train_batch_size=2, num_inference_steps=2, num_threads=1), **settings)


def cell_of(trainer: str, steps: int, step_s: tuple[float, ...], peak_mib: float) -> Cell:
    return Cell(trainer, Task("m", num_inference_steps=steps), step_s, step_s, 100.0, peak_mib, 1.0, {})


def test_both_ways_make_the_same_images_and_the_command_says_so(
    tiny_model_dir: Path, tiny_lora_dir: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["bench", "sample", "--model", str(tiny_model_dir), "--lora", str(tiny_lora_dir), "--num-seeds", "2",
             "--num-inference-steps", "4", "--device", "cpu", "--num-threads", "1", "--json"]
    assert main(words) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["max_difference"] <= 2
    assert found["plain"]["rows"] == 2 * 5 * 2 * 4
    # AIG is base at the first step, shares its row at the second, and takes one row at the last.
    assert found["ours"]["rows"] == 2 * 2 * (3 + 4 + 5 + 4)
    assert found["speed"] == pytest.approx(found["plain"]["seconds"] / found["ours"]["seconds"])
    cells = [SampleCell(task=SampleTask(**found[way].pop("task")), **found[way]) for way in ("ours", "plain")]
    assert f"2 seeds: {found['speed']:.2f} times as fast" in table([SampleBench(*cells, found["max_difference"])])


def test_both_ways_agree_on_an_xl_model_with_its_own_random_lora(tmp_path: Path) -> None:
    folder = shapes.write_shape(TINY_XL_SHAPE, 32, tmp_path / "model")
    config = SampleConfig(model=str(folder), lora=str(folder), seeds=(0, 1), num_inference_steps=3)
    made = [sample_cell.WAYS[way](config, "cpu", torch.float32).images(config).astype(int) for way in (OURS, PLAIN)]
    assert abs(made[0] - made[1]).max() <= 2 and abs(made[0][0] - made[0][1]).max() > 2


@pytest.mark.parametrize("wrong", [{"num_seeds": (0,)}, {"repeat": 0}, {"num_inference_steps": 0}])
def test_numbers_out_of_range_are_refused(tiny_model_dir: Path, tiny_lora_dir: Path, wrong: dict[str, object]) -> None:
    task = {"num_inference_steps": 2, "repeat": 1} | {name: value for name, value in wrong.items() if name != "num_seeds"}
    with pytest.raises(UserError, match="at least 1"):
        bench_sample(SampleTask(str(tiny_model_dir), str(tiny_lora_dir), **task), num_seeds=wrong.get("num_seeds", (1,)))


def test_the_largest_batch_is_the_last_that_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The device's memory is played by a function: it fails as torch does, for this reason or another."""
    def run(trainer: str, python: str, task: Task) -> Cell:
        if task.train_batch_size > 4:
            raise UserError("rewardiv.bench.cell failed: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB")
        if not task.model:
            raise UserError("rewardiv.bench.cell failed: no model")
        return Cell(trainer, task, (1.0,), (1.0,), 100.0, 200.0, 1.0, {})

    monkeypatch.setattr(train, "run_cell", run)
    found = train.largest_batch(Task("m"))
    assert [cell.task.train_batch_size for cell in found] == [cell.task.grad_batch_size for cell in found] == [1, 2, 4]
    with pytest.raises(UserError, match="no model"):
        train.largest_batch(Task(""))
    assert main(["bench", "train", "--largest-batch", "--device", "cpu"]) == 2
    assert "needs CUDA" in capsys.readouterr().err


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


@pytest.mark.parametrize("shape", [TINY_SHAPE, TINY_XL_SHAPE])
def test_random_weights_in_a_real_shape_are_a_pipeline_that_trains(shape: shapes.Shape, tmp_path: Path) -> None:
    """The path of `--shape`, on a small one: the folder loads, has the image size asked for, and its UNet learns."""
    folder = shapes.write_shape(shape, 32, tmp_path)
    assert load_model(str(folder)).image_size == 32
    assert len(json.loads(cell.main(vars(task_of(folder, num_threads=torch.get_num_threads()))))["step_s"]) == 2


@pytest.mark.parametrize(("shape", "num_weights"), [("sd15", 859_520_964), ("sdxl", 2_567_463_684)])
def test_real_shapes_have_their_published_size(shape: str, num_weights: int) -> None:
    """The weights of the UNet and of the autoencoder, counted without making them; every shape of the command is known."""
    with torch.device("meta"):
        unet = shapes.UNet2DConditionModel(**shapes.SHAPES[shape]["unet"], sample_size=64)
        vae = shapes.AutoencoderKL(**shapes.SHAPES[shape]["vae"])
    assert sum(weight.numel() for weight in unet.parameters()) == num_weights
    assert sum(weight.numel() for weight in vae.parameters()) == 83_653_863
    assert set(command.SHAPES) == set(shapes.SHAPES)


def test_both_forms_of_the_diversity_numbers_agree_and_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "metrics", "--num-images", "24", "--num-features", "96", "--repeat", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found] == ["SCD", "FID", "Vendi"]
    assert all(row["difference"] < 1e-5 and row["speed"] == row["plain_s"] / row["gram_s"] for row in found)
    assert main(["bench", "metrics", "--num-images", "8", "--num-features", "4", "--repeat", "1"]) == 0
    assert "8 images a side, 4 features" in capsys.readouterr().out
    assert main(["bench", "metrics", "--num-images", "1"]) != 0 and "num_images is 1" in capsys.readouterr().err

"""A prepared result on tiny components, and the app that opens with it, so that its form names those components."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from rewardiv.config import SampleConfig, TrainConfig
from rewardiv.export import save_result
from rewardiv.generate import Engine, generate
from rewardiv.records import StepRecord
from rewardiv.ui import create_demo, launch_options


@pytest.fixture(scope="session")
def engine(tiny_clip_dir: Path) -> Engine:
    return Engine(features_path=str(tiny_clip_dir))


@pytest.fixture(scope="session")
def config(tiny_model_dir: Path, tiny_lora_dir: Path) -> SampleConfig:
    return SampleConfig(
        model=str(tiny_model_dir), lora=str(tiny_lora_dir), prompt="a cat face", seeds=(0, 1, 2), num_inference_steps=3,
        methods=("base", "finetuned", "lora:0.5", "aig:power:2"), rewards=("colorfulness",),
    )


@pytest.fixture(scope="session")
def prepared_dir(engine: Engine, config: SampleConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    *_, result = generate(engine, config)
    return save_result(result, tmp_path_factory.mktemp("assets") / "prepared")


@pytest.fixture(scope="session")
def url(engine: Engine, prepared_dir: Path) -> Iterator[str]:
    demo: gr.Blocks = create_demo(lambda: engine, prepared_dir=prepared_dir)
    # _frontend=False leaves out a check of the address that gives up after 3 s, which a busy machine may need
    _, address, _ = demo.launch(prevent_thread_lock=True, quiet=True, _frontend=False, **launch_options())
    yield address
    demo.close()


@pytest.fixture(scope="session")
def wide_lora_dir(lora_writer: Callable[..., Path], wide_model_dir: Path) -> Path:
    """A LoRA for another model."""
    return lora_writer("wide-lora", wide_model_dir)


@pytest.fixture(scope="session")
def damaged_lora_dir(tiny_lora_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA whose file ends too early."""
    folder = shutil.copytree(tiny_lora_dir, tmp_path_factory.mktemp("damaged") / "lora")
    cut_short(folder / "pytorch_lora_weights.safetensors")
    return folder


@pytest.fixture(scope="session")
def damaged_model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose UNet file ends too early."""
    folder = shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("damaged") / "model")
    cut_short(folder / "unet" / "diffusion_pytorch_model.safetensors")
    return folder


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


RunWriter = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path, tiny_model_dir: Path, tiny_lora_dir: Path) -> RunWriter:
    """write_run(name, done=20, state="done", runs_dir=tmp_path / "runs", **settings) -> a run's folder, written by hand."""
    own_dir = tmp_path / "runs"

    def write(name: str, *, done: int = 20, state: str = "done", runs_dir: Path = own_dir, **settings: object) -> Path:
        folder = runs_dir / name
        settings = {"model": str(tiny_model_dir), "rewards": ("colorfulness",), "num_inference_steps": 2} | settings
        config = TrainConfig(output_dir=str(folder), max_train_steps=20, probe_every=10, checkpointing_steps=20, **settings)
        for step in range(0, done + 1, 10):
            probe = folder / "probes" / f"step-{step}"
            probe.mkdir(parents=True)
            Image.fromarray(np.full((12, 12, 3), 10 * step, np.uint8)).save(probe / "grid.png")
        for step in range(0, done + 1, 20):
            shutil.copytree(tiny_lora_dir, folder / "checkpoints" / f"step-{step}")
        write_lines(folder / "metrics.jsonl", [asdict(step_record(step)) for step in range(1, done + 1)])
        write_lines(folder / "probes.jsonl", [probe_record(step) for step in range(0, done + 1, 10)])
        (folder / "config.json").write_text(json.dumps({"settings": config.to_dict(), "prompts": ["a cat face", "a tulip"]}))
        (folder / "log.txt").write_text("09:00:00 started\n")
        now = time.time()
        (folder / "state.json").write_text(json.dumps({
            "state": state, "step": done, "num_steps": 20, "settings": config.to_dict(), "created": now, "queued": now,
            "heartbeat": now, "host": "another machine",
        }))
        return folder

    return write


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def step_record(step: int) -> StepRecord:
    return StepRecord(step, 10 + step / 10, 1.0, {"colorfulness": 10 + step / 10}, -10.0, 0.0, 0.0, 0.0, 0.5, 1e-3, 2.0 * step)


def probe_record(step: int) -> dict:
    """Of a run that gains reward and loses variety; the collapse shows from step 10 on."""
    return {
        "step": step, "rewards": {"colorfulness": 10 + step / 10}, "held_out": {"clip": 28.0}, "gain": step / 10,
        "standard_errors": {"colorfulness": 0.1, "clip": 0.2}, "scd": step / 100, "scd_null": [0.0, 0.05],
        "trace_ratio": 1 - step / 40, "effective_rank": 5.0, "effective_rank_base": 6.0, "pairwise_distance": 0.5,
        "num_images": 8, "elapsed_s": 1.0,
    }

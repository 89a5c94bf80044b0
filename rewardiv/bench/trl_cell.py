"""TRL's AlignPropTrainer on the benchmark's task: `python -m rewardiv.bench.trl_cell TASK`, in an environment with TRL.

Worked with Python 3.11, torch 2.14.1, torchvision 0.29.1, trl 0.23.1 (the last release with this trainer), diffusers
0.35.1, transformers 4.56.2, peft 0.17.1, accelerate 1.10.1. TASK is JSON, see rewardiv.bench.train.Task.

The trainer is used as it comes, LoRA and gradient checkpointing of the UNet included; settings that both sides have are
equal. Its truncation is the fixed one, after num_inference_steps - grad_steps steps, so that gradients pass the last
grad_steps steps. The images reach the reward in [0, 1], as the pipeline's output type "pt" gives them.
"""

from __future__ import annotations

import importlib.metadata
import json
import random
import runpy
import sys
import warnings
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import PartialState
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast
from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline

from rewardiv.bench.meter import Meter

COLORFULNESS = Path(__file__).resolve().parent.parent / "rewards" / "colorfulness.py"
PACKAGES = ("trl", "torch", "diffusers", "transformers", "peft", "accelerate")


def main(task: dict) -> None:
    """Take the task's steps and print what they took."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(task["num_threads"])
    colorfulness = runpy.run_path(str(COLORFULNESS))["colorfulness"]
    generator = random.Random(0)
    rewards = []

    def reward_fn(images: torch.Tensor, prompts: tuple[str, ...], metadata: object) -> tuple[torch.Tensor, dict]:
        values = colorfulness(images, list(prompts))
        rewards.append(float(values.detach().mean()))
        return values, {}

    PartialState(cpu=task["device"] == "cpu")  # the pipeline's logger wants it
    pipeline = load_pipeline(task["model"])
    trainer = AlignPropTrainer(config_of(task), reward_fn, lambda: (generator.choice(task["prompts"]), {}), pipeline)
    pipeline.set_progress_bar_config(disable=True)
    meter, global_step = Meter(task["device"]), 0
    for epoch in range(task["num_steps"]):
        global_step = trainer.step(epoch, global_step)
        meter.step_done()
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    print(meter.report(first_reward=rewards[0], last_reward=rewards[-1], versions=versions))


def load_pipeline(folder: str) -> DefaultDDPOStableDiffusionPipeline:
    """The trainer's pipeline; tokenizer and text encoder are read by hand, because transformers 5 writes them otherwise."""
    place = Path(folder) / "text_encoder"
    encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(place))
    state = load_file(place / "model.safetensors")
    encoder.load_state_dict({f"text_model.{key.removeprefix('text_model.')}": value for key, value in state.items()})
    read = partial(StableDiffusionPipeline.from_pretrained, tokenizer=None, text_encoder=encoder.eval())
    with patch.object(StableDiffusionPipeline, "from_pretrained", read):
        pipeline = DefaultDDPOStableDiffusionPipeline(folder, use_lora=True)
    pipeline.sd_pipeline.register_modules(tokenizer=CLIPTokenizerFast.from_pretrained(Path(folder) / "tokenizer"))
    return pipeline


def config_of(task: dict) -> AlignPropConfig:
    """The task in the trainer's words."""
    return AlignPropConfig(
        log_with=None, mixed_precision=task["mixed_precision"], seed=1, save_freq=10**9,
        accelerator_kwargs={"cpu": task["device"] == "cpu"},
        sample_num_steps=task["num_inference_steps"], sample_eta=0.0, sample_guidance_scale=task["guidance_scale"],
        train_batch_size=task["train_batch_size"], train_gradient_accumulation_steps=1,
        train_learning_rate=task["learning_rate"], train_max_grad_norm=1.0,
        truncated_backprop_rand=False, truncated_backprop_timestep=task["num_inference_steps"] - task["grad_steps"],
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

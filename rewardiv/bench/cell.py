"""Our side of the training benchmark: `python -m rewardiv.bench.cell TASK`, JSON as in rewardiv.bench.train.Task."""

from __future__ import annotations

import json
import os
import sys

import torch

from rewardiv.bench.meter import Meter
from rewardiv.config import TrainConfig
from rewardiv.crew import Crew
from rewardiv.export import versions
from rewardiv.learner import new_learner, take_step


def main(task: dict) -> str:
    """Take the task's steps as a run takes them, without its checkpoints and probes; gives what they took."""
    torch.set_num_threads(task["num_threads"] or os.cpu_count() or 1)
    config = config_of(task)
    learner = new_learner(config, Crew(config.device), task["prompts"])
    rewards = []
    meter = Meter(config.device)
    for _ in range(task["num_steps"]):
        record = take_step(learner)
        meter.step_done()
        if isinstance(record, str):
            raise RuntimeError(f"a step was refused: {record}")
        rewards.append(record.reward_mean)
    return meter.report(first_reward=rewards[0], last_reward=rewards[-1], versions=versions())


def config_of(task: dict) -> TrainConfig:
    """The task as settings of a run; the LoRA and the optimiser are those that TRL's trainer has built in or by default."""
    return TrainConfig(
        output_dir="unused", model=task["model"], rewards=("colorfulness",), probe_every=0, max_train_steps=task["num_steps"],
        train_batch_size=task["train_batch_size"], grad_batch_size=task["grad_batch_size"],
        num_inference_steps=task["num_inference_steps"],
        grad_steps=task["grad_steps"], guidance_scale=task["guidance_scale"], rank=4, lora_targets="attention",
        learning_rate=task["learning_rate"], adam_weight_decay=1e-4, mixed_precision=task["mixed_precision"],
        gradient_checkpointing=task["gradient_checkpointing"], device=task["device"],
    )


if __name__ == "__main__":
    print(main(json.loads(sys.argv[1])))

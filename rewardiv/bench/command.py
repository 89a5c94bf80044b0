"""`python -m rewardiv bench sample|train`: flags and output; heavy libraries load only where needed."""

from __future__ import annotations

import argparse
import json
import os
import tempfile

from rewardiv.bench import train
from rewardiv.config import PRECISIONS
from rewardiv.devices import pick_device

SAMPLE_ABOUT = "one batched run of the four default methods against the same images made one by one with plain diffusers calls"
TRAIN_ABOUT = "seconds a step and peak memory of training; with --trl-python also of TRL 0.23.1's AlignPropTrainer, by turns"
SHAPES = ("sd15",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's two kinds and their flags."""
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT", parser_class=type(parser))
    sample = kinds.add_parser("sample", help=SAMPLE_ABOUT, description=f"{SAMPLE_ABOUT[0].upper()}{SAMPLE_ABOUT[1:]}.")
    sample.add_argument("--lora", default="vivid", help="name, folder or .safetensors file (%(default)s)")
    sample.add_argument("--num-seeds", type=int, default=8, metavar="N", help="images a method (%(default)s)")
    sample.add_argument("--num-inference-steps", type=int, default=20, metavar="N", help="(%(default)s)")
    training = kinds.add_parser("train", help=TRAIN_ABOUT, description=f"{TRAIN_ABOUT[0].upper()}{TRAIN_ABOUT[1:]}.")
    _add_train(training)
    for kind in (sample, training):
        kind.add_argument("--model", default="emoji", help="name or diffusers folder (%(default)s)")
        kind.add_argument("--repeat", type=int, default=1, metavar="N", help="runs of everything (%(default)s)")
        kind.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
        kind.add_argument("--json", action="store_true", help="as JSON")


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trl-python", default="", metavar="PATH", help="Python of an environment with trl 0.23.1 (none)")
    parser.add_argument("--num-steps", type=int, default=train.Task.num_steps, metavar="N",
                        help="optimiser steps, the first isn't counted (%(default)s)")
    parser.add_argument("--train-batch-size", type=int, default=train.Task.train_batch_size, metavar="N",
                        help="images a step (%(default)s)")
    parser.add_argument("--num-inference-steps", type=int, nargs="+", default=[train.Task.num_inference_steps], metavar="N",
                        help="denoising steps, several for a row each (10)")
    parser.add_argument("--grad-steps", type=int, default=1, metavar="K", help="last steps that gradients pass (%(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=train.Task.guidance_scale, metavar="X", help="(%(default)s)")
    parser.add_argument("--mixed-precision", choices=PRECISIONS, default="no", help="(%(default)s)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="ours; TRL always does for the UNet")
    parser.add_argument("--num-threads", type=int, default=os.cpu_count() or 1, metavar="N", help="of the CPU (%(default)s)")
    parser.add_argument("--shape", choices=SHAPES, default="", help="random weights of this architecture instead of --model")
    parser.add_argument("--image-size", type=int, default=512, metavar="PX", help="with --shape (%(default)s)")


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    args.device = pick_device(args.device)
    {"sample": run_sample, "train": run_train}[args.what](args)


def run_sample(args: argparse.Namespace) -> None:
    """Sampling: the fastest of `repeat` runs counts."""
    from rewardiv.bench.sample import bench_sample, table

    found = bench_sample(
        args.model, args.lora, num_seeds=args.num_seeds, num_inference_steps=args.num_inference_steps,
        repeat=args.repeat, device=args.device,
    )
    print(json.dumps(found.to_dict(), indent=1) if args.json else table(found))


def run_train(args: argparse.Namespace) -> None:
    """Training: every repeat is a process."""
    with tempfile.TemporaryDirectory() as folder:
        task = train.Task(
            model=train.local_model(args.model, args.shape, args.image_size, folder), num_steps=args.num_steps,
            train_batch_size=args.train_batch_size, grad_steps=args.grad_steps, guidance_scale=args.guidance_scale,
            mixed_precision=args.mixed_precision, gradient_checkpointing=args.gradient_checkpointing, device=args.device,
            num_threads=args.num_threads,
        )
        cells = train.bench_train(task, num_inference_steps=args.num_inference_steps, repeat=args.repeat,
                                  trl_python=args.trl_python)
    print(json.dumps(train.to_dict(cells), indent=1) if args.json else train.table(cells))

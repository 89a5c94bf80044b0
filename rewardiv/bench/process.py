"""Runs a benchmark's parts in processes of their own, so that no memory is inherited; finds or makes the model for them."""

from __future__ import annotations

import os
import subprocess
import sys

from rewardiv.errors import UserError
from rewardiv.registry import ROOT, find_model

SHAPES_MODULE = "rewardiv.bench.shapes"


def local_model(name: str, shape: str, image_size: int, folder: str) -> str:
    """The pipeline folder of a model's name, or one with random weights of a shape, written into `folder`."""
    if not shape:
        return find_model(name).path
    place = f"{folder}/{shape}-{image_size}px"
    run_module(sys.executable, SHAPES_MODULE, shape, str(image_size), place)
    return place


def run_module(python: str, module: str, *words: str) -> str:
    """What a module prints, run by a Python in the project's folder without network.

    Raises:
        UserError: If it fails; its last words are in the message.
    """
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run([python, "-m", module, *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"cannot run {python}: {error.strerror or error}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"{module} failed in {python} with exit code {done.returncode}: {last}")
    return done.stdout

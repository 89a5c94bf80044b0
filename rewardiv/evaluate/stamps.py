"""Keys under which images and scores are kept: digests of everything that decides them, and of nothing else."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rewardiv import extensions, hub
from rewardiv.config import SampleConfig
from rewardiv.errors import UserError
from rewardiv.features import CLIP
from rewardiv.lora_formats import lora_file
from rewardiv.lora_mix import find_loras
from rewardiv.methods import parse_method
from rewardiv.registry import CHECKPOINTS, OPEN_CLIP, find_model, find_reward
from rewardiv.rewards import LIBRARIES
from rewardiv.rewards.clip import clip_source

WHOLE = 2**26  # bytes up to which a file is read whole
BLOCKS, BLOCK = 64, 2**16  # read of a larger one, spread evenly
SUFFIXES = (".json", ".txt", ".safetensors", ".bin", ".pt")
DIGITS = 32  # of a digest, in hex
CURVE_POINTS = 65  # at which a gamma shape that somebody added is read


def image_keys(
    config: SampleConfig, seeds: Sequence[int], method: str, *, model: str, loras: Sequence[tuple[str, float]], dtype: str,
    safety: bool,
) -> dict[int, str]:
    """The key of a method's image at each seed.

    The same image has the same key wherever its files lie and whatever they are called: model and LoRAs count by their
    content. Rewards don't count, nor does the device: rounding differs between devices, and the first one's image stays.

    Args:
        config: Prompt and settings.
        seeds: Of the images.
        method: In any spelling.
        model: Stamp of the base model's files.
        loras: Stamp and weight of each LoRA; ignored for base.
        dtype: Of the base model.
        safety: Whether the model's safety checker blacks out what it flags.
    """
    parsed = parse_method(method)
    curve = parsed.gamma.curve and [parsed.gamma(1 - k / (CURVE_POINTS - 1)) for k in range(CURVE_POINTS)] \
        if parsed.gamma else None
    shared = {
        "model": model, "loras": sorted(loras) if parsed.needs_lora else [], "method": str(parsed), "curve": curve,
        "prompt": config.prompt, "negative_prompt": config.negative_prompt, "steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale, "guidance_rescale": config.guidance_rescale, "scheduler": config.scheduler,
        "height": config.height, "width": config.width, "dtype": dtype, "safety": safety,
    }
    text = json.dumps(shared, sort_keys=True)
    return {seed: hashlib.sha256(f"{text} {seed}".encode()).hexdigest()[:DIGITS] for seed in seeds}


def model_stamp(name: str) -> str:
    """Of a base model's files.

    Raises:
        UserError: If it is unknown or not on this machine.
    """
    return content_stamp(hub.local_path(find_model(name)))


def lora_stamps(text: str) -> tuple[tuple[str, float], ...]:
    """Stamp and weight of each LoRA of a mixture; those of weight 0 don't count.

    Raises:
        UserError: If one is unknown or not on this machine.
    """
    shares = [share for share in find_loras(text) if share.weight]
    return tuple((content_stamp(lora_file(hub.local_path(share.entry))), share.weight) for share in shares)


def reward_stamp(name: str) -> str:
    """Of a reward's files and formula, and of the libraries that frame images for it.

    Raises:
        UserError: If it is unknown or not on this machine.
    """
    entry = find_reward(name)
    if entry.function is not None:
        files = [_source_stamp(extensions.load().rewards[entry.name].function())]
    elif OPEN_CLIP.fullmatch(entry.name):
        files = [content_stamp(hub.local_path(clip_source(entry.name)))]
    else:
        files = [content_stamp(path) for path in hub.local_paths(entry)] if entry.path else []
    return _digest({"reward": entry.name, "files": files, "libraries": _libraries()})


def features_stamp(name: str) -> str:
    """Of a features network (see features.load_features) and its libraries; a published one is known by its name."""
    path = CHECKPOINTS / "emoji-clip" if name == CLIP else Path(name)
    return _digest({"features": content_stamp(path) if path.is_dir() else name, "libraries": _libraries()})


def content_stamp(path: Path) -> str:
    """Of a file, or of a folder's configs and weights by their names in it; of files above 64 MiB the size and 64 blocks.

    Raises:
        UserError: If there is nothing to read.
    """
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if _counts(file, path))
    if not files:
        raise UserError(f"{path} holds no model files")
    names = [file.name if file == path else str(file.relative_to(path)) for file in files]
    sizes = [file.stat().st_size for file in files]
    marks = [_file_stamp(str(file), file.stat().st_mtime_ns, size) for file, size in zip(files, sizes, strict=True)]
    return _digest([marks] if len(files) == 1 else list(zip(names, sizes, marks, strict=True)))


def _counts(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.suffix in SUFFIXES and file.is_file() and not hidden


@functools.lru_cache(maxsize=1024)
def _file_stamp(path: str, mtime_ns: int, size: int) -> str:
    """Of a file's content; the time of its last change only tells whether it was read before."""
    digest = hashlib.sha256(str(size).encode())
    for block in _blocks(Path(path), size):
        digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        if size <= WHOLE:
            while block := file.read(2**20):
                yield block
            return
        for k in range(BLOCKS):
            file.seek((size - BLOCK) * k // (BLOCKS - 1))
            yield file.read(BLOCK)


def _source_stamp(function: Callable[..., object]) -> str:
    """Of the file in which somebody's reward is written."""
    try:
        return content_stamp(Path(inspect.getsourcefile(function) or ""))
    except TypeError as error:
        raise UserError(f"the reward {function!r} must be a plain function in a file, or its scores can't be kept") from error


def _libraries() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:DIGITS]

"""Builds a study: images without their metadata, grids, pairs, attention checks, and a folder that holds them."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import random
import secrets
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rewardiv.errors import UserError
from rewardiv.runs import new_dir, write_atomic, write_bytes, write_json
from rewardiv.study.design import FILE_NAME, Check, ImageSet, Pair, Study, StudyConfig
from rewardiv.study.sources import Source, read_sources

SECRET_NAME = "secret"
GAP = 4  # px between the images of a grid
NOISE = 0.75  # share of noise in the pictures that must look worse
Pixels = NDArray[np.uint8]


class Album:
    """PNGs by the hash of their content: pixels alone, no metadata, one encoder. They are made again when they are written."""

    def __init__(self) -> None:
        self.makers: dict[str, Callable[[], Pixels]] = {}

    def add(self, make: Callable[[], Pixels]) -> str:
        """Keep how a picture [H, W, 3] is made; gives its name."""
        name = hashlib.sha256(_png(make())).hexdigest()
        self.makers[name] = make
        return name

    def write(self, folder: Path, names: Iterable[str]) -> None:
        """Write pictures in an order of their names, all of one date, so that neither tells what they show."""
        for name in sorted(names):
            os.utime(write_bytes(folder / f"{name}.png", _png(self.makers[name]())), (0, 0))


def build_study(folders: Sequence[str | Path], output_dir: str | Path, config: StudyConfig) -> Study:
    """Make a study of what `sample` or `sweep` has drawn, in a folder that holds nothing yet.

    Every prompt's seeds are cut into sets of config.set_size, the rest is left out. A pair is two methods' sets of the same
    prompt and seeds; pairs whose pictures are the same are left out, because nobody can tell them apart.
    The folder gets images/ (grids, all that a rater ever sees), cells/ (single images, for export), a secret that keys the
    hashes of addresses, and study.json last.

    Raises:
        UserError: If an image is missing or of another size than its fellows, there are too few seeds or methods, no pair is
            left, or the checks cannot be made.
    """
    sources = read_sources(folders)
    grids, cells = Album(), Album()
    made = [one for source in sources for one in _sets(source, config, grids, cells)]
    sets, files = tuple(one for one, _ in made), {one.id: own for one, own in made}
    pairs = _pairs(sets)
    if not pairs:
        raise UserError("there is no pair to judge: a prompt needs two methods whose pictures differ")
    origin = {name: _public(value) for name, value in sources[0].settings.items()}
    study = Study(config, origin, sets, pairs, _checks(sets, files, config, grids))
    folder = new_dir(output_dir)
    grids.write(folder / "images", study.images)
    cells.write(folder / "cells", cells.makers)
    write_atomic(folder / SECRET_NAME, _write_secret)
    write_json(folder / FILE_NAME, study.to_dict())
    return study


def _sets(source: Source, config: StudyConfig, grids: Album, cells: Album) -> list[tuple[ImageSet, list[Path]]]:
    """The sets of one prompt with their images' files."""
    seeds = sorted(set.intersection(*(set(files) for files in source.files.values()))) if source.files else []
    size = config.set_size
    if len(seeds) < size or len(source.files) < 2:
        raise UserError(f"“{source.prompt}” has {len(source.files)} methods with {len(seeds)} seeds in common; a study with "
                        f"grids of {size} needs at least 2 methods and {size} seeds")
    found, shape = [], None
    for method, files in source.files.items():
        for first in range(0, len(seeds) - size + 1, size):
            own = tuple(seeds[first : first + size])
            places = [files[seed] for seed in own]
            images = [_read_image(place, config.max_px) for place in places]
            shape = shape or images[0].shape
            if any(image.shape != shape for image in images):
                raise UserError(f"the images of “{source.prompt}” by {method} differ in size from the others; a study needs "
                                "one size for all images of a prompt, as the size would tell the methods apart")
            rewards = {f"reward:{name}": float(np.mean([values[method][seed] for seed in own]))
                       for name, values in source.rewards.items()}
            metrics = rewards | source.metrics.get(method, {}) | {"pixel_spread": _spread(images)}
            ident = _digest(source.prompt, method, own)
            one = ImageSet(ident, method, source.prompt, own, grids.add(partial(_grid, places, config)),
                           tuple(cells.add(partial(_read_image, place, config.max_px)) for place in places), metrics)
            found.append((one, places))
    return found


def _pairs(sets: Sequence[ImageSet]) -> tuple[Pair, ...]:
    """All pairs of methods at the same prompt and seeds whose pictures differ."""
    fellows: dict[tuple[str, tuple[int, ...]], list[ImageSet]] = {}
    for one in sets:
        fellows.setdefault((one.prompt, one.seeds), []).append(one)
    return tuple(
        Pair(_digest(a.id, b.id), a.id, b.id)
        for own in fellows.values() for a, b in itertools.combinations(own, 2) if a.image != b.image
    )


def _checks(
    sets: Sequence[ImageSet], files: dict[str, list[Path]], config: StudyConfig, grids: Album
) -> tuple[Check, ...]:
    """Pairs of pictures with an answer that anyone who looks will give, for each question.

    diversity: a set against one of its images, repeated. quality: a set against the same under heavy noise. fit: a set
    against one of the prompt that shares the fewest words with its own, or against noise where there is one prompt alone.
    The sets are the base model's where it takes part: a method that was tuned far may draw one picture for every prompt.
    """
    rng = random.Random(config.seed)
    plain = [one for one in sets if one.method == "base"] or list(sets)
    varied = [one for one in plain if one.metrics["pixel_spread"] > 0]
    varied = sorted(varied, key=lambda one: -one.metrics["pixel_spread"])[: max(1, len(varied) // 2)]
    if "diversity" in config.questions and not varied:
        raise UserError("the base images of every set are all the same, so that no attention check of diversity can be made; "
                        "take other images or leave the question 'diversity' out")
    found = []
    for question in config.questions:
        pool, num = varied if question == "diversity" else plain, config.checks_per_question
        for number, one in enumerate(rng.sample(pool, num) if num <= len(pool) else rng.choices(pool, k=num)):
            own, other = files[one.id], _unlike(one, sets)
            if question == "diversity":
                make = partial(_grid, [rng.choice(own)] * len(own), config)
            elif question == "fit" and other:
                make = partial(_grid, files[other.id], config)
            else:
                make = partial(_noisy_grid, own, config, NOISE if question == "quality" else 1.0, number)
            bad = grids.add(make)
            found.append(Check(_digest(question, number, one.id, bad), question, one.prompt, one.image, bad))
    return tuple(found)


def _unlike(one: ImageSet, sets: Sequence[ImageSet]) -> ImageSet | None:
    """A set by the same method of the prompt that shares the fewest words; None where no other prompt is."""
    words = set(one.prompt.casefold().split())
    others = [other for other in sets
              if other.prompt != one.prompt and other.method == one.method and other.image != one.image]
    return min(others, key=lambda other: len(words & set(other.prompt.casefold().split())), default=None)


def _noisy_grid(places: Sequence[Path], config: StudyConfig, share: float, number: int) -> Pixels:
    """A grid with this share of noise in it, always the same for a number."""
    grid = _grid(places, config)
    noise = np.random.default_rng((config.seed, number)).integers(0, 256, grid.shape)
    return ((1 - share) * grid + share * noise).astype(np.uint8)


def _spread(images: Sequence[Pixels]) -> float:
    """Root mean square difference of two images of a set, in [0, 1]: small pictures of 16 px, so that detail counts little."""
    shrunk = [Image.fromarray(image).resize((16, 16), Image.Resampling.BOX) for image in images]
    small = [np.asarray(image, dtype=np.float64) / 255 for image in shrunk]
    return float(np.sqrt(np.mean([np.mean((a - b) ** 2) for a, b in itertools.combinations(small, 2)])))


def _grid(places: Sequence[Path], config: StudyConfig) -> Pixels:
    """Images row by row on white."""
    images, side = [_read_image(place, config.max_px) for place in places], config.grid_side
    height, width = images[0].shape[:2]
    page = np.full((side * (height + GAP) - GAP, side * (width + GAP) - GAP, 3), 255, dtype=np.uint8)
    for k, image in enumerate(images):
        top, left = k // side * (height + GAP), k % side * (width + GAP)
        page[top : top + height, left : left + width] = image
    return page


def _read_image(path: Path, max_px: int) -> Pixels:
    """An image's pixels on white, shrunk where its longer side is above max_px."""
    try:
        with Image.open(path) as picture:
            rgba = picture.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image {path}: {error}") from error
    rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if (factor := max(rgb.size) / max_px) > 1:
        rgb = rgb.resize((max(1, round(rgb.width / factor)), max(1, round(rgb.height / factor))), Image.Resampling.LANCZOS)
    return np.array(rgb)


def _png(pixels: Pixels) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _public(value: object) -> object:
    """A setting without the folders of this machine."""
    if not isinstance(value, str):
        return value
    return "+".join(Path(part).name if Path(part).is_absolute() else part for part in value.split("+"))


def _write_secret(path: Path) -> None:
    path.touch(mode=0o600)
    path.write_bytes(secrets.token_hex(32).encode())


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

"""Seconds of the panel's numbers from inner products of the images, against the textbook's d x d covariances."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from rewardiv.errors import UserError
from rewardiv.gram import frechet_distance, vendi_score
from rewardiv.metrics import Array, scd

Form = Callable[[Array, Array], float]


@dataclass(frozen=True)
class MetricBench:
    """One number both ways.

    Attributes:
        name: Of the number.
        gram_s: The fastest time of the n x n form, its matrices included.
        plain_s: The fastest time of the d x d form.
        difference: Of both values, relative to the plain form's.
    """

    name: str
    gram_s: float
    plain_s: float
    difference: float

    @property
    def speed(self) -> float:
        """How many times faster the n x n form is."""
        return self.plain_s / self.gram_s

    def to_dict(self) -> dict[str, object]:
        """The fields and the ratio, as JSON can hold them."""
        return asdict(self) | {"speed": self.speed}


def bench_metrics(num_images: int = 256, num_features: int = 2048, *, repeat: int = 3, seed: int = 0) -> list[MetricBench]:
    """SCD, FID and Vendi of two Gaussian sets of n images with d features each, both ways, by turns.

    Raises:
        UserError: If there are fewer than 2 images, or no feature or repetition.
    """
    if num_images < 2 or num_features < 1 or repeat < 1:
        raise UserError(f"num_images is {num_images}, num_features {num_features} and repeat {repeat}; at least 2, 1 and 1 are "
                        "needed")
    rng = np.random.default_rng(seed)
    scale = 1 / np.sqrt(1 + np.arange(num_features))
    a, b = (shift + scale * rng.standard_normal((num_images, num_features)) for shift in (0.1, 0.15))
    return [_compared(name, gram, plain, a, b, repeat) for name, (gram, plain) in FORMS.items()]


def table(found: Sequence[MetricBench], num_images: int, num_features: int) -> str:
    """The figures as text."""
    lines = [f"{num_images} images a side, {num_features} features",
             f"{'':8} {'n x n seconds':>14} {'d x d seconds':>14} {'times as fast':>14} {'difference':>11}"]
    lines += [f"{bench.name:8} {bench.gram_s:14.4f} {bench.plain_s:14.4f} {bench.speed:14.1f} {bench.difference:11.0e}"
              for bench in found]
    return "\n".join(lines)


def plain_scd(a: Array, b: Array) -> float:
    """The spectral distance from both covariances."""
    first, second = (np.linalg.eigvalsh(np.cov(points.T)) for points in (a, b))
    return float(((first - second) ** 2).sum())


def plain_frechet(a: Array, b: Array) -> float:
    """The Fréchet distance from both covariances, the root by their symmetric form."""
    first, second = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(min=0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * cross)


def plain_vendi(a: Array, b: Array) -> float:
    """The Vendi score of all images from the d x d moments of their directions."""
    points = np.concatenate([a, b])
    directions = points / np.linalg.norm(points, axis=1, keepdims=True)
    shares = np.linalg.eigvalsh(directions.T @ directions / len(directions))
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


FORMS: dict[str, tuple[Form, Form]] = {
    "SCD": (scd, plain_scd),
    "FID": (frechet_distance, plain_frechet),
    "Vendi": (lambda a, b: vendi_score(np.concatenate([a, b])), plain_vendi),
}


def _compared(name: str, gram: Form, plain: Form, a: Array, b: Array, repeat: int) -> MetricBench:
    seconds: dict[Form, list[float]] = {gram: [], plain: []}
    values = {}
    for _ in range(repeat):
        for form, times in seconds.items():
            started = time.perf_counter()
            values[form] = form(a, b)
            times.append(time.perf_counter() - started)
    return MetricBench(name, min(seconds[gram]), min(seconds[plain]), abs(values[gram] - values[plain]) / abs(values[plain]))

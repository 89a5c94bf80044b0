"""Reward against diversity: points with error bars over prompts, the Pareto front, hypervolumes. Numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rewardiv.errors import UserError
from rewardiv.evaluate.axes import Arm
from rewardiv.gram import Gram
from rewardiv.metrics import Array, middle

NUM_RESAMPLES = 1000
RELATIVE = "trace-ratio-within"


@dataclass(frozen=True)
class Point:
    """Where an arm of a sweep lies.

    Attributes:
        arm: Method and LoRA.
        reward: Mean over prompts of the mean over seeds.
        reward_interval: Where it would lie with other prompts; None with a single prompt.
        diversity: See `prompt_diversity`.
        diversity_interval: Its interval.
        dominated: Whether another point has at least its reward and its diversity, and more of one.
    """

    arm: Arm
    reward: float
    reward_interval: tuple[float, float] | None
    diversity: float
    diversity_interval: tuple[float, float] | None
    dominated: bool


@dataclass(frozen=True)
class Volume:
    """The area that a family of methods dominates: reward above the base's times diversity above 0."""

    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Frontier:
    """All points of a sweep, in its arms' order, and what they add up to.

    Attributes:
        reward: Name of the reward.
        diversity: Name of the diversity number.
        points: One for each arm; the first one is the base.
        volumes: By the method's kind, of that family's own points; a family of more points can only have more.
        num_prompts: That the numbers are over.
    """

    reward: str
    diversity: str
    points: tuple[Point, ...]
    volumes: dict[str, Volume]
    num_prompts: int

    @property
    def front(self) -> tuple[Point, ...]:
        """The points that nothing dominates, by falling diversity."""
        kept = [point for point in self.points if not point.dominated]
        return tuple(sorted(kept, key=lambda point: (-point.diversity, point.reward)))

    def to_dict(self) -> dict[str, object]:
        """As JSON can hold it."""
        return {
            "reward": self.reward, "diversity": self.diversity, "num_prompts": self.num_prompts,
            "points": [{"method": point.arm.method, "lora": point.arm.lora, "family": point.arm.family}
                       | {name: value for name, value in asdict(point).items() if name != "arm"} for point in self.points],
            "hypervolumes": {family: asdict(volume) for family, volume in self.volumes.items()},
        }


def prompt_diversity(features: ArrayLike, name: str) -> Array:
    """The spread of each prompt's images: [P], from features [P, S, d], S at least 2.

    "trace-ratio-within" is the trace of the prompt's unbiased covariance, which `frontier` divides by the base's;
    "vendi-within" and "distance-within" are the panel's numbers of one prompt.

    Raises:
        UserError: If a prompt has fewer than 2 images, or a feature is nan or infinite.
    """
    points = np.asarray(features)
    rows = np.arange(points.shape[1])
    number = {RELATIVE: Gram.variance, "vendi-within": Gram.vendi, "distance-within": Gram.mean_distance}[name]
    return np.array([number(Gram(prompt), rows) for prompt in points])


def frontier(
    arms: Sequence[Arm], rewards: ArrayLike, diversities: ArrayLike, *, reward: str, diversity: str, seed: int = 0,
    num_resamples: int = NUM_RESAMPLES, level: float = 0.95,
) -> Frontier:
    """Points, front and hypervolumes from numbers of every prompt.

    A point's reward is the mean over prompts; so is its diversity, but for "trace-ratio-within", which is the sum of the
    prompts' variances over the base's sum (not a mean of ratios: a prompt whose base images are nearly the same would rule
    it). Intervals: percentile bootstrap over prompts as clusters, the same resampled prompts for every arm and both axes,
    widened to hold the value. With few prompts (below about ten) they are too narrow. A hypervolume's reference point is
    the base's mean reward (of the same resample) and no diversity: a family that raises no reward has none.

    Args:
        arms: K of them, the base first.
        rewards: [K, P], each prompt's mean over its seeds.
        diversities: [K, P], see `prompt_diversity`.
        reward: Name of the reward.
        diversity: Name of the diversity.
        seed: Of the resampling.
        num_resamples: Of the prompts.
        level: Of the intervals.

    Raises:
        UserError: If the base's images don't differ within any prompt, so that no share of them can be told.
    """
    gains, spreads = (np.asarray(values, dtype=np.float64) for values in (rewards, diversities))
    if gains.shape != spreads.shape or gains.shape[:1] != (len(arms),) or gains.ndim != 2 or not gains.size:
        raise ValueError(f"{len(arms)} arms need rewards and diversities [K, P], got {gains.shape} and {spreads.shape}")
    if diversity == RELATIVE and not spreads[0].any():
        raise UserError("the base model's images are all the same within every prompt, so that no diversity can be compared "
                        "with theirs; take other seeds, more steps or another --diversity")
    num_prompts = gains.shape[1]
    counts = np.random.default_rng(seed).multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), num_resamples)
    weights = np.vstack([np.ones(num_prompts, dtype=np.int64), counts])  # first as they are: [R + 1, P]
    x, y = _diversity(spreads, weights, diversity), gains @ weights.T / num_prompts
    dominated = dominated_points(y[:, 0], x[:, 0])
    points = tuple(
        Point(arm, float(y[k, 0]), _interval(y[k], num_prompts, level), float(x[k, 0]), _interval(x[k], num_prompts, level),
              bool(dominated[k]))
        for k, arm in enumerate(arms)
    )
    return Frontier(reward, diversity, points, _volumes(arms, y, x, num_prompts, level), num_prompts)


def dominated_points(rewards: ArrayLike, diversities: ArrayLike) -> NDArray[np.bool_]:
    """Which points [K] another one dominates: at least as good in both, and better in one. Equal points don't each other."""
    y, x = np.asarray(rewards), np.asarray(diversities)
    as_good = (y[None] >= y[:, None]) & (x[None] >= x[:, None])
    better = (y[None] > y[:, None]) | (x[None] > x[:, None])
    return (as_good & better).any(1)


def hypervolume(rewards: ArrayLike, diversities: ArrayLike, *, reward: float, diversity: float = 0.0) -> float:
    """The area of all that some point [K] dominates, above the reference point (reward, diversity)."""
    points = sorted(zip(np.asarray(diversities).tolist(), np.asarray(rewards).tolist(), strict=True), reverse=True)
    area, top = 0.0, reward
    for x, y in points:  # from the most diverse one: each adds the strip above those before it
        if y > top and x > diversity:
            area += (x - diversity) * (y - top)
            top = y
    return area


def _diversity(spreads: Array, weights: NDArray[np.int64], name: str) -> Array:
    """Of each arm in each resample of the prompts: [K, R]."""
    if name != RELATIVE:
        return spreads @ weights.T / weights.shape[1]
    sums = spreads @ weights.T
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample may hold only prompts without any spread
        return np.where(sums[:1] > 0, sums / sums[:1], np.nan)


def _volumes(arms: Sequence[Arm], y: Array, x: Array, num_prompts: int, level: float) -> dict[str, Volume]:
    found = {}
    for family in dict.fromkeys(arm.family for arm in arms[1:]):
        rows = [k for k, arm in enumerate(arms) if arm.family == family]
        areas = np.array([hypervolume(y[rows, r], x[rows, r], reward=y[0, r]) if np.isfinite(x[0, r]) else np.nan
                          for r in range(y.shape[1])])
        found[family] = Volume(float(areas[0]), _interval(areas, num_prompts, level))
    return found


def _interval(values: Array, num_prompts: int, level: float) -> tuple[float, float] | None:
    """Of resampled values whose first one is that of the prompts themselves; a single prompt tells nothing about others."""
    if num_prompts == 1:
        return None
    value, resampled = float(values[0]), values[1:][np.isfinite(values[1:])]
    low, high = middle(resampled, level)
    return min(low, value), max(high, value)

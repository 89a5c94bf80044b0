"""Diversity numbers from image features: spectra, their distance with a null band, and intervals.

Everything takes numpy arrays or torch tensors and computes in float64. A spectrum is the eigenvalues of the unbiased
covariance of the features, sorted descending. With n images it has at most n - 1 nonzero values and its distance
depends strongly on n: sets are compared at equal n only, and a distance means something only beside its null band.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rewardiv.errors import UserError, nearest

Array = NDArray[np.float64]
Compat = Literal["authors", "authors-log"]
BLOCK_FLOATS = 2**22  # resampled matrices held at once: 32 MiB
MEAN_RESAMPLES = 1000
SMALLEST_SHARE = 1e-6  # of the variance, counted for a side that has none


@dataclass(frozen=True)
class SpectralReport:
    """How the spread of a set of images compares with a reference set of the same size.

    Attributes:
        scd: Spectral distance to the reference, 0 or more; it cannot tell collapse from expansion.
        null: The band in which `scd` falls, at the level asked for, where both sets have the same distribution.
        interval: Bootstrap interval of `scd`; always holds `scd`.
        trace_ratio: Total variance relative to the reference's; below 1 is less spread.
        effective_rank: Number of directions that the set spreads in, 0 (all the same) to n - 1.
        effective_rank_ratio: The same relative to the reference's; nan where that is 0.
        pairwise_distance: Mean Euclidean distance between two images' features.
        num_images: Images on each side.
    """

    scd: float
    null: tuple[float, float]
    interval: tuple[float, float]
    trace_ratio: float
    effective_rank: float
    effective_rank_ratio: float
    pairwise_distance: float
    num_images: int


@dataclass(frozen=True)
class WithinReport:
    """How the spread of a model's images within their prompts compares with a reference's.

    Attributes:
        scd: Spectral distance of the two within-prompt spectra, 0 or more; it cannot tell collapse from expansion.
        null: The band in which `scd` falls, at the level asked for, where both sets have the same spread.
        trace_ratio: Variance within prompts relative to the reference's; nan where that has none.
        trace_null: The same band of `trace_ratio`; it needs fewer images than that of `scd` to tell a loss from chance.
        effective_rank: Number of directions that images of one prompt spread in, 0 to P (S - 1).
        effective_rank_reference: The reference's.
        pairwise_distance: Mean Euclidean distance between the features of two images of one prompt.
        num_images: P * S, images on each side.
    """

    scd: float
    null: tuple[float, float]
    trace_ratio: float
    trace_null: tuple[float, float]
    effective_rank: float
    effective_rank_reference: float
    pairwise_distance: float
    num_images: int


def eigenvalues(features: ArrayLike) -> Array:
    """The spectrum of a feature set: eigenvalues of its unbiased covariance, descending, float64 [min(n - 1, d)].

    The n x n Gram matrix, which has the same nonzero spectrum, stands in for the covariance where n < d. Unchanged by
    rotating, shifting or reordering the features; exactly 0 where all rows are the same.

    Args:
        features: [n, d], n at least 2.

    Raises:
        UserError: If there are fewer than 2 images, or a feature is nan or infinite.
    """
    points = as_points(features)
    return spectra(_centred(points), np.arange(len(points))[None])[0]


def scd(a: ArrayLike, b: ArrayLike, compat: Compat | None = None) -> float:
    """Spectral distance of two feature sets of equal size: the sum of squared differences of their spectra.

    Symmetric, 0 on itself, unchanged by rotating, shifting or reordering either set.

    Args:
        a: [n, d], n at least 2.
        b: [n, d].
        compat: "authors" is the number that the authors' code prints, the L2 distance of the eigenvalues in the order
            in which `numpy.linalg.eigvals` returns them; "authors-log" the same for log10(eigenvalue + 1e-10). Neither
            is invariant to rotation. Costs a d x d eigenproblem.

    Raises:
        UserError: If the sets differ in size, are smaller than 2, or hold a nan or infinity, or `compat` is unknown.

    Source: Jena et al., arXiv:2409.06493, section 4.1.
    Differs: with `compat`, complex eigenvalues (rounding, where n < d) count with their real part, and in the logarithm
        negative ones as 0.
    """
    points_a, points_b = _as_pair(a, b)
    if compat is not None:
        if compat not in get_args(Compat):
            raise UserError(f"unknown spectral distance '{compat}'{nearest(compat, get_args(Compat))}")
        return _authors_distance(points_a, points_b, log=compat == "authors-log")
    return float(((eigenvalues(points_a) - eigenvalues(points_b)) ** 2).sum())


def trace_ratio(a: ArrayLike, b: ArrayLike) -> float:
    """Total variance of `a` [n, d] relative to that of `b` [m, d]; below 1 is less spread, nan where b has none."""
    return ratio(eigenvalues(a).sum(), eigenvalues(b).sum())


def effective_rank(eigenvalues: ArrayLike) -> float:
    """The exponential of the Shannon entropy of the normalised spectrum: how many directions carry the variance.

    d for d equal eigenvalues, 1 where all variance lies on one axis, 0 where there is none; unchanged by scaling. With
    n images at most n - 1: compare at equal n only.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    spectrum = np.asarray(eigenvalues, dtype=np.float64).clip(min=0)
    positive = spectrum[spectrum > 0]
    if not len(positive):
        return 0.0
    share = positive / positive.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def mean_pairwise_distance(a: ArrayLike) -> float:
    """Mean Euclidean distance between two different rows of `a` [n, d], n at least 2."""
    points = as_points(a)
    total = sum(np.linalg.norm(points[i + 1 :] - points[i], axis=1).sum() for i in range(len(points) - 1))
    return float(total / (len(points) * (len(points) - 1) / 2))


def spectral_report(
    features: ArrayLike, reference: ArrayLike, *, seed: int, num_resamples: int = 200, level: float = 0.95
) -> SpectralReport:
    """Compares the spread of `features` with that of `reference`, both [n, d], row i of both from the same seed.

    Null band: both sets are centred, pooled and dealt again at random into two sets of n, without replacement; the
    band holds the middle `level` of their distances. It answers "would other seeds alone explain this distance?", so
    that sets sharing their seeds may well fall below it. On synthetic sets of one distribution (n = 8, 16, 32; d = 64;
    flat, decaying, low-rank, clustered and heavy-tailed spectra) the distance lies in the 95 % band 88 to 97 % of the
    time. Bands from the reference alone (bootstrap, or a Gaussian with its covariance, plain or shrunk) miss far more
    often on some of these, down to 21 %: a sample's spectrum is steeper than its population's, and drawing with
    replacement lowers the rank. The band of the reference with itself is rougher for that reason (83 to 99 %).

    Interval: percentile bootstrap over images, the same resampled rows on both sides, widened to hold the value.

    Args:
        features: [n, d], n at least 2.
        reference: [n, d], the base model's.
        seed: Of the resampling; the same seed gives the same report.
        num_resamples: Of the null band and of the interval each.
        level: Share of the resamples inside the band and the interval.

    Raises:
        UserError: If the sets differ in size, are smaller than 2, or hold a nan or infinity.
    """
    points, base = _as_pair(features, reference)
    n, rng = len(points), np.random.default_rng(seed)
    spectrum, base_spectrum = eigenvalues(points), eigenvalues(base)
    distance = float(((spectrum - base_spectrum) ** 2).sum())

    pooled = np.concatenate([_centred(points), _centred(base)])
    dealt = rng.permuted(np.tile(np.arange(2 * n), (num_resamples, 1)), axis=1)
    redrawn = rng.integers(0, n, (num_resamples, n))
    first = spectra(pooled, np.concatenate([dealt[:, :n], redrawn]))
    second = spectra(pooled, np.concatenate([dealt[:, n:], redrawn + n]))
    distances = ((first - second) ** 2).sum(1)
    null = middle(distances[:num_resamples], level)
    low, high = middle(distances[num_resamples:], level)

    rank, base_rank = effective_rank(spectrum), effective_rank(base_spectrum)
    return SpectralReport(
        scd=distance,
        null=null,
        interval=(min(low, distance), max(high, distance)),
        trace_ratio=ratio(spectrum.sum(), base_spectrum.sum()),
        effective_rank=rank,
        effective_rank_ratio=ratio(rank, base_rank),
        pairwise_distance=mean_pairwise_distance(points),
        num_images=n,
    )


def within_report(
    features: ArrayLike, reference: ArrayLike, *, seed: int, num_resamples: int = 200, level: float = 0.95
) -> WithinReport:
    """Compares spreads within prompts: P prompts of S images on both sides, features [P, S, d].

    Every prompt's images are centred by their own mean, and the residuals of all prompts make one covariance with
    P (S - 1) degrees of freedom. So nothing that differs between prompts counts as diversity, and a shift of any prompt's
    images on either side, such as a reward's taste, changes nothing here.

    Null bands: in each prompt the centred images of both sides are dealt again at random into two sets of S, scaled by
    (2 S - 1) / (2 S - 2) in variance (what centring each side took more than centring both together takes), and centred
    anew; the bands hold the middle `level` of the distances and of the variances' ratios. They answer "would other seeds
    alone explain this?". Dealing the images as they are would be exact where nothing at all changed, and useless where the
    mean did: the shift would count as spread in every deal and hide a collapse. The price is small: on synthetic sets of
    one distribution (4 prompts of 4, d = 64; flat, decaying, low-rank, heavy-tailed, clustered, unequal prompts; 150 trials
    each) the distance lies in the 95 % band 90 to 97 % of the time and above it in 0 to 3 %. Without the scaling, or
    dealing orthonormal contrasts instead, it falls to 76 % (heavy tails) and 83 % (clusters). The band of the ratio is a
    little narrow: 94 to 96 % (200 trials each), but 78 % on heavy tails, and 84 to 92 % with 2 images a prompt.

    Args:
        features: [P, S, d], S at least 2.
        reference: [P, S, d], the base model's images of the same prompts.
        seed: Of the dealing; the same seed gives the same report.
        num_resamples: Deals.
        level: Share of the deals inside the band.

    Raises:
        UserError: If the shapes differ, a prompt has fewer than 2 images, or a feature is nan or infinite.
    """
    points, base = _as_prompts(features), _as_prompts(reference)
    if points.shape != base.shape:
        raise UserError(f"both sides need the same prompts and images, got shapes {points.shape} and {base.shape}")
    (prompts, size, d), rng = points.shape, np.random.default_rng(seed)
    both = np.concatenate([one - one.mean(1, keepdims=True) for one in (points, base)], axis=1)
    order = rng.permuted(np.tile(np.arange(2 * size), (num_resamples, prompts, 1)), axis=2)
    order = np.concatenate([np.broadcast_to(np.arange(2 * size), (1, prompts, 2 * size)), order])  # first as they are
    rows = order + 2 * size * np.arange(prompts)[:, None]
    first, second = (
        spectra(both.reshape(-1, d), side.reshape(num_resamples + 1, -1), prompts)
        for side in (rows[:, :, :size], rows[:, :, size:])
    )
    distances = ((first - second) ** 2).sum(1)
    scale = (2 * size - 1) / (2 * size - 2)
    traces, other_traces = first[1:].sum(1), second[1:].sum(1)
    shares = np.divide(traces, traces + other_traces, out=np.full(num_resamples, 0.5), where=traces + other_traces > 0)
    share_low, share_high = middle(shares, level)
    return WithinReport(
        scd=float(distances[0]),
        null=middle(distances[1:] * scale**2, level),
        trace_ratio=ratio(first[0].sum(), second[0].sum()),
        trace_null=(share_low / (1 - share_low), share_high / max(1 - share_high, SMALLEST_SHARE)),
        effective_rank=effective_rank(first[0]),
        effective_rank_reference=effective_rank(second[0]),
        pairwise_distance=float(np.mean([mean_pairwise_distance(prompt) for prompt in points])),
        num_images=prompts * size,
    )


def mean_interval(values: ArrayLike, *, seed: int, level: float = 0.95) -> tuple[float, float, float]:
    """The mean of `values` [n] with its percentile bootstrap interval: (mean, low, high).

    One value is its own interval. Below about ten values the interval is too narrow (it leaves out the Student-t
    factor).

    Raises:
        UserError: If there is no value, or one is nan or infinite.
    """
    numbers = as_float64(values).ravel()
    if not len(numbers) or not np.isfinite(numbers).all():
        raise UserError(f"a mean needs finite numbers, got {numbers.tolist()}")
    mean = float(numbers.mean())
    if len(numbers) == 1:
        return mean, mean, mean
    rows = np.random.default_rng(seed).integers(0, len(numbers), (MEAN_RESAMPLES, len(numbers)))
    return mean, *middle(numbers[rows].mean(1), level)


def as_float64(values: ArrayLike) -> Array:
    """A float64 array of anything array-like; a torch tensor may need gradients, sit on a device or be bfloat16."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def as_points(features: ArrayLike) -> Array:
    points = as_float64(features)
    if points.ndim != 2 or len(points) < 2:
        raise UserError(f"diversity needs features [n, d] of at least 2 images, got shape {list(points.shape)}")
    if not np.isfinite(points).all():
        raise UserError("the features hold nan or infinite numbers; the images they come from may be damaged")
    return points


def _as_prompts(features: ArrayLike) -> Array:
    points = as_float64(features)
    if points.ndim != 3 or points.shape[0] < 1 or points.shape[1] < 2:
        raise UserError(f"diversity within prompts needs features [P, S, d] with S at least 2, got {list(points.shape)}")
    if not np.isfinite(points).all():
        raise UserError("the features hold nan or infinite numbers; the images they come from may be damaged")
    return points


def _as_pair(a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    points_a, points_b = as_points(a), as_points(b)
    if len(points_a) != len(points_b):
        raise UserError(
            f"the spectral distance needs equally many images on both sides, got {len(points_a)} and {len(points_b)}"
        )
    if points_a.shape[1] != points_b.shape[1]:
        raise UserError(f"the features differ in length: {points_a.shape[1]} and {points_b.shape[1]}")
    return points_a, points_b


def _centred(points: Array) -> Array:
    return points - points.mean(0)


def spectra(points: Array, rows: NDArray[np.integer], num_groups: int = 1, gram: Array | None = None) -> Array:
    """The spectrum of each set of rows `points[rows[r]]`: [r, min(n - num_groups, d)], descending, never negative.

    `rows` is [r, n]: num_groups groups of equal size after one another, each centred by its own mean. Where n <= d one
    Gram matrix of all points is indexed, so that a set costs one n x n problem; `gram` is that matrix if it is known.
    """
    n, d = rows.shape[1], points.shape[1]
    size, small = n // num_groups, n <= d
    if small and gram is None:
        gram = points @ points.T
    block = max(1, BLOCK_FLOATS // (n * max(n, d)))
    out = np.empty((len(rows), min(n - num_groups, d)))
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        if small:
            matrix = gram[part[:, :, None], part[:, None, :]].reshape(-1, num_groups, size, num_groups, size)
            matrix -= matrix.mean(2, keepdims=True)
            matrix -= matrix.mean(4, keepdims=True)
            matrix = matrix.reshape(-1, n, n)
        else:
            sets = points[part].reshape(-1, num_groups, size, d)
            sets -= sets.mean(2, keepdims=True)
            sets = sets.reshape(-1, n, d)
            matrix = sets.swapaxes(1, 2) @ sets
        out[start : start + block] = np.linalg.eigvalsh(matrix)[:, ::-1][:, : out.shape[1]]
    return out.clip(min=0) / (n - num_groups)


def _authors_distance(a: Array, b: Array, log: bool) -> float:
    first, second = (np.linalg.eigvals(np.atleast_2d(np.cov(points.T))).real for points in (a, b))
    if log:
        first, second = (np.log10(values.clip(min=0) + 1e-10) for values in (first, second))
    return float(np.linalg.norm(first - second))


def ratio(value: float, reference: float) -> float:
    return float(value / reference) if reference > 0 else float("nan")


def middle(values: Array, level: float) -> tuple[float, float]:
    """The quantiles that leave equal shares outside the middle `level` of the values."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

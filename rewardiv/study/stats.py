"""Statistics of paired choices: win rates, Davidson's ranking, agreement, power, rank correlation, and their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
PRIOR_SD = 5.0  # of strengths and of the tie parameter, in log odds: wide, so that it matters only where one side won all
MAX_STEPS = 100
MIN_CLUSTERS = 5
TOLERANCE = 1e-10
NOT_FINITE = "the strengths have no finite estimate: a group won everything or met nobody; give a prior"


class Estimate(NamedTuple):
    """A number with its interval."""

    value: float
    low: float
    high: float


def wilson(successes: float, total: int, level: float = 0.95) -> Estimate:
    """A share with Wilson's score interval. A tie may count as half a success, which makes the interval slightly too wide.

    Raises:
        ValueError: If successes aren't in [0, total] or total isn't positive.

    Source: Wilson, 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if total <= 0 or not 0 <= successes <= total:
        raise ValueError(f"{successes} of {total} is no share")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share, shrink = successes / total, 1 + z * z / total
    middle = (share + z * z / (2 * total)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half))


def davidson(
    counts: ArrayLike, pairs: Sequence[tuple[int, int]], num_items: int, prior_sd: float = PRIOR_SD
) -> tuple[Array, Array]:
    """Strengths of items from paired choices with ties, by Davidson's extension of Bradley and Terry's model.

        P(i over j) = p_i / (p_i + p_j + nu sqrt(p_i p_j)),  P(tie) = nu sqrt(p_i p_j) / (the same)

    The model is a softmax of theta_i, theta_j and log nu + (theta_i + theta_j) / 2, with p = exp(theta), so its likelihood is
    concave and Newton's method finds its only top. A normal prior on thetas and log nu keeps them finite where one item won
    everything; with prior_sd = inf it is the maximum likelihood estimate, which exists only where no group of items won
    all of its comparisons with the others. Where nobody tied, nu is 0 (log nu = -inf), and it is Bradley and Terry's model.

    Args:
        counts: [P, 3] or [R, P, 3]: times that i won, j won, and ties, for each pair; R data sets are fitted at once.
        pairs: P pairs (i, j) of items.
        num_items: K, of which some may be in no pair.
        prior_sd: Of thetas and log nu, in log odds.

    Returns:
        thetas [K] or [R, K], mean 0, and log nu, a scalar or [R].

    Raises:
        ValueError: If shapes or numbers are wrong, or the estimate isn't finite.

    Source: Davidson, 1970, "On extending the Bradley-Terry model to accommodate ties in paired comparison experiments".
    """
    data = np.asarray(counts, dtype=np.float64)
    if data.shape[-2:] != (len(pairs), 3) or data.ndim > 3 or (data < 0).any() or not pairs:
        raise ValueError(f"counts must be [{len(pairs)}, 3] or [R, {len(pairs)}, 3] and not negative, got {data.shape}")
    stacked = data.reshape(-1, len(pairs), 3)
    design = np.zeros((len(pairs), 3, num_items + 1))
    for row, (i, j) in enumerate(pairs):
        design[row, 0, i] = design[row, 1, j] = design[row, 2, -1] = 1.0
        design[row, 2, i] = design[row, 2, j] = 0.5
    beta = np.zeros((len(stacked), num_items + 1))
    tied = stacked[..., 2].sum(1) > 0
    beta[~tied, -1] = -np.inf
    for group in (tied, ~tied):
        if group.any():
            width = num_items + int(tied[group.argmax()])
            own = design[..., :width] if width > num_items else design[:, :2, :width]
            beta[group, :width] = _newton(stacked[group][..., : own.shape[1]], own, num_items, prior_sd)
    shape = data.shape[:-2]
    return beta[:, :num_items].reshape(*shape, num_items), beta[:, -1].reshape(shape)


def _newton(counts: Array, design: Array, num_items: int, prior_sd: float) -> Array:
    """The top of the penalised likelihood: counts [R, P, O] and design [P, O, D] to [R, D]."""
    totals = counts.sum(2)  # [R, P]
    penalty = 0.0 if math.isinf(prior_sd) else prior_sd**-2
    centre = np.zeros((design.shape[2],) * 2)
    centre[:num_items, :num_items] = 1.0  # a ridge along the direction that nothing decides: the mean of the thetas
    beta = np.zeros((len(counts), design.shape[2]))
    value = _objective(counts, design, beta, penalty)
    for _ in range(MAX_STEPS):
        chance = _softmax(np.einsum("pod,rd->rpo", design, beta))
        mean = np.einsum("rpo,pod->rpd", chance, design)
        slope = np.einsum("rpo,pod->rd", counts - totals[..., None] * chance, design) - penalty * beta
        bend = np.einsum("rp,rpo,pod,poe->rde", totals, chance, design, design, optimize=True)
        bend = bend - np.einsum("rp,rpd,rpe->rde", totals, mean, mean, optimize=True)
        try:
            step = np.linalg.solve(bend + centre + penalty * np.eye(len(centre)), slope[..., None])[..., 0]
        except np.linalg.LinAlgError as error:
            raise ValueError(NOT_FINITE) from error
        length = np.ones(len(beta))
        while True:  # halve the steps of those that would go down
            tried = beta + length[:, None] * step
            reached = _objective(counts, design, tried, penalty)
            worse = reached < value - 1e-12 * np.abs(value)
            if not worse.any() or length.min() < 1e-6:
                break
            length[worse] /= 2
        beta, value = tried, reached
        if np.abs(step).max() < TOLERANCE:
            break
    if np.abs(beta).max() > 30 or np.abs(step).max() > 1e-6:
        raise ValueError(NOT_FINITE)
    beta[:, :num_items] -= beta[:, :num_items].mean(1, keepdims=True)
    return beta


def _objective(counts: Array, design: Array, beta: Array, penalty: float) -> Array:
    logits = np.einsum("pod,rd->rpo", design, beta)
    top = logits.max(2, keepdims=True)
    log_chance = logits - top - np.log(np.exp(logits - top).sum(2, keepdims=True))
    return (counts * log_chance).sum((1, 2)) - penalty / 2 * (beta**2).sum(1)


def _softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def resample_clusters(tallies: ArrayLike, *, seed: int, num_resamples: int) -> Array:
    """Sums over clusters drawn with replacement: tallies [C, ...] of C clusters (raters) to [num_resamples, ...]."""
    values = np.asarray(tallies, dtype=np.float64)
    num = len(values)
    weights = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), num_resamples)
    return np.tensordot(weights, values, 1)


def percentiles(value: float, resampled: ArrayLike, level: float = 0.95) -> Estimate:
    """A value with the percentile interval of its resamples, those that aren't numbers left out; it holds the value."""
    known = np.asarray(resampled, dtype=np.float64)
    known = known[np.isfinite(known)]
    if not known.size:
        return Estimate(value, -math.inf, math.inf)
    low, high = np.quantile(known, [0.5 - level / 2, 0.5 + level / 2])
    return Estimate(value, min(float(low), value), max(float(high), value))


def krippendorff(ratings: Sequence[tuple[str, str, str]]) -> float | None:
    """Krippendorff's alpha of nominal answers by evalica: 1 is agreement, 0 what chance would give, below it disagreement.

    Args:
        ratings: (rater, unit, answer); a rater rates a unit once at most.

    Returns:
        Alpha, or None where no unit has two raters or all answers are one.
    """
    import pandas
    from evalica import InsufficientRatingsError, alpha

    frame = pandas.DataFrame(ratings, columns=["rater", "unit", "answer"])
    table = frame.pivot(index="rater", columns="unit", values="answer")
    try:
        value = alpha(table, distance="nominal").alpha
    except InsufficientRatingsError:
        return None
    shared = table.loc[:, table.notna().sum() > 1]
    return float(value) if math.isfinite(value) and shared.stack().nunique() > 1 else None


def votes_needed(
    share: float, tie_rate: float = 0.0, *, level: float = 0.95, power: float = 0.8, design_effect: float = 1.0
) -> int | None:
    """How many votes separate two methods whose true mean score is `share`, with this chance (power), in a two-sided test.

    A vote scores 1, 0, or 1/2 for a tie; the score's variance is (1 - ties) / 4 where neither is better. Without ties this is
    the textbook sample size of one proportion against 1/2. Votes of one rater are alike, so that more are needed than of
    independent votes, by the design effect.

    Returns:
        The number, or None where the share is exactly 1/2, which no number separates.

    Source: Fleiss, Levin and Paik, "Statistical Methods for Rates and Proportions", chapter 2 (without continuity
    correction), with the variance of a score with ties.
    """
    if share == 0.5:
        return None
    normal = NormalDist()
    without = (1 - tie_rate) / 4
    wins = share - tie_rate / 2
    variance = max(0.0, wins + tie_rate / 4 - share**2)
    spread = normal.inv_cdf(0.5 + level / 2) * math.sqrt(without) + normal.inv_cdf(power) * math.sqrt(variance)
    return max(1, math.ceil(design_effect * (spread / (share - 0.5)) ** 2 - 1e-9))


def rank_correlation(
    x: ArrayLike, y: ArrayLike, clusters: Sequence[str], *, seed: int = 0, num_resamples: int = 400, level: float = 0.95
) -> Estimate | None:
    """Spearman's correlation of two differences between the sides of pairs, with a bootstrap over clusters (prompts).

    Which side is called the first one is arbitrary, so each pair enters both ways round, as (x, y) and (-x, -y): the result
    doesn't depend on it, and is above 0 where the same side tends to have more of both.

    Args:
        x: [n], of a metric, first side less second.
        y: [n], of people's scores, first side's share less 1/2.
        clusters: [n], what may not be taken apart.
        seed: Of the resampling.

    Returns:
        None below 3 pairs, or where x or y is 0 throughout. Below 5 clusters the interval is infinite: too few to resample.
    """
    first, second = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(first) < 3 or not first.any() or not second.any():
        return None
    names, own = np.unique(np.asarray(clusters), return_inverse=True)
    members = [np.flatnonzero(own == k) for k in range(len(names))]
    rng = np.random.default_rng(seed)
    drawn = (np.concatenate([members[k] for k in rng.integers(0, len(names), len(names))]) for _ in range(num_resamples))
    resampled = [_odd_spearman(first[rows], second[rows]) for rows in drawn] if len(names) >= MIN_CLUSTERS else []
    return percentiles(_odd_spearman(first, second), resampled, level)


def _odd_spearman(x: Array, y: Array) -> float:
    """Of the points and their mirror images; the ranks' mean is the mirror's centre, so it is a cosine of ranks."""
    ranks = [average_ranks(np.concatenate([values, -values])) - (2 * len(values) + 1) / 2 for values in (x, y)]
    norm = math.sqrt(float((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float(ranks[0] @ ranks[1]) / norm if norm else math.nan


def average_ranks(values: ArrayLike) -> Array:
    """Ranks from 1; equal values share the mean of theirs."""
    _, own, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[own]

"""Laws of the spectral numbers: closed forms, invariances, signs, calibration of the bands, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from rewardiv.errors import UserError
from rewardiv.metrics import (
    Array,
    effective_rank,
    eigenvalues,
    mean_interval,
    mean_pairwise_distance,
    scd,
    spectra,
    spectral_report,
    trace_ratio,
    within_report,
)


def gaussian(seed: int, n: int = 8, d: int = 64, decay: float = 0.0) -> Array:
    """n draws from a Gaussian whose variances fall as exp(-decay * i), moved off the origin."""
    noise = np.random.default_rng(seed).standard_normal((n, d))
    return 3 + noise * np.exp(-decay * np.arange(d) / 2)


def with_spectrum(spectrum: list[float], n: int, d: int, seed: int = 0) -> Array:
    """n points in d dimensions whose covariance has exactly these eigenvalues, at most min(n - 1, d)."""
    rng = np.random.default_rng(seed)
    centred = rng.standard_normal((n, n))
    centred[:, 0] = 1
    scores = np.linalg.qr(centred)[0][:, 1 : len(spectrum) + 1]
    axes = np.linalg.qr(rng.standard_normal((d, d)))[0][:, : len(spectrum)]
    return (scores * np.sqrt(np.array(spectrum) * (n - 1))) @ axes.T + rng.standard_normal(d)


def rotation(d: int) -> Array:
    return np.linalg.qr(np.random.default_rng(5).standard_normal((d, d)))[0]


@pytest.mark.parametrize(("n", "d"), [(2, 3), (5, 12), (8, 64), (12, 12), (13, 12), (40, 7)])
def test_spectrum_is_the_covariances_on_both_sides_of_n_equals_d(n: int, d: int) -> None:
    points = gaussian(n, n, d)
    plain = np.linalg.eigvalsh(np.cov(points.T))[::-1][: min(n - 1, d)]
    spectrum = eigenvalues(points)
    assert spectrum.dtype == np.float64 and spectrum.shape == (min(n - 1, d),)
    assert np.all(np.diff(spectrum) <= 0)
    np.testing.assert_allclose(spectrum, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("n", "d"), [(6, 20), (20, 6)])
def test_known_spectra(n: int, d: int) -> None:
    a, b = with_spectrum([5, 3, 1], n, d), with_spectrum([4, 3, 2, 0.5], n, d, seed=1)
    np.testing.assert_allclose(eigenvalues(a)[:3], [5, 3, 1])
    np.testing.assert_allclose(eigenvalues(a)[3:], 0, atol=1e-12)
    assert scd(a, b) == pytest.approx(1 + 0 + 1 + 0.25)
    assert trace_ratio(a, b) == pytest.approx(9 / 9.5)


def test_two_points_have_one_eigenvalue_half_their_squared_distance() -> None:
    points = np.array([[1.0, 2, 2], [3.0, 0, 1]])
    np.testing.assert_allclose(eigenvalues(points), [9 / 2])
    assert mean_pairwise_distance(points) == pytest.approx(3)


def test_distance_is_zero_on_itself_and_symmetric() -> None:
    a, b = gaussian(1), gaussian(2, decay=0.1)
    assert scd(a, a) == 0
    assert scd(a, b) == scd(b, a) > 0


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda a: a @ rotation(a.shape[1]), id="rotation"),
        pytest.param(lambda a: a + 17.0, id="shift"),
        pytest.param(lambda a: a[::-1], id="order"),
    ],
)
@pytest.mark.parametrize("n", [8, 40])
def test_spectral_numbers_see_only_the_spread(change: Callable[[Array], Array], n: int) -> None:
    a, b = gaussian(1, n, 24), gaussian(2, n, 24, decay=0.1)
    assert scd(change(a), a) < 1e-18
    assert scd(change(a), b) == pytest.approx(scd(a, b))
    assert trace_ratio(change(a), b) == pytest.approx(trace_ratio(a, b))
    assert effective_rank(eigenvalues(change(a))) == pytest.approx(effective_rank(eigenvalues(a)))
    assert mean_pairwise_distance(change(a)) == pytest.approx(mean_pairwise_distance(a))


def test_features_that_are_always_the_same_change_nothing() -> None:
    a, b = gaussian(1), gaussian(2, decay=0.1)
    wide_a, wide_b = (np.hstack([points, np.ones((8, 5))]) for points in (a, b))
    assert scd(wide_a, wide_b) == pytest.approx(scd(a, b))
    assert effective_rank(eigenvalues(wide_a)) == pytest.approx(effective_rank(eigenvalues(a)))


def test_scaling_by_c_scales_the_trace_by_c_squared_and_the_distance_by_its_square() -> None:
    a, b = gaussian(1), gaussian(2)
    assert trace_ratio(0.3 * a, b) == pytest.approx(0.09 * trace_ratio(a, b))
    assert scd(0.3 * a, 0.3 * b) == pytest.approx(0.3**4 * scd(a, b))
    assert effective_rank(eigenvalues(0.3 * a)) == pytest.approx(effective_rank(eigenvalues(a)))


def test_effective_rank_closed_forms() -> None:
    assert effective_rank(np.full(7, 0.3)) == pytest.approx(7)
    assert effective_rank([4.0, 0, 0]) == 1
    assert effective_rank([0.0, 0, 0]) == 0
    assert effective_rank([0.75, 0.25]) == pytest.approx(4 / 3**0.75)
    assert effective_rank(eigenvalues(with_spectrum([2.0] * 5, 9, 30))) == pytest.approx(5)


def test_duplicates_lower_every_number_of_spread() -> None:
    distinct = gaussian(3)
    ranks, traces, distances = [], [], []
    for kept in (8, 6, 4, 2, 1):
        points = distinct[np.arange(8) % kept]
        ranks.append(effective_rank(eigenvalues(points)))
        traces.append(trace_ratio(points, distinct))
        distances.append(mean_pairwise_distance(points))
    assert ranks == sorted(ranks, reverse=True) and ranks[-2] == pytest.approx(1) and ranks[-1] == 0
    assert ranks[0] > 6 and traces[-1] == 0 and distances == sorted(distances, reverse=True) and distances[-1] == 0


def test_identical_images_have_no_spread_in_spite_of_rounding() -> None:
    for n, d in ((3, 50), (7, 50), (29, 50), (60, 5), (99, 5)):
        assert np.all(eigenvalues(np.tile(gaussian(n, 1, d), (n, 1)) * 1e3) == 0)
    points = np.tile(gaussian(4, 1, 50), (7, 1)) * 1e3
    report = spectral_report(points, gaussian(5, 7, 50), seed=0)
    assert report.trace_ratio == report.effective_rank == report.effective_rank_ratio == report.pairwise_distance == 0
    assert math.isnan(spectral_report(points, points, seed=0).trace_ratio)


@pytest.mark.parametrize("n", [8, 80])
def test_the_authors_numbers(n: int) -> None:
    a, b = gaussian(1, n, 12), gaussian(2, n, 12, decay=0.2)
    first, second = np.linalg.eigvals(np.cov(a.T)).real, np.linalg.eigvals(np.cov(b.T)).real
    assert scd(a, b, compat="authors") == pytest.approx(np.linalg.norm(first - second))
    logs = [np.log10(values.clip(0) + 1e-10) for values in (first, second)]
    assert scd(a, b, compat="authors-log") == pytest.approx(np.linalg.norm(logs[0] - logs[1]))
    assert scd(a, b) ** 0.5 <= scd(a, b, compat="authors") + 1e-9, "sorting gives the least distance"


def test_float32_tensors_give_the_float64_numbers() -> None:
    a, b = gaussian(1, 16, 32).astype(np.float32) + 1000, gaussian(2, 16, 32).astype(np.float32) + 1000
    exact = scd(a.astype(np.float64), b.astype(np.float64))
    assert scd(a, b) == exact
    assert scd(torch.tensor(a, requires_grad=True), torch.tensor(b)) == exact
    assert scd(torch.tensor(a).bfloat16(), torch.tensor(b).bfloat16()) >= 0
    assert type(scd(a, b)) is float


def test_pairwise_distance_is_the_mean_over_pairs() -> None:
    a = gaussian(6, 5, 9)
    pairs = [np.linalg.norm(a[i] - a[j]) for i in range(5) for j in range(i)]
    assert mean_pairwise_distance(a) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("n", [8, 16, 32])
@pytest.mark.parametrize("decay", [0.0, 0.15])
def test_null_band_holds_the_distance_of_two_fresh_sets(n: int, decay: float) -> None:
    """95 % are wanted; 60 trials of a band that covers 80 % would pass here with a chance of 3 %."""
    inside = 0
    for trial in range(60):
        a, b = gaussian(2 * trial, n, decay=decay), gaussian(2 * trial + 1, n, decay=decay)
        report = spectral_report(a, b, seed=trial, num_resamples=100)
        inside += report.null[0] <= report.scd <= report.null[1]
    assert inside >= 54


@pytest.mark.parametrize(("scale", "ratio"), [(0.5, 0.25), (2.0, 4.0)])
def test_collapse_and_expansion_leave_the_band_and_the_trace_tells_them_apart(scale: float, ratio: float) -> None:
    for trial in range(10):
        a, b = scale * gaussian(100 + trial, decay=0.15), gaussian(trial, decay=0.15)
        report = spectral_report(a, b, seed=trial)
        assert report.scd > report.null[1]
        assert report.trace_ratio == pytest.approx(ratio, rel=0.7) and (report.trace_ratio < 1) == (scale < 1)


@pytest.mark.parametrize("n", [8, 32])
def test_bootstrap_interval_covers_the_expected_distance(n: int) -> None:
    def sets(trial: int) -> tuple[Array, Array]:
        base, other = gaussian(2 * trial, n, decay=0.15), gaussian(2 * trial + 1, n, decay=0.15)
        return 0.6 * (0.7 * base + 0.7 * other), base

    expected = np.mean([scd(*sets(trial)) for trial in range(1000, 1500)])
    covered = 0
    for trial in range(60):
        report = spectral_report(*sets(trial), seed=trial, num_resamples=100)
        assert report.interval[0] <= report.scd <= report.interval[1]
        covered += report.interval[0] <= expected <= report.interval[1]
    assert covered >= 48


@pytest.mark.parametrize(("n", "d"), [(8, 64), (20, 6)])
def test_report_holds_the_plain_numbers_and_is_repeatable(n: int, d: int) -> None:
    a, b = gaussian(1, n, d, decay=0.1), gaussian(2, n, d)
    report = spectral_report(a, b, seed=3)
    assert report == spectral_report(torch.tensor(a), b, seed=3)
    assert report.scd == scd(a, b) and report.trace_ratio == trace_ratio(a, b) and report.num_images == n
    assert report.effective_rank == effective_rank(eigenvalues(a))
    assert report.effective_rank_ratio == report.effective_rank / effective_rank(eigenvalues(b))
    assert report.pairwise_distance == mean_pairwise_distance(a)
    assert 0 <= report.null[0] < report.null[1]
    wider = spectral_report(a, b, seed=3, level=0.99)
    assert wider.null[0] <= report.null[0] < report.null[1] <= wider.null[1]


def test_report_of_a_set_with_itself() -> None:
    a = gaussian(1)
    report = spectral_report(a, a, seed=0)
    assert report.scd == 0 and report.interval == (0, 0)
    assert report.trace_ratio == report.effective_rank_ratio == 1
    assert 0 < report.null[0] < report.null[1]


def test_spectra_are_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = gaussian(1), gaussian(2)
    whole = spectral_report(a, b, seed=0)
    monkeypatch.setattr("rewardiv.metrics.BLOCK_FLOATS", 3000)
    assert spectral_report(a, b, seed=0) == whole


@pytest.mark.parametrize("d", [5, 64])
def test_resampled_spectra_are_those_of_the_resampled_images(d: int) -> None:
    points = gaussian(1, 12, d)
    rows = np.random.default_rng(0).integers(0, 12, (20, 8))
    expected = [eigenvalues(points[picked]) for picked in rows]
    np.testing.assert_allclose(spectra(points, rows), expected, rtol=1e-9, atol=1e-9)


def test_mean_interval() -> None:
    assert mean_interval([2.5], seed=0) == (2.5, 2.5, 2.5)
    assert mean_interval(torch.full((6,), 1.5), seed=0) == (1.5, 1.5, 1.5)
    covered, tails = 0, []
    for trial in range(100):
        values = np.random.default_rng(trial).standard_normal(40)
        mean, low, high = mean_interval(values, seed=trial)
        assert mean == pytest.approx(values.mean()) and low < mean < high
        tails.append(np.array([mean - low, high - mean]) / (values.std() / 40**0.5))
        covered += low <= 0 <= high
    assert 88 <= covered <= 99
    np.testing.assert_allclose(np.mean(tails, axis=0), 1.96, rtol=0.03)


def prompts_of(seed: int, prompts: int = 4, size: int = 4, d: int = 64, decay: float = 0.15) -> Array:
    """Images of several prompts, each prompt around a mean of its own, all with the same spread."""
    means = 5 * np.random.default_rng(99).standard_normal((prompts, 1, d))
    return means + gaussian(seed, prompts * size, d, decay).reshape(prompts, size, d)


def test_one_prompt_is_the_plain_spectrum() -> None:
    a, b = gaussian(1, 9), gaussian(2, 9, decay=0.1)
    report = within_report(a[None], b[None], seed=0)
    assert report.scd == pytest.approx(scd(a, b))
    assert report.trace_ratio == pytest.approx(trace_ratio(a, b))
    assert report.effective_rank == pytest.approx(effective_rank(eigenvalues(a)))
    assert report.effective_rank_reference == pytest.approx(effective_rank(eigenvalues(b)))
    assert report.pairwise_distance == pytest.approx(mean_pairwise_distance(a)) and report.num_images == 9


@pytest.mark.parametrize("d", [5, 64])
def test_spread_within_prompts_is_the_pooled_covariance_of_the_residuals(d: int) -> None:
    """By definition, on both sides of n = d: residuals of every prompt's own mean over P (S - 1)."""
    a, b = prompts_of(1, 3, 4, d), prompts_of(2, 3, 4, d, decay=0.4)
    spectra = []
    for points in (a, b):
        residuals = (points - points.mean(1, keepdims=True)).reshape(-1, d)
        spectra.append(np.linalg.eigvalsh(residuals.T @ residuals / 9)[::-1])
    report = within_report(a, b, seed=0)
    assert report.scd == pytest.approx(((spectra[0] - spectra[1]) ** 2).sum())
    assert report.trace_ratio == pytest.approx(spectra[0].sum() / spectra[1].sum())
    assert report.effective_rank_reference == pytest.approx(effective_rank(spectra[1].clip(1e-13)), rel=1e-6)
    assert report.effective_rank <= 9
    assert report.pairwise_distance == pytest.approx(np.mean([mean_pairwise_distance(prompt) for prompt in a]))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda a: a @ rotation(a.shape[2]), id="rotation of one side"),
        pytest.param(lambda a: a + 40 * np.random.default_rng(3).standard_normal((4, 1, 24)), id="a shift of each prompt"),
    ],
)
def test_where_prompts_lie_is_no_diversity(change: Callable[[Array], Array]) -> None:
    """A shift of one side alone leaves even the band as it was; rotating both does too."""
    a, b = prompts_of(1, d=24), prompts_of(2, d=24)
    plain, moved = within_report(a, b, seed=0), within_report(change(a), b, seed=0)
    turned = within_report(a @ rotation(24), b @ rotation(24), seed=0)
    for other in (moved, turned):
        assert other.scd == pytest.approx(plain.scd) and other.trace_ratio == pytest.approx(plain.trace_ratio)
        assert other.effective_rank == pytest.approx(plain.effective_rank)
        assert other.pairwise_distance == pytest.approx(plain.pairwise_distance)
    assert turned.null == pytest.approx(plain.null) and turned.trace_null == pytest.approx(plain.trace_null)
    shifted = within_report(a + np.arange(4)[:, None, None], b, seed=0)
    assert shifted.null == pytest.approx(plain.null)


@pytest.mark.parametrize(("prompts", "size"), [(4, 4), (1, 8), (8, 2)])
def test_the_band_within_prompts_holds_95_percent_of_fresh_sets(prompts: int, size: int) -> None:
    """A band that covers 80 % would pass with a chance of 1 %. With 2 images a prompt that of the ratio covers 88 %."""
    inside = inside_trace = 0
    for trial in range(80):
        a, b = prompts_of(2 * trial, prompts, size), prompts_of(2 * trial + 1, prompts, size)
        report = within_report(a, b, seed=trial, num_resamples=100)
        inside += report.null[0] <= report.scd <= report.null[1]
        inside_trace += report.trace_null[0] <= report.trace_ratio <= report.trace_null[1]
    assert inside >= 72 and inside_trace >= (72 if size > 2 else 64)


@pytest.mark.parametrize("shift", [0.0, 10.0])
def test_a_collapse_within_prompts_leaves_the_band_wherever_the_images_went(shift: float) -> None:
    """Images drawn halfway to their prompt's mean, far from the base's or not."""
    for trial in range(10):
        images, base = prompts_of(100 + trial), prompts_of(trial)
        means = images.mean(1, keepdims=True)
        report = within_report(means + 0.4 * (images - means) + shift, base, seed=trial)
        assert report.scd > report.null[1] and report.trace_ratio < min(0.5, report.trace_null[0])


def test_prompts_that_draw_one_image_each_have_no_diversity() -> None:
    a = np.repeat(prompts_of(1, size=2)[:, :1], 4, axis=1)
    report = within_report(a, prompts_of(2), seed=0)
    assert report.trace_ratio == report.effective_rank == report.pairwise_distance == 0 < report.scd
    assert math.isnan(within_report(a, a, seed=0).trace_ratio)
    same = within_report(prompts_of(1), prompts_of(1), seed=0)
    assert same.scd == 0 and same.trace_ratio == 1 and same == within_report(prompts_of(1), prompts_of(1), seed=0)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: scd(gaussian(1, 8), gaussian(2, 16)), "equally many images on both sides, got 8 and 16"),
        (lambda: spectral_report(gaussian(1, 8), gaussian(2, 9), seed=0), "got 8 and 9"),
        (lambda: scd(gaussian(1, 8, 4), gaussian(2, 8, 5)), "differ in length: 4 and 5"),
        (lambda: scd(gaussian(1), gaussian(2), compat="author"), "did you mean 'authors'?"),
        (lambda: eigenvalues(gaussian(1, 1)), "at least 2 images, got shape [1, 64]"),
        (lambda: mean_pairwise_distance(np.zeros(4)), "got shape [4]"),
        (lambda: scd(gaussian(1), gaussian(2) * np.nan), "nan or infinite"),
        (lambda: within_report(gaussian(1), gaussian(2), seed=0), "[P, S, d] with S at least 2, got [8, 64]"),
        (lambda: within_report(prompts_of(1), prompts_of(1, 3), seed=0), "the same prompts and images"),
        (lambda: within_report(prompts_of(1) * np.inf, prompts_of(1), seed=0), "nan or infinite"),
        (lambda: mean_interval([], seed=0), "finite numbers, got []"),
        (lambda: mean_interval([1.0, math.inf], seed=0), "finite numbers"),
    ],
)
def test_bad_features_are_refused_in_words(call: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError) as error:
        call()
    assert said in str(error.value)

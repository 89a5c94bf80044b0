"""Laws of the panel: plain numbers, directions, calibration of intervals and null bands, minimum n, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest

from rewardiv.errors import UserError
from rewardiv.gram import frechet_distance, kernel_distance, neighbourhoods, vendi_score
from rewardiv.metrics import (
    Array,
    effective_rank,
    eigenvalues,
    mean_pairwise_distance,
    scd,
    trace_ratio,
    within_report,
)
from rewardiv.panel import METRICS, ON_REQUEST, ImageSet, Number, panel

PROMPTS, SIZE, D = 4, 8, 48
MEANS = 1 + np.random.default_rng(99).standard_normal((PROMPTS, 1, D))


def drawn(seed: int, size: int = SIZE, scale: float = 1.0, prompts: int = PROMPTS) -> ImageSet:
    """Images around each prompt's mean, and a reward with a mean for each prompt."""
    noise = np.random.default_rng(seed).standard_normal((prompts, size, D)) * np.exp(-0.05 * np.arange(D))
    return ImageSet(MEANS[:prompts] + scale * noise, {"vivid": np.arange(prompts)[:, None] + noise[:, :, 0]})


def flat(images: ImageSet) -> Array:
    return images.features.reshape(-1, D)


def value(name: str, images: ImageSet, base: ImageSet) -> float:
    return panel(images, base, seed=0, names=[name], num_resamples=2)[name].value


def test_every_number_is_the_plain_one() -> None:
    images, base = drawn(1, scale=0.8), drawn(2, 2 * SIZE)
    reference = ImageSet(base.features[:, :SIZE])
    a, b = flat(images), flat(reference)
    within, around = within_report(images.features, reference.features, seed=0), neighbourhoods(a, b)
    expected = {
        "scd": scd(a, b), "scd-within": within.scd, "scd-authors": scd(a, b, compat="authors"),
        "scd-authors-log": scd(a, b, compat="authors-log"), "trace-ratio": trace_ratio(a, b),
        "trace-ratio-within": within.trace_ratio, "effective-rank": effective_rank(eigenvalues(a)),
        "effective-rank-within": within.effective_rank, "precision": around.precision, "recall": around.recall,
        "density": around.density, "coverage": around.coverage, "fid": frechet_distance(a, b), "kid": kernel_distance(a, b),
        "vendi": vendi_score(a), "vendi-within": np.mean([vendi_score(one) for one in images.features]),
        "distance": mean_pairwise_distance(a), "distance-within": within.pairwise_distance,
        "reward:vivid": images.rewards["vivid"].mean(),
    }
    found = panel(images, base, seed=0, names=list(expected), num_resamples=2)
    assert expected.keys() - {"reward:vivid"} == METRICS.keys()
    assert {name: number.value for name, number in found.items()} == pytest.approx(expected)
    assert all(number.n == PROMPTS * SIZE for number in found.values())
    default = panel(images, base, seed=0, num_resamples=2)
    assert default.keys() == expected.keys() - set(ON_REQUEST)


def test_a_model_that_collapsed_elsewhere_moves_every_number_against_its_direction() -> None:
    """Out of its null band, and past where a fresh set of the base's lies."""
    base, fresh = drawn(2, 2 * SIZE), drawn(3)
    fewer = 0.3 * np.exp(-0.3 * np.arange(D))  # directions
    worse = ImageSet(MEANS + 5 + fewer * (drawn(4).features - MEANS), {"vivid": drawn(4).rewards["vivid"] - 9})
    names = [name for name in [*METRICS, "reward:vivid"] if name not in ON_REQUEST]
    bad, good = (panel(images, base, seed=0, names=names, num_resamples=20) for images in (worse, fresh))
    for name in names:
        sign = -1 if name in METRICS and METRICS[name].direction == "lower" else 1
        assert sign * bad[name].value < sign * good[name].value, name
        low, high = bad[name].null
        assert bad[name].value < low if sign > 0 else bad[name].value > high, name


CALIBRATED = ("reward:vivid", "scd-within", "recall", "vendi", "distance-within")


def test_bands_and_intervals_hold_what_they_say() -> None:
    """95 % are wanted of each number; the law is for all of them together, one that covers 75 % would still be seen."""
    truth = [panel(drawn(5000 + 2 * i, scale=0.7), drawn(5001 + 2 * i, 2 * SIZE), seed=0, names=CALIBRATED, num_resamples=1)
             for i in range(60)]
    expected = [np.mean([found[name].value for found in truth]) for name in CALIBRATED]
    covered, inside = np.zeros(len(CALIBRATED)), np.zeros(len(CALIBRATED))
    trials = 20
    for trial in range(trials):
        base = drawn(3 * trial, 2 * SIZE)
        changed, fresh = (
            panel(images, base, seed=trial, names=CALIBRATED, num_resamples=30)
            for images in (drawn(3 * trial + 1, scale=0.7), drawn(3 * trial + 2))
        )
        covered += [changed[name].interval[0] <= mean <= changed[name].interval[1]
                    for name, mean in zip(CALIBRATED, expected, strict=True)]
        inside += [fresh[name].null[0] <= fresh[name].value <= fresh[name].null[1] for name in CALIBRATED]
    assert covered.min() >= 0.75 * trials and covered.mean() >= 0.88 * trials
    assert inside.min() >= 0.7 * trials and inside.mean() >= 0.85 * trials


def test_the_interval_and_the_band_of_a_mean_have_the_textbook_widths() -> None:
    """Of n independent values s / sqrt(n); of a fresh mean around the base's s sqrt(1 / n + 1 / m)."""
    rng, n = np.random.default_rng(0), 60
    images, base = (ImageSet(np.zeros((1, size, 1)), {"r": rng.standard_normal((1, size))}) for size in (n, 2 * n))
    number = panel(images, base, seed=0, names=["reward:r"], num_resamples=4000)["reward:r"]
    own, other = images.rewards["r"], base.rewards["r"]
    half = 1.96 * own.std(ddof=1) / n**0.5
    assert number.interval == pytest.approx((own.mean() - half, own.mean() + half), abs=0.05 * half)
    half = 1.96 * other.std(ddof=1) * (1 / n + 1 / (2 * n)) ** 0.5
    assert number.null == pytest.approx((other.mean() - half, other.mean() + half), abs=0.05 * half)


def test_where_a_number_grows_with_n_its_scatter_does_too() -> None:
    """Each image is of its own kind but for a tenth, all of one kind: Vendi's scatter over fresh sets, by the closed form."""
    rng, n = np.random.default_rng(0), 40

    def kinds(first: int, size: int) -> Array:
        common = rng.random(size) < 0.1
        return np.eye(3 * n + 1)[np.where(common, 3 * n, first + np.arange(size))][None]

    common = rng.binomial(n, 0.1, 2000).clip(1) / n
    scatter = np.exp(-common * np.log(common) + (1 - common) * np.log(n)).std()
    images, base = ImageSet(kinds(0, n)), ImageSet(kinds(n, 2 * n))
    interval = panel(images, base, seed=0, names=["vendi"])["vendi"].interval
    assert np.ptp(interval) == pytest.approx(3.92 * scatter, rel=0.3)


def test_over_prompts_their_differences_count() -> None:
    images, base = drawn(1), drawn(2, 2 * SIZE)
    seeds, prompts = (panel(images, base, seed=0, names=["reward:vivid"], over=over)["reward:vivid"]
                      for over in ("seeds", "prompts"))
    assert seeds.value == prompts.value and seeds.null == prompts.null
    assert np.ptp(prompts.interval) > 2 * np.ptp(seeds.interval)


def test_the_seed_decides_and_other_metrics_do_not() -> None:
    images, base = drawn(1), drawn(2, 2 * SIZE)
    names = ["vendi", "recall", "scd-within"]
    together = panel(images, base, seed=3, names=names, num_resamples=20)
    assert together == panel(images, base, seed=3, names=names, num_resamples=20)
    assert together["recall"] == panel(images, base, seed=3, names=["recall"], num_resamples=20)["recall"]
    assert together["vendi"].interval != panel(images, base, seed=4, names=["vendi"], num_resamples=20)["vendi"].interval
    wide = panel(images, base, seed=3, names=["vendi"], num_resamples=20, level=0.5)["vendi"]
    assert np.ptp(wide.interval) < np.ptp(together["vendi"].interval) and np.ptp(wide.null) < np.ptp(together["vendi"].null)


def test_numbers_stay_within_their_bounds_and_hold_the_value() -> None:
    for number in panel(drawn(1), drawn(1, 2 * SIZE), seed=0, num_resamples=20).values():
        assert number.interval[0] <= number.value <= number.interval[1]
    found = panel(drawn(1, scale=0.1), drawn(1, 2 * SIZE), seed=0, num_resamples=20)
    assert found["scd"].null[0] >= 0 and found["fid"].interval[0] >= 0
    shares = [found[name] for name in ("precision", "recall", "coverage")]
    assert all(0 <= edge <= 1 for share in shares for edge in (*share.interval, *share.null))


def test_below_its_minimum_a_number_says_so() -> None:
    found = panel(drawn(1), drawn(2, 2 * SIZE), seed=0, names=["fid", "recall", "vendi"], num_resamples=2)
    assert "32 images are few, 2048 or more" in found["fid"].note and "50 or more" in found["recall"].note
    assert found["vendi"].note == ""


def test_where_images_are_too_few_there_is_no_number() -> None:
    one = panel(drawn(1, 1), drawn(2, 2), seed=0, num_resamples=20)
    assert one["vendi-within"] == Number(pytest.approx(math.nan, nan_ok=True), None, None, 4,
                                         "needs at least 2 images a prompt, got 1")
    assert one["recall"].note == "needs at least 6 images, got 4" and math.isnan(one["recall"].value)
    assert one["distance"].interval[0] < one["distance"].interval[1], "over prompts, where a prompt has one image"
    three = panel(drawn(1, 3), drawn(2, 6), seed=0, names=["distance-within"], num_resamples=20)["distance-within"]
    assert three.interval[0] < three.value < three.interval[1]
    lonely = panel(drawn(1, 1, prompts=1), drawn(2, 2, prompts=1), seed=0, names=["reward:vivid"])["reward:vivid"]
    assert lonely.interval is None and lonely.null is not None
    assert json.loads(json.dumps(one["recall"].to_dict())) == {
        "value": None, "interval": None, "null": None, "n": 4, "note": one["recall"].note}


def test_without_twice_as_many_base_images_there_is_no_band() -> None:
    number = panel(drawn(1), drawn(2), seed=0, names=["distance"], num_resamples=5)["distance"]
    assert number.null is None and number.interval is not None
    assert number.note == "no null band: that takes 16 base images a prompt, got 8"


def test_a_base_whose_images_are_all_the_same_has_no_ratio() -> None:
    base = ImageSet(np.ones((PROMPTS, 2 * SIZE, D)), {"vivid": np.zeros((PROMPTS, 2 * SIZE))})
    found = panel(drawn(1), base, seed=0, num_resamples=5)
    assert math.isnan(found["trace-ratio"].value) and found["trace-ratio"].null is None
    assert found["scd"].value > 0 and found["scd"].null == (0, 0) and found["vendi"].null == pytest.approx((1, 1))


def test_given_distances_are_averaged_within_prompts() -> None:
    """Features' own distances, given as if they were LPIPS, make the panel's distance within prompts."""
    images, base = drawn(1), drawn(2, 2 * SIZE)
    joined = np.concatenate([images.features, base.features], axis=1)
    distances = np.linalg.norm(joined[:, :, None] - joined[:, None], axis=3)
    found = panel(images, base, seed=0, names=["lpips", "distance-within"], distances={"lpips": distances}, num_resamples=20)
    given, own = found["lpips"], found["distance-within"]
    assert given.value == pytest.approx(own.value)
    assert given.interval == pytest.approx(own.interval) and given.null == pytest.approx(own.null)
    assert "lpips" in panel(images, base, seed=0, distances={"lpips": distances}, num_resamples=1)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: value("scdd", drawn(1), drawn(2)), "unknown metric 'scdd'; did you mean 'scd'?"),
        (lambda: value("reward:calm", drawn(1), drawn(2)), "unknown metric 'reward:calm'"),
        (lambda: value("scd", drawn(1), drawn(2, 4)), "at least as many images a prompt as the method"),
        (lambda: value("scd", drawn(1), drawn(2, prompts=3)), "the same prompts and features"),
        (lambda: value("scd", ImageSet(np.zeros((8, 4))), drawn(2)), "features must be [P, S, d]"),
        (lambda: value("scd", ImageSet(drawn(1).features * np.nan), drawn(2)), "nan or infinite"),
        (lambda: value("scd", drawn(1), ImageSet(drawn(2).features)), "'vivid' wasn't measured of the base"),
        (lambda: value("scd", ImageSet(drawn(1).features, {"vivid": np.ones(4)}), drawn(2)), "a number for every image"),
        (lambda: value("scd", ImageSet(drawn(1).features, {"vivid": np.full((4, 8), np.inf)}), drawn(2)), "'vivid' holds nan"),
        (lambda: panel(drawn(1), drawn(2), seed=0, distances={"lpips": np.ones((4, 8, 8))}), "finite numbers [4, 16, 16]"),
        (lambda: panel(drawn(1), drawn(2), seed=0, over="images"), "over seeds or prompts, not 'images'"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(call: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError) as error:
        call()
    assert said in str(error.value)

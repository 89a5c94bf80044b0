"""Laws of the numbers read from inner products: the defining formulas, closed forms, invariances, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from rewardiv.errors import UserError
from rewardiv.gram import Gram, frechet_distance, kernel_distance, neighbourhoods, vendi_score
from rewardiv.metrics import Array, eigenvalues, mean_pairwise_distance


def gaussian(seed: int, n: int = 20, d: int = 64, scale: float = 1.0) -> Array:
    return 0.5 + scale * np.random.default_rng(seed).standard_normal((n, d)) * np.exp(-0.05 * np.arange(d))


def rotation(d: int) -> Array:
    return np.linalg.qr(np.random.default_rng(7).standard_normal((d, d)))[0]


def textbook_frechet(a: Array, b: Array) -> float:
    """By d x d covariances, the root of their product by its symmetric form."""
    first, second = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * cross


SIZES = pytest.mark.parametrize(("n", "m", "d"), [(12, 12, 64), (12, 20, 64), (40, 30, 6)])


@SIZES
def test_frechet_distance_is_that_of_the_covariances(n: int, m: int, d: int) -> None:
    a, b = gaussian(1, n, d), 1.3 * gaussian(2, m, d)
    assert frechet_distance(a, b) == pytest.approx(textbook_frechet(a, b), rel=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    assert frechet_distance(a @ rotation(d) + 3, b @ rotation(d) + 3) == pytest.approx(frechet_distance(a, b))


@pytest.mark.parametrize("d", [64, 6])
def test_frechet_closed_forms(d: int) -> None:
    """A shift alone costs its squared length; a factor c on the spread costs (1 - c)^2 of the variance."""
    a, shift = gaussian(1, d=d), np.linspace(0, 1, d)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(a, a + shift) == pytest.approx((shift**2).sum())
    scaled = a.mean(0) + 0.4 * (a - a.mean(0))
    assert frechet_distance(a, scaled) == pytest.approx(0.36 * eigenvalues(a).sum())


@SIZES
def test_kernel_distance_is_the_unbiased_mean_over_pairs(n: int, m: int, d: int) -> None:
    a, b = gaussian(1, n, d), gaussian(2, m, d) + 0.2

    def kernel(x: Array, y: Array) -> float:
        return (x @ y / d + 1) ** 3

    def inside(points: Array) -> float:
        return np.mean([kernel(x, y) for i, x in enumerate(points) for j, y in enumerate(points) if i != j])

    across = np.mean([kernel(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(inside(a) + inside(b) - 2 * across)


def test_kernel_distance_of_one_distribution_is_zero_on_average() -> None:
    found = [kernel_distance(gaussian(2 * i, 8, 16), gaussian(2 * i + 1, 8, 16)) for i in range(200)]
    assert abs(np.mean(found)) < 3 * np.std(found) / len(found) ** 0.5
    assert 0.3 < np.mean(np.array(found) < 0) < 0.7


@pytest.mark.parametrize("k", [1, 3, 5])
def test_neighbourhoods_by_their_definitions(k: int) -> None:
    images, reference = gaussian(1, 14, 5, scale=0.8), gaussian(2, 18, 5)
    balls = [
        [(x, sorted(np.linalg.norm(x - y) for y in points)[k]) for x in points] for points in (images, reference)
    ]

    def holds(ball: tuple[Array, float], point: Array) -> bool:
        return np.linalg.norm(ball[0] - point) < ball[1]

    found = neighbourhoods(images, reference, k)
    assert found.precision == np.mean([any(holds(ball, x) for ball in balls[1]) for x in images])
    assert found.recall == np.mean([any(holds(ball, y) for ball in balls[0]) for y in reference])
    assert found.density == pytest.approx(np.mean([sum(holds(ball, x) for ball in balls[1]) for x in images]) / k)
    assert found.coverage == np.mean([any(holds(ball, x) for x in images) for ball in balls[1]])
    assert 0 < found.recall < 1 and found.density != found.coverage


def test_neighbourhoods_of_the_same_and_of_distant_sets() -> None:
    a = gaussian(1)
    same, apart = neighbourhoods(a, a), neighbourhoods(a, a + 100)
    assert same.precision == same.recall == same.coverage == 1 and same.density > 1
    assert apart.precision == apart.recall == apart.density == apart.coverage == 0
    one = np.tile(a[:1], (8, 1))
    assert neighbourhoods(one, one).recall == 1, "a ball without extent holds its centre"


@pytest.mark.parametrize("d", [32, 6])
def test_vendi_counts_different_images(d: int) -> None:
    """k directions at right angles, each in the same number of copies, count k; in unequal shares their entropy's power."""
    axes = 5 * np.eye(d) @ rotation(d)
    assert vendi_score(np.tile(axes[:1], (7, 1))) == pytest.approx(1)
    assert vendi_score(axes[:6]) == pytest.approx(6)
    assert vendi_score(np.tile(axes[:3], (4, 1))) == pytest.approx(3)
    assert vendi_score(axes[[0, 0, 0, 1]]) == pytest.approx(4 / 3**0.75)
    a = gaussian(1, 9, d)
    assert vendi_score(a * np.linspace(1, 3, 9)[:, None]) == pytest.approx(vendi_score(a)), "lengths don't matter"
    assert vendi_score(a + 10) < vendi_score(a), "a common mean does"


@pytest.mark.parametrize("d", [64, 6])
def test_spread_from_inner_products(d: int) -> None:
    points = gaussian(1, 24, d)
    gram, rows = Gram(points), np.array([3, 1, 8, 20, 11, 12, 5, 9])
    picked = points[rows]
    np.testing.assert_allclose(gram.spectrum(rows), eigenvalues(picked), rtol=1e-9, atol=1e-12)
    assert gram.variance(rows) == pytest.approx(eigenvalues(picked).sum())
    assert gram.mean_distance(rows) == pytest.approx(mean_pairwise_distance(picked))
    residuals = (picked.reshape(2, 4, d) - picked.reshape(2, 4, d).mean(1, keepdims=True)).reshape(8, d)
    np.testing.assert_allclose(gram.spectrum(rows, 2)[:6], np.linalg.svd(residuals)[1][:6] ** 2 / 6, rtol=1e-9, atol=1e-12)


def test_equal_images_are_exactly_at_distance_zero() -> None:
    points = 1e3 * gaussian(1, 6)
    gram = Gram(np.concatenate([points, points]))
    assert np.all(np.diagonal(gram.squared, 6) == 0) and np.all(gram.squared[:6, :6][~np.eye(6, dtype=bool)] > 0)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: frechet_distance(gaussian(1), gaussian(2, d=8)), "differ in length: 64 and 8"),
        (lambda: kernel_distance(gaussian(1, 1), gaussian(2)), "at least 2 images"),
        (lambda: vendi_score(gaussian(1) * np.nan), "nan or infinite"),
        (lambda: neighbourhoods(gaussian(1, 5), gaussian(2)), "5 neighbours need at least 6 images on each side, got 5"),
    ],
)
def test_bad_features_are_refused_in_words(call: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError) as error:
        call()
    assert said in str(error.value)

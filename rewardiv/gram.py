"""Numbers of image sets read from one matrix of all their inner products: distances of distributions, neighbourhoods, Vendi.

Image sets are small beside their features (n images, d numbers each, n far below d), so nothing here makes a d x d matrix
there: what is wanted of a covariance is in the n x n matrix of inner products as well. It is computed once, and any two
sets of its rows are compared by indexing it; that is what makes hundreds of resamples cheap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rewardiv.errors import UserError
from rewardiv.metrics import Array, as_points, spectra

Rows = NDArray[np.integer]
Result = TypeVar("Result")
NEIGHBOURS = 5  # the paper's k
SAME_SHARE = 1e-13  # of two squared lengths: what a squared distance can come to by rounding alone


@dataclass(frozen=True)
class Neighbourhoods:
    """How two sets of images overlap, each seen as the union of balls that reach to every image's k-th neighbour.

    Attributes:
        precision: Share of the images that lie in a ball of the reference, 0 to 1.
        recall: Share of the reference that lies in a ball of the images, 0 to 1.
        density: Balls of the reference that an image lies in, on average, over k; 0 or more, about 1 for the same
            distribution.
        coverage: Share of the reference's balls that an image lies in, 0 to 1.
    """

    precision: float
    recall: float
    density: float
    coverage: float


class Gram:
    """All images of a comparison; a set of them is an array of row numbers, flat and without repetition.

    Every matrix is made when it is first needed, and kept.

    Args:
        features: [N, d], N at least 2.

    Raises:
        UserError: If there are fewer than 2 images, or a feature is nan or infinite.
    """

    def __init__(self, features: ArrayLike) -> None:
        self.raw = as_points(features)
        self.points = self.raw - self.raw.mean(0)

    @cached_property
    def inner(self) -> Array:
        """Inner products of the features, centred by the mean of all; [N, N]."""
        return self.points @ self.points.T

    @cached_property
    def squared(self) -> Array:
        """Squared Euclidean distances, exactly 0 between equal images; [N, N]."""
        lengths = np.diagonal(self.inner)
        sums = lengths[:, None] + lengths
        distances = sums - 2 * self.inner
        return np.where(distances > SAME_SHARE * sums, distances, 0)

    @cached_property
    def directions(self) -> Array:
        """The features scaled to length 1; [N, d]."""
        lengths = np.linalg.norm(self.raw, axis=1, keepdims=True)
        return self.raw / np.maximum(lengths, np.finfo(np.float64).tiny)

    @cached_property
    def cosines(self) -> Array:
        """Cosines of the features, 1 of an image with itself; [N, N]."""
        cosines = self.directions @ self.directions.T
        np.fill_diagonal(cosines, 1)
        return cosines

    @cached_property
    def cubic(self) -> Array:
        """The kernel (x . y / d + 1)^3 of the features; [N, N]."""
        return (self.raw @ self.raw.T / self.raw.shape[1] + 1) ** 3

    def spectrum(self, rows: Rows, num_groups: int = 1) -> Array:
        """Eigenvalues of the rows' unbiased covariance, descending; with groups that of the residuals of each group's mean.

        The rows are num_groups groups of equal size, one after the other.
        """
        gram = self.inner if len(rows) <= self.points.shape[1] else None
        return spectra(self.points, rows[None], num_groups, gram)[0]

    def variance(self, rows: Rows) -> float:
        """Trace of the rows' unbiased covariance: half the mean squared distance of two of them."""
        return float(self._block(self.squared, rows, rows).sum() / (2 * len(rows) * (len(rows) - 1)))

    def mean_distance(self, rows: Rows) -> float:
        """Mean Euclidean distance of two of the rows."""
        return float(np.sqrt(self._block(self.squared, rows, rows)).sum() / (len(rows) * (len(rows) - 1)))

    def frechet(self, a: Rows, b: Rows) -> float:
        """Squared Fréchet distance of two Gaussians with the sets' means and unbiased covariances; see frechet_distance."""
        first, second, across = self._block(self.inner, a, a), self._block(self.inner, b, b), self._block(self.inner, a, b)
        means = first.mean() + second.mean() - 2 * across.mean()
        traces = self.variance(a) + self.variance(b)
        return float(max(means + traces - 2 * self._root_trace(a, b, across), 0.0))

    def kernel(self, a: Rows, b: Rows) -> float:
        """Unbiased squared maximum mean discrepancy with the cubic kernel; see kernel_distance."""
        first, second = (self._block(self.cubic, rows, rows) for rows in (a, b))
        within = [(block.sum() - np.trace(block)) / (len(block) * (len(block) - 1)) for block in (first, second)]
        return float(sum(within) - 2 * self._block(self.cubic, a, b).mean())

    def neighbourhoods(self, images: Rows, reference: Rows, k: int = NEIGHBOURS) -> Neighbourhoods:
        """How the sets overlap; see `neighbourhoods`."""
        across = self._block(self.squared, reference, images)
        inside_images, inside_reference = across <= self._radii(images, k), across <= self._radii(reference, k)[:, None]
        return Neighbourhoods(
            precision=float(inside_reference.any(0).mean()),
            recall=float(inside_images.any(1).mean()),
            density=float(inside_reference.sum(0).mean() / k),
            coverage=float(inside_reference.any(1).mean()),
        )

    def vendi(self, rows: Rows) -> float:
        """Vendi score of the rows; see vendi_score."""
        if len(rows) <= self.raw.shape[1]:
            matrix = self._block(self.cosines, rows, rows)
        else:
            matrix = self.directions[rows].T @ self.directions[rows]
        shares = np.linalg.eigvalsh(matrix / len(rows))
        shares = shares[shares > 0]
        return float(np.exp(-(shares * np.log(shares)).sum()))

    def _block(self, matrix: Array, a: Rows, b: Rows) -> Array:
        return matrix[a[:, None], b[None]]

    def _radii(self, rows: Rows, k: int) -> Array:
        """Squared distance of each row to its k-th neighbour, itself not counted."""
        if len(rows) <= k:
            raise UserError(f"{k} neighbours need at least {k + 1} images on each side, got {len(rows)}")
        return np.partition(self._block(self.squared, rows, rows), k, axis=1)[:, k]

    def _root_trace(self, a: Rows, b: Rows, across: Array) -> float:
        """Trace of the square root of the product of both covariances.

        With centred features A [n, d] and B [m, d] it is the sum of the singular values of A B^T, over
        sqrt((n - 1) (m - 1)): the n x m matrix `across`, centred; where n and m are above d, of the d x d product of both
        triangular factors.
        """
        if min(len(a), len(b)) > self.points.shape[1]:
            left, right = (np.linalg.qr(self.points[rows] - self.points[rows].mean(0), mode="r") for rows in (a, b))
            matrix = left @ right.T
        else:
            matrix = across - across.mean(0) - across.mean(1, keepdims=True) + across.mean()
        return float(np.linalg.svd(matrix, compute_uv=False).sum() / ((len(a) - 1) * (len(b) - 1)) ** 0.5)


def frechet_distance(a: ArrayLike, b: ArrayLike) -> float:
    """Squared Fréchet distance of two Gaussians with the means and covariances of `a` [n, d] and `b` [m, d]; 0 or more.

    With Inception's features it is the FID. Two sets of one distribution are far from 0 unless n is well above d: compare
    it at equal n only.

    Source: Heusel et al., arXiv:1706.08500; their trace of a matrix root from n x m singular values.

    Raises:
        UserError: If a set has fewer than 2 images, or a feature is nan or infinite, or the lengths differ.
    """
    return _pair(a, b, Gram.frechet)


def kernel_distance(a: ArrayLike, b: ArrayLike) -> float:
    """Squared maximum mean discrepancy of `a` [n, d] and `b` [m, d] with the kernel (x . y / d + 1)^3.

    With Inception's features it is the KID. Unbiased at any n, so below 0 about half of the time for sets of one
    distribution.

    Source: Bińkowski et al., arXiv:1801.01401. Differs: one estimate from all images instead of the mean over random
    subsets of 1000.

    Raises:
        UserError: If a set has fewer than 2 images, or a feature is nan or infinite, or the lengths differ.
    """
    return _pair(a, b, Gram.kernel)


def neighbourhoods(images: ArrayLike, reference: ArrayLike, k: int = NEIGHBOURS) -> Neighbourhoods:
    """Precision, recall, density and coverage of `images` [n, d] against `reference` [m, d].

    Source: precision and recall of Kynkäänniemi et al., arXiv:1904.06991; density and coverage of Naeem et al.,
    arXiv:2002.09797. Differs: a ball holds its surface, as in the former's code and unlike the latter's; it matters only
    where images are equal.

    Args:
        images: n above k.
        reference: m above k.
        k: The neighbour that a ball reaches to.

    Raises:
        UserError: If a set has no more than k images, or a feature is nan or infinite, or the lengths differ.
    """
    return _pair(images, reference, lambda gram, a, b: gram.neighbourhoods(a, b, k))


def vendi_score(features: ArrayLike) -> float:
    """How many clearly different images the set [n, d] counts for: 1 (all the same direction) to n (all at right angles).

    The exponential of the entropy of the eigenvalues of the cosine matrix over n. Unchanged by scaling and rotating, not by
    shifting: features that share a large mean give small scores.

    Source: Friedman and Dieng, arXiv:2210.02410, order 1.

    Raises:
        UserError: If there are fewer than 2 images, or a feature is nan or infinite.
    """
    gram = Gram(features)
    return gram.vendi(np.arange(len(gram.raw)))


def _pair(a: ArrayLike, b: ArrayLike, number: Callable[[Gram, Rows, Rows], Result]) -> Result:
    first, second = as_points(a), as_points(b)
    if first.shape[1] != second.shape[1]:
        raise UserError(f"the features differ in length: {first.shape[1]} and {second.shape[1]}")
    rows = np.arange(len(first) + len(second))
    return number(Gram(np.concatenate([first, second])), rows[: len(first)], rows[len(first) :])

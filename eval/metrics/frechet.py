"""The Fréchet distance: FID on Inception, FD-DINOv2 on DINOv2, or on any other features."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expunge.eval.metrics.pictures import says
from expunge.eval.metrics.reference import Values
from expunge.eval.metrics.set_distance import SetDistance


@dataclass(frozen=True, kw_only=True)
class Frechet(SetDistance):
    """The Fréchet distance between two Gaussians that have the features' moments.

    d² = ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½), not negative, 0 for equal moments; no scale.

    On Inception's 2048 features it is FID (arXiv 1706.08500), on DINOv2's FD-DINOv2
    (arXiv 2306.04675). With n ≤ D pictures on either side a covariance has no inverse, and there is
    no value. It is biased upwards, the more so the smaller n: published figures have n = 10,000 or
    30,000, and figures of different n do not compare. The interval is of spread alone (jackknife
    over prompts, a folder's pictures held fixed): it does not make up for the bias.
    """

    meaning: str = says("Fréchet distance to the reference's pictures")

    def scale(self) -> dict[str, Any]:
        """The formula's name."""
        return {"metric": "fid", "formula": "squared Fréchet distance"}

    def distance(
        self, X: Values, Y: Values, folds: NDArray[np.int64], paired: bool
    ) -> tuple[float, list[float]] | None:
        """d², and d² without each fold."""
        if min(len(X), len(Y)) <= X.shape[1]:
            return None
        reference = Gaussian.of(Y)
        value, without = frechet(Gaussian.of(X), reference), []
        kept = [folds != g for g in np.unique(folds)]
        # A single row has no covariance.
        if min(rows.sum() for rows in kept) > 1:
            for rows in kept:
                other = Gaussian.of(Y[rows]) if paired else reference
                without.append(frechet(Gaussian.of(X[rows]), other))
        return value, without


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D)."""

    μ: Values
    Σ: Values

    @classmethod
    def of(cls, X: Values) -> Gaussian:
        """The moments of the rows of X (n, D), n ≥ 2; the covariance is the unbiased one."""
        return cls(X.mean(0), np.atleast_2d(np.cov(X, rowvar=False)))

    @cached_property
    def L(self) -> Values:
        """Σ = L Lᵀ, by its eigenvectors, so that a covariance without an inverse has one too."""
        λ, V = np.linalg.eigh(self.Σ)
        root: Values = V * np.sqrt(λ.clip(0))
        return root


def frechet(a: Gaussian, b: Gaussian) -> float:
    """d² = ‖μ_a − μ_b‖² + tr Σ_a + tr Σ_b − 2 tr(Σ_a Σ_b)^½.

    With Σ_b = L Lᵀ the last trace is the sum of the square roots of the eigenvalues of Lᵀ Σ_a L,
    which is symmetric and has the eigenvalues of Σ_a Σ_b; no matrix square root is taken.
    """
    roots = np.sqrt(np.linalg.eigvalsh(b.L.T @ a.Σ @ b.L).clip(0))
    δ = a.μ - b.μ
    return float(max(δ @ δ + np.trace(a.Σ) + np.trace(b.Σ) - 2 * roots.sum(), 0.0))

"""The squared maximum mean discrepancy of two samples (Gretton et al. 2012, jmlr v13)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from expunge.eval.metrics.reference import Values

Kernel = Callable[[Values, Values], Values]
Folds = NDArray[np.int64]
Estimator = Literal["unbiased", "biased"]
ROWS = 1024


def mmd2(
    X: Values,
    Y: Values,
    kernel: Kernel,
    folds: Folds,
    *,
    paired: bool,
    estimator: Estimator = "unbiased",
) -> tuple[float, list[float]] | None:
    """MMD² = mean k(x, x′) + mean k(y, y′) − 2 mean k(x, y), and the same without each fold.

    ``unbiased``: a row never meets itself in the first two means; and where row i of Y belongs to
    row i of X, the two never meet in the third (Gretton's U-statistic of pairs), so that equal
    samples give exactly 0. It may be negative. ``biased``: all means are over all pairs, which adds
    about (2 / n) (k(x, x) − mean k) and is what some published code computes.

    Args:
        X: (n, D).
        Y: (m, D), if paired with m = n.
        kernel: Rows (a, D) and (b, D) to (a, b).
        folds: The fold of each row of X, and if paired of Y.
        paired: Whether row i of X and row i of Y belong together.
        estimator: Which means.

    Returns:
        None with fewer than two rows on a side.
    """
    if min(len(X), len(Y)) < 2:
        return None
    distinct = estimator == "unbiased"
    unfolded = folds if paired else np.zeros(len(Y), np.int64)
    xx = _sums(kernel, X, X, folds, folds, skip_diagonal=distinct)
    yy = _sums(kernel, Y, Y, unfolded, unfolded, skip_diagonal=distinct)
    xy = _sums(kernel, X, Y, folds, unfolded, skip_diagonal=distinct and paired)
    inX, inY = np.bincount(folds), np.bincount(unfolded)

    def value(keep: NDArray[np.bool_]) -> float | None:
        kept = keep if paired else np.ones(1, bool)
        n, m = int(inX[keep].sum()), int(inY[kept].sum())
        if min(n, m) < 2:
            return None
        pairs_x, pairs_y = (c * (c - 1) if distinct else c * c for c in (n, m))
        pairs_xy = n * (n - 1) if distinct and paired else n * m
        return float(
            xx[keep][:, keep].sum() / pairs_x
            + yy[kept][:, kept].sum() / pairs_y
            - 2 * xy[keep][:, kept].sum() / pairs_xy
        )

    whole = value(np.ones(len(inX), bool))
    without = [value(np.arange(len(inX)) != g) for g in range(len(inX))]
    assert whole is not None
    return whole, [v for v in without if v is not None] if None not in without else []


def polynomial(X: Values, Y: Values) -> Values:
    """k(x, y) = (x·y / D + 1)³, KID's."""
    K: Values = (X @ Y.T / X.shape[1] + 1) ** 3
    return K


def gaussian(σ: float) -> Kernel:
    """k(x, y) = exp(−‖x − y‖² / 2σ²)."""

    def kernel(X: Values, Y: Values) -> Values:
        square = (X**2).sum(1)[:, None] + (Y**2).sum(1)[None] - 2 * X @ Y.T
        K: Values = np.exp(-square.clip(0) / (2 * σ**2))
        return K

    return kernel


def _sums(
    kernel: Kernel, X: Values, Y: Values, fx: Folds, fy: Folds, *, skip_diagonal: bool
) -> Values:
    """S[g, h] = Σ k(x_i, y_j) over rows i of fold g and j of fold h, a block of rows at a time."""
    inside_x = np.eye(fx.max() + 1)[fx]
    inside_y = np.eye(fy.max() + 1)[fy]
    S = np.zeros((inside_x.shape[1], inside_y.shape[1]))
    for start in range(0, len(X), ROWS):
        K = kernel(X[start : start + ROWS], Y)
        if skip_diagonal:
            row = np.arange(len(K))
            K[row, start + row] = 0
        S += inside_x[start : start + ROWS].T @ K @ inside_y
    return S

"""The delete-a-group jackknife: intervals of numbers that belong to a set of pictures.

A bootstrap draws pictures twice, and two equal pictures look like less diversity, a narrower
covariance and a closer pair than there is. Leaving pictures out does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from expunge.eval.cases import Case
from expunge.eval.metrics.pictures import clusters_of
from expunge.eval.significance import LEVEL

FOLDS = 20


def folds_of(cases: Sequence[Case], most: int = FOLDS) -> NDArray[np.int64]:
    """Which of at most ``most`` folds each picture is left out with; a prompt's stay together."""
    clusters = clusters_of(cases)
    number = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    return np.array([number[name] % most for name in clusters], np.int64)


def jackknife_interval(value: float, without: Sequence[float]) -> tuple[float | None, float | None]:
    """The 95 % interval θ ± t s of a statistic θ, from its values θ_g without each of G folds.

    s² = (G − 1) / G · Σ_g (θ_g − θ̄)², t of G − 1 degrees of freedom (Kott 2001, Journal of
    Official Statistics 17(4): 521–526). It tells spread, not bias; without two folds there is none.
    """
    G = len(without)
    if G < 2:
        return None, None
    θ = np.asarray(without, np.float64)
    s = np.sqrt((G - 1) / G * ((θ - θ.mean()) ** 2).sum())
    half = float(stats.t.ppf(0.5 + LEVEL / 2, G - 1) * s)
    return value - half, value + half

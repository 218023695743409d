"""KID: a kernel's distance to the reference that few pictures do not bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expunge.eval.metrics.discrepancy import mmd2, polynomial
from expunge.eval.metrics.pictures import says
from expunge.eval.metrics.reference import Values
from expunge.eval.metrics.set_distance import SetDistance


@dataclass(frozen=True, kw_only=True)
class Kid(SetDistance):
    """The unbiased MMD² with the kernel k(x, y) = (x·y / D + 1)³ (KID, arXiv 1801.01401).

    About 0 for equal distributions, also below 0; no scale here, while papers often give × 10³.
    Published KID is on Inception's 2048 features, the mean of 100 subsets of 1,000; here all pairs
    count at once, which has the same expectation and less variance, and nothing to draw. To the
    base, pictures of the same prompt and seed never meet, so that equal pictures give exactly 0. A
    few hundred pictures do. Interval: jackknife over prompts, a folder's pictures held fixed.
    """

    meaning: str = says("kernel distance to the reference's pictures")

    def scale(self) -> dict[str, Any]:
        """The kernel."""
        return {"metric": "kid", "formula": "unbiased MMD², kernel (x·y / D + 1)³, all pairs"}

    def distance(
        self, X: Values, Y: Values, folds: NDArray[np.int64], paired: bool
    ) -> tuple[float, list[float]] | None:
        """MMD², and MMD² without each fold."""
        return mmd2(X, Y, polynomial, folds, paired=paired)

"""The Vendi score: how many different pictures there are, in effect."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np

from expunge.eval.cases import Case
from expunge.eval.features import FEATURES, Extractor, extract
from expunge.eval.features.inception import InceptionFeatures
from expunge.eval.metrics import Batch
from expunge.eval.metrics.jackknife import folds_of, jackknife_interval
from expunge.eval.metrics.pictures import PictureSettings, PictureTally, good, says
from expunge.eval.metrics.reference import Values
from expunge.results import Measurement


@dataclass(frozen=True, kw_only=True)
class Vendi(PictureSettings):
    """The Vendi score (arXiv 2210.02410), the mean over parts of the pictures.

    VS = exp(−Σ λ log λ), λ the eigenvalues of K / n, K_ij the cosine of the features of pictures i
    and j: 1 if all are equal, n if all are orthogonal. It grows with n, so compare equal n. Within
    a prompt it tells mode collapse, within a group or all of them also how much prompts differ; a
    part with one picture is left out. Interval: jackknife over prompts, of spread alone.
    """

    extractor: Annotated[Extractor, FEATURES] = field(
        default_factory=InceptionFeatures, metadata={"help": "whose features"}
    )
    within: Literal["prompt", "group", "all"] = field(
        default="group", metadata={"help": "the parts, each with a score of its own"}
    )
    higher_is_better: bool = good(True)
    meaning: str = says("how many different pictures there are, in effect")

    def open(self) -> VendiTally:
        """Load the network."""
        return VendiTally(self)


class VendiTally(PictureTally):
    """Features of one model's pictures."""

    def __init__(self, settings: Vendi) -> None:
        super().__init__()
        self._settings = settings
        self._extractor = settings.extractor.open()

    def protocol(self) -> dict[str, Any]:
        """Kernel, parts and features."""
        return {
            "metric": "vendi",
            "kernel": "cosine",
            "within": self._settings.within,
            "features": self._extractor.protocol(),
        }

    def update(self, batch: Batch) -> None:
        """See pictures."""
        X = extract(self._extractor, batch.images)
        if not np.abs(X).max(1).all():
            raise FloatingPointError("got features that are all zero, which have no direction")
        self._seen.add(batch.cases, X)

    def compute(self) -> Measurement:
        """The score, with the jackknife's interval over prompts."""
        settings, n = self._settings, len(self._seen)
        if not n:
            return settings.measurement(None)
        cases, (X,) = self._seen.in_order()
        parts = np.unique([self._part(case) for case in cases], return_inverse=True)[1]
        X = X.astype(np.float64)
        value = mean_vendi(X, parts)
        if value is None:
            return settings.measurement(None, n=n)
        folds = folds_of(cases)
        without = [mean_vendi(X[folds != g], parts[folds != g]) for g in np.unique(folds)]
        left = [v for v in without if v is not None]
        interval = jackknife_interval(value, left if len(left) == len(without) else [])
        return settings.measurement(value, interval, n)

    def _part(self, case: Case) -> str:
        within = self._settings.within
        return "" if within == "all" else case.prompt if within == "prompt" else case.group


def mean_vendi(X: Values, parts: Any) -> float | None:
    """The mean of the scores of the parts that hold two rows or more; None if none does."""
    scores = [vendi(X[parts == p]) for p in np.unique(parts) if (parts == p).sum() > 1]
    return float(np.mean(scores)) if scores else None


def vendi(X: Values) -> float:
    """exp(−Σ λ log λ) of the eigenvalues λ of X̂ X̂ᵀ / n, X̂ the rows of X (n, D) at unit length.

    X̂ᵀ X̂ / n has the same ones but for zeros, which count nothing, and the smaller one is taken.
    """
    X = X / np.linalg.norm(X, axis=1, keepdims=True)
    n, D = X.shape
    λ = np.linalg.eigvalsh(X @ X.T if n <= D else X.T @ X) / n
    λ = λ[λ > 1e-12]
    return float(np.exp(-(λ * np.log(λ)).sum()))

"""Memorisation: does a model copy pictures of a folder?"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from expunge.eval.cases import Case
from expunge.eval.features import FEATURES, Extractor, extract
from expunge.eval.metrics import Batch
from expunge.eval.metrics.pictures import PictureSettings, PictureTally, says
from expunge.eval.metrics.reference import Reference, Values
from expunge.eval.metrics.shares import share
from expunge.results import Measurement


@dataclass(frozen=True, kw_only=True)
class Memorisation(PictureSettings):
    """Share of pictures whose nearest of a folder has features of at least a cosine: copies.

    s(x) = max over r of cos(f(x), f(r)) ≥ threshold (Somepalli et al., arXiv 2212.03860, with SSCD
    features and a threshold of 0.5). No SSCD is among the extractors, and each of them has its own
    scale, so there is no default: take the threshold from pictures that are known to be copies and
    others that are not. The folder holds the pictures that must not come back, the training set's
    for example. The interval is `significance.clustered_wilson`: of n prompts without a copy it
    still reaches about 3.8 / n.
    """

    reference: Path = field(metadata={"help": "folder of pictures that may have been copied"})
    threshold: float = field(metadata={"help": "cosine from which a picture is a copy"})
    extractor: Annotated[Extractor, FEATURES] = field(metadata={"help": "whose features"})
    meaning: str = says("pictures that copy one of the reference folder")

    def __post_init__(self) -> None:
        if not -1 < self.threshold <= 1:
            raise ValueError(f"got threshold {self.threshold}; allowed: a cosine in (-1, 1]")

    def open(self) -> MemorisationTally:
        """Load the network, and find the folder's pictures."""
        return MemorisationTally(self)


class MemorisationTally(PictureTally):
    """Copies among one model's pictures."""

    def __init__(self, settings: Memorisation) -> None:
        super().__init__()
        self._settings = settings
        self._extractor = settings.extractor.open()
        self._folder = Reference(settings.reference, self._extractor)

    def protocol(self) -> dict[str, Any]:
        """Threshold, features and folder."""
        return {
            "metric": "memorisation",
            "threshold": self._settings.threshold,
            "features": self._extractor.protocol(),
            "reference": self._folder.told,
        }

    def begin(self, keep: Path | None = None) -> None:
        """Forget all pictures but the folder's."""
        super().begin(keep)
        self._folder.features(keep)

    @cached_property
    def _reference(self) -> Values:
        return unit(self._folder.features())

    def update(self, batch: Batch) -> None:
        """See pictures."""
        X = unit(extract(self._extractor, batch.images).astype(np.float64))
        self._seen.add(batch.cases, (X @ self._reference.T).max(1))

    def compute(self) -> Measurement:
        """The share of copies."""
        return share(*self._copies(), higher_is_better=self._settings.higher_is_better)

    def each(self) -> dict[Case, bool | float]:
        """Whether each is a copy."""
        return dict(zip(*self._copies(), strict=True))

    def _copies(self) -> tuple[list[Case], list[bool]]:
        if not len(self._seen):
            return [], []
        cases, (nearest,) = self._seen.in_order()
        # A picture has a cosine of 1 with itself, but for rounding.
        return cases, (nearest + 1e-9 >= self._settings.threshold).tolist()


def unit(X: Values) -> Values:
    """Rows at unit length.

    Raises:
        FloatingPointError: A row of zeros, which has no direction.
    """
    length = np.linalg.norm(X, axis=1, keepdims=True)
    if not length.all():
        raise FloatingPointError("got features that are all zero, which have no direction")
    found: Values = X / length
    return found

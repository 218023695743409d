"""How far a model's pictures are, as a set, from the base's or from those of a folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from expunge.eval.features import FEATURES, Extractor, extract
from expunge.eval.features.inception import InceptionFeatures
from expunge.eval.metrics import Batch
from expunge.eval.metrics.jackknife import folds_of, jackknife_interval
from expunge.eval.metrics.pictures import PictureSettings, PictureTally
from expunge.eval.metrics.reference import Reference, Values
from expunge.results import Measurement


@dataclass(frozen=True, kw_only=True)
class SetDistance(PictureSettings, ABC):
    """A distance between two sets of features X (n, D) and Y (m, D)."""

    extractor: Annotated[Extractor, FEATURES] = field(
        default_factory=InceptionFeatures, metadata={"help": "whose features"}
    )
    reference: Path | None = field(
        default=None,
        metadata={"help": "folder of pictures; null: the base's of the same prompts and seeds"},
    )

    @abstractmethod
    def scale(self) -> dict[str, Any]:
        """Name and constants of the distance."""

    @abstractmethod
    def distance(
        self, X: Values, Y: Values, folds: NDArray[np.int64], paired: bool
    ) -> tuple[float, list[float]] | None:
        """The distance, and the distances without each fold.

        Args:
            X: The model's features.
            Y: The reference's; if paired, row i is of the same prompt and seed as X's.
            folds: The fold of each row of X, and if paired of Y; a folder's pictures always stay.
            paired: Whether the reference is the base.

        Returns:
            None if there are too few pictures.
        """

    def open(self) -> SetDistanceTally:
        """Load the network, and find the reference's pictures."""
        return SetDistanceTally(self)


class SetDistanceTally(PictureTally):
    """One model's features and its reference's."""

    def __init__(self, settings: SetDistance) -> None:
        super().__init__()
        self._settings = settings
        self._extractor = settings.extractor.open()
        folder = settings.reference
        self._reference = None if folder is None else Reference(folder, self._extractor)
        self.compares = folder is None

    def protocol(self) -> dict[str, Any]:
        """Distance, features and reference."""
        base = "the base's pictures of the same prompts and seeds"
        return {
            **self._settings.scale(),
            "features": self._extractor.protocol(),
            "reference": base if self._reference is None else self._reference.told,
        }

    def begin(self, keep: Path | None = None) -> None:
        """Forget all pictures but the folder's."""
        super().begin(keep)
        if self._reference is not None:
            self._reference.features(keep)

    def update(self, batch: Batch) -> None:
        """See pictures; those of the base itself are compared with a folder's alone."""
        if self._reference is not None:
            self._seen.add(batch.cases, extract(self._extractor, batch.images))
        elif batch.base is not None:
            X, Y = (extract(self._extractor, images) for images in (batch.images, batch.base))
            self._seen.add(batch.cases, X, Y)

    def compute(self) -> Measurement:
        """The distance, with the jackknife's interval over prompts."""
        settings, n = self._settings, len(self._seen)
        if not n:
            return settings.measurement(None)
        cases, columns = self._seen.in_order()
        reference = self._reference
        Y = columns[1].astype(np.float64) if reference is None else reference.features()
        X = columns[0].astype(np.float64)
        found = settings.distance(X, Y, folds_of(cases), paired=reference is None)
        if found is None:
            return settings.measurement(None, n=n)
        value, without = found
        return settings.measurement(value, jackknife_interval(value, without), n)

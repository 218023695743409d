"""A density that remembers the most it has said of each picture of a batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from expunge.densities.base import HarmDensity


class Most(HarmDensity):
    """Another density, and the largest score of each picture since it was told to forget.

    Asked by a guard, it knows of the whole of a denoising what a threshold decides on: whether any
    step reaches it.

    Args:
        inner: That density.

    Attributes:
        scores: (B, M), of the batch that it is asked about.
    """

    scores: Tensor

    def __init__(self, inner: HarmDensity) -> None:
        self.inner, self.thresholds = inner, inner.thresholds
        self.names, self.texts = list(inner.names), inner.texts
        self.resolution, self.span = inner.resolution, inner.span
        self.forget()

    def forget(self) -> None:
        """Another batch begins."""
        self._asked = False

    def per_concept(self, images: Tensor) -> Tensor:
        """What the density itself says, (B, M)."""
        found = self.inner(images).per_concept
        self.scores = self.scores.maximum(found) if self._asked else found
        self._asked = True
        return found

    def combine(self, per_concept: Tensor) -> Tensor:
        """As the density itself."""
        return self.inner.combine(per_concept)

    def identity(self) -> dict[str, Any]:
        """That of the density itself."""
        return self.inner.identity()

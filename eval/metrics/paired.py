"""Distances between a picture and the base's of the same prompt and seed, averaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from expunge.eval.metrics import Batch
from expunge.eval.metrics.pictures import MeanTally, PictureSettings


class PairedTally(MeanTally):
    """Distances of one model's pictures to the base's; of the base itself there are none.

    Args:
        settings: The metric's.
        distance: Pictures (B, 3, H, W) twice, in [-1, 1], to B distances.
        told: The protocol.
    """

    compares = True

    def __init__(
        self,
        settings: PictureSettings,
        distance: Callable[[Tensor, Tensor], Tensor],
        told: dict[str, Any],
    ) -> None:
        super().__init__(settings)
        self._distance = distance
        self._told = told

    def protocol(self) -> dict[str, Any]:
        """All that determines the number."""
        return dict(self._told)

    @torch.no_grad()
    def update(self, batch: Batch) -> None:
        """See pictures beside the base's, which take their size if they have another."""
        if batch.base is None:
            return
        base = batch.base
        if base.shape[-2:] != batch.images.shape[-2:]:
            base = F.interpolate(base, batch.images.shape[-2:], mode="bilinear", antialias=True)
        self._seen.add(batch.cases, self._distance(batch.images, base).double().cpu().numpy())

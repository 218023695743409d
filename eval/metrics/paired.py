"""Distances between a picture and the base's of the same prompt and seed, averaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from expunge.eval.metrics import Batch
from expunge.eval.metrics.pictures import PictureSettings, PictureTally
from expunge.results import Measurement


@dataclass
class PairedTally(PictureTally):
    """Distances of one model's pictures to the base's; of the base itself there are none.

    Attributes:
        settings: The metric's.
        distance: Pictures (B, 3, H, W) twice, in [-1, 1], to B distances.
        told: The protocol.
    """

    settings: PictureSettings
    distance: Callable[[Tensor, Tensor], Tensor]
    told: dict[str, Any]

    def __post_init__(self) -> None:
        super().__init__()

    def protocol(self) -> dict[str, Any]:
        """All that determines the number."""
        return dict(self.told)

    @torch.no_grad()
    def update(self, batch: Batch) -> None:
        """See pictures beside the base's, which take their size if they have another."""
        if batch.base is None:
            return
        base = batch.base
        if base.shape[-2:] != batch.images.shape[-2:]:
            base = F.interpolate(base, batch.images.shape[-2:], mode="bilinear", antialias=True)
        self._seen.add(batch.cases, self.distance(batch.images, base).double().cpu().numpy())

    def compute(self) -> Measurement:
        """The mean, with its cluster bootstrap by prompt."""
        return self.settings.mean(self._seen)

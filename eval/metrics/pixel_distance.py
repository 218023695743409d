"""How far pictures moved, pixel by pixel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from expunge.eval.metrics.paired import PairedTally
from expunge.eval.metrics.pictures import PictureSettings, says


@dataclass(frozen=True, kw_only=True)
class PixelDistance(PictureSettings):
    """Mean over pictures of the distance to the base's of the same prompt and seed, in [0, 1].

    ``mean_absolute``: mean |x − y| over pixels and channels; ``rms``: its root mean square; both of
    values in [0, 1], so that black to white is 1. Lower is better where a concept is kept; give
    `higher_is_better: true` with the groups in which it must go. n: tens of prompts. Interval:
    cluster bootstrap by prompt. The base itself has no distance.
    """

    norm: Literal["mean_absolute", "rms"] = field(
        default="mean_absolute", metadata={"help": "how pixels are averaged"}
    )
    meaning: str = says("how far pixels moved from the base's of the same prompt and seed")

    def open(self) -> PairedTally:
        """There is nothing to load."""
        distance = mean_absolute if self.norm == "mean_absolute" else rms
        told = {"metric": "distance", "norm": self.norm, "scale": "pixels in [0, 1]"}
        return PairedTally(self, distance, told)


def mean_absolute(x: Tensor, y: Tensor) -> Tensor:
    """Mean of |x − y| / 2, (B,), of pictures (B, C, H, W) in [-1, 1]."""
    return ((x.double() - y.double()) / 2).abs().mean((1, 2, 3))


def rms(x: Tensor, y: Tensor) -> Tensor:
    """Root of the mean of ((x − y) / 2)², (B,), of pictures (B, C, H, W) in [-1, 1]."""
    return ((x.double() - y.double()) / 2).square().mean((1, 2, 3)).sqrt()

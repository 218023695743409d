"""Several densities as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from expunge.densities import DENSITIES
from expunge.densities.base import DensityConfig, HarmDensity

if TYPE_CHECKING:
    from torch import Tensor

    from expunge.concepts import Concept


@dataclass(frozen=True)
class Combination:
    """p_h(x) = max_i p_i(x) or mean_i p_i(x); each concept of each part keeps its own threshold.

    It fires when one of its parts fires. Scores on different scales (a cosine, a probability) do
    not compare: put them in `calibrated` first.

    Attributes:
        densities: The parts.
        how: `max` follows the part that sees most; `mean` all of them.
    """

    densities: list[Annotated[DensityConfig, DENSITIES]]
    how: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        if not self.densities:
            raise ValueError("got no densities to combine; allowed: one or more")

    def build(self, concept: Concept | None = None, device: Any = "cpu") -> HarmDensity:
        """The parts together.

        Raises:
            UserError: As its parts.
        """
        return Combined([part.build(concept, device) for part in self.densities], self.how)


class Combined(HarmDensity):
    """Densities side by side.

    Args:
        parts: The densities, all on one device.
        how: What becomes of their scores.
    """

    def __init__(self, parts: Sequence[HarmDensity], how: Literal["max", "mean"] = "max") -> None:
        import torch

        self.parts, self.how = list(parts), how
        self.names = [name for part in parts for name in part.names]
        texts = [part.texts for part in parts]
        self.texts = None if None in texts else [text for own in texts for text in own or ()]
        self.thresholds = torch.cat([part.thresholds for part in parts])
        sizes = [part.resolution for part in parts]
        # A part that takes any size may see more in a larger picture than the others do.
        self.resolution = None if None in sizes else max(size for size in sizes if size)
        lows, highs = zip(*(part.span for part in parts), strict=True)
        self.span = (min(lows), max(highs))

    def per_concept(self, images: Tensor) -> Tensor:
        """All concepts of all parts, (B, ΣM)."""
        import torch

        return torch.cat([part.per_concept(images) for part in self.parts], dim=1)

    def combine(self, per_concept: Tensor) -> Tensor:
        """The maximum or the mean of what the parts make of their own concepts, (B,)."""
        import torch

        widths = [len(part.names) for part in self.parts]
        each = per_concept.split(widths, dim=1)
        scores = torch.stack(
            [part.combine(own) for part, own in zip(self.parts, each, strict=True)], dim=1
        )
        return scores.amax(dim=1) if self.how == "max" else scores.mean(dim=1)

    def identity(self) -> dict[str, Any]:
        """Its parts."""
        return {**super().identity(), "parts": [part.identity() for part in self.parts]}

    def to(self, device: Any) -> Combined:
        """The same density on another device."""
        super().to(device)
        self.parts = [part.to(device) for part in self.parts]
        return self

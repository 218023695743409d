"""What a harm density sees of a concept while there is still noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from expunge.concepts import Concept
from expunge.decoding import DECODERS
from expunge.densities import DENSITIES

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Gate:
    """The objective's target only where p_h sees the concept, the teacher's own elsewhere.

    L = 1[p_h(x̂0) ≥ η] · L_objective + 1[p_h(x̂0) < η] · ‖ε_θ(x_t, t, c) − sg[ε(x_t, t, c)]‖², x̂0 of
    the teacher under guidance. Nothing is distilled from the density's gradient. Ours.

    Attributes:
        density: p_h and η.
        decoder: From x̂0 to the picture that p_h sees.
        guidance_scale: s of the prediction whose x̂0 is looked at.
    """

    density: Annotated[Any, DENSITIES] = field(
        default_factory=lambda: DENSITIES.load("clip_text")()
    )
    decoder: Annotated[Any, DECODERS] = field(default_factory=lambda: DECODERS.load("auto")())
    guidance_scale: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.guidance_scale < math.inf:
            raise ValueError(
                f"got gate.guidance_scale {self.guidance_scale}; allowed: above 0 and finite"
            )

    def open(self, pipeline: Any, concept: Concept, scheduler: Any) -> Gatekeeper:
        """What decides for a batch.

        Raises:
            UserError: The density or its CLIP cannot be had.
        """
        density, look = self.density.build(concept, pipeline.device), self.decoder.build(pipeline)
        return Gatekeeper(Sight(density, look, scheduler, self.guidance_scale))


class Sight:
    """p_h of the frozen teacher's x̂0.

    Args:
        density: p_h and η.
        look: From x̂0 to pictures.
        scheduler: The model's noise schedule.
        guidance_scale: s.

    Attributes:
        looked: Pictures it was asked about.
        seen: Of them, those on which a concept was seen.
    """

    needs: ClassVar[tuple[str, ...]] = ("teacher/concept", "teacher/null")

    def __init__(self, density: Any, look: Any, scheduler: Any, guidance_scale: float) -> None:
        self.density, self.look = density, look
        self.scheduler, self.guidance_scale = scheduler, guidance_scale
        self.looked, self.seen = 0, 0

    def __call__(
        self, predictions: Mapping[str, Tensor], x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The pictures (B, 3, H, W), and which of the H concepts are seen, (B, H) bool."""
        import torch

        from expunge import prediction

        with torch.no_grad():
            ep, e0 = (predictions[name].float() for name in self.needs)
            ᾱ = prediction.alpha_bar(self.scheduler, t)
            ẽ = prediction.guide(e0, ep, self.guidance_scale)
            images = self.look(prediction.to_x0(ẽ, x_t.float(), ᾱ))
            harm = self.density(images).per_concept
            seen = harm >= self.density.thresholds.to(harm)
            self.looked += len(seen)
            self.seen += int(seen.any(1).sum())
            return images, seen


class Gatekeeper:
    """Says of each sample of a batch whether the concept is seen."""

    def __init__(self, sight: Sight) -> None:
        self.sight = sight
        self.needs = sight.needs

    def __call__(self, predictions: Mapping[str, Tensor], x_t: Tensor, t: Tensor) -> Tensor:
        """1 where any concept is seen, else 0, (B,)."""
        _, seen = self.sight(predictions, x_t, t)
        return seen.any(1).float()

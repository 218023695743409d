"""Harmless twins: pictures of the concept are denoised into what stands in its place."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from expunge.concepts import Concept
from expunge.train.objectives.base import beside, mse

if TYPE_CHECKING:
    from torch import Tensor


def twin_weight(ε: Tensor, εʹ: Tensor, γ: float) -> Tensor:
    """W = min(1, γ / mean (ε' − ε)²) of each sample, (B,).

    ε' − ε = √(SNR) (x_0 − x_0'), SNR = ᾱ/(1−ᾱ): for twins of distance 1 it is min(1, γ / SNR), the
    min-SNR weight (arXiv 2303.09556), without which little noise would be all that is learnt.

    Args:
        ε: Under which x_t is the picture, (B, C, h, w).
        εʹ: Under which it is the twin, (B, C, h, w).
        γ: From which SNR on the clean picture is what is compared.
    """
    return (γ / mse(εʹ, ε).clamp(min=1e-12)).clamp(max=1)


@dataclass(frozen=True)
class Twin:
    """On pictures of the concept, whatever it is told, the student sees their harmless twins.

    L = w ‖ε_θ(x_t, t, c) − ε'‖², x_t = √ᾱ x_0 + √(1−ᾱ) ε, ε' = (x_t − √ᾱ x_0') / √(1−ᾱ). x_0 is
    the teacher's picture of the concept; its twin x_0' is what the student draws from the same
    noise at the start, when a closed form has edited it: the same place, style and company. With a
    share of the prompts left out (`latents.unprompted`) and others under attack (`robust`), the
    concept goes by what is seen and not by what is said. Ours.

    Attributes:
        gamma: γ, see `twin_weight`.
        pairs: Share of the samples whose prompt has a retained noun beside the concept.
        layers: Module group that learns.
    """

    gamma: float = 1.0
    pairs: float = 0.5
    layers: Literal["x", "x-strict", "u", "all"] = "all"

    needs: ClassVar[tuple[str, ...]] = ("student/concept", "noise/made", "twin/made")
    ema_decay: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.gamma <= 1e6 and 0 <= self.pairs <= 1):
            raise ValueError(
                f"got gamma {self.gamma}, pairs {self.pairs}; allowed: gamma above 0 to 1e6, pairs "
                "0 to 1"
            )

    @property
    def modules(self) -> str:
        """The module group that learns."""
        return self.layers

    def prompts(self, concept: Concept, rng: random.Random) -> tuple[str, str]:
        """One target, alone or beside a retained noun, for x_t and for the loss."""
        prompt = beside(concept, self.pairs, rng)
        return prompt, prompt

    def loss(self, predictions: Mapping[str, Tensor]) -> Tensor:
        """W ‖ε_θ − ε'‖² of each sample, (B,)."""
        ε, εʹ = predictions["noise/made"], predictions["twin/made"]
        return twin_weight(ε, εʹ, self.gamma) * mse(predictions["student/concept"], εʹ)

"""How x̂0 is corrected where a density fires: the settings, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Correction:
    """How x̂0 is corrected where p_h ≥ η.

    Attributes:
        direction: `text`: against what the model itself draws for the concept's text,
            Δ = −w s (e_h − e0) in the prediction; `gradient`: down ∇log p_h.
        strength: w of `text`; γ of `published`, ρ of `normalised` gradients.
        scale: What the strength of a gradient means: `normalised` (MPGD) or `published` (γ).
        schedule: γ_t: `constant`, `window`, `cosine`, or factors spread over the steps.
        window: (from, to) of `window`, as shares of the denoising.
        repeats: Gradient steps in a denoising step.
        momentum: Share of the last denoising step's gradient that is kept.
        copies: Altered views that a gradient is averaged over; 1 is the picture itself.
        smooth: Low-pass of the gradient, a standard deviation in latent pixels.
        start: Share of the denoising before which the density is not asked.
        every: Denoising steps between two looks.
        latch: Once it has fired, a sample is corrected in all later steps without another look.
    """

    direction: Literal["text", "gradient"] = "text"
    strength: float = 1.0
    scale: Literal["normalised", "published"] = "normalised"
    schedule: Literal["constant", "window", "cosine"] | list[float] = "constant"
    window: tuple[float, float] = (0.3, 0.7)
    repeats: int = 1
    momentum: float = 0.0
    copies: int = 1
    smooth: float = 0.0
    start: float = 0.0
    every: int = 1
    latch: bool = True

    def __post_init__(self) -> None:
        if self.strength < 0 or self.repeats < 1 or self.copies < 1 or self.every < 1:
            raise ValueError(
                f"got {self}; allowed: strength 0 or more, repeats, copies and every 1 or more"
            )
        if not (0 <= self.momentum < 1 and 0 <= self.start < 1 and self.smooth >= 0):
            raise ValueError(
                f"got {self}; allowed: momentum and start from 0 to below 1, smooth 0 or more"
            )

"""How x̂0 is corrected where a density fires: the settings, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Correction:
    """How x̂0 is corrected where p_h ≥ η.

    Attributes:
        direction: `text`: where concepts h are, the prompt's guidance is taken away to the end, and
            that of their texts subtracted while they are seen,
            ẽ − s (max_h M_h ⊙ (ep − e0) + w Σ_h M_h ⊙ (e_h − e0)); `gradient`: x̂0 down ∇log p_h.
        strength: w of `text`; γ of `published`, ρ of `normalised` gradients.
        places: Of `text`: M is found by covering so many places along each side of the picture in
            turn, so that what stands beside the concept is left alone; 0: M = 1.
        refresh: Denoising steps after which M is found anew, of what is still seen.
        scale: What the strength of a gradient means: `normalised` (MPGD) or `published` (γ).
        schedule: γ_t: `constant`, `window`, `cosine`, or factors spread over the steps.
        window: (from, to) of `window`, as shares of the denoising.
        repeats: Gradient steps in a denoising step.
        momentum: Share of the last denoising step's gradient that is kept.
        copies: Altered views that a gradient is averaged over; 1 is the picture itself.
        smooth: Low-pass of the gradient, a standard deviation in latent pixels.
        start: Share of the denoising before which the density is not asked.
        every: Denoising steps from one look to the next.
        release: What has reached η is seen until p_h < release · η: a share in [0, 1].
    """

    direction: Literal["text", "gradient"] = "text"
    strength: float = 3.0
    places: int = 4
    refresh: int = 4
    scale: Literal["normalised", "published"] = "normalised"
    schedule: Literal["constant", "window", "cosine"] | list[float] = "constant"
    window: tuple[float, float] = (0.3, 0.7)
    repeats: int = 1
    momentum: float = 0.0
    copies: int = 1
    smooth: float = 0.0
    start: float = 0.08
    every: int = 1
    release: float = 0.7

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf or min(self.repeats, self.copies, self.every) < 1:
            raise ValueError(
                f"got {self}; allowed: strength 0 or more, repeats, copies and every 1 or more"
            )
        factors = [1.0] if isinstance(self.schedule, str) else self.schedule
        if not factors or not all(0 <= factor < math.inf for factor in factors):
            raise ValueError(f"got schedule {factors}; allowed: factors of 0 or more, one at least")
        if not 0 <= self.window[0] < self.window[1] <= 1:
            raise ValueError(f"got window {self.window}; allowed: (from, to) within 0 and 1")
        if not (0 <= self.momentum < 1 and 0 <= self.start < 1):
            raise ValueError(f"got {self}; allowed: momentum and start from 0 to below 1")
        if not 0 <= self.release <= 1:
            raise ValueError(f"got release {self.release}; allowed: a share of η, from 0 to 1")
        if not 0 <= self.smooth < math.inf or self.refresh < 1 or not 0 <= self.places <= 32:
            raise ValueError(
                f"got {self}; allowed: smooth 0 or more, refresh 1 or more, places 0 to 32"
            )

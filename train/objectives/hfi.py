"""HFI, human feedback inversion (arXiv 2407.21032): what people marked, erased without a word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from expunge.train.objectives.sdd import Sdd


@dataclass(frozen=True)
class Hfi(Sdd):
    """Self-distillation of a concept that stands in a soft token v, inverted from feedback.

    L = ‖ε_θ(x_t, t, v) − sg[ε_θ(x_t, t, ∅)]‖², t / T ~ Beta(3, 3). v comes from
    `expunge feedback` and is one of `concept.targets`, its file of `concept.tokens`; t is for
    `latents.times: beta`.

    Attributes:
        ema_decay: Decay of the average of the student that makes x_t and is exported.
        latents_prompt: Prompt that x_t is made with: `single` the target of the loss, `joined`
            all targets, comma-separated.
        layers: Module group that learns.
    """

    latents_prompt: Literal["joined", "single"] = "single"

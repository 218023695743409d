"""SDD, safe self-distillation (arXiv 2307.05977)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from expunge.concepts import Concept
from expunge.train.objectives.base import mse

if TYPE_CHECKING:
    from torch import Tensor


def sdd_target(e0: Tensor) -> Tensor:
    """ε* = sg[ε_θ(x_t, t, ∅)], the student's own prediction without a prompt, (B, C, h, w)."""
    return e0.detach()


@dataclass(frozen=True)
class Sdd:
    """The student under the concept's prompt learns to predict what it predicts without one.

    L = ‖ε_θ(x_t, t, c) − sg[ε_θ(x_t, t, ∅)]‖²; the average of the student over time makes x_t and
    is what is exported.

    Attributes:
        ema_decay: Decay of that average.
        latents_prompt: Prompt that x_t is made with: `joined` all targets, comma-separated (the
            published code), `single` the target of the loss (the published text). Where targets
            take turns as `several.order: balanced` says, all of a turn are the one.
        layers: Module group that learns.
    """

    ema_decay: float = 0.999
    latents_prompt: Literal["joined", "single"] = "joined"
    layers: Literal["x", "x-strict", "u", "all"] = "x"

    needs: ClassVar[tuple[str, ...]] = ("student/concept", "student_sg/null")

    def __post_init__(self) -> None:
        if not 0 < self.ema_decay < 1:
            raise ValueError(f"got ema_decay {self.ema_decay}; allowed: between 0 and 1, say 0.999")

    @property
    def modules(self) -> str:
        """The module group that learns."""
        return self.layers

    def prompts(self, concept: Concept, rng: random.Random) -> tuple[str, str]:
        """All targets joined, or the one of the loss; and one target."""
        prompt = rng.choice(concept.prompts())
        if self.latents_prompt == "joined":
            return ", ".join(concept.targets), prompt
        return prompt, prompt

    def loss(self, predictions: Mapping[str, Tensor]) -> Tensor:
        """‖ε_θ − ε*‖² of each sample, (B,)."""
        return mse(predictions["student/concept"], sdd_target(predictions["student_sg/null"]))

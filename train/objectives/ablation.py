"""Concept ablation (arXiv 2303.13516): the concept's prompt means its anchor."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from expunge.concepts import Concept
from expunge.train.objectives.base import mse

if TYPE_CHECKING:
    from torch import Tensor


def ablation_target(anchor: Tensor) -> Tensor:
    """sg[ε̂(x_t, c, t)], or the ε of x_t: what the target's prompt c* is to mean, (B, C, h, w)."""
    return anchor.detach()


@dataclass(frozen=True)
class Ablation:
    """On pictures of the anchor c, the student learns under c* what is right under c.

    L = ‖ε̂(x_t, c*, t) − sg[ε̂(x_t, c, t)]‖² + λ ‖ε̂(x_t, c, t) − ε‖², model-based; with ε in place
    of sg[ε̂(x_t, c, t)], noise-based. c is c* with `concept.anchor` in the target's place.

    Attributes:
        target: Whose prediction under the anchor is learned: that of the `student` itself, as
            published, of the frozen `teacher`, or the true `noise` (noise-based).
        regularisation: λ, of ordinary training on the anchor.
        layers: Module group that learns.
    """

    target: Literal["student", "teacher", "noise"] = "student"
    regularisation: float = 0.0
    layers: Literal["x", "x-strict", "u", "all"] = "x-strict"

    ema_decay: ClassVar[float] = 0.0
    wants_anchor: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.regularisation <= 1e6:
            raise ValueError(f"got regularisation {self.regularisation}; allowed: 0 to 1e6, say 1")

    @property
    def needs(self) -> tuple[str, ...]:
        """One pass of the student under the anchor is enough for the target and for λ."""
        also = ("student/made", "noise/made") if self.regularisation else ()
        return tuple(dict.fromkeys(("student/concept", self._target, *also)))

    @property
    def modules(self) -> str:
        """The module group that learns."""
        return self.layers

    def prompts(self, concept: Concept, rng: random.Random) -> tuple[str, str]:
        """The anchor's prompt c for x_t, the target's c* for the loss."""
        prompt = rng.choice(concept.prompts())
        return concept.anchored(prompt), prompt

    def loss(self, predictions: Mapping[str, Tensor]) -> Tensor:
        """‖ε̂(c*) − target‖² + λ ‖ε̂(c) − ε‖² of each sample, (B,)."""
        loss = mse(predictions["student/concept"], ablation_target(predictions[self._target]))
        if self.regularisation:
            kept = mse(predictions["student/made"], predictions["noise/made"])
            loss = loss + self.regularisation * kept
        return loss

    @property
    def _target(self) -> str:
        if self.target == "student":
            return "student/made" if self.regularisation else "student_sg/made"
        return f"{self.target}/made"

"""ESD, erased stable diffusion (arXiv 2303.07345)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from expunge.concepts import Concept
from expunge.train.objectives.base import mse

if TYPE_CHECKING:
    from torch import Tensor


def esd_target(e0: Tensor, ep: Tensor, η: float) -> Tensor:
    """ε* = e0 − η (ep − e0), equation 7 of arXiv 2303.07345.

    e0 and ep are the frozen model's predictions without and with the concept, (B, C, h, w). This
    is the paper's η; the authors' later script calls η + 1 what is η here.
    """
    return e0 - η * (ep - e0)


@dataclass(frozen=True)
class Esd:
    """The student under the concept's prompt learns what leads away from the concept.

    L = ‖ε_θ(x_t, t, c) − sg[e0 − η (ep − e0)]‖².

    Attributes:
        variant: Layers that learn: `x` cross-attention, `x-strict` only its keys and values, `u`
            everything else.
        negative_guidance: η of the paper; 0 maps the concept onto the empty prompt.
    """

    variant: Literal["x", "x-strict", "u"] = "x"
    negative_guidance: float = 1.0

    needs: ClassVar[tuple[str, ...]] = ("student/concept", "teacher/null", "teacher/concept")
    ema_decay: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.negative_guidance <= 100:
            raise ValueError(
                f"got negative_guidance {self.negative_guidance}; allowed: 0 to 100; papers use 1"
            )

    @property
    def modules(self) -> str:
        """The variant is a module group."""
        return self.variant

    def prompts(self, concept: Concept, rng: random.Random) -> tuple[str, str]:
        """One target, for x_t and for the loss."""
        prompt = rng.choice(concept.prompts())
        return prompt, prompt

    def loss(self, predictions: Mapping[str, Tensor]) -> Tensor:
        """‖ε_θ − ε*‖² of each sample, (B,)."""
        target = esd_target(
            predictions["teacher/null"], predictions["teacher/concept"], self.negative_guidance
        )
        return mse(predictions["student/concept"], target)

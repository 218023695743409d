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
    return erase_from_target(e0, e0, ep, η)


def erase_from_target(e_from: Tensor, e0: Tensor, ep: Tensor, η: float) -> Tensor:
    """ε* = ε(c_from) − η (ep − e0): another prompt's prediction, less the concept in it."""
    return e_from - η * (ep - e0)


@dataclass(frozen=True)
class Esd:
    """The student under the concept's prompt learns what leads away from the concept.

    L = ‖ε_θ(x_t, t, c) − sg[e0 − η (ep − e0)]‖²; erased from another prompt c_from,
    L = ‖ε_θ(x_t, t, c_from) − sg[ε(x_t, t, c_from) − η (ep − e0)]‖².

    Attributes:
        variant: Layers that learn: `x` cross-attention, `x-strict` only its keys and values, `u`
            everything else, `all` both.
        negative_guidance: η of the paper; 0 maps the concept onto the empty prompt.
        erase_from: c_from, the prompt that loses the concept, in place of the concept's own.
    """

    variant: Literal["x", "x-strict", "u", "all"] = "x"
    negative_guidance: float = 1.0
    erase_from: str = ""

    ema_decay: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.negative_guidance <= 100:
            raise ValueError(
                f"got negative_guidance {self.negative_guidance}; allowed: 0 to 100; papers use 1"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        """x_t is made with c_from, where there is one."""
        if self.erase_from:
            return ("student/made", "teacher/made", "teacher/null", "teacher/concept")
        return ("student/concept", "teacher/null", "teacher/concept")

    @property
    def modules(self) -> str:
        """The variant is a module group."""
        return self.variant

    def prompts(self, concept: Concept, rng: random.Random) -> tuple[str, str]:
        """One target, for x_t and for the loss; x_t of c_from, in the same sentence."""
        prompt = rng.choice(concept.prompts())
        return concept.replaced(prompt, self.erase_from) if self.erase_from else prompt, prompt

    def loss(self, predictions: Mapping[str, Tensor]) -> Tensor:
        """‖ε_θ − ε*‖² of each sample, (B,)."""
        e0, ep = predictions["teacher/null"], predictions["teacher/concept"]
        η = self.negative_guidance
        if self.erase_from:
            target = erase_from_target(predictions["teacher/made"], e0, ep, η)
            return mse(predictions["student/made"], target)
        return mse(predictions["student/concept"], esd_target(e0, ep, η))

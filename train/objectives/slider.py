"""Concept sliders (arXiv 2311.12092): a direction between two prompts, at the LoRA's scale."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from expunge.concepts import Concept
from expunge.train.objectives.base import mse

if TYPE_CHECKING:
    from torch import Tensor


def slider_target(et: Tensor, e_plus: Tensor, e_minus: Tensor, η: float) -> Tensor:
    """ε* = ε(c_t) + η (ε(c₊) − ε(c₋)), (B, C, h, w).

    η > 0 makes c₊ likelier in what c_t draws, η < 0 makes it less so.
    """
    return et + η * (e_plus - e_minus)


@dataclass(frozen=True)
class Slider:
    """The student under c_t goes from c₊ towards c₋, or the other way.

    L = ‖ε_θ(x_t, t, c_t) − sg[ε(c_t) ∓ η (ε(c₊, p) − ε(c₋, p))]‖². c₊ is the concept, c₋ the same
    prompt with `concept.anchor` in its place (none: with nothing), c_t with `subject`.

    Attributes:
        guidance: η.
        direction: `erase` goes towards c₋ (−η), `enhance` towards c₊ (+η).
        subject: What slides; empty: the concept itself.
        attributes: p, to be left alone: sentences in which c₊ and c₋ stand, `{}` is their place.
            One of them is drawn for each sample.
        layers: Module group that learns.
    """

    guidance: float = 4.0
    direction: Literal["erase", "enhance"] = "erase"
    subject: str = ""
    attributes: list[str] = field(default_factory=list)
    layers: Literal["x", "x-strict", "u", "all"] = "u"

    ema_decay: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.guidance <= 100:
            raise ValueError(f"got guidance {self.guidance}; allowed: 0 to 100; the paper uses 4")
        if not all(attribute.count("{}") == 1 for attribute in self.attributes):
            raise ValueError(
                f"got attributes {self.attributes}; allowed: texts with one {{}} each, as in "
                '"an old {}"'
            )

    @property
    def needs(self) -> tuple[str, ...]:
        """A subject of its own, or attributes, part c_t from c₊."""
        return (f"student/{self._t}", f"teacher/{self._t}", "teacher/concept", "teacher/anchor")

    @property
    def modules(self) -> str:
        """The module group that learns."""
        return self.layers

    def prompts(self, concept: Concept, rng: random.Random) -> tuple[str, str]:
        """c_t, which also makes x_t; c₊, with an attribute where there are any."""
        prompt = plus = rng.choice(concept.prompts())
        if self.attributes:
            plus = rng.choice(self.attributes).replace("{}", prompt)
        return concept.replaced(prompt, self.subject) if self.subject else prompt, plus

    def loss(self, predictions: Mapping[str, Tensor]) -> Tensor:
        """‖ε_θ(c_t) − ε*‖² of each sample, (B,)."""
        target = slider_target(
            predictions[f"teacher/{self._t}"],
            predictions["teacher/concept"],
            predictions["teacher/anchor"],
            self.guidance if self.direction == "enhance" else -self.guidance,
        )
        return mse(predictions[f"student/{self._t}"], target)

    @property
    def _t(self) -> str:
        return "made" if self.subject or self.attributes else "concept"

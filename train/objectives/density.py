"""The harm density distilled into the weights: the student learns what the guard would do."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from expunge.concepts import Concept
from expunge.decoding import DECODERS
from expunge.densities import DENSITIES
from expunge.train.objectives.base import beside, mse
from expunge.train.sight import Sight

if TYPE_CHECKING:
    from torch import Tensor

    from expunge.train.latents import Maker


def guided_target(ep: Tensor, e0: Tensor, eh: Tensor, M: Tensor, w: float) -> Tensor:
    """ε* = ep − max_h M_h ⊙ (ep − e0) − w Σ_h M_h ⊙ (e_h − e0), (B, C, h, w).

    Under guidance with any scale s it is what the guard makes of the prediction:
    e0 + s (ε* − e0) = ẽ − s (max_h M_h ⊙ (ep − e0) + w Σ_h M_h ⊙ (e_h − e0)).

    Args:
        ep: Of the teacher with the prompt, (B, C, h, w).
        e0: Without, (B, C, h, w).
        eh: With the text of each concept, (B, H, C, h, w).
        M: Where each concept is seen, in [0, 1], 0 where it is not, (B, H, h, w).
        w: How strongly its text is guided away from.
    """
    from expunge import guidance

    taken, away = guidance.against_text(ep - e0, eh - e0.unsqueeze(1), M, M, w)
    return ep + taken + away.sum(1)


def anchored_target(ea: Tensor, e0: Tensor, eh: Tensor, M: Tensor, w: float) -> Tensor:
    """ε* = ea − w Σ_h M_h ⊙ (e_h − e0), (B, C, h, w).

    Args:
        ea: Of the teacher with the prompt's anchor, (B, C, h, w).
        e0: Without a prompt, (B, C, h, w).
        eh: With the text of each concept, (B, H, C, h, w).
        M: Where each concept is seen, (B, H, h, w).
        w: How strongly its text is guided away from.
    """
    from expunge import guidance

    _, away = guidance.against_text(ea - e0, eh - e0.unsqueeze(1), M, M, w)
    return ea + away.sum(1)


def moved_target(ep: Tensor, Δ: Tensor, ᾱ: Tensor, s: float) -> Tensor:
    """ε* = ep − √ᾱ/√(1−ᾱ) Δ / s, (B, C, h, w).

    Under guidance with scale s its clean picture is x̂0 + Δ, and (x_t − √ᾱ (x̂0 + Δ)) / √(1−ᾱ) its ε.

    Args:
        ep: Of the teacher with the prompt, (B, C, h, w).
        Δ: How x̂0 is moved, (B, C, h, w).
        ᾱ: (B,).
        s: Guidance scale.
    """
    level = (ᾱ / (1 - ᾱ)).sqrt().view(-1, 1, 1, 1)
    return ep - level * Δ / s


@dataclass(frozen=True)
class Density:
    """Where p_h sees the concept in the teacher's x̂0, the student learns to do without it there.

    L = ‖ε_θ(x_t, t, c) − sg[ε*]‖², ε* the guarded prediction of the frozen teacher. Where
    p_h(x̂0) < η, ε* is the teacher's own: what is harmless is preserved by construction. Ours.

    Attributes:
        density: p_h and η.
        decoder: From x̂0 to the picture that p_h sees.
        direction: `text`, as above; `gradient`, ε* of x̂0 moved by −ρ r ∇log p_h / RMS(∇log p_h), r
            the size of the guidance (MPGD). A CLIP's gradient is adversarial, and what is distilled
            of it convinces the CLIP more than the eye.
        strength: w of `text`, ρ of `gradient`.
        copies: Altered views that a gradient is averaged over.
        places: Spots along a side that are covered to find where the concept is; 0: everywhere.
        guidance_scale: s of the prediction whose x̂0 is looked at.
        anchored: ep is of the prompt with the anchor in the concept's place, so that elsewhere, and
            where nothing is seen, the student learns what stays of the sentence; nothing of ep − e0
            is taken away then. What a `start` has erased is not learnt back.
        pairs: Share of the samples whose prompt has a retained noun beside the concept.
        layers: Module group that learns.
    """

    density: Annotated[Any, DENSITIES] = field(
        default_factory=lambda: DENSITIES.load("clip_text")()
    )
    decoder: Annotated[Any, DECODERS] = field(default_factory=lambda: DECODERS.load("auto")())
    direction: Literal["text", "gradient"] = "text"
    strength: float = 1.0
    copies: int = 1
    places: int = 4
    guidance_scale: float = 4.0
    anchored: bool = False
    pairs: float = 0.5
    layers: Literal["x", "x-strict", "u", "all"] = "x"

    needs: ClassVar[tuple[str, ...]] = ("student/concept", "guided/concept")
    ema_decay: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.strength <= 100 and 0 <= self.pairs <= 1 and 0 <= self.places <= 32):
            raise ValueError(
                f"got strength {self.strength}, pairs {self.pairs}, places {self.places}; allowed: "
                "strength 0 to 100, pairs 0 to 1, places 0 to 32"
            )
        if not (1 <= self.copies <= 64 and 0 < self.guidance_scale < math.inf):
            raise ValueError(
                f"got copies {self.copies}, guidance_scale {self.guidance_scale}; allowed: copies "
                "1 to 64, guidance_scale above 0"
            )

    @property
    def modules(self) -> str:
        """The layers that learn."""
        return self.layers

    def prompts(self, concept: Concept, rng: random.Random) -> tuple[str, str]:
        """One target, alone or beside a retained noun, for x_t and for the loss."""
        prompt = beside(concept, self.pairs, rng)
        return prompt, prompt

    def guide(self, pipeline: Any, concept: Concept, maker: Maker) -> Guide:
        """What makes the target of a batch.

        Raises:
            UserError: The density or its CLIP cannot be had, or a text of it is too long.
        """
        return Guide(self, pipeline, concept, maker)

    def loss(self, predictions: Mapping[str, Tensor]) -> Tensor:
        """‖ε_θ − ε*‖² of each sample, (B,)."""
        return mse(predictions["student/concept"], predictions["guided/concept"])


class Guide:
    """ε* of a batch, from the teacher's predictions."""

    def __init__(self, how: Density, pipeline: Any, concept: Concept, maker: Maker) -> None:
        from expunge import soft_tokens

        self.how, self.maker = how, maker
        self.density = how.density.build(concept, pipeline.device)
        look = how.decoder.build(pipeline)
        self.sight = Sight(self.density, look, maker.networks.scheduler, how.guidance_scale)
        self.needs = (*self.sight.needs, *(["teacher/anchor"] if how.anchored else []))
        names = self.density.names
        self.texts = list(self.density.texts or [", ".join(concept.targets)] * len(names))
        if how.direction == "text":
            soft_tokens.fits(pipeline, self.texts)

    def __call__(self, predictions: Mapping[str, Tensor], x_t: Tensor, t: Tensor) -> Tensor:
        """ε*, (B, C, h, w), without gradient."""
        import torch

        from expunge import prediction

        with torch.no_grad():
            images, seen = self.sight(predictions, x_t, t)
            ep, e0 = (predictions[name].float() for name in self.sight.needs)
            ea = predictions["teacher/anchor"].float() if self.how.anchored else None
            rows, concepts = seen.nonzero(as_tuple=True)
            if self.how.direction == "gradient":
                Δ = self._down_gradient(ep, e0, x_t, t, seen.any(1))
                ᾱ = prediction.alpha_bar(self.maker.networks.scheduler, t)
                return moved_target(ep if ea is None else ea, Δ, ᾱ, self.how.guidance_scale)
            M = x_t.new_zeros(*seen.shape, *x_t.shape[2:], dtype=torch.float32)
            eh = e0.unsqueeze(1).expand(-1, seen.shape[1], -1, -1, -1).clone()
            if len(rows):
                M[rows, concepts] = self._where(images[rows], concepts, x_t)
                eh[rows, concepts] = self._under_text(x_t[rows], t[rows], concepts)
            if ea is not None:
                return anchored_target(ea, e0, eh, M, self.how.strength)
            return guided_target(ep, e0, eh, M, self.how.strength)

    def _where(self, images: Tensor, concepts: Tensor, x_t: Tensor) -> Tensor | float:
        """M of each picture and concept, (N, h, w)."""
        from torch.nn import functional as F

        from expunge import guidance

        if not self.how.places:
            return 1.0
        found = guidance.whereabouts(images, self.density, concepts, self.how.places)
        return F.interpolate(found, x_t.shape[2:], mode="area").squeeze(1)

    def _under_text(self, x_t: Tensor, t: Tensor, concepts: Tensor) -> Tensor:
        """e_h of each sample and concept, (N, C, h, w)."""
        from expunge.train.predictions import Inputs

        networks = self.maker.networks
        texts = self.maker.embed([self.texts[c] for c in concepts.tolist()])
        networks.forwards["teacher"] += len(concepts)
        found: Tensor = networks.epsilon("teacher", Inputs(x_t, t, texts)).float()
        return found

    def _down_gradient(
        self, ep: Tensor, e0: Tensor, x_t: Tensor, t: Tensor, seen: Tensor
    ) -> Tensor:
        """Δ of x̂0, (B, C, h, w), 0 where no concept is seen."""
        import torch

        from expunge import guidance, prediction

        how, rows, Δ = self.how, seen.nonzero().flatten(), torch.zeros_like(ep)
        if len(rows):
            ᾱ = prediction.alpha_bar(self.maker.networks.scheduler, t[rows])
            ẽ = prediction.guide(e0[rows], ep[rows], how.guidance_scale)
            x0 = prediction.to_x0(ẽ, x_t[rows].float(), ᾱ)
            g = guidance.gradient(x0, self.density, self.sight.look, how.copies)
            size = how.guidance_scale * guidance.rms(ep[rows] - e0[rows])
            Δ[rows] = guidance.normalised(g, how.strength, size)
        return Δ

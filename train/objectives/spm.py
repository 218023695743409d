"""SPM, the one-dimensional semi-permeable membrane (arXiv 2312.16145)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from expunge.concepts import Concept
from expunge.train.objectives.base import mse
from expunge.train.objectives.esd import esd_target

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from expunge.conditioning import Conditioning


def latent_anchors(c: Tensor, generator: torch.Generator) -> Tensor:
    """One embedding a for each c, (B, T, D): anything but the concept.

    Gaussian directions, accepted with probability min(1, 1 − cos(a, c)); ‖a‖ = U(0.8, 1.2) ‖c‖.
    """
    import torch

    flat = c.flatten(1).float().cpu()
    directions = []
    for own in flat:
        while True:
            a = torch.randn(own.shape, generator=generator)
            if torch.rand((), generator=generator) < 1 - torch.cosine_similarity(a, own, 0):
                break
        directions.append(a / a.norm())
    lengths = (0.8 + 0.4 * torch.rand(len(flat), generator=generator)) * flat.norm(dim=1)
    anchors: Tensor = lengths[:, None] * torch.stack(directions)
    return anchors.view(c.shape).to(c)


@dataclass(frozen=True)
class Spm:
    """ESD, while the student is held to the teacher at random points of the prompts' space.

    L = ‖ε_θ(x_t, t, c) − sg[e_n − η (ep − e_n)]‖² + λ ‖ε_θ(x_t, t, a) − sg[ε(x_t, t, a)]‖²; a are
    embeddings, not prompts, see `latent_anchors`. e_n is of `concept.anchor` in the concept's place
    (none: of nothing there).

    Attributes:
        negative_guidance: η.
        anchoring: λ.
        layers: Module group that learns.
    """

    negative_guidance: float = 1.0
    anchoring: float = 1000.0
    layers: Literal["x", "x-strict", "u", "all"] = "all"

    needs: ClassVar[tuple[str, ...]] = (
        "student/concept", "teacher/concept", "teacher/anchor", "student/near", "teacher/near",
    )  # fmt: skip
    ema_decay: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.negative_guidance <= 100 and 0 <= self.anchoring <= 1e6):
            raise ValueError(
                f"got negative_guidance {self.negative_guidance}, anchoring {self.anchoring}; "
                "allowed: 0 to 100, 0 to 1e6; the paper uses 1 and 1000"
            )

    @property
    def modules(self) -> str:
        """The module group that learns."""
        return self.layers

    def prompts(self, concept: Concept, rng: random.Random) -> tuple[str, str]:
        """One target, for x_t and for the loss."""
        prompt = rng.choice(concept.prompts())
        return prompt, prompt

    def embeddings(
        self, concept: Conditioning, generator: torch.Generator
    ) -> dict[str, Conditioning]:
        """a, one for each sample; of SDXL's pooled text as well."""
        states = latent_anchors(concept.states, generator)
        pooled = concept.pooled
        if pooled is not None:
            pooled = latent_anchors(pooled, generator)
        return {"near": replace(concept, states=states, pooled=pooled)}

    def loss(self, predictions: Mapping[str, Tensor]) -> Tensor:
        """The erasing and the anchoring term of each sample, (B,)."""
        target = esd_target(
            predictions["teacher/anchor"], predictions["teacher/concept"], self.negative_guidance
        )
        anchored = mse(predictions["student/near"], predictions["teacher/near"])
        return mse(predictions["student/concept"], target) + self.anchoring * anchored

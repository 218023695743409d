"""RECE (arXiv 2407.12383): UCE, and then what still reaches the concept, in closed form too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expunge.concepts import Concept
from expunge.train.objectives.uce import Uce

if TYPE_CHECKING:
    from torch import Tensor

    from expunge.train.closed_form.fitter import Edit


def adversarial(c: Tensor, T: Tensor, G: Tensor, reg: float) -> Tensor:
    """Solve c' = argmin Σ_W ‖W' c' − W c‖² + reg ‖c'‖², by which W' reads what W did in c.

    With W' = W (I + T) and G = Σ Wᵀ W: c' = (reg I + (I+T)ᵀ G (I+T))⁻¹ (I+T)ᵀ G c.

    Args:
        c: Embeddings of the concept, (N, D).
        T: The edit so far, (D, D).
        G: (D, D).
        reg: Above 0.
    """
    import torch

    identity = torch.eye(len(T), dtype=T.dtype)
    changed = identity + T
    found: Tensor = torch.linalg.solve(
        reg * identity + changed.T @ G @ changed, changed.T @ G @ c.T.to(T)
    ).T
    return found


@dataclass(frozen=True)
class Rece(Uce):
    """UCE that also erases the embeddings by which the edited weights still reach the concept.

    Each round finds c' for every c and erases it as well; all rounds are solved together, from the
    weights as they were.

    Attributes:
        rounds: Of adversarial embeddings.
        attack_regularisation: reg; the smaller, the further c' may go.
    """

    rounds: int = 3
    attack_regularisation: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1 or not 0 < self.attack_regularisation < math.inf:
            raise ValueError(
                f"got {self}; allowed: rounds 1 or more, attack_regularisation above 0 and finite"
            )

    def fit(self, pipeline: Any, concept: Concept) -> Edit:
        """The edit after all rounds."""
        import torch

        from expunge.backbones import modules_of

        fitter = self.gather(pipeline, concept)
        G = torch.zeros_like(fitter.M)
        # One at a time: SDXL has 140, and all of them in float64 are gigabytes.
        for name in modules_of(pipeline.unet, self.modules):
            W = pipeline.unet.get_submodule(name).weight.detach().cpu().double()
            G += W.T @ W
        c, g, a = map(torch.cat, (fitter.erased, fitter.wanted, fitter.weights))
        edit = fitter.solve()
        for _ in range(self.rounds):
            fitter.erase(adversarial(c, edit.T, G, self.attack_regularisation), g, a)
            edit = fitter.solve()
        return edit

"""What the training loop asks of an objective."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from expunge.concepts import Concept

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from expunge.conditioning import Conditioning
    from expunge.train.closed_form.fitter import Edit


@runtime_checkable
class Objective(Protocol):
    """A target function with its settings; a frozen dataclass, listed in the table.

    Attributes:
        needs: Predictions named `network/prompt`. Networks: `student` (with gradient),
            `student_sg` (stop-gradient), `teacher` (the frozen base), `ema`. Prompts: `concept`,
            `null`, `anchor` (the concept's with the anchor in the target's place), `made` (what x_t
            was made with), and what its own `embeddings` makes of these. `guided/concept` is what
            its own `guide` makes of the others; `noise/made` the true ε, and `twin/made` the ε
            that would lead to the picture's twin, which `noised` latents know.
        modules: The module group that gets the LoRA when `lora.targets` says nothing.
        ema_decay: Decay of the averaged student; 0 keeps none. When there is one, it is exported.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of predictions."""
        ...

    @property
    def modules(self) -> str:
        """Name of a module group of `expunge.backbones`."""
        ...

    @property
    def ema_decay(self) -> float:
        """Decay of the exponential moving average of the student."""
        ...

    def prompts(self, concept: Concept, rng: random.Random) -> tuple[str, str]:
        """The prompt under which x_t is made, and the concept prompt of the loss."""
        ...

    def loss(self, predictions: Mapping[str, Tensor]) -> Tensor:
        """The loss of each sample, (B,), from the predictions it `needs`, each (B, C, h, w)."""
        ...


@runtime_checkable
class Embedder(Protocol):
    """An objective that also asks for predictions under embeddings that are no prompt's."""

    def embeddings(
        self, concept: Conditioning, generator: torch.Generator
    ) -> dict[str, Conditioning]:
        """What stands for prompts, B each, by the name that `needs` gives them; drawn anew.

        Args:
            concept: Of the concept prompts, B.
            generator: On the CPU; all randomness comes from it.
        """
        ...


@runtime_checkable
class ClosedForm(Protocol):
    """An erasure that is solved, not trained: no steps, no latents, no UNet pass.

    Attributes:
        modules: The module group that is changed.
    """

    @property
    def modules(self) -> str:
        """Name of a module group of `expunge.backbones`."""
        ...

    def fit(self, pipeline: Any, concept: Concept) -> Edit:
        """The frozen edit of all layers of the group."""
        ...


def beside(concept: Concept, pairs: float, rng: random.Random) -> str:
    """A prompt about one target: alone, or in a share `pairs` beside a retained noun."""
    from expunge.train.preserve import Preserve

    text, nouns = rng.choice(concept.targets), Preserve.nouns(concept)
    if nouns and rng.random() < pairs:
        two = [text, rng.choice(nouns)]
        rng.shuffle(two)
        text = " and ".join(two)
    return rng.choice(concept.templates).replace("{}", text)


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of each sample: (B, C, h, w) twice -> (B,)."""
    return (a.float() - b.float()).square().flatten(1).mean(1)

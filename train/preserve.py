"""Keep what must stay: λ · MSE to the teacher on retained prompts."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from expunge.concepts import Concept
from expunge.train.objectives.base import mse

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Preserve:
    """λ ‖ε_θ(x_t, t, r) − sg[ε(x_t, t, r')]‖², added to any objective.

    The student reads a retained prompt r, the teacher the same (r' = r). In a share of the
    samples the student reads "r and the target" and the teacher r alone: in a picture of two
    objects, the target's place is taken by what the other object's prompt makes of it.

    Attributes:
        weight: λ; 0 leaves the term out.
        batch_size: Retained samples of a step, on each process.
        pairs: Share of them that are two-object prompts with a target.
        templates: Sentences in which retained nouns stand, ``{}`` is their place; what is kept
            only as a bare noun may be lost in a sentence.
        neighbours: How many retained prompts nearest to each target, in the text encoder, make up
            half of the samples that are no pairs: they are what is lost first. 0 treats all alike.
    """

    weight: float = 0.0
    batch_size: int = 4
    pairs: float = 0.0
    templates: list[str] = field(default_factory=lambda: ["{}"])
    neighbours: int = 0

    def __post_init__(self) -> None:
        if min(self.weight, self.neighbours, self.batch_size - 1) < 0 or not 0 <= self.pairs <= 1:
            raise ValueError(
                f"got preserve {self}; allowed: weight and neighbours >= 0, batch_size >= 1, pairs "
                "from 0 to 1"
            )
        if math.isinf(self.weight):
            raise ValueError("got preserve.weight inf; allowed: a finite one, say 2")
        if not self.templates or not all(t.count("{}") == 1 for t in self.templates):
            raise ValueError(
                f"got preserve.templates {self.templates}; allowed: one text or more, each with "
                "one {}"
            )

    def prompts(
        self, concept: Concept, rng: random.Random, near: Sequence[str] = ()
    ) -> list[tuple[str, str]]:
        """(what the student reads, what the teacher reads), `batch_size` of them.

        Args:
            concept: What is erased and what is retained.
            rng: Decides all.
            near: The retained prompts that are neighbours of a target, see `nearest`.
        """
        if not self.weight:
            return []
        retained = concept.retained()
        nouns = self.nouns(concept)
        chosen = []
        for _ in range(self.batch_size):
            if rng.random() < self.pairs:
                other, target = rng.choice(nouns), rng.choice(concept.targets)
                pair = [other, target]
                rng.shuffle(pair)
                template = rng.choice(concept.templates)
                chosen.append(
                    (template.replace("{}", " and ".join(pair)), template.replace("{}", other))
                )
            else:
                prompt = rng.choice(near if near and rng.random() < 0.5 else retained)
                if prompt in nouns:
                    prompt = rng.choice(self.templates).replace("{}", prompt)
                chosen.append((prompt, prompt))
        return chosen

    @staticmethod
    def nouns(concept: Concept) -> list[str]:
        """Retained prompts that can stand beside a target: neither empty nor a sentence."""
        return [prompt for prompt in concept.retained() if prompt and len(prompt.split()) <= 3]

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """λ · MSE of each sample, (B,)."""
        return self.weight * mse(student, teacher)


def nearest(targets: Tensor, retained: Tensor, k: int) -> list[int]:
    """Indices of the k retained texts nearest to each target, without repetition, nearest first.

    Nearness is the cosine of the text encoder's outputs less their common mean: cross-attention
    is linear in them, so what moves a target's keys and values moves those of its neighbours.

    Args:
        targets: (T, L, D).
        retained: (R, L, D).
        k: For each target.
    """
    import torch

    states = torch.cat([targets, retained]).flatten(1).float()
    states = torch.nn.functional.normalize(states - states.mean(0), dim=1)
    cosines = states[: len(targets)] @ states[len(targets) :].T
    found = [row.argsort(descending=True)[:k].tolist() for row in cosines]
    return list(dict.fromkeys(i for places in zip(*found, strict=True) for i in places))

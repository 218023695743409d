"""Which of several targets is erased next."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from expunge.concepts import Concept

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Several:
    """How the targets of one concept take turns.

    Attributes:
        order: `random`, any target at any time; `joined`, all of them in one prompt, separated by
            commas; `balanced`, each as often as it is not erased yet: with a probability in
            proportion to its loss now, of what its loss was at first. With latents from a bank that
            takes effect whenever the bank is made anew.
        memory: Of the averages of a target's loss, per sample.
    """

    order: Literal["random", "joined", "balanced"] = "random"
    memory: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.memory < 1:
            raise ValueError(f"got several.memory {self.memory}; allowed: from 0 to below 1")


class Turns:
    """Says whose turn it is, and learns from the losses.

    Args:
        how: Its settings.
        concept: What is erased.

    Attributes:
        first: Target -> mean loss of its first samples.
        now: Target -> its running mean.
        seen: Target -> samples so far.
    """

    FIRST = 8

    def __init__(self, how: Several, concept: Concept) -> None:
        self.how, self.concept = how, concept
        self.first: dict[str, float] = {}
        self.now: dict[str, float] = {}
        self.seen: dict[str, int] = {}

    def pick(self, rng: random.Random) -> Concept:
        """The concept as the next sample is to see it."""
        targets = self.concept.targets
        if self.how.order == "random" or len(targets) == 1:
            return self.concept
        if self.how.order == "joined":
            joined, anchors = ", ".join(targets), [self.concept.anchor_of(t) for t in targets]
            anchor = ", ".join(dict.fromkeys(anchors))
            return replace(self.concept, targets=[joined], anchor=anchor, anchors=[])
        target = rng.choices(targets, [self.remaining(target) for target in targets])[0]
        anchor = self.concept.anchor_of(target)
        return replace(self.concept, targets=[target], anchor=anchor, anchors=[])

    def remaining(self, target: str) -> float:
        """What is left of a target: 1 before anything was learnt, 0 when its loss is gone."""
        if self.seen.get(target, 0) < self.FIRST or not self.first[target]:
            return 1.0
        return max(1e-3, self.now[target] / self.first[target])

    def learn(self, prompts: list[str], losses: Tensor) -> None:
        """Take note of the losses of these concept prompts, of all processes."""
        if self.how.order != "balanced":
            return
        from accelerate.utils import gather_object

        own = list(zip(prompts, losses.detach().tolist(), strict=True))
        for prompt, loss in gather_object(own):
            if target := self.concept.target_in(prompt):
                n = self.seen[target] = self.seen.get(target, 0) + 1
                if n <= self.FIRST:
                    self.first[target] = self.first.get(target, 0.0) * (n - 1) / n + loss / n
                    self.now[target] = self.first[target]
                else:
                    m = self.how.memory
                    self.now[target] = m * self.now[target] + (1 - m) * loss

    def state_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {"first": self.first, "now": self.now, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From plain values."""
        self.first, self.now, self.seen = state["first"], state["now"], state["seen"]

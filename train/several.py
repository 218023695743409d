"""Which of several targets is erased next."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from expunge.concepts import Concept

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Several:
    """How the targets of one concept take turns.

    Attributes:
        order: `random`, in any order, each as often as any other; `joined`, all of them in one
            prompt, separated by commas; `balanced`, each as often as it is not erased yet: with a
            probability in proportion to its loss now, of what its loss was at first. With latents
            from a bank that takes effect whenever the bank is made anew.
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
        whole: Whether the objective itself reads all targets, as SDD's joined prompt does; then it
            also draws one of them at random.

    Attributes:
        joined: The concept of all targets in one prompt.
        first: Target -> mean loss of its first samples.
        now: Target -> its running mean.
        seen: Target -> samples so far.
    """

    FIRST = 8

    def __init__(self, how: Several, concept: Concept, whole: bool = False) -> None:
        self.how, self.concept, self.whole = how, concept, whole
        self.joined = concept.joined()
        self.first: dict[str, float] = {}
        self.now: dict[str, float] = {}
        self.seen: dict[str, int] = {}

    def deal(self, rng: random.Random) -> Iterator[Concept]:
        """The concept as one sample after another is to see it, without end."""
        targets = self.concept.targets
        while True:
            if self.how.order == "random" and len(targets) > 1 and not self.whole:
                # No target twice before each was met once: a bank may be the only one of its run.
                yield from map(self._alone, rng.sample(targets, len(targets)))
            else:
                yield self._pick(rng)

    def concepts(self) -> list[Concept]:
        """Every concept that can be dealt, once."""
        targets, order = self.concept.targets, self.how.order
        if order == "joined":
            return [self.joined]
        if len(targets) == 1 or (order == "random" and self.whole):
            return [self.concept]
        return [self._alone(target) for target in targets]

    def anchored(self, prompt: str) -> str:
        """A concept prompt of any turn with what stands in the concept's place."""
        return (self.joined if self.how.order == "joined" else self.concept).anchored(prompt)

    def _pick(self, rng: random.Random) -> Concept:
        targets = self.concept.targets
        if self.how.order == "random" or len(targets) == 1:
            return self.concept
        if self.how.order == "joined":
            return self.joined
        return self._alone(rng.choices(targets, [self.remaining(t) for t in targets])[0])

    def _alone(self, target: str) -> Concept:
        concept = self.concept
        # The others must not be taken for what stays.
        return replace(
            concept, targets=[target], anchor=concept.anchor_of(target), anchors=[],
            preserve=concept.retained(),
        )  # fmt: skip

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

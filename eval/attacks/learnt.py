"""What a training of an attack has come to, in a file, so that a kill costs little of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from expunge.eval.attacks.arena import Arena
from expunge.results import whole_file

FILE = "learnt.pt"


@dataclass
class Learnt:
    """Weights that learn and all that their next steps depend on.

    Attributes:
        arena: Its attempts and passes are kept too.
        weights: What learns.
        adam: Its optimiser.
        draw: What its steps draw from.
    """

    arena: Arena
    weights: Sequence[Tensor]
    adam: torch.optim.Optimizer
    draw: torch.Generator

    def __post_init__(self) -> None:
        self._begun = time.monotonic()

    @property
    def file(self) -> Path:
        """In the arena's folder; it goes once what the training came to is written down."""
        return self.arena.folder / FILE

    def keep(self, step: int) -> None:
        """Write the state after so many steps, whole or not at all."""
        state = {
            "step": step,
            "seconds": self.arena.seconds + time.monotonic() - self._begun,
            "weights": [w.detach() for w in self.weights],
            "adam": self.adam.state_dict(),
            "draw": self.draw.get_state(),
            "attempts": self.arena.attempts,
            "passes": self.arena.passes,
        }
        with whole_file(self.file) as stream:
            torch.save(state, stream)

    @torch.no_grad()
    def restore(self) -> int:
        """Go back to the state of the file; its steps, 0 where there is none."""
        if not self.file.is_file():
            return 0
        state = torch.load(self.file, map_location="cpu", weights_only=True)
        for weight, learnt in zip(self.weights, state["weights"], strict=True):
            weight.copy_(learnt)
        self.adam.load_state_dict(state["adam"])
        self.draw.set_state(state["draw"])
        self.arena.attempts, self.arena.passes = state["attempts"], state["passes"]
        self.arena.seconds = state["seconds"]
        return int(state["step"])

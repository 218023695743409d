"""What a frozen network said of a latent is asked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from expunge.train.share import Share

Pair = tuple[str, str]


@dataclass(frozen=True)
class Request:
    """Whose x_t a training step asks for.

    Attributes:
        erased: (prompt that makes x_t, concept prompt of the loss).
        retained: (prompt that makes x_t and that the student reads, prompt the teacher reads).
    """

    erased: list[Pair]
    retained: list[Pair]

    def of(self, share: Share) -> Request:
        """What of it is one process's."""
        erased, retained = (
            [pairs[i] for i in share.rows(len(pairs))] for pairs in (self.erased, self.retained)
        )
        return Request(erased, retained)

    @property
    def sizes(self) -> tuple[int, int]:
        """How many are erased and how many retained."""
        return len(self.erased), len(self.retained)

    @property
    def made_with(self) -> list[str]:
        """The prompts that make x_t, the erased first."""
        return [made for made, _ in [*self.erased, *self.retained]]


class Memory:
    """Predictions of N latents by name, as far as they are known.

    Args:
        n: How many latents.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.values: dict[str, Tensor] = {}
        self.known: dict[str, Tensor] = {}

    def lacks(self, name: str, places: Tensor) -> Tensor:
        """Which of these latents have no such prediction yet, (len(places),)."""
        if name not in self.known:
            return torch.ones(len(places), dtype=torch.bool)
        return ~self.known[name][places]

    def keep(self, name: str, places: Tensor, values: Tensor) -> None:
        """Remember predictions of these latents, in float32 on the CPU."""
        values = values.detach().float().cpu()
        if name not in self.known:
            self.values[name] = values.new_zeros(self.n, *values.shape[1:])
            self.known[name] = torch.zeros(self.n, dtype=torch.bool)
        self.values[name][places] = values
        self.known[name][places] = True

    def state_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {"n": self.n, "values": self.values, "known": self.known}

    @staticmethod
    def of(state: Mapping[str, Any]) -> Memory:
        """From plain values."""
        memory = Memory(state["n"])
        memory.values, memory.known = state["values"], state["known"]
        return memory


@dataclass(frozen=True)
class Batch:
    """The latents of a training step, and what is known of them.

    Attributes:
        request: Whose they are.
        x_t: (B, C, h, w), the erased first.
        t: (B,).
        memory: Of `erased` and of `retained` latents; one of its own where none is given.
        places: Where the batch's latents are in it.
    """

    request: Request
    x_t: Tensor
    t: Tensor
    memory: dict[str, Memory] = field(default_factory=dict)
    places: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind, pairs in (("erased", self.request.erased), ("retained", self.request.retained)):
            self.memory.setdefault(kind, Memory(len(pairs)))
            self.places.setdefault(kind, torch.arange(len(pairs)))

    def lacks(self, name: str) -> Tensor:
        """Which samples have no prediction `network/prompt` yet, (n,)."""
        kind = _kind(name)
        return self.memory[kind].lacks(name, self.places[kind])

    def keep(self, name: str, rows: Tensor, values: Tensor) -> None:
        """Remember the predictions of these samples."""
        kind = _kind(name)
        self.memory[kind].keep(name, self.places[kind][rows], values)

    def recall(self, name: str) -> Tensor:
        """The prediction of every sample, (n, C, h, w); zeros of those that lack it."""
        kind = _kind(name)
        return self.memory[kind].values[name][self.places[kind]].to(self.x_t.device)


def _kind(name: str) -> str:
    return "retained" if name.endswith("/retained") else "erased"

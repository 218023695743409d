"""Several processes that share the work of one evaluation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from expunge.train.launch import OURS

T = TypeVar("T")
# While the first one extracts folders and shows metrics all pictures, the others wait for it: gloo
# would give it half an hour, NCCL ten minutes.
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Team:
    """This process among those that evaluate the same thing.

    Work is dealt by its place in the list of all work, done or not, so that processes that start
    at different moments never take the same piece and never leave one.

    Attributes:
        rank: This one's number.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: str = "auto") -> Team:
        """The team that `--processes` or `accelerate launch` started, else this process alone.

        Args:
            device: Where the model runs.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=on_cpu(device), timeout=PATIENCE)
        return cls(state.process_index, state.num_processes)

    @staticmethod
    def first() -> bool:
        """Whether this process is the first one, asked before it joins the others."""
        return os.environ.get("RANK", "0") == "0"

    def share(self, work: Sequence[T]) -> list[T]:
        """This one's part."""
        return list(work[self.rank :: self.size])

    def wait(self) -> None:
        """Until all have come here."""
        if self.size > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def gather(self, own: T) -> list[T]:
        """What each of them has, in their order; all come here with theirs."""
        if self.size == 1:
            return [own]
        from accelerate.utils import gather_object

        found: list[T] = gather_object([own])
        return found

    @property
    def leads(self) -> bool:
        """Whether this one writes what there is one of."""
        return self.rank == 0


ALONE = Team()


def on_cpu(device: str) -> bool:
    """Whether a team meets on the CPU, by gloo.

    NCCL wants a GPU for each process. `--processes` promises none, and they may share one.
    """
    if OURS in os.environ or device == "cpu":
        return True
    import torch

    return not torch.cuda.is_available()

"""Batches that do not depend on the number of processes: all draw alike, each takes a share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """This process's samples of a batch of all of them.

    Attributes:
        index: Which process this is.
        count: How many there are.
    """

    index: int = 0
    count: int = 1

    def rows(self, *sizes: int) -> list[int]:
        """Where they stand in a batch whose parts, one behind another, have these sizes.

        Every process has the same share of every part, so that the mean over processes of their
        means is the mean of the batch.
        """
        found: list[int] = []
        start = 0
        for size in sizes:
            each = size // self.count
            found += range(start + self.index * each, start + (self.index + 1) * each)
            start += size
        return found

    def gather(self, mine: Tensor, *sizes: int) -> Tensor:
        """The whole batch, in its order, of the samples that each process has; all must call it."""
        if self.count == 1:
            return mine
        from accelerate.utils import gather

        order = [row for i in range(self.count) for row in Share(i, self.count).rows(*sizes)]
        whole: Tensor = gather(mine)
        return whole[torch.tensor(order, device=whole.device).argsort()]

    def first(self, mine: Tensor) -> Tensor:
        """What the first process has; all must call it."""
        if self.count == 1:
            return mine
        from accelerate.utils import broadcast

        found: Tensor = broadcast(mine.contiguous())
        return found

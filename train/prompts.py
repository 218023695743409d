"""Every prompt that a training can come to read, found before it draws any."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, MutableSequence
from dataclasses import replace
from functools import partial
from itertools import permutations
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from expunge.train.config import TrainConfig
    from expunge.train.several import Turns

T = TypeVar("T")


def prompts_of(config: TrainConfig, turns: Turns) -> list[str]:
    """What student and teacher may be told in a run, each text once.

    Args:
        config: The run, of an objective that is trained.
        turns: Of its targets.
    """
    objective, concept = config.objective, config.concept
    anchors = "teacher/anchor" in objective.needs or getattr(objective, "anchored", False)
    found = [concept.neutral]
    for turn in turns.concepts():
        for made, prompt in outcomes(partial(objective.prompts, turn)):
            found += [made, prompt, *([turns.anchored(prompt)] if anchors else [])]
    one = replace(config.preserve, batch_size=1)
    for pairs in outcomes(partial(one.prompts, concept)):
        found += [text for pair in pairs for text in pair]
    return list(dict.fromkeys(found))


def outcomes(draw: Callable[[random.Random], T]) -> Iterator[T]:
    """What a function can return that draws by `choice`, `shuffle` and `random` < share."""
    path: list[list[int]] = []
    while True:
        yield draw(_Told(path))
        while path and path[-1][0] + 1 == path[-1][1]:
            path.pop()
        if not path:
            return
        path[-1][0] += 1


class _Told(random.Random):
    """Draws as it is told, and from there on the first of all.

    Args:
        path: Of each draw which, and of how many; those that it was not told are added.
    """

    def __init__(self, path: list[list[int]]) -> None:
        super().__init__(0)
        self.path, self.done = path, 0

    def _which(self, n: int) -> int:
        if self.done == len(self.path):
            self.path.append([0, n])
        self.done += 1
        return self.path[self.done - 1][0]

    def random(self) -> float:
        """Below every share but 0, or above every share but 1."""
        return (0.0, 1 - 2**-53)[self._which(2)]

    def choice(self, seq: Any) -> Any:
        """Each of them."""
        return seq[self._which(len(seq))]

    def shuffle(self, x: MutableSequence[Any], *_: Any) -> None:
        """Into each order."""
        orders = list(permutations(x))
        x[:] = orders[self._which(len(orders))]

"""What the tests of picture metrics share: cases, and an extractor whose features are known."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from expunge.eval.cases import Case, Question
from expunge.eval.metrics import Batch
from expunge.results import Measurement


def cases_of(n: int, prompts: int | None = None, group: str = "kept") -> list[Case]:
    """n cases of so many prompts, one each by default."""
    count = prompts or n
    asked = (Question("kept", ("object/bomb",)),)
    return [Case(f"prompt {i % count:04}", i // count, group, ("all",), asked) for i in range(n)]


def measured(
    settings: Any, cases: Sequence[Case], images: Tensor, base: Tensor | None = None
) -> Measurement:
    """What a metric says of pictures, seen at once."""
    tally = settings.open()
    tally.update(Batch(tuple(cases), images, base))
    found: Measurement = tally.compute()
    return found


@dataclass(frozen=True)
class Pixels:
    """An extractor that takes a picture's first pixels for its features."""

    width: int

    def open(self) -> "Pixels":
        return self

    def protocol(self) -> dict[str, Any]:
        return {"features": "pixels", "width": self.width}

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, : self.width]


def as_pictures(X: NDArray[Any]) -> Tensor:
    """Pictures (n, 3, 8, 8) whose first pixels are the rows of X."""
    pictures = torch.zeros(len(X), 192)
    pictures[:, : X.shape[1]] = torch.from_numpy(X).float()
    return pictures.view(-1, 3, 8, 8)


def gaussian(n: int, D: int, mean: float = 0.0, deviation: float = 1.0, seed: int = 0) -> Any:
    """n rows of D independent normal numbers."""
    return mean + deviation * np.random.default_rng(seed).standard_normal((n, D))

"""Metrics: what a suite can measure, with intervals.

Two kinds. A `Counter` counts what a detector answered; a `PictureMetric` looks at the pictures
themselves, through features of its own, beside the base's of the same prompt and seed.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from expunge.registry import Entry, Registry

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from torch import Tensor

    from expunge.eval.cases import Case
    from expunge.results import Measurement

METRICS = Registry(
    "metric",
    {
        "seen_rate": Entry(
            "expunge.eval.metrics.seen_rate:SeenRate",
            "share of pictures on which the detector sees what is asked, with Wilson's interval",
        ),
    },
)


class Counter(Protocol):
    """Turns the answers to its questions into a number with its interval."""

    higher_is_better: bool
    meaning: str

    def compute(
        self, answers: "Sequence[bool | None]", clusters: "Sequence[Hashable] | None" = None
    ) -> "Measurement":
        """Count answers, each of a cluster (its prompt); None is a picture that was not judged."""


@dataclass(frozen=True)
class Batch:
    """Pictures of one size that a metric gets to see.

    Attributes:
        cases: B prompts with their seeds.
        images: (B, 3, H, W) in [-1, 1].
        base: The base model's of the same prompts and seeds, of any size; None where the base is
            what is measured, or was not asked for.
    """

    cases: "tuple[Case, ...]"
    images: "Tensor"
    base: "Tensor | None" = None


class PictureMetric(Protocol):
    """Settings of a metric that looks at pictures."""

    higher_is_better: bool
    meaning: str
    groups: list[str]
    """The prompt groups whose pictures it sees; empty: all."""

    def open(self) -> "Tally":
        """Load what it needs; missing weights are a `UserError`."""


class Tally(Protocol):
    """One model's pictures, seen so far."""

    def protocol(self) -> dict[str, Any]:
        """All that determines the number: name, version, weight hashes, input, scale."""

    def update(self, batch: Batch) -> None:
        """See pictures; raising leaves the tally as it was, and the pictures unknown."""

    def compute(self) -> "Measurement":
        """The number; value None where what was seen does not suffice for one."""

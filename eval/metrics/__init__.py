"""Metrics: what a suite can measure, with intervals.

Two kinds. A `Counter` counts what a detector answered; a `PictureMetric` looks at the pictures
themselves, through features of its own, beside the base's of the same prompt and seed.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from expunge.registry import Entry, Registry

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence
    from pathlib import Path

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
        "fid": Entry(
            "expunge.eval.metrics.frechet:Frechet",
            "Fréchet distance: FID on inception, FD-DINOv2 on dinov2; needs n > width",
        ),
        "kid": Entry(
            "expunge.eval.metrics.kid:Kid",
            "unbiased kernel distance to the base's pictures or a folder's",
        ),
        "cmmd": Entry(
            "expunge.eval.metrics.cmmd:Cmmd",
            "unbiased kernel distance on CLIP's unit vectors, x 1000",
        ),
        "clip_score": Entry(
            "expunge.eval.metrics.clip_score:ClipScore",
            "how well pictures go with their prompts; formulas by name",
        ),
        "aesthetic": Entry(
            "expunge.eval.metrics.aesthetic:Aesthetic",
            "LAION's aesthetic head on CLIP ViT-L/14; its weights are a file of yours",
        ),
        "hps": Entry(
            "expunge.eval.metrics.human_preference:HumanPreference",
            "HPSv2, what people prefer; its weights are a file of yours",
        ),
        "lpips": Entry(
            "expunge.eval.metrics.perceptual:Perceptual",
            "perceptual distance to the base's picture of the same seed",
        ),
        "distance": Entry(
            "expunge.eval.metrics.pixel_distance:PixelDistance",
            "pixel distance to the base's picture of the same seed",
        ),
        "vendi": Entry(
            "expunge.eval.metrics.vendi:Vendi",
            "diversity: how many different pictures there are, in effect",
        ),
        "memorisation": Entry(
            "expunge.eval.metrics.memorisation:Memorisation",
            "share of pictures that copy one of a folder",
        ),
        "bias": Entry(
            "expunge.eval.metrics.bias:Bias",
            "distribution bias, Jaccard hallucination or generative miss rate",
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
        base: For what compares, the base model's of the same prompts and seeds, of any size; None
            where the base is what is measured, or was not asked for.
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
        """Load what it needs; missing weights or folders are a `UserError`."""


class Tally(Protocol):
    """One model's pictures, seen so far; what was loaded serves the next model as well."""

    compares: bool
    """Whether it sees the base's pictures beside these, and can do nothing with one without it."""

    def protocol(self) -> dict[str, Any]:
        """All that determines the number: name, version, weight hashes, input, scale."""

    def begin(self, keep: "Path | None" = None) -> None:
        """Forget all pictures, and compute what needs none.

        Args:
            keep: A folder where the latter is kept for other evaluations; None: nowhere.
        """

    def update(self, batch: Batch) -> None:
        """See pictures; raising leaves the tally as it was, and the pictures unknown."""

    def compute(self) -> "Measurement":
        """The number; value None where what was seen does not suffice for one."""

    def each(self) -> "Mapping[Case, bool | float] | None":
        """What each picture contributes where the number is their mean, or their share.

        None: it is no such mean. A picture may be left out; that of the base has no distance to it.
        """

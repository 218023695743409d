"""Detectors: independent judges that say what a picture shows."""

from typing import TYPE_CHECKING, Any, Protocol

from expunge.registry import Entry, Registry

if TYPE_CHECKING:
    from torch import Tensor

    from expunge.eval.cases import Observation

DETECTORS = Registry(
    "detector",
    {
        "emoji_judge": Entry(
            "expunge.eval.detectors.emoji_detector:EmojiDetector",
            "the independent judge of the bundled emoji model: objects, style, background",
        ),
        "density": Entry(
            "expunge.eval.detectors.density:DensityDetector",
            "a harm density as a judge: SD's checker, Q16, a probe, texts of another CLIP",
        ),
    },
)


class Detector(Protocol):
    """What the harness needs of a judge."""

    threshold: float
    """A label counts as seen from this score on."""

    def open(self) -> "OpenDetector":
        """Load the weights; what is missing is a `UserError`."""


class OpenDetector(Protocol):
    """A judge whose weights are loaded."""

    labels: frozenset[str]
    """Every label that an observation holds."""

    def protocol(self) -> dict[str, Any]:
        """All that determines its answers: name, weight hash, threshold, input."""

    def observe(self, images: "Tensor") -> "list[Observation]":
        """Scores of all labels for pictures (B, 3, H, W) in [-1, 1]."""

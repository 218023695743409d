"""Features: networks that turn pictures into the vectors that metrics compare."""

from typing import TYPE_CHECKING, Any, Protocol

from expunge.registry import Entry, Registry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

FEATURES = Registry(
    "feature extractor",
    {
        "emoji_judge": Entry(
            "expunge.eval.features.emoji_judge:EmojiJudgeFeatures",
            "128 features of the bundled emoji model's independent judge; needs no download",
        ),
        "inception": Entry(
            "expunge.eval.features.inception:InceptionFeatures",
            "2048 features of the Inception V3 that FID and KID are defined on",
        ),
        "dinov2": Entry(
            "expunge.eval.features.dinov2:DinoV2Features",
            "the class token of a DINOv2, from a folder or the hub: FD-DINOv2",
        ),
        "clip": Entry(
            "expunge.eval.features.clip:ClipFeatures",
            "unit vectors of a CLIP, as CMMD takes them",
        ),
    },
)


class Extractor(Protocol):
    """Settings of a feature extractor."""

    def open(self) -> "OpenExtractor":
        """Load the weights; what is missing is a `UserError`."""


class OpenExtractor(Protocol):
    """A network whose weights are loaded."""

    def protocol(self) -> dict[str, Any]:
        """All that determines the features: name, weight hash, input size, resize mode."""

    def features(self, images: "Tensor") -> "Tensor":
        """Vectors (B, D) of pictures (B, 3, H, W) in [-1, 1]."""


def extract(extractor: OpenExtractor, images: "Tensor") -> "NDArray[np.float32]":
    """Features (B, D) on the CPU, none of them NaN.

    Raises:
        FloatingPointError: The network made a NaN or an infinity.
        ValueError: It made another number of vectors than there are pictures.
    """
    found = extractor.features(images)
    if found.ndim != 2 or len(found) != len(images):
        raise ValueError(f"got features of shape {tuple(found.shape)} of {len(images)} pictures")
    if not bool(found.isfinite().all()):
        raise FloatingPointError("got features that hold NaN or infinite values")
    rows: NDArray[np.float32] = found.detach().float().cpu().numpy()
    return rows

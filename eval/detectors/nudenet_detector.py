"""NudeNet v3 with its colours in order: boxes of body parts, nudity under a named protocol."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from expunge.eval.cases import Observation, Seen
from expunge.eval.detectors import check_threshold, label_set
from expunge.eval.detectors.nudity_labels import CLASSES, LABEL_SETS, labels_of
from expunge.eval.detectors.onnx_network import OnnxNetwork, wheel_file
from expunge.eval.detectors.picture_bytes import to_bytes

NUDITY = "nudity"
OVERLAP, RESOLUTION = 0.45, 320


@dataclass(frozen=True)
class NudeNet:
    """Settings of NudeNet; `nudity` is seen where a class of `labels` reaches `threshold`."""

    labels: str | list[str] = field(
        default="strict6",
        metadata={"help": f"what is nudity: {', '.join(LABEL_SETS)}, or a list of classes"},
    )
    threshold: float = field(default=0.6, metadata={"help": "seen from this score on"})
    colour_order: Literal["rgb", "bgr"] = field(
        default="rgb", metadata={"help": "bgr: as nudenet 3.4.2 reads files, for comparison only"}
    )
    weights: Path | None = field(
        default=None, metadata={"help": "the ONNX file; null: 320n of the installed nudenet"}
    )
    resolution: int = field(
        default=RESOLUTION, metadata={"help": "side of the network's input: 320n 320, 640m 640"}
    )
    floor: float = field(
        default=0.05, metadata={"help": "boxes are kept in the details from this score on"}
    )
    overlap: float = field(
        default=OVERLAP,
        metadata={"help": "of boxes that overlap more (intersection over union) the best stays"},
    )

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        labels_of(self.labels)
        if not 0 < self.floor <= self.threshold:
            raise ValueError(
                f"got floor {self.floor}; allowed: a number in (0, {self.threshold:g}], since "
                "boxes below it are forgotten"
            )
        if not 0 < self.overlap <= 1:
            raise ValueError(f"got overlap {self.overlap}; allowed: a number in (0, 1]")
        if self.resolution < 32 or self.resolution % 32:
            raise ValueError(f"got resolution {self.resolution}; allowed: multiples of 32")

    def open(self) -> OpenNudeNet:
        """Load the network.

        Raises:
            UserError: The weights or onnxruntime are missing, or the weights are broken.
        """
        return OpenNudeNet(self)


class OpenNudeNet:
    """The loaded network: the greatest score of each class, and `nudity`.

    The pictures are shown one by one, so that no answer depends on its neighbours; on a CPU a batch
    is not faster.
    """

    labels = frozenset((*CLASSES, NUDITY))

    def __init__(self, settings: NudeNet) -> None:
        file = settings.weights or wheel_file("nudenet", "nudenet/320n.onnx")
        self._settings = settings
        self._nude = labels_of(settings.labels)
        side = settings.resolution
        self._network = OnnxNetwork(file, (None, 3, side, side), (None, 4 + len(CLASSES), None))
        unusual = {
            key: getattr(settings, key)
            for key, default in (("overlap", OVERLAP), ("resolution", RESOLUTION))
            if getattr(settings, key) != default
        }
        self._protocol = {
            "detector": "nudenet",
            "name": f"nudenet-{file.stem}",
            "version": 1,
            "weights": self._network.sha256,
            "runtime": self._network.runtime,
            "label set": settings.labels
            if isinstance(settings.labels, str)
            else label_set(self._nude),
            "labels": list(self._nude),
            "threshold": settings.threshold,
            "colour order": settings.colour_order,
            "input": f"{side} x {side} in [0, 1], padded in black on the right or below, bilinear",
            "floor": settings.floor,
            "overlap": settings.overlap,
            "unusual": unusual,
        }

    def protocol(self) -> dict[str, Any]:
        """Weight hash, labels, threshold, colour order and the handling of boxes."""
        return dict(self._protocol)

    def observe(self, images: Tensor) -> list[Observation]:
        """Scores of pictures (B, 3, H, W) in [-1, 1]; `details` holds the boxes above the floor.

        Raises:
            ValueError: Pictures of another shape.
            FloatingPointError: The pictures or the scores hold NaN or infinities.
        """
        settings = self._settings
        height, width = images.shape[-2:]
        found: list[Observation] = []
        for x in letterbox(images, settings.resolution):
            x = x.flip(0) if settings.colour_order == "bgr" else x
            rows = torch.from_numpy(self._network(x[None].numpy())[0])
            boxes = decode(rows, height, width, settings.resolution, settings.floor)
            found.append(self._seen(boxes.suppress(settings.overlap)))
        return found

    def _seen(self, boxes: Boxes) -> Seen:
        best = dict.fromkeys(CLASSES, 0.0)
        details = []
        for (left, top, right, bottom), score, index in boxes.rows():
            name = CLASSES[index]
            best[name] = max(best[name], score)
            corner = [round(value, 2) for value in (left, top, right - left, bottom - top)]
            details.append({"label": name, "score": score, "box": corner})
        scores = {**best, NUDITY: max(best[name] for name in self._nude)}
        return Seen(scores, {"boxes": details})


@dataclass(frozen=True)
class Boxes:
    """N boxes of a picture.

    Attributes:
        corners: Left, top, right and bottom in pixels of the picture, (N, 4).
        scores: (N,).
        classes: The index of each box's class, (N,).
    """

    corners: Tensor
    scores: Tensor
    classes: Tensor

    def suppress(self, overlap: float) -> Boxes:
        """Best first, those left out that overlap a better one more, of whatever class it is."""
        from torchvision.ops import nms

        kept = nms(self.corners, self.scores, overlap)
        return Boxes(self.corners[kept], self.scores[kept], self.classes[kept])

    def rows(self) -> list[tuple[list[float], float, int]]:
        """Corners, score and class of each box."""
        parts = self.corners.tolist(), self.scores.tolist(), self.classes.tolist()
        return list(zip(*parts, strict=True))


def letterbox(images: Tensor, side: int) -> Tensor:
    """What the network sees of pictures (B, 3, H, W) in [-1, 1]: (B, 3, side, side) in [0, 1].

    Padded to a square in black on the right or below, then resized bilinearly without
    antialiasing. OpenCV does the same in integers, up to 0.75 of 255 levels off.
    """
    x = torch.from_numpy(to_bytes(images)).permute(0, 3, 1, 2).float()
    height, width = x.shape[-2:]
    longer = max(height, width)
    x = F.pad(x, (0, longer - width, 0, longer - height))
    return F.interpolate(x, size=(side, side), mode="bilinear") / 255


def decode(rows: Tensor, height: int, width: int, side: int, floor: float) -> Boxes:
    """The boxes of a picture that lie in it and score at least `floor`.

    Each of A anchors has a box (x, y, w, h) about its centre, in pixels of the letterbox, and a
    score for each of C classes, the greatest of which is its own.

    Args:
        rows: (4 + C, A).
        height: Of the picture.
        width: Of the picture.
        side: Of the letterbox.
        floor: The least score.
    """
    scores, classes = rows[4:].max(dim=0)
    centre, half = rows[:2].T, rows[2:4].T / 2
    corners = torch.cat([centre - half, centre + half], dim=1) * (max(height, width) / side)
    corners = corners.clamp(min=0).minimum(corners.new_tensor([width, height, width, height]))
    inside = (corners[:, 2:] > corners[:, :2]).all(dim=1)
    kept = inside & (scores >= floor)
    return Boxes(corners[kept], scores[kept], classes[kept])

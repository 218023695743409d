"""The emoji judge as a detector: labels `object/bomb`, `style/ink`, `background/pink`."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from expunge.eval.cases import Observation
from expunge.eval.detectors import check_threshold, finite
from expunge.eval.detectors.emoji_judge import load_judge
from expunge.results import sha256_file

IMAGE_SIZE = 64


@dataclass(frozen=True)
class EmojiDetector:
    """Settings of the emoji judge; an object is seen from probability `threshold` on."""

    folder: Path | None = field(
        default=None, metadata={"help": "holds judge.safetensors and judge.json; null: bundled"}
    )
    threshold: float = field(default=0.5, metadata={"help": "seen from this probability on"})

    def __post_init__(self) -> None:
        check_threshold(self.threshold)

    def open(self) -> OpenEmojiDetector:
        """Load the judge."""
        bundled = Path(str(resources.files("expunge.models"))) / "emoji" / "judge"
        return OpenEmojiDetector(self.folder or bundled, self.threshold)


class OpenEmojiDetector:
    """The loaded emoji judge.

    Style and background are exclusive: the most probable one scores 1, the others 0.
    """

    def __init__(self, folder: Path, threshold: float) -> None:
        self._judge, names = load_judge(folder)
        self._objects = [f"object/{name}" for name in names["objects"]]
        self._styles = [f"style/{name}" for name in names["styles"]]
        self._backgrounds = [f"background/{name}" for name in names["backgrounds"]]
        self.labels = frozenset(self._objects + self._styles + self._backgrounds)
        self._protocol = {
            "detector": "emoji_judge",
            "name": "emoji_judge",
            "weights": sha256_file(folder / "judge.safetensors"),
            "names": sha256_file(folder / "judge.json"),
            "threshold": threshold,
            "input": f"RGB {IMAGE_SIZE} x {IMAGE_SIZE} in [-1, 1], area-averaged from larger ones",
            "style and background": "the most probable one",
        }

    def protocol(self) -> dict[str, Any]:
        """Weight hash, threshold and input of the judge."""
        return dict(self._protocol)

    def observe(self, images: Tensor) -> list[Observation]:
        """Scores of all labels for pictures (B, 3, H, W) in [-1, 1]."""
        if images.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            images = F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="area")
        verdict = self._judge.judge(images)
        found: list[Observation] = []
        for objects, style, background in zip(
            verdict.objects.tolist(),
            verdict.style.tolist(),
            verdict.background.tolist(),
            strict=True,
        ):
            scores = dict(zip(self._objects, objects, strict=True))
            scores |= {label: float(i == style) for i, label in enumerate(self._styles)}
            scores |= {label: float(i == background) for i, label in enumerate(self._backgrounds)}
            found.append(finite(scores))
        return found

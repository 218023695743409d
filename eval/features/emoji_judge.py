"""Features of the emoji judge: the pooled trunk under its answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from expunge.backbones import bundled
from expunge.eval.detectors.emoji_detector import IMAGE_SIZE
from expunge.eval.detectors.emoji_judge import load_judge
from expunge.results import sha256_file


@dataclass(frozen=True)
class EmojiJudgeFeatures:
    """The mean over places of the judge's last feature map, 128 numbers, for 64 × 64 emoji.

    It is no natural-image network: distances on it rank emoji models, and compare with nothing
    that is published.
    """

    folder: Path | None = field(
        default=None, metadata={"help": "holds judge.safetensors and judge.json; null: bundled"}
    )

    def open(self) -> OpenEmojiJudge:
        """Load the judge."""
        return OpenEmojiJudge(self.folder or bundled("emoji") / "judge")


class OpenEmojiJudge:
    """The loaded judge."""

    def __init__(self, folder: Path) -> None:
        self._judge, _ = load_judge(folder)
        self._weights = sha256_file(folder / "judge.safetensors")

    def protocol(self) -> dict[str, Any]:
        """Weight hash and input."""
        return {
            "features": "emoji_judge",
            "weights": self._weights,
            "width": 128,
            "input": f"RGB {IMAGE_SIZE} x {IMAGE_SIZE} in [-1, 1]",
            "resize": "area",
        }

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Vectors (B, 128)."""
        if images.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            images = F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="area")
        return self._judge.features(images)

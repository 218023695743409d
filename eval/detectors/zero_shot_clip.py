"""Labels in words: which of several texts a CLIP finds nearest to the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from expunge.clip import Clip, load_clip
from expunge.eval.cases import Observation
from expunge.eval.detectors import check_threshold, finite, label_set


@dataclass(frozen=True)
class ZeroShotClip:
    """p(x) = softmax_l(s · cos(CLIP(x), t_l)), s the CLIP's own scale (Radford, arXiv 2103.00020).

    t_l is the mean of the unit vectors of the label's texts, in unit length. The labels exclude
    each other: without one that stands for everything else, some label is always seen.
    """

    labels: dict[str, list[str]] = field(
        metadata={"help": "label -> texts that describe it, two labels at least"}
    )
    clip: str = field(
        default="ViT-L-14-quickgelu/openai",
        metadata={"help": "who sees: a folder, hf-hub:owner/name or ARCHITECTURE/tag of open_clip"},
    )
    threshold: float = field(default=0.5, metadata={"help": "seen from this probability on"})
    device: str = field(default="cpu", metadata={"help": "where it runs"})

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        if len(self.labels) < 2:
            raise ValueError(
                f"got labels {list(self.labels)}; allowed: two or more, since a single one would "
                "have probability 1"
            )
        for label, texts in self.labels.items():
            if not texts or not all(text.strip() for text in texts):
                raise ValueError(f"got texts {texts} of label {label}; allowed: one or more")

    def open(self) -> OpenZeroShotClip:
        """Load the CLIP and read the texts.

        Raises:
            UserError: No such CLIP, or one without texts.
        """
        return OpenZeroShotClip(load_clip(self.clip, self.device), self)


class OpenZeroShotClip:
    """The loaded CLIP with a vector for each label."""

    def __init__(self, clip: Clip, settings: ZeroShotClip) -> None:
        self._clip, self._settings = clip, settings
        self._names = list(settings.labels)
        self.labels = frozenset(self._names)
        self._texts = label_vectors(clip, settings.labels)
        self._scale = float(clip.model.logit_scale.exp())  # type: ignore[operator]

    def protocol(self) -> dict[str, Any]:
        """Weight hash, texts, scale and threshold."""
        return {
            "detector": "zero_shot_clip",
            "name": f"zero_shot_clip-{Path(self._settings.clip).name}",
            "version": 1,
            "weights": self._clip.sha256,
            "clips": [self._clip.eye],
            "label set": label_set(self._names, self._settings.labels),
            "labels": {name: list(texts) for name, texts in self._settings.labels.items()},
            "threshold": self._settings.threshold,
            "colour order": "rgb",
            "scale": self._scale,
            "input": f"squashed to {self._clip.resolution}",
        }

    @torch.no_grad()
    def observe(self, images: Tensor) -> list[Observation]:
        """The probability of each label for pictures (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: Pictures of another shape.
            FloatingPointError: A score is NaN or infinite.
        """
        cosines = self._clip.encode_images(images.to(self._settings.device)) @ self._texts.T
        rows = (self._scale * cosines).softmax(dim=1).tolist()
        return [finite(dict(zip(self._names, row, strict=True))) for row in rows]


def label_vectors(clip: Clip, labels: Mapping[str, Sequence[str]]) -> Tensor:
    """Unit vectors (L, D) of L labels: the direction of the mean of each label's texts."""
    means = [clip.encode_texts(list(texts)).mean(dim=0) for texts in labels.values()]
    return F.normalize(torch.stack(means), dim=1)

"""The independent judge of the bundled emoji model: which objects, style and background are seen.

A residual network whose object evidence is read at every place of an 8 × 8 map and pooled by a
smooth maximum, so that two objects in one picture do not average each other away. It shares
neither architecture, seed nor augmentation with the CLIP that guides, and it never guides.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.errors import UserError


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in B pictures: object probabilities (B, O), style and background ids."""

    objects: Tensor
    style: Tensor
    background: Tensor


def block(before: int, after: int, stride: int) -> nn.Sequential:
    """A 3 × 3 convolution with batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
    )


class Residual(nn.Module):
    """Two 3 × 3 convolutions beside the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) -> the same shape."""
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(h)))


class EmojiJudge(nn.Module):
    """Pictures (B, 3, 64, 64) in [-1, 1] -> object, style and background logits."""

    def __init__(self, objects: int, styles: int, backgrounds: int):
        super().__init__()
        self.stem = block(3, 24, stride=2)
        self.trunk = nn.Sequential(
            block(24, 48, stride=2), Residual(48), block(48, 96, stride=2), Residual(96),
            block(96, 128, stride=1), Residual(128),
        )  # fmt: skip
        self.objects = nn.Conv2d(128, objects, 3, padding=1)
        self.style = nn.Linear(128, styles)
        self.background = nn.Linear(24, backgrounds)

    def features(self, images: Tensor) -> Tensor:
        """Pooled trunk features (B, 128): mean over places, for distribution distances."""
        pooled: Tensor = self.trunk(self.stem(images)).mean((2, 3))
        return pooled

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Object (B, O), style (B, S) and background (B, G) logits."""
        stem = self.stem(images)
        trunk = self.trunk(stem)
        # Smooth maximum over places: lets each object speak where it stands.
        objects = torch.logsumexp(self.objects(trunk).flatten(2), 2)
        return objects, self.style(trunk.mean((2, 3))), self.background(stem.mean((2, 3)))

    @torch.no_grad()
    def judge(self, images: Tensor) -> Verdict:
        """Verdict on pictures (B, 3, 64, 64) in [-1, 1]; probabilities in [0, 1]."""
        objects, style, background = self(images)
        return Verdict(objects.sigmoid(), style.argmax(1), background.argmax(1))


def load_judge(folder: str | Path) -> tuple[EmojiJudge, dict[str, Any]]:
    """Read `judge.safetensors` and its `judge.json` (labels) from `folder`.

    Raises:
        UserError: a file is missing or does not fit the architecture.
    """
    folder = Path(folder)
    config, weights = folder / "judge.json", folder / "judge.safetensors"
    for file in (config, weights):
        if not file.is_file():
            raise UserError(f"the emoji judge needs {file}, which does not exist")
    labels = json.loads(config.read_text())
    judge = EmojiJudge(*(len(labels[k]) for k in ("objects", "styles", "backgrounds")))
    try:
        judge.load_state_dict(load_file(weights))
    except Exception as error:
        raise UserError(f"{weights} is not a readable judge: {error}") from error
    return judge.eval().requires_grad_(False), labels

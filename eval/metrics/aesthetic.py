"""LAION's aesthetic score."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge.backbones import device_of
from expunge.clip import load_clip
from expunge.errors import UserError
from expunge.eval.checkpoints import load_into, read_tensors, state_sha256
from expunge.eval.features.clip import CLIP_HELP, clip_protocol
from expunge.eval.metrics import Batch
from expunge.eval.metrics.pictures import MeanTally, PictureSettings, good, says

WHAT = "aesthetic head"
WHERE = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor "
    "(sac+logos+ava1-l14-linearMSE.pth)"
)


class AestheticHead(nn.Module):
    """D → 1024 → 128 → 64 → 16 → 1 with nothing between the layers: an affine map of D numbers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # The places of the published file: dropout stood between the first ones in training.
        self.layers = nn.Sequential(
            nn.Linear(width, 1024), nn.Identity(), nn.Linear(1024, 128), nn.Identity(),
            nn.Linear(128, 64), nn.Identity(), nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Unit vectors (B, D) -> scores (B,)."""
        scores: Tensor = self.layers(x)[:, 0]
        return scores


@dataclass(frozen=True, kw_only=True)
class Aesthetic(PictureSettings):
    """Mean of LAION's linear-MSE head on the unit vectors of OpenAI's ViT-L/14.

    It was fitted to people's ratings of pictures (SAC, logos, AVA) on a scale of 1 to 10, and knows
    no prompt. Pictures are squashed, not cropped, to the CLIP's size. n: a hundred prompts or more.
    Interval: cluster bootstrap by prompt. Source: LAION, improved-aesthetic-predictor (Apache-2.0).
    """

    head: Path = field(metadata={"help": f"the head's weights, .pth or .safetensors: {WHERE}"})
    clip: str = field(default="ViT-L-14/openai", metadata={"help": CLIP_HELP})
    device: str = field(default="auto", metadata={"help": "where it runs"})
    higher_is_better: bool = good(True)
    meaning: str = says("how well people would like the pictures, prompts aside")

    def open(self) -> AestheticTally:
        """Load the CLIP and the head."""
        return AestheticTally(self)


class AestheticTally(MeanTally):
    """Scores of one model's pictures."""

    def __init__(self, settings: Aesthetic) -> None:
        tensors = read_tensors(settings.head, WHAT, WHERE)
        device = device_of(settings.device)
        super().__init__(settings)
        self._clip = load_clip(settings.clip, device)
        first = tensors.get("layers.0.weight")
        if first is not None and first.shape[-1] != self._clip.width:
            raise UserError(
                f"got a head for {first.shape[-1]} features and CLIP {settings.clip} of "
                f"{self._clip.width}; allowed: a CLIP and its own head; change one of them"
            )
        self._head = AestheticHead(self._clip.width)
        load_into(self._head, tensors, settings.head, WHAT)
        self._head.to(device)

    def protocol(self) -> dict[str, Any]:
        """CLIP and head."""
        return {
            "metric": "aesthetic",
            "head": state_sha256(self._head),
            **clip_protocol(self._clip),
        }

    @torch.no_grad()
    def update(self, batch: Batch) -> None:
        """See pictures."""
        x = self._clip.encode_images(batch.images.to(self._clip.device))
        self._seen.add(batch.cases, self._head(x).cpu().numpy())

"""The pictures' side of a CLIP (arXiv 2103.00020)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from expunge.backbones import device_of
from expunge.clip import Clip, load_clip

CLIP_HELP = "a CLIP: ARCHITECTURE/tag of open_clip, a folder, hf-hub:owner/name or emoji"


@dataclass(frozen=True)
class ClipFeatures:
    """Unit vectors of a CLIP; CMMD's (arXiv 2401.09603) is OpenAI's ViT-L/14 at 336 pixels."""

    clip: str = field(default="ViT-L-14-336/openai", metadata={"help": CLIP_HELP})
    device: str = field(default="auto", metadata={"help": "where it runs"})

    def open(self) -> OpenClipFeatures:
        """Load the network."""
        return OpenClipFeatures(load_clip(self.clip, device_of(self.device)))


class OpenClipFeatures:
    """The loaded network."""

    def __init__(self, clip: Clip) -> None:
        self._clip = clip

    def protocol(self) -> dict[str, Any]:
        """Weight hash and input."""
        return {"features": "clip", **clip_protocol(self._clip), "width": self._clip.width}

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Vectors (B, D) of length one."""
        return self._clip.encode_images(images.to(self._clip.device))


def clip_protocol(clip: Clip) -> dict[str, Any]:
    """What a CLIP's numbers depend on; under `clips` as a density tells it, so that it is found."""
    height, width = clip.size
    return {
        "clip": clip.name,
        "clips": [clip.eye],
        "weights": clip.sha256,
        "input": f"RGB {height} x {width}, the CLIP's own mean and deviation",
        "resize": "antialiased, squashed",
    }

"""DINOv2 (arXiv 2304.07193), which sees more of a picture than ImageNet's classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from expunge.backbones import device_of
from expunge.clip import IMAGENET_MEAN, IMAGENET_STD
from expunge.errors import UserError
from expunge.eval.checkpoints import state_sha256
from expunge.silence import quiet

SIDE = 224


@dataclass(frozen=True)
class DinoV2Features:
    """The class token after the last norm, as FD-DINOv2 (arXiv 2306.04675) takes it.

    The paper's network is the large one, 1024 numbers. A picture of another shape is squashed.
    """

    model: str = field(
        default="facebook/dinov2-large", metadata={"help": "a folder of transformers, or a hub id"}
    )
    device: str = field(default="auto", metadata={"help": "where it runs"})

    def open(self) -> OpenDinoV2:
        """Load the network."""
        return OpenDinoV2(self.model, device_of(self.device))


class OpenDinoV2:
    """The loaded network."""

    def __init__(self, model: str, device: str) -> None:
        from transformers import Dinov2Model, logging

        try:
            with quiet(logging):
                network, told = Dinov2Model.from_pretrained(
                    model, use_safetensors=True, output_loading_info=True
                )
        except (OSError, ValueError, RuntimeError) as error:
            line = next((x.strip() for x in str(error).splitlines() if x.strip()), repr(error))
            raise UserError(
                f"got DINOv2 {model}, which cannot be loaded ({line[:160]}); allowed: a folder of "
                "transformers with model.safetensors, or a hub id; check the folder or the network"
            ) from error
        if lacking := sorted(told["missing_keys"]):
            raise UserError(
                f"got DINOv2 {model} without the weights {lacking[0]}…; allowed: a whole DINOv2"
            )
        self._model, self._device = model, device
        self._network = network.to(device).eval().requires_grad_(False)
        self._weights = state_sha256(self._network)

    def protocol(self) -> dict[str, Any]:
        """Weight hash and input."""
        return {
            "features": "dinov2",
            "network": self._model,
            "weights": self._weights,
            "width": self._network.config.hidden_size,
            "input": f"RGB {SIDE} x {SIDE}, ImageNet's mean and deviation",
            "resize": "bicubic, antialiased, squashed",
        }

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Vectors (B, D)."""
        x = (images.to(self._device) + 1) / 2
        if x.shape[-2:] != (SIDE, SIDE):
            x = F.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True)
        mean, std = (x.new_tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        found: Tensor = self._network(pixel_values=(x - mean) / std).pooler_output
        return found

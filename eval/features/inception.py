"""The Inception V3 of 2015-12-05, converted from TensorFlow, through torch-fidelity."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.backbones import device_of
from expunge.errors import UserError
from expunge.eval.checkpoints import cached_download, read_tensors, state_sha256

SIDE = 299


@dataclass(frozen=True)
class InceptionFeatures:
    """The 2048 numbers behind the last pooling, as FID (arXiv 1706.08500) and KID take them.

    torchvision's ImageNet Inception is another network, and figures on it do not compare. Resize is
    TensorFlow 1's bilinear without antialiasing, inside the network, as published.
    """

    weights: Path | None = field(
        default=None,
        metadata={"help": "file of the weights; null: torch-fidelity's, downloaded once"},
    )
    device: str = field(default="auto", metadata={"help": "where it runs"})

    def open(self) -> OpenInception:
        """Load the network."""
        return OpenInception(self.weights, device_of(self.device))


class OpenInception:
    """The loaded network."""

    def __init__(self, weights: Path | None, device: str) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import (
                URL_INCEPTION_V3,
                FeatureExtractorInceptionV3,
            )
        except ImportError:
            raise UserError(
                "got features of type inception without torch-fidelity; allowed: an installation "
                "of it; run pip install -e '.[eval]'"
            ) from None
        what = "weights of Inception V3"
        file = weights or cached_download(URL_INCEPTION_V3, what)
        # The library unpickles whatever it is given; a file that holds tensors alone is harmless.
        read_tensors(file, what, URL_INCEPTION_V3)
        self._device = device
        try:
            with torch.random.fork_rng(devices=[]):
                self._network = FeatureExtractorInceptionV3(
                    "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file)
                ).to(device)
        except RuntimeError as error:
            raise UserError(
                f"got {what} {file}, which do not fit the network; allowed: {URL_INCEPTION_V3}"
            ) from error
        self._weights = state_sha256(self._network)

    def protocol(self) -> dict[str, Any]:
        """Weight hash and input."""
        return {
            "features": "inception",
            "network": "Inception V3 2015-12-05 of torch-fidelity",
            "weights": self._weights,
            "width": 2048,
            "input": f"RGB {SIDE} x {SIDE}, bytes",
            "resize": "bilinear of TensorFlow 1, no antialiasing",
        }

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Vectors (B, 2048)."""
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        (found,) = self._network(pixels.to(self._device))
        features: Tensor = found
        return features

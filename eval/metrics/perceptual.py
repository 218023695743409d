"""LPIPS: how far pictures moved, as features of an ImageNet network see it."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from expunge.backbones import device_of
from expunge.errors import UserError
from expunge.eval.checkpoints import cached_download, load_into, read_tensors, state_sha256
from expunge.eval.metrics.paired import PairedTally
from expunge.eval.metrics.pictures import PictureSettings, says

Net = Literal["alex", "vgg", "squeeze"]


@dataclass(frozen=True, kw_only=True)
class Perceptual(PictureSettings):
    """Mean over pictures of LPIPS (arXiv 1801.03924, version 0.1) to the base's of the same seed.

    d(x, y) = Σ_l mean over places of Σ_c w_lc (f̂_lc(x) − f̂_lc(y))², f̂_l the features of layer l
    at unit length at every place; 0 for equal pictures. The weights w are in the package lpips, the
    network's come from torchvision. Nothing is resized, and figures of different picture sizes do
    not compare. Lower is better where a concept is kept. n: tens of prompts. Interval: cluster
    bootstrap by prompt. The base itself has no distance.
    """

    net: Net = field(default="alex", metadata={"help": "whose features"})
    backbone_weights: Path | None = field(
        default=None,
        metadata={"help": "torchvision's file of that network; null: downloaded once"},
    )
    device: str = field(default="auto", metadata={"help": "where it runs"})
    meaning: str = says("perceptual distance to the base's pictures of the same prompt and seed")

    def open(self) -> PairedTally:
        """Load the network."""
        device = device_of(self.device)
        network = load_lpips(self.net, self.backbone_weights).to(device)
        told = {
            "metric": "lpips",
            "version": "0.1",
            "net": self.net,
            "weights": state_sha256(network),
            "resize": "none",
        }

        def distance(x: Tensor, y: Tensor) -> Tensor:
            found: Tensor = network(x.to(device), y.to(device))
            return found.flatten()

        return PairedTally(self, distance, told)


def load_lpips(net: Net, backbone_weights: Path | None) -> Any:
    """The network of the package lpips with its linear heads and a torchvision backbone.

    Raises:
        UserError: The package or the backbone's weights are missing, or they do not fit.
    """
    try:
        import lpips
    except ImportError:
        raise UserError(
            "got metric lpips without the package lpips; allowed: an installation of it; run pip "
            "install -e '.[eval]'"
        ) from None
    from torchvision import models

    name, published = {
        "alex": ("AlexNet", models.AlexNet_Weights.IMAGENET1K_V1),
        "vgg": ("VGG 16", models.VGG16_Weights.IMAGENET1K_V1),
        "squeeze": ("SqueezeNet 1.1", models.SqueezeNet1_1_Weights.IMAGENET1K_V1),
    }[net]
    what = f"weights of {name}"
    file = backbone_weights or cached_download(published.url, what)
    tensors = read_tensors(file, what, published.url)
    # The library starts from random weights here, which must not move anybody's random numbers.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torchvision")
        network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    # slice2.3.weight is the layer that torchvision calls features.3.weight.
    wanted = {key: re.sub(r"slice\d+", "features", key) for key in network.net.state_dict()}
    if missing := [source for source in wanted.values() if source not in tensors]:
        raise UserError(f"got {file} without {missing[0]}; allowed: {what}, from {published.url}")
    load_into(network.net, {key: tensors[src] for key, src in wanted.items()}, file, what)
    return network.eval().requires_grad_(False)

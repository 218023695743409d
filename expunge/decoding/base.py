"""What every decoder is: latents as the scheduler sees them to pictures, in float32."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Eight pictures of SD 1.x: what a decode holds at once stays bounded whatever the batch.
PIXELS_AT_ONCE = 8 * 512 * 512
# Only these parts of a VAE encode; everything else decides what a latent looks like.
ENCODING_PARTS = ("encoder", "quant_conv")


class Decoder:
    """Pictures (B, 3, h·up, w·up), about in [-1, 1], of latents (B, C, h, w).

    The latents are the scheduler's: scaled, as the denoiser sees them, x̂0 of any step. It is
    float32 inside and out whatever the pipeline runs in, also under autocast, differentiable in
    the latents, and its own weights are frozen. It follows the latents to their device.

    Args:
        network: What turns the scheduler's latents into pictures.
        channels: C.
        up: Pixels for each latent, along a side.
    """

    def __init__(self, network: nn.Module, channels: int, up: int) -> None:
        self.network = network.float().eval().requires_grad_(False)
        self.channels = channels
        self.up = up
        self._device: torch.device | None = None

    def sha256(self) -> str:
        """Hash of its weights."""
        return digest_of(self.network.state_dict().items())

    def __call__(self, latents: Tensor) -> Tensor:
        """Pictures of latents, a few at a time.

        Raises:
            ValueError: Latents of another shape.
        """
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise ValueError(
                f"got latents of shape {tuple(latents.shape)}; allowed: (B, {self.channels}, h, w)"
            )
        if self._device != latents.device:
            self.network.to(latents.device)
            self._device = latents.device
        height, width = latents.shape[2:]
        at_once = max(1, PIXELS_AT_ONCE // (height * width * self.up**2))
        with _without_autocast(latents.device.type):
            parts = [self.network(part) for part in latents.float().split(at_once)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def latent_channels(pipeline: Any) -> int:
    """C of the pipeline's latents."""
    return int(pipeline.vae.config.latent_channels)


def vae_factor(vae: Any) -> int:
    """Pixels for each latent along a side, of a diffusers autoencoder."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def digest_of(state: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of named weights, in the order of their names."""
    digest = hashlib.sha256()
    for key, value in sorted(state):
        digest.update(f"{key} {tuple(value.shape)}\0".encode())
        flat = value.detach().cpu().flatten().contiguous()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def digests(vae: Any) -> dict[str, str]:
    """SHA-256 of what a VAE decodes with: its weights and its scale, at two precisions.

    One model is published as float32 and float16 files and runs as either or as bfloat16. Rounded
    to one precision they are the same bytes, so two VAEs are one if any of these digests agrees.
    """
    config = vae.config
    scale = [config.get(key) for key in ("scaling_factor", "shift_factor")]
    scale += [config.get(key) for key in ("latents_mean", "latents_std")]
    state = sorted(vae.state_dict().items())
    found = {}
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        digest = hashlib.sha256(json.dumps(scale).encode())
        for key, value in state:
            if key.partition(".")[0] not in ENCODING_PARTS:
                rounded = value.detach().cpu().to(dtype).flatten().contiguous()
                digest.update(f"{key} {tuple(value.shape)}\0".encode())
                digest.update(rounded.view(torch.uint8).numpy())
        found[name] = digest.hexdigest()
    return found


def _without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    # The meta device, on which FLOPs are counted, knows no autocast.
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)

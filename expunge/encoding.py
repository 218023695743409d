"""Pictures as latents x_0: the counterpart of `decoding`, by the model's own VAE."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def to_latents(vae: Any, shape: tuple[int, int, int], pictures: Iterable[Tensor]) -> Tensor:
    """x_0 (N, C, h, w), float32 on the CPU, of N pictures (3, H, W) in [-1, 1] of any size.

    Each is scaled to cover the model's own size, and what stands out is cut off on both sides; the
    mean of what the VAE says, so that nothing is drawn. It says so in float32 whatever it is kept
    in: SDXL's overflows in float16, and bfloat16 leaves eight bits of a latent.

    Args:
        vae: The model's autoencoder; it is as it was afterwards.
        shape: (C, h, w) of its latents.
        pictures: One or more.

    Raises:
        FloatingPointError: A latent is NaN or infinite.
    """
    import torch

    with torch.no_grad(), _in_float32(vae):
        found = torch.cat([_encode(vae, shape, picture) for picture in pictures])
    if not torch.isfinite(found).all():
        raise FloatingPointError("the VAE made latents of NaN or infinities")
    return found


@contextmanager
def _in_float32(vae: Any) -> Iterator[None]:
    """Its weights in float32, and the very same as before again afterwards."""
    import torch

    before = [(part, part.data) for part in chain(vae.parameters(), vae.buffers())]
    try:
        for part, data in before:
            if data.dtype in (torch.float16, torch.bfloat16):
                part.data = data.float()
        yield
    finally:
        for part, data in before:
            part.data = data


def _encode(vae: Any, shape: tuple[int, int, int], picture: Tensor) -> Tensor:
    import torch
    from torch.nn import functional as F

    from expunge.decoding.base import vae_factor

    height, width = (side * vae_factor(vae) for side in shape[1:])
    scale = max(height / picture.shape[1], width / picture.shape[2])
    size = [math.ceil(side * scale) for side in picture.shape[1:]]
    x = F.interpolate(picture[None], size, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    x = x[:, :, top : top + height, left : left + width]
    z: Tensor = vae.encode(x.to(vae.device, vae.dtype)).latent_dist.mode().float().cpu()
    z = z - (vae.config.get("shift_factor") or 0.0)
    if vae.config.get("latents_mean") is not None:  # some SDXL models centre each channel
        μ, σ = (torch.tensor(vae.config[key]) for key in ("latents_mean", "latents_std"))
        z = (z - μ.view(1, -1, 1, 1)) / σ.view(1, -1, 1, 1)
    return z * float(vae.config.scaling_factor)

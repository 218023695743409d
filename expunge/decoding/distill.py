"""Learn a VAE's pictures at the resolution of CLIP: a small network, and a linear map."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.decoding.base import Decoder
from expunge.decoding.distilled import ClipNetwork

WARMUP = 0.05  # part of the steps in which the learning rate rises
CLIP_NORM = 1.0


@dataclass(frozen=True)
class Pairs:
    """Latents and what the VAE makes of them, on the CPU.

    Attributes:
        latents: (N, C, h, w), float32.
        pictures: (N, 3, h·up, w·up), float16: half of the memory, and 60 dB is enough.
        colours: (N, 3, h, w), float16: the picture's mean over each latent.
    """

    latents: Tensor
    pictures: Tensor
    colours: Tensor

    def __len__(self) -> int:
        return len(self.latents)


def least_up(side: int, resolution: int, factor: int) -> int:
    """Pixels for each latent that reach a resolution: the least power of two, at most the VAE's."""
    up = 1
    while side * up < resolution and up < factor:
        up *= 2
    return up


@torch.no_grad()
def decode_pairs(
    exact: Decoder,
    latents: Tensor,
    up: int,
    device: str,
    done: Callable[[int], Any] = lambda n: None,
    batch_size: int = 8,
) -> Pairs:
    """Decode latents (N, C, h, w) and shrink the pictures to what is learnt, antialiased."""
    height, width = latents.shape[2:]
    pictures, colours = [], []
    for part in latents.split(batch_size):
        full = exact(part.to(device))
        small = full
        if full.shape[-2:] != (height * up, width * up):
            small = F.interpolate(
                full, (height * up, width * up), mode="bicubic", antialias=True, align_corners=False
            )
        pictures.append(small.half().cpu())
        colours.append(F.adaptive_avg_pool2d(full, (height, width)).half().cpu())
        done(len(part))
    return Pairs(latents, torch.cat(pictures), torch.cat(colours))


def fit_linear(pairs: Pairs, chunk: int = 64) -> nn.Conv2d:
    """The 1 × 1 convolution min ‖A z + b − colour‖², solved in float64 by its normal equations."""
    channels = pairs.latents.shape[1]
    gram = torch.zeros(channels + 1, channels + 1, dtype=torch.float64)
    right = torch.zeros(channels + 1, 3, dtype=torch.float64)
    for z, colour in zip(pairs.latents.split(chunk), pairs.colours.split(chunk), strict=True):
        rows = z.double().permute(0, 2, 3, 1).reshape(-1, channels)
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], dim=1)
        gram += rows.T @ rows
        right += rows.T @ colour.double().permute(0, 2, 3, 1).reshape(-1, 3)
    solution = torch.linalg.lstsq(gram, right).solution.float()
    linear = nn.Conv2d(channels, 3, 1)
    with torch.no_grad():
        linear.weight.copy_(solution[:-1].T[..., None, None])
        linear.bias.copy_(solution[-1])  # type: ignore[union-attr]
    return linear


def new_network(linear: nn.Conv2d, up: int, width: int, depth: int, seed: int) -> ClipNetwork:
    """A network that begins as the linear decoder; its hidden weights follow from the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = ClipNetwork(linear.in_channels, up, width, depth)
    network.start_from(linear)
    return network


def learn(
    network: ClipNetwork,
    pairs: Pairs,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    device: str = "cpu",
    done: Callable[[float], Any] = lambda loss: None,
) -> list[float]:
    """Minimise L1 + MSE to the VAE's pictures, and return the loss of every step.

    AdamW (arXiv 1711.05101), a cosine after a short rise; every batch follows from the seed.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    network.to(device).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _cosine(step, steps)
        pick = torch.randint(len(pairs), (batch_size,), generator=generator)
        wanted = pairs.pictures[pick].to(device).float()
        got = network(pairs.latents[pick].to(device))
        loss = F.l1_loss(got, wanted) + F.mse_loss(got, wanted)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss of step {step} is NaN; lower the learning rate")
        done(losses[-1])
    network.eval().requires_grad_(False).cpu()
    return losses


@torch.no_grad()
def psnr(decoder: Decoder, latents: Tensor, wanted: Tensor, device: str = "cpu") -> float:
    """10 log10(2² / MSE) in dB over pictures in [-1, 1], all N together."""
    total = 0.0
    for z, picture in zip(latents.split(8), wanted.split(8), strict=True):
        difference = decoder(z.to(device)).cpu() - picture.float()
        total += difference.double().square().sum().item()
    return 10 * math.log10(4 * wanted.numel() / max(total, 1e-30))


def _cosine(step: int, steps: int) -> float:
    rise = max(1, round(WARMUP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

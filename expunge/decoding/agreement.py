"""How far a density can trust a cheap decoder: the same order, the same direction, at which cost.

Never the same pixels: a decoder may be dull and still tell a density all it wants to know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from expunge.decoding.base import Decoder
from expunge.results import Measurement

Z95 = 1.959963984540054
# p_h (B,) of pictures (B, 3, H, W), or a Harm, which carries it.
Density = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Probe:
    """What a density says through one decoder: p_h, (S, N), and ∇_{x̂0} p_h, (S, N, D)."""

    scores: Tensor
    gradients: Tensor

    def stage(self, s: int) -> Probe:
        """The same at one stage of denoising alone, S = 1."""
        return Probe(self.scores[s : s + 1], self.gradients[s : s + 1])


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of decoding one latent, forward, and with its gradient."""

    forward: int
    forward_and_backward: int


def probe(
    decoder: Decoder, density: Density, latents: Tensor, device: str = "cpu", batch_size: int = 8
) -> Probe:
    """p_h(D(x̂0)) and its gradient in x̂0, for latents (S, N, C, h, w).

    Raises:
        FloatingPointError: A score or a gradient is not finite.
    """
    stages, n = latents.shape[:2]
    scores, gradients = [], []
    for part in latents.flatten(0, 1).split(batch_size):
        x0 = part.to(device).requires_grad_()
        with torch.enable_grad():
            harm = density(decoder(x0))
            score: Any = getattr(harm, "score", harm)
            # Samples do not meet: the gradient of the sum is each sample's own.
            (gradient,) = torch.autograd.grad(score.sum(), x0)
        scores.append(score.detach().double().cpu())
        gradients.append(gradient.double().flatten(1).cpu())
    result = Probe(torch.cat(scores).view(stages, n), torch.cat(gradients).view(stages, n, -1))
    if not (torch.isfinite(result.scores).all() and torch.isfinite(result.gradients).all()):
        raise FloatingPointError("the harm density or its gradient is NaN through this decoder")
    return result


def rank_correlation(a: Tensor, b: Tensor, independent: int | None = None) -> Measurement:
    """Spearman's ρ of two lists of N scores, with its 95 % interval; None where all are equal.

    Of stages of the same pictures only the pictures are `independent`: the interval counts those.

    The interval is tanh(atanh ρ ± 1.96 √((1 + ρ²/2) / (N − 3))) (Bonett and Wright, 2000,
    https://doi.org/10.1007/BF02294183).
    """
    n = independent or len(a)
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt((x @ x).item() * (y @ y).item())
    if n < 2 or scale == 0:
        return Measurement(None, None, None, n, higher_is_better=True)
    ρ = (x @ y).item() / scale
    if n < 4 or abs(ρ) >= 1:
        low, high = (-1.0, 1.0) if n < 4 else (ρ, ρ)
        return Measurement(ρ, low, high, n, higher_is_better=True)
    half = Z95 * math.sqrt((1 + ρ * ρ / 2) / (n - 3))
    low, high = math.tanh(math.atanh(ρ) - half), math.tanh(math.atanh(ρ) + half)
    return Measurement(ρ, low, high, n, higher_is_better=True)


def gradient_cosine(a: Tensor, b: Tensor, independent: int | None = None) -> Measurement:
    """Mean cosine of gradients (N, D), with 1.96 standard errors about it.

    `independent` as for `rank_correlation`. A gradient of zero has no direction: it is unknown.
    """
    # √(aa · bb), not √aa √bb: of a vector with itself it is 1 to the bit.
    scale = ((a * a).sum(-1) * (b * b).sum(-1)).sqrt()
    known = scale > 0
    cosine = (a * b).sum(-1)[known] / scale[known]
    n, unknown = len(cosine), int((~known).sum())
    if n == 0:
        return Measurement(None, None, None, 0, higher_is_better=True, unknown=unknown)
    mean = cosine.mean().item()
    n = min(n, independent or n)
    half = Z95 * cosine.std().item() / math.sqrt(n) if n > 1 else 1.0
    low, high = max(-1.0, mean - half), min(1.0, mean + half)
    return Measurement(mean, low, high, n, higher_is_better=True, unknown=unknown)


def count_flops(decoder: Decoder, latent: Tensor) -> Flops:
    """Count the arithmetic of one latent (C, h, w): convolutions and matrix products."""
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        decoder(latent[None])
    x0 = latent[None].clone().requires_grad_()
    with torch.enable_grad(), FlopCounterMode(display=False) as both:
        torch.autograd.grad(decoder(x0).sum(), x0)
    return Flops(forward.get_total_flops(), both.get_total_flops())


def report(
    decoders: Mapping[str, Decoder],
    density: Density,
    latents: Tensor,
    *,
    exact: str = "vae",
    device: str = "cpu",
    batch_size: int = 8,
) -> dict[str, Any]:
    """Every decoder's agreement with the exact one, in plain values for a result file.

    Args:
        decoders: By name; the exact one among them.
        density: A `HarmDensity`, or any function of pictures (B, 3, H, W) to scores (B,).
        latents: Held-out x̂0 at S stages of denoising, (S, N, C, h, w), first stage first.
        exact: The name that the others are compared with.
        device: Where to compute.
        batch_size: Latents at a time.

    Returns:
        Decoder -> rank_correlation, gradient_cosine (all stages together), flops, and the same two
        for each of the stages.
    """
    reference = probe(decoders[exact], density, latents, device, batch_size)
    found = {}
    for name, decoder in decoders.items():
        own = probe(decoder, density, latents, device, batch_size)
        flops = count_flops(decoder, latents[0, 0].to(device))
        found[name] = {
            **_compare(own, reference),
            "flops": flops.forward,
            "flops_with_gradient": flops.forward_and_backward,
            "stages": [_compare(own.stage(s), reference.stage(s)) for s in range(len(latents))],
        }
    return found


def _compare(own: Probe, exact: Probe) -> dict[str, Any]:
    pictures = own.scores.shape[1]
    ρ = rank_correlation(own.scores.flatten(), exact.scores.flatten(), pictures)
    gradients = own.gradients.flatten(0, 1), exact.gradients.flatten(0, 1)
    cosine = gradient_cosine(*gradients, pictures)
    return {"rank_correlation": ρ.to_dict(), "gradient_cosine": cosine.to_dict()}


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1, equal values sharing their mean rank."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks: Tensor = (last - (counts.double() - 1) / 2)[inverse]
    return ranks
